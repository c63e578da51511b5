"""The block map on its own: it may differ from the definition only where rounding decides."""
import pytest
import torch

from comfyui_spargeattn.kernels import BlockMap, BlockShape
from comfyui_spargeattn.kernels.reference import LOG2E
from comfyui_spargeattn.tests.kernels.harness import DEVICE, ON_GPU, tensors

BLOCK = BlockShape(64, 32)
BATCH, HEADS, KV_HEADS, DIM = 2, 2, 1, 16
SCALE = 0.4


def prepared(n_q, n_k, *, seed=0, spread=1.0, padded=False, whole=False):
    """Prepared queries and keys with means and similarities at random: all that the selection reads.

    whole: means of ±1, whose products sum exactly in any order.
    """
    from comfyui_spargeattn.kernels._triton.prepare import PreparedKeys, PreparedQueries
    nq, nk = BLOCK.counts(n_q, n_k)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        x = torch.randn(*shape, generator=generator) * spread
        return (x.sign() if whole else x).to(DEVICE)

    q_similarity, k_similarity = (torch.rand(BATCH, heads, n, generator=generator) for heads, n in
                                  ((HEADS, nq), (KV_HEADS, nk)))
    q_similarity[:, :, 3::5] = -torch.inf  # dense queries
    k_similarity[:, :, 3::11] = -torch.inf  # sinks
    count = torch.full((BATCH, KV_HEADS, nk), BLOCK.k, dtype=torch.int32)
    count[..., -1] = n_k - (nk - 1) * BLOCK.k
    if padded:
        count[..., 1::4], count[..., 2::7] = 0, 5
        count[1] = 0  # nothing to attend
    q = PreparedQueries(quantised=None, scale=None, mean=randn(BATCH, HEADS, nq, DIM),
                        similarity=q_similarity.to(DEVICE), partial=None, sampled=None)
    k = PreparedKeys(quantised=None, scale=None, mean=randn(BATCH, KV_HEADS, nk, DIM),
                     similarity=k_similarity.to(DEVICE), count=count.to(DEVICE), valid=None, pooled=None,
                     pooled_scale=None)
    return q, k


def bounds(queries, keys, *, thresholds, selection, causal, n_q):
    """(must, may, visible, partial): bool (B, H, nq, nk), blocks that every right map keeps, and that some right map
    keeps: a chosen block is one whose better blocks do not reach the target yet, up to rounding of float32."""
    group = HEADS // KV_HEADS
    similarity, count, k_mean = (x.repeat_interleave(group, 1) for x in (keys.similarity, keys.count, keys.mean))
    nq, nk = queries.mean.shape[2], k_mean.shape[2]
    first_row = torch.arange(nq, device=DEVICE)[:, None] * BLOCK.q
    last_row = (first_row + BLOCK.q - 1).clamp(max=n_q - 1)
    first_key = torch.arange(nk, device=DEVICE) * BLOCK.k
    visible = (count > 0)[:, :, None].expand(-1, -1, nq, -1)
    partial = torch.zeros_like(visible)
    if causal:
        visible = visible & (first_key <= last_row)
        partial = visible & (first_key + BLOCK.k - 1 > first_row)
    amount, theta = (x.double()[None, :, None, None] for x in thresholds[:2])
    ruled = visible & ((similarity[:, :, None] < theta) | partial | (queries.similarity[..., None] < theta))
    judged = visible & (similarity[:, :, None] >= theta) & ~partial

    factor = SCALE * LOG2E
    scores = queries.mean.double() @ k_mean.double().mT * factor
    magnitude = (queries.mean.double().abs() @ k_mean.double().abs().mT * factor).amax(-1, keepdim=True)
    rounding = magnitude * (1e-3 if ON_GPU else 2e-6) + 1e-9  # TF32 there
    scores = scores.masked_fill(~judged, -torch.inf)
    if selection == "cdf":
        mass = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)).exp2()
        target, slack = amount * mass.sum(-1, keepdim=True), (1e-5 + rounding) * mass.sum(-1, keepdim=True)
    else:
        mass = judged.double()
        target = (amount * visible.sum(-1, keepdim=True) - 1e-3).ceil().minimum(mass.sum(-1, keepdim=True))
        slack = torch.zeros_like(target)

    def better(margin):
        """Mass of the blocks whose score exceeds a block's own by more than `margin`."""
        return ((scores[..., None, :] > scores[..., :, None] + margin[..., None]) * mass[..., None, :]).sum(-1)

    every = judged & (amount >= 1)
    must = ruled | every | (judged & (better(-rounding) - mass < target - slack))
    may = ruled | every | (judged & (better(rounding) < target + slack))
    return must, may, visible, partial


def check(queries, keys, *, n_q, n_k, selection, causal, amounts, theta=0.3, pooled=True,
          max_undecided=0.1 if ON_GPU else 0.02):
    from comfyui_spargeattn.kernels._triton.blockmap import select_blocks
    thresholds = torch.tensor([amounts, [theta] * HEADS, [0.0] * HEADS], device=DEVICE)
    plain = len(set(amounts)) == 1
    lists = select_blocks(queries, keys, None, scale=SCALE, per_head=None if plain else thresholds,
                          thresholds=[amounts[0], theta, 0.0], selection=selection, causal=causal, n_q=n_q, n_k=n_k,
                          block=BLOCK, pooled=pooled)
    found, lists = lists.public(BLOCK), tensors(lists)
    mask = found.mask()
    must, may, visible, partial = bounds(queries, keys, thresholds=thresholds, selection=selection, causal=causal,
                                         n_q=n_q)
    for what, wrong in (("missing", must & ~mask), ("too many", mask & ~may)):
        assert not bool(wrong.any()), f"{what}: {wrong.sum().item()} blocks, the first at {wrong.nonzero()[0].tolist()}"
    assert bool((mask.any(-1) == visible.any(-1)).all()), "a row without a block"
    undecided = (may & ~must).double().mean().item()
    assert undecided <= max_undecided, f"rounding decides {undecided:.1%} of the blocks: the case tests little"

    assert torch.equal(found.counts, BlockMap.from_mask(mask, BLOCK).counts), "a block is listed twice"
    listed = torch.arange(mask.shape[-1], device=DEVICE) < found.counts[..., None]
    assert torch.equal(found.indices.where(listed, 0), BlockMap.from_mask(mask, BLOCK).indices.where(listed, 0))
    # The entries before the first that needs a mask inside need none; the rest may be masked for nothing.
    count = keys.count.repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None]
    inside = partial | (count < BLOCK.k).expand_as(partial)
    places = (mask.cumsum(-1) - 1).where(mask & inside, mask.shape[-1]).amin(-1)
    assert torch.equal(lists.counts[..., 0], places.minimum(found.counts).int())
    if pooled:
        weight = count.clamp(min=1).log2().expand_as(mask).where(visible & ~mask, -torch.inf)
        torch.testing.assert_close(lists.tail.float(), weight, rtol=2e-3, atol=0)
    else:
        assert lists.tail is None
    return mask


SIZES = [(300, 290), (64, 32), (65, 33), (1, 700), (700, 1), (64, 60_000)] + ([(700, 70_000)] if ON_GPU else [])


@pytest.mark.parametrize("n_q, n_k", SIZES)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("selection", ("cdf", "topk"))
def test_selection(selection, causal, n_q, n_k):
    queries, keys = prepared(n_q, n_k)
    mask = check(queries, keys, n_q=n_q, n_k=n_k, selection=selection, causal=causal, amounts=[0.6] * HEADS)
    assert n_q < 200 or n_k < 200 or (causal and n_q < n_k) or 0.1 < mask.double().mean() < 0.98


@pytest.mark.parametrize("selection", ("cdf", "topk"))
@pytest.mark.parametrize("chunk", (32, 256))
def test_per_head_and_padding(selection, chunk, monkeypatch):
    from comfyui_spargeattn.kernels._triton import blockmap
    monkeypatch.setattr(blockmap, "_CHUNK", chunk)
    queries, keys = prepared(200, 1500, padded=True)
    check(queries, keys, n_q=200, n_k=1500, selection=selection, causal=False, amounts=[0.3, 1.0])


@pytest.mark.parametrize("selection", ("cdf", "topk"))
@pytest.mark.parametrize("spread", (0.03, 1.0, 30.0))
def test_flat_and_steep_rows(selection, spread):
    """From nearly equal scores to a single block that holds all."""
    queries, keys = prepared(200, 500, spread=spread)
    check(queries, keys, n_q=200, n_k=500, selection=selection, causal=False, amounts=[0.5] * HEADS, theta=-1.0,
          pooled=False, max_undecided=1.0 if ON_GPU and spread > 1 else 0.05)  # TF32 decides between steep scores


@pytest.mark.parametrize("selection", ("cdf", "topk"))
def test_equal_scores_are_chosen_together(selection):
    queries, keys = prepared(200, 500, whole=True)
    keys.mean[:] = 1.0
    mask = check(queries, keys, n_q=200, n_k=500, selection=selection, causal=False, amounts=[0.1] * HEADS, theta=-1.0,
                 max_undecided=1.0)
    assert bool(mask.all())


def test_topk_keeps_exactly_its_share():
    queries, keys = prepared(200, 640)
    mask = check(queries, keys, n_q=200, n_k=640, selection="topk", causal=False, amounts=[0.25] * HEADS, theta=-1.0)
    rows = queries.similarity > -torch.inf
    judged = (keys.similarity > -torch.inf).repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None]
    assert bool(((mask & judged).sum(-1)[rows] == 5).all())

"""The block map on its own: it may differ from the definition only where rounding decides."""
import pytest
import torch

from comfyui_spargeattn.kernels import BlockMap, BlockShape, SpargeParams, reference
from comfyui_spargeattn.kernels.reference import Compressed
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE, ON_GPU, map_bounds, tensors

BLOCK = BlockShape(64, 32)
BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 16
SCALE = 0.4


def prepared(n_q, n_k, *, seed=0, spread=1.0, padded=False, ties=False):
    """Prepared queries and keys with means and similarities at random: all that the selection reads."""
    from comfyui_spargeattn.kernels._triton.prepared import PreparedKeys, PreparedQueries
    nq, nk = BLOCK.counts(n_q, n_k)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        x = torch.randn(*shape, generator=generator) * spread
        return (x.sign() if ties else x).to(DEVICE)

    q_similarity, k_similarity = (torch.rand(BATCH, heads, n, generator=generator) for heads, n in
                                  ((HEADS, nq), (KV_HEADS, nk)))
    q_similarity[:, :, 3::5] = -torch.inf  # dense queries
    k_similarity[:, :, 3::11] = -torch.inf  # sinks
    count = torch.full((BATCH, KV_HEADS, nk), BLOCK.k, dtype=torch.int32)
    count[..., -1] = n_k - (nk - 1) * BLOCK.k
    if padded:
        count[..., 1::4], count[..., 2::7] = 0, 5
        count[1] = 0  # nothing to attend
    def only(prepared, **values):
        return prepared(**dict.fromkeys(prepared.__dataclass_fields__) | values)

    return (only(PreparedQueries, mean=randn(BATCH, HEADS, nq, DIM), similarity=q_similarity.to(DEVICE)),
            only(PreparedKeys, mean=randn(BATCH, KV_HEADS, nk, DIM), similarity=k_similarity.to(DEVICE),
                 count=count.to(DEVICE)))


def described(queries, keys):
    """The same as the reference has it, but for the tokens."""
    def compressed(x, valid):
        values = dict(tokens=None, centre=None, valid=valid, mean=x.mean.double(), similarity=x.similarity,
                      always=x.similarity == -torch.inf, bias=torch.zeros_like(valid, dtype=torch.float64))
        return Compressed(**{name: values[name] for name in Compressed.__dataclass_fields__})

    valid = torch.arange(BLOCK.k, device=DEVICE) < keys.count[..., None]
    return (compressed(queries, torch.ones_like(queries.similarity, dtype=torch.bool)[..., None]),
            compressed(keys, valid).map(lambda x: None if x is None else reference._expand_groups(x, HEADS)))


def check(queries, keys, *, n_q, n_k, selection, causal, amounts, thetas=(0.3,), pooled=True,
          max_undecided=0.1 if ON_GPU else 0.02):
    from comfyui_spargeattn.kernels._triton.blockmap import select_blocks
    amount, theta = (torch.tensor(x).expand(HEADS) for x in (amounts, thetas))
    plain = len(amounts) == len(thetas) == 1
    per_head = None if plain else torch.stack([amount, theta, torch.zeros(HEADS)]).to(DEVICE)
    thresholds = [amounts[0], thetas[0], 0.0] if plain else [torch.nan] * 3
    lists = select_blocks(queries, keys, None, scale=SCALE, per_head=per_head, thresholds=thresholds,
                          selection=selection, causal=causal, q_tokens=n_q, block=BLOCK, pooled=pooled)
    found, lists = lists.public(BLOCK), tensors(lists)
    mask = found.mask()
    q, k = described(queries, keys)
    params = SpargeParams(**{"topk" if selection == "topk" else "cdf_threshold": amount}, similarity_threshold=theta)
    rules = reference.visibility(n_q, k, BLOCK, causal)
    visible, partial = rules.visible, rules.partial
    must, may = map_bounds(q, k, rules, params, SCALE)
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
        bits = (lists.skipped[..., None] >> torch.arange(32, device=DEVICE) & 1).flatten(-2)
        assert torch.equal(bits[..., :mask.shape[-1]] != 0, visible & ~mask)
        assert not bool(bits[..., mask.shape[-1]:].any()), "a block that does not exist is skipped"
    else:
        assert lists.skipped is None
    return mask


SIZES = [(300, 290), (64, 32), (65, 33), (1, 700), (700, 1), (64, 20_000)] + ([(700, 70_000)] if ON_GPU else [])


@pytest.mark.parametrize("n_q, n_k", SIZES)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("selection", ("cdf", "topk"))
def test_selection(selection, causal, n_q, n_k):
    queries, keys = prepared(n_q, n_k)
    mask = check(queries, keys, n_q=n_q, n_k=n_k, selection=selection, causal=causal, amounts=[0.6])
    assert n_q < 200 or n_k < 200 or (causal and n_q < n_k) or 0.1 < mask.double().mean() < 0.98


@pytest.mark.parametrize("selection", ("cdf", "topk"))
@pytest.mark.parametrize("chunk, resident", [(32, 32), (256, 512)])
def test_per_head_and_padding(selection, chunk, resident, monkeypatch):
    from comfyui_spargeattn.kernels._triton import blockmap
    monkeypatch.setattr(blockmap, "_CHUNK", chunk)
    monkeypatch.setattr(blockmap, "_SEARCHED", chunk)
    monkeypatch.setattr(blockmap, "_RESIDENT", resident)
    queries, keys = prepared(1000, 1500, padded=True, spread=2.0)
    check(queries, keys, n_q=1000, n_k=1500, selection=selection, causal=False, amounts=[0.3, 1.0, 0.8, 0.5],
          thetas=[0.3, 0.3, 0.8, -1.0])


@pytest.mark.parametrize("selection", ("cdf", "topk"))
@pytest.mark.parametrize("spread", (0.03, 1.0, 30.0))
def test_flat_and_steep_rows(selection, spread):
    """From nearly equal scores to a single block that holds all."""
    queries, keys = prepared(200, 500, spread=spread)
    check(queries, keys, n_q=200, n_k=500, selection=selection, causal=False, amounts=[0.5], thetas=[-1.0],
          pooled=False, max_undecided=1.0 if ON_GPU and spread > 1 else 0.05)  # TF32 decides between steep scores


@pytest.mark.parametrize("selection", ("cdf", "topk"))
def test_equal_scores_are_chosen_together(selection):
    queries, keys = prepared(200, 500, ties=True)  # sums that are exact in every order
    keys.mean[:] = 1.0
    mask = check(queries, keys, n_q=200, n_k=500, selection=selection, causal=False, amounts=[0.1], thetas=[-1.0],
                 max_undecided=1.0)
    assert bool(mask.all())


@pytest.mark.parametrize("selection, amounts", [("cdf", [0.999]), ("topk", [0.9])])
def test_values_whose_mean_parts_one_from_the_rest(selection, amounts):
    """Each score is many times the next one, so that halving has to end the search."""
    queries, keys = prepared(64, 32 * 110)
    queries.similarity[:] = keys.similarity[:] = 1.0
    queries.mean[:], keys.mean[:] = 0.0, 0.0
    queries.mean[..., 0] = 1.0 / SCALE
    steps = torch.arange(keys.mean.shape[2], device=DEVICE, dtype=torch.float32)
    keys.mean[..., 0] = -0.06 * steps if selection == "cdf" else 1e-8 * 1.5 ** steps
    mask = check(queries, keys, n_q=64, n_k=32 * 110, selection=selection, causal=False, amounts=amounts, thetas=[-1.0],
                 max_undecided=(0.4 if ON_GPU else 0.05) if selection == "cdf" else 1.0)  # the largest score's rounding
    assert selection == "cdf" or bool((mask.sum(-1) == 99).all())


def test_topk_keeps_exactly_its_share():
    queries, keys = prepared(200, 640)
    mask = check(queries, keys, n_q=200, n_k=640, selection="topk", causal=False, amounts=[0.25], thetas=[0.9])
    rows = queries.similarity > -torch.inf
    judged = (keys.similarity > -torch.inf).repeat_interleave(HEADS // KV_HEADS, 1)[:, :, None]
    assert bool(((mask & judged).sum(-1)[rows] == 5).all())


def test_topk_rounds_up_no_further():
    """0.6 · 25 is a little more than 15 in float32."""
    queries, keys = prepared(64, 800)
    keys.similarity[:] = queries.similarity[:] = 1.0
    assert (torch.tensor(0.6) * 25).ceil() == 16
    mask = check(queries, keys, n_q=64, n_k=800, selection="topk", causal=False, amounts=[0.6])
    assert bool((mask.sum(-1) == 15).all())

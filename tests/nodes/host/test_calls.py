"""ComfyUI's attention calling convention, called as its models call it, from inside a sampling run."""
import random
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import checkpoints
import pytest
import torch
from sampling import apply, condition, probed, relative_l1, sample

TOKENS = 640
BOUND = 0.02 if not torch.cuda.is_available() else 0.06
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


@pytest.fixture(scope="module")
def wan(comfy_nodes, tmp_path_factory):
    return checkpoints.written(checkpoints.FAMILIES["wan"], tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def in_sampling(comfy_nodes, wan):
    """Calls `body(attention, transformer_options, probe)` where the diffusion model would run; returns its result.

    `attention` is ComfyUI's PyTorch attention, `probe` the override below ours: what we decline reaches it.
    """
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy.patcher_extension import WrappersMP

    def run(body, **widgets):
        below, probe = probed(wan)
        patched = apply(comfy_nodes, below, **widgets)
        results = []

        def stand_in(executor, x, *args, **kwargs):
            options = kwargs.get("transformer_options") or next(arg for arg in args if isinstance(arg, dict))
            results.append(body(attention_pytorch, options, probe))
            return torch.zeros_like(x)

        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "stand_in", stand_in)
        sample(patched, checkpoints.FAMILIES["wan"], steps=1)
        return results[0]

    return run


def tensors(batch, heads, kv_heads, tokens, head_dim, *, split, seed=0):
    """q, k, v: (B, H, L, D) where `split`, else (B, L, H * D)."""
    generator = torch.Generator().manual_seed(seed)

    def make(count):
        x = torch.randn(batch, count, tokens, head_dim, generator=generator).to(DEVICE, DTYPE)
        return x if split else x.transpose(1, 2).reshape(batch, tokens, -1)

    return make(heads), make(kv_heads), make(kv_heads)


def check(in_sampling, qkv, *args, goes_dense=False, **kwargs):
    """Compare a call with the node against the same call without; the probe tells whether it went sparse."""

    def body(attention, options, probe):
        expected = attention(*qkv, *args, **kwargs)
        probe.calls.clear()
        actual = attention(*qkv, *args, **kwargs, transformer_options=options)
        return expected, actual, len(probe.calls)

    expected, actual, declined = in_sampling(body)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if goes_dense:
        assert declined == 1 and torch.equal(actual, expected)
    else:
        assert declined == 0 and relative_l1(actual, expected) <= BOUND


@pytest.mark.parametrize("skip_output_reshape", (False, True))
@pytest.mark.parametrize("skip_reshape", (False, True))
def test_layouts(in_sampling, skip_reshape, skip_output_reshape):
    qkv = tensors(2, 3, 3, TOKENS, 64, split=skip_reshape)
    check(in_sampling, qkv, 3, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)


def test_heads_by_keyword(in_sampling):
    check(in_sampling, tensors(1, 2, 2, TOKENS, 64, split=False), heads=2)


def test_everything_positional(in_sampling):
    """mask, attn_precision, skip_reshape and skip_output_reshape in their places."""
    check(in_sampling, tensors(1, 2, 2, TOKENS, 64, split=True), 2, None, None, True, True)


@pytest.mark.parametrize("split", (False, True))
def test_grouped_queries(in_sampling, split):
    check(in_sampling, tensors(1, 6, 2, TOKENS, 64, split=split), 6, skip_reshape=split, enable_gqa=True)


def test_value_with_split_heads_beside_flat_queries(in_sampling):
    q, k, v = tensors(1, 2, 2, TOKENS, 64, split=False)
    check(in_sampling, (q, k, v.reshape(1, TOKENS, 2, 64)), 2)


def test_strided_views(in_sampling):
    """q, k and v cut from one projection, as single-stream blocks pass them."""
    projected = torch.randn(1, TOKENS, 3, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    check(in_sampling, projected.permute(2, 0, 3, 1, 4).unbind(0), 2, skip_reshape=True)


def test_scale(in_sampling):
    check(in_sampling, tensors(1, 2, 2, TOKENS, 64, split=False), 2, scale=0.3)


@pytest.mark.parametrize("positional", (False, True))
def test_key_padding_mask(in_sampling, positional):
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool, device=DEVICE)
    mask[0, ..., 500:] = False
    qkv = tensors(2, 2, 2, TOKENS, 64, split=True)
    args, kwargs = ((2, mask), {}) if positional else ((2,), {"mask": mask})
    check(in_sampling, qkv, *args, skip_reshape=True, **kwargs)


def test_general_mask_goes_dense(in_sampling):
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=DEVICE).tril()
    check(in_sampling, tensors(1, 2, 2, TOKENS, 64, split=True), 2, causal, skip_reshape=True, goes_dense=True)


@pytest.mark.parametrize("shape", ((1, 1, TOKENS), (2, 1, TOKENS), (1, TOKENS), (2, 1, 1, TOKENS)))
def test_additive_mask_over_keys(in_sampling, shape):
    """Biases of a few, and padding as the lowest value of the dtype."""
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    bias[..., 500:] = torch.finfo(DTYPE).min
    check(in_sampling, tensors(2, 2, 2, TOKENS, 64, split=True), 2, bias, skip_reshape=True)


def test_additive_mask_over_queries_goes_dense(in_sampling):
    bias = torch.zeros(1, TOKENS, TOKENS, device=DEVICE, dtype=DTYPE)
    bias[:, :, 500:] = -1e4
    check(in_sampling, tensors(1, 2, 2, TOKENS, 64, split=True), 2, bias, skip_reshape=True, goes_dense=True)


@pytest.mark.parametrize("strength", (1.0, 0.5))
@pytest.mark.parametrize("name", ("ltxv", "ltx2"))
def test_guides_of_ltx(comfy_nodes, tmp_path, name, strength):
    """Where a guide is to count more or less than the clip, the model asks for attention in full precision, with the
    guide's queries apart from the others."""
    family = replace(checkpoints.FAMILIES[name], latent=(1, 128, 4, 16, 18))
    checkpoints.write(family, tmp_path / "model.safetensors")
    model = checkpoints.load(family, tmp_path / "model.safetensors", None)
    places = torch.cartesian_prod(torch.arange(1.0), torch.arange(16.0), torch.arange(18.0)).T * 32
    positive = condition(family)
    positive[0][1].update(keyframe_idxs=places[None, ..., None].repeat(1, 1, 1, 2), guide_attention_entries=[
        {"pre_filter_count": 16 * 18, "strength": strength, "pixel_mask": None, "latent_shape": None}])
    mask = torch.ones(1, 1, 4, 16, 18)
    mask[:, :, 3:] = 0
    dense = sample(model, family, positive=positive, noise_mask=mask)
    patched = apply(comfy_nodes, model)
    assert relative_l1(sample(patched, family, positive=positive, noise_mask=mask), dense) <= BOUND
    summary = patched.model_options["transformer_options"]["optimized_attention_override"].run.summary
    assert summary.sparse == (2 * family.calls if strength == 1 else 0)
    assert strength == 1 or summary.dense["cross-attention"] >= 2 * 2 * family.calls


def test_model_that_refuses_low_precision_goes_dense(in_sampling):
    check(in_sampling, tensors(1, 2, 2, TOKENS, 64, split=False), 2, low_precision_attention=False, goes_dense=True)


def test_cross_attention_goes_dense(in_sampling):
    q = tensors(1, 2, 2, TOKENS, 64, split=False)[0]
    check(in_sampling, (q, *tensors(1, 2, 2, 77, 64, split=False)[1:]), 2, goes_dense=True)


def test_head_dim_above_the_kernels_limit_goes_dense(in_sampling):
    check(in_sampling, tensors(1, 1, 1, TOKENS, 264, split=True), 1, skip_reshape=True, goes_dense=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="the limit of the eager path holds on a CPU")
def test_more_tokens_than_the_eager_path_serves_go_dense(in_sampling):
    check(in_sampling, tensors(1, 1, 1, 16385, 8, split=True), 1, skip_reshape=True, goes_dense=True)


class Owner:
    """An override that takes containers, as ComfyUI's INT8 attention does: each tensor has to be free once it is let go
    of."""

    def __init__(self):
        self.freed = []

    def __call__(self, func, *args, **kwargs):
        raise AssertionError("the containers were opened")

    def container_function(self, q, k, v, heads, *args, **kwargs):
        for container in (q, k, v):
            tensor = container.take()
            gone = weakref.ref(tensor)
            shape = tensor.shape
            del tensor
            self.freed.append(gone() is None)
        return torch.zeros(shape[0], shape[2], shape[1] * shape[3], device=DEVICE, dtype=DTYPE)


@pytest.mark.parametrize("tokens, declined", ((TOKENS, 0), (256, 1)))
@pytest.mark.parametrize("previous", ("an override for tensors", "none", "an override for containers"))
def test_containers(in_sampling, tokens, declined, previous):
    """Single-owner tensors: empty in the end, and a call that stays dense goes where any other would, unopened."""
    from comfy.ldm.modules.attention import AttentionTensorContainer, optimized_attention

    qkv = tensors(1, 2, 2, tokens, 64, split=True)
    owner = Owner()

    def body(attention, options, probe):
        override = options["optimized_attention_override"]
        if previous != "an override for tensors":
            override.previous = None if previous == "none" else owner
        expected = attention(*qkv, 2, skip_reshape=True)
        containers = [AttentionTensorContainer(x.clone()) for x in qkv]
        probe.calls.clear()
        actual = optimized_attention(*containers, 2, skip_reshape=True, transformer_options=options)
        return expected, actual, len(probe.calls), [container.tensor for container in containers]

    expected, actual, calls, left = in_sampling(body)
    assert left == [None, None, None]
    if declined and previous == "an override for containers":
        assert owner.freed == [True] * 3 and not actual.any()
    else:
        assert calls == (declined if previous == "an override for tensors" else 0) and owner.freed == []
        assert relative_l1(actual, expected) <= BOUND


def test_threads_do_not_share_state(in_sampling):
    """ComfyUI's multi-GPU workers call from several threads at once."""
    calls = [tensors(1, 2, 2, TOKENS, 64, split=False, seed=seed) for seed in range(4)]

    def body(attention, options, probe):
        def one(qkv):
            with torch.inference_mode():
                return attention(*qkv, 2, transformer_options=dict(options))

        sequential = [one(qkv) for qkv in calls]
        with ThreadPoolExecutor(4) as pool:
            return sequential, list(pool.map(one, calls))

    sequential, concurrent = in_sampling(body, selection={"selection": "topk", "keep_percent": 30.0,
                                                          "similarity_threshold": -1.0})
    assert all(map(torch.equal, sequential, concurrent))


def test_any_shape(in_sampling):
    """Whatever the shapes and flags: the answer is that of dense attention, in its shape and dtype."""

    def body(attention, options, probe):
        rng = random.Random(0)
        for _ in range(40):
            batch, kv_heads, groups = rng.randint(1, 2), rng.randint(1, 3), rng.randint(1, 3)
            tokens, head_dim = rng.randint(512, 700), rng.choice((8, 40, 64, 72, 96, 128, 160))
            split, skip_output_reshape = rng.random() < 0.5, rng.random() < 0.5
            heads = kv_heads * groups
            qkv = tensors(batch, heads, kv_heads, tokens, head_dim, split=split)
            flags = {"skip_reshape": split, "skip_output_reshape": skip_output_reshape, "enable_gqa": groups > 1}
            expected = attention(*qkv, heads, **flags)
            actual = attention(*qkv, heads, **flags, transformer_options=options)
            assert actual.shape == expected.shape and actual.dtype == expected.dtype
            assert relative_l1(actual, expected) <= BOUND

        return len(probe.calls)

    assert in_sampling(body) == 0

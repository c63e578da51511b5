"""A call that owns its tensors, as MiniMax-H3 hands them over, takes less memory than dense attention."""
import pytest
import torch
import torch.nn.functional as F

from comfyui_spargeattn.kernels import SpargeParams, block_map, sparge_attention
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.tests.gpu.device import needs_gpu
from comfyui_spargeattn.tests.kernels._triton.harness import PV_FORMATS
from comfyui_spargeattn.tests.nodes.stand_ins import Container

pytestmark = needs_gpu
HEADS, DIM = 56, 128
PARAMS = SpargeParams(topk=0.2)


def as_the_model_makes_them(tokens):
    """q, k, v (1, H, N, D): q and k are parts of one product, of which v is a copy."""
    torch.manual_seed(0)
    product = torch.randn(tokens, 3 * HEADS * DIM, dtype=torch.bfloat16, device="cuda")
    q, k, v = (x.unflatten(-1, (HEADS, DIM)) for x in product.split(HEADS * DIM, -1))
    return [x.transpose(0, 1)[None] for x in (q, k, v.clone(memory_format=torch.contiguous_format))]


def apart(tokens):
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, tokens, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(3)]


def peak(attend, made, tokens):
    """Bytes that a call takes beside its inputs at the most, and its result. attend: gets their containers."""
    containers = [Container(x) for x in made(tokens)]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(containers)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, out


def dense(containers):
    """As ComfyUI's attention with torch's."""
    q, k, v = (container.take() for container in containers)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def ours(pv_dtype, skipped="drop"):
    override = SpargeOverride(NodeSettings(PARAMS, start_percent=0.0, pv_dtype=pv_dtype, skipped=skipped))

    def attend(containers):
        out = override(dense_instead, *containers, HEADS, skip_reshape=True, transformer_options={})
        assert not any(container.tensor is not None for container in containers)
        return out

    return attend


def dense_instead(*args, **kwargs):
    raise AssertionError("the call stayed dense")


@pytest.mark.parametrize("pv_dtype", PV_FORMATS)
@pytest.mark.parametrize("tokens", (37740, 104050))
@pytest.mark.parametrize("made", (as_the_model_makes_them, apart), ids=lambda made: made.__name__)
def test_below_dense_attention(made, tokens, pv_dtype):
    of_dense, out = peak(dense, made, tokens)
    result = out.nbytes
    assert of_dense >= result
    del out
    for skipped in ("drop", "pooled"):
        taken, out = peak(ours(pv_dtype, skipped), made, tokens)
        assert out.shape == (1, tokens, HEADS * DIM) and out.is_contiguous()
        q, k, v = made(tokens)
        expected = sparge_attention(q, k, v, params=PARAMS, pv_dtype=pv_dtype, skipped=skipped, impl="triton")
        assert torch.equal(out, expected.transpose(1, 2).flatten(2))
        assert taken < of_dense, f"{taken / result:.3f} of the result, dense attention {of_dense / result:.3f}"
        if made is as_the_model_makes_them:  # otherwise the result has to be copied into another layout
            assert taken < 0.8 * result, f"{taken / result:.3f} of the result"
        del q, k, v, out, expected


def test_a_map_fits_beside_it():
    """A report predicts it again while q, k and the result are there."""
    q, k, _ = as_the_model_makes_them(37740)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block_map(q, k, params=PARAMS, impl="triton")
    assert torch.cuda.max_memory_allocated() - before < 0.85 * q.nbytes


def test_short_memory_leaves_the_containers_full():
    """Then the model's own attention has to take the call."""
    containers = [Container(x) for x in as_the_model_makes_them(37740)]
    asked = []

    def dense_after_all(q, k, v, *args, **kwargs):
        asked.append([x.peek() for x in (q, k, v)])
        return asked[-1][0]

    before = containers[2].peek().clone()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        override = SpargeOverride(NodeSettings(PARAMS, start_percent=0.0))
        override(dense_after_all, *containers, HEADS, skip_reshape=True, transformer_options={})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(asked) == 1 and torch.equal(asked[0][2], before)

"""The gate that an output has to pass before it is timed."""
import pytest

from comfyui_spargeattn.kernels import SpargeParams, block_map, sparge_attention
from comfyui_spargeattn.tests.bench.measure import gate_error
from comfyui_spargeattn.tests.cases import drifting_qkv

QUARTER = SpargeParams(topk=0.25)


@pytest.mark.parametrize("skipped, other", (("drop", "pooled"), ("pooled", "drop")))
def test_gate(skipped, other):
    """It passes what attends the chosen blocks, and tells a tail from none; the last block is not full."""
    q, k, v = drifting_qkv(1, 2, 600, 32)
    q = q / 4  # the weights spread, so that what is skipped matters
    chosen = block_map(q, k, params=QUARTER)
    out = sparge_attention(q, k, v, params=QUARTER, skipped=skipped)
    assert gate_error(out, q, k, v, chosen, skipped) < 1e-5
    assert gate_error(out, q, k, v, chosen, other) > 0.03
    assert gate_error(out, q, k, v, None) > 0.03

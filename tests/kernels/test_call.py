"""What a call's thresholds decide about its preparation."""
import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.kernels.call import CallSpec, Thresholds
from comfyui_spargeattn.nodes.call.plan import STRICT


@pytest.mark.parametrize("params, mixes", [
    (SpargeParams(cdf_threshold=1.0), True), (SpargeParams(topk=1.0), True), (SpargeParams(cdf_threshold=STRICT), True),
    (SpargeParams(cdf_threshold=0.995), False), (SpargeParams(topk=0.999), False),
    (SpargeParams(cdf_threshold=torch.ones(2)), False)], ids=lambda x: str(getattr(x, "amount", x)))
def test_channels_are_mixed_where_rounding_is_most_of_the_error(params, mixes):
    call = CallSpec(Thresholds.of(params, torch.device("cpu")))
    assert call.mixing_groups(128) == (8 if mixes else 1)
    assert call.mixing_groups(96) == call.mixing_groups(16) == 1
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    assert CallSpec(call.thresholds, block_mask=mask).mixing_groups(128) == 1


@pytest.mark.parametrize("params, judges", [
    (SpargeParams(cdf_threshold=0.9, similarity_threshold=0.3), True),
    (SpargeParams(cdf_threshold=0.9, similarity_threshold=-0.99), True),
    (SpargeParams(cdf_threshold=0.9, similarity_threshold=-1.0), False),
    (SpargeParams(topk=0.5, similarity_threshold=0.3), False),  # which keeps a fixed share
    (SpargeParams(cdf_threshold=0.9, similarity_threshold=torch.tensor([-1.0, 0.5])), True)],
    ids=lambda x: str(getattr(x, "similarity_threshold", x)))
def test_similarity_is_found_where_it_can_keep_a_block(params, judges):
    call = CallSpec(Thresholds.of(params, torch.device("cpu")))
    assert call.judges_similarity == judges
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    assert not CallSpec(call.thresholds, block_mask=mask).judges_similarity

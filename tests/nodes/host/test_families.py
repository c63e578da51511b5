"""Model families, loaded and sampled by ComfyUI, dense and with the node."""
import checkpoints
import pytest
import torch
from checkpoints import FAMILIES
from sampling import SPARSE, apply, condition, probed, relative_l1, sample

# Relative L1 of the final latent. Tokens of a random model are not alike, so that the similarity judge keeps nearly
# every block: on the CPU only the order of summation differs. On a GPU the products are quantised, and random layers
# carry that error to the end.
CONSERVATIVE_BOUND = 1e-4 if not torch.cuda.is_available() else 0.1


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, comfy_nodes, tmp_path_factory):
    """(family, its ModelPatcher) from a checkpoint written for this run."""
    family = FAMILIES[request.param]
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield family, checkpoints.written(family, tmp_path_factory.mktemp("checkpoints"), monkeypatch)


def test_conservative_thresholds_agree_with_dense(comfy_nodes, loaded):
    family, model = loaded
    before = sample(model, family)
    below, probe = probed(model)  # ours on top of the probe: what we decline reaches it
    patched = sample(apply(comfy_nodes, below), family)
    after = sample(model, family)

    assert torch.equal(before, after), "the unpatched branch changed"
    assert patched.isfinite().all()
    assert probe.declined == [], "calls stayed dense"
    assert relative_l1(patched, before) <= CONSERVATIVE_BOUND


def test_as_many_calls_as_the_family_makes(comfy_nodes, loaded):
    """Guards the test above: the probe counts every call that could be sparse."""
    family, model = loaded
    dense, probe = probed(model)
    sample(dense, family, steps=2)
    assert len(probe.declined) == 2 * family.calls


def test_half_of_the_blocks(comfy_nodes, loaded):
    family, model = loaded
    dense = sample(model, family)
    patched = sample(apply(comfy_nodes, model, selection=SPARSE), family)
    assert patched.isfinite().all()
    # Random weights spread the softmax evenly: what half of the blocks held is missed, and its error stays small.
    assert 1e-3 < relative_l1(patched, dense) < 0.25


def test_guidance_with_conditions_of_different_lengths(comfy_nodes, loaded):
    family, model = loaded
    conditions = {"positive": condition(family), "negative": condition(family, family.context[0] // 2, seed=2)}
    dense = sample(model, family, cfg=4.0, **conditions)
    below, probe = probed(model)
    patched = sample(apply(comfy_nodes, below), family, cfg=4.0, **conditions)
    assert probe.declined == []
    assert relative_l1(patched, dense) <= 2 * CONSERVATIVE_BOUND


def test_batch_of_two(comfy_nodes, loaded):
    family, model = loaded
    if not family.batches:
        pytest.skip("the model takes one sample at a time")
    dense = sample(model, family, batch=2, cfg=4.0)
    patched = sample(apply(comfy_nodes, model), family, batch=2, cfg=4.0)
    assert relative_l1(patched, dense) <= 2 * CONSERVATIVE_BOUND

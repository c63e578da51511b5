"""Which call gets which residual: layers, conditions, windows, batches, memory."""
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from comfyui_spargeattn.kernels import Residual
from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.plan import CallSite
from comfyui_spargeattn.nodes.run import residual_memory
from comfyui_spargeattn.nodes.run.host_memory import HostTier, Memory
from comfyui_spargeattn.nodes.run.residual_memory import SHARE
from comfyui_spargeattn.nodes.run.residuals import ResidualStore
from comfyui_spargeattn.tests.nodes.run.test_host_memory import Eager, Pins

HEADS, TOKENS, DIM = 2, 10, 8
BYTES = HEADS * TOKENS * (DIM + 4)
CPU = torch.device("cpu")
_sparse_evaluations = count(10 ** 6)


def call(*conditions, each=1, window=None, replaced=(), of="dit", tokens=TOKENS):
    q = torch.zeros(each * max(1, len(conditions)), tokens, HEADS, DIM)
    options = {"uuids": list(conditions), "patches_replace": {of: dict.fromkeys(replaced)}}
    if window is not None:
        options["context_window"] = SimpleNamespace(index_list=window)
    return AttentionCall(q, q, q, "BNHD", transformer_options=options)


def site(layer="single:0", doubt=""):
    return CallSite(layer=layer, doubt=doubt)


def store(calls=100):
    """A store with memory for so many residuals of one condition."""
    return ResidualStore(Memory(lambda device: int(calls * BYTES / SHARE)))


def refresh(kept, made, evaluation=1, layer="single:0"):
    """Keep a residual whose scales number the batch entries and tell the evaluation; returns whether it was."""
    keys = kept.keys(made, site(layer))
    if not kept.admits(made, keys, evaluation):
        return False
    batch = made.batch
    residual = Residual.empty((batch, HEADS, made.q_tokens, DIM), torch.device("cpu"))
    residual.scale[:] = torch.arange(batch)[:, None, None] + 100 * evaluation
    kept.put(keys, residual, evaluation)
    return True


def got(kept, asked, layer="single:0", evaluation=None):
    """The numbers of the batch entries that a call gets, by default in an evaluation of its own."""
    evaluation = next(_sparse_evaluations) if evaluation is None else evaluation
    residual = kept.get(kept.keys(asked, site(layer)), asked.q.device, evaluation)
    if residual is None:
        return None
    assert residual.quantised.shape == (asked.batch, HEADS, asked.q_tokens, DIM)
    assert residual.scale.is_contiguous() and residual.quantised.is_contiguous()
    return residual.scale[:, 0, 0].tolist()


def test_conditions_together_and_apart():
    kept = store()
    assert refresh(kept, call("positive", "negative", each=2))
    assert got(kept, call("positive", "negative", each=2)) == [100, 101, 102, 103]
    assert got(kept, call("negative", each=2)) == [102, 103]
    assert got(kept, call("negative", "positive", each=2)) == [102, 103, 100, 101]
    assert refresh(kept, call("negative", each=2), evaluation=2)
    assert got(kept, call("positive", "negative", each=2)) == [100, 101, 200, 201]


def test_whole_batches_are_not_copied():
    kept = store()
    refresh(kept, call("positive", "negative"))
    keys = kept.keys(call("positive", "negative"), site())
    whole, again, last = (kept.get(x, CPU, i) for i, x in enumerate((keys, keys, keys[1:]), 2))
    assert whole.quantised.data_ptr() == again.quantised.data_ptr()
    assert last.scale.data_ptr() == whole.scale[1:].data_ptr()


@pytest.mark.parametrize("other, layer", [
    (call("other"), "single:0"),
    (call("positive"), "single:1"),
    (call("positive", each=2), "single:0"),
    (call("positive", tokens=TOKENS + 1), "single:0"),
    (call("positive", window=[0, 1]), "single:0"),
    (call("positive", replaced=[("double_block", 3)]), "single:0"),
    (call("positive", replaced=[("middle", 0, 0)], of="attn1"), "single:0"),
    (call("positive", "other"), "single:0"),
], ids=("condition", "layer", "batch", "tokens", "window", "replaced", "replaced attention", "one of two"))
def test_nothing_for_what_is_not_the_same(other, layer):
    kept = store()
    refresh(kept, call("positive"))
    assert got(kept, other, layer) is None
    assert got(kept, call("positive")) == [100]


def test_windows_have_their_own():
    kept = store()
    for i, window in enumerate(([0, 1, 2], [2, 3, 4])):
        assert refresh(kept, call("positive", window=window), layer=f"single:{i}") or True
    assert got(kept, call("positive", window=[0, 1, 2]), "single:0") == [100]
    assert got(kept, call("positive", window=[2, 3, 4]), "single:0") is None
    assert got(kept, call("positive", window=[2, 3, 4]), "single:1") == [100]


@pytest.mark.parametrize("made, place", [
    (call("positive"), site(layer=None)),
    (call("positive"), site(doubt="layers were left out")),
    (call(), site()),
    (AttentionCall(*[torch.zeros(3, 4, 2, 8)] * 3, "BNHD", transformer_options={"uuids": ["a", "b"]}), site()),
    (AttentionCall(*[torch.zeros(1, 4, 2, 8)] * 3, "BNHD",
                   transformer_options={"uuids": ["a"], "context_window": object()}), site()),
], ids=("no layer", "doubt", "no conditions", "batch of no conditions", "unknown window"))
def test_what_can_not_be_recognised(made, place):
    assert store().keys(made, place) is None and store().get(None, CPU, 1) is None


def test_the_same_twice_in_one_evaluation_is_never_used():
    """Tiles of a picture come one after another with the same condition and shape."""
    kept = store()
    assert refresh(kept, call("positive"))
    assert not refresh(kept, call("positive"))
    assert got(kept, call("positive")) is None
    assert not refresh(kept, call("positive"), evaluation=2) and got(kept, call("positive")) is None
    assert refresh(kept, call("negative"), evaluation=2)
    assert not refresh(kept, call("both", "both"), evaluation=2)
    kept.clear()
    assert refresh(kept, call("positive"))


def test_the_same_twice_where_the_first_was_not_kept():
    """For want of memory, or because making it failed: the second one's residual is not the first one's."""
    kept = store(calls=0)
    assert not refresh(kept, call("positive"))
    kept.room._limits[CPU] = 1 << 30
    assert not refresh(kept, call("positive")) and got(kept, call("positive")) is None


def test_the_same_twice_between_refreshes_only():
    """As with a guidance that evaluates a condition anew from some step on."""
    kept = store()
    refresh(kept, call("positive"))
    assert got(kept, call("positive"), evaluation=2) == [100]
    assert got(kept, call("positive"), evaluation=3) == [100] and got(kept, call("positive"), evaluation=3) is None
    assert got(kept, call("positive"), evaluation=4) is None and not refresh(kept, call("positive"), evaluation=5)


def test_memory():
    kept = store(calls=3)
    assert refresh(kept, call("positive", "negative"), layer="single:0")
    assert refresh(kept, call("positive"), layer="single:1")
    assert not refresh(kept, call("negative"), layer="single:1")
    assert kept.most_bytes == 3 * BYTES and kept.refused == 1
    # Making one anew takes the place of the old one.
    assert refresh(kept, call("positive", "negative"), evaluation=2, layer="single:0")
    assert got(kept, call("positive", "negative"), "single:0") == [200, 201]
    # Part of an old one keeps all of its memory, until that is needed for new ones.
    assert refresh(kept, call("positive"), evaluation=3, layer="single:0")
    assert got(kept, call("positive"), "single:0") == [300] and got(kept, call("negative"), "single:0") is None


def test_free_memory_is_asked_for_once_a_run():
    asked = []
    kept = ResidualStore(Memory(lambda device: asked.append(device) or 1 << 30))
    for evaluation in range(3):
        refresh(kept, call("positive"), evaluation)
    assert asked == [CPU]
    kept.clear()
    refresh(kept, call("positive"))
    assert len(asked) == 2


def test_what_the_last_refresh_did_not_make_goes():
    """Windows that move on from step to step take the memory of one evaluation."""
    kept = store(calls=2)
    for evaluation in (1, 2, 3):
        for window in ([evaluation], [evaluation + 10]):
            assert refresh(kept, call("positive", window=window), evaluation)
        kept.end_refresh(evaluation)
        assert got(kept, call("positive", window=[evaluation])) == [100 * evaluation]
        assert got(kept, call("positive", window=[evaluation - 1])) is None
    assert kept.most_bytes == 2 * BYTES and kept.refused == 0


def test_dropped():
    kept = store()
    refresh(kept, call("positive"))
    kept.drop(kept.keys(call("positive"), site()))
    assert got(kept, call("positive")) is None


class TieredStore(ResidualStore):
    """A store that takes the CPU for a GPU, and `meta` for the host: with memory for so many residuals in each."""

    def __init__(self, on_gpu, on_host=100, pins=None):
        self.pins, self.stream = pins or Pins(), Eager()
        super().__init__(Memory(lambda device: int((on_gpu if device == CPU else on_host) * BYTES / SHARE),
                                self.pins.pin, self.pins.unpin))

    def _tier(self, device):
        return self._tiers.setdefault(device, HostTier(device, self._memory, self.stream))


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr(residual_memory, "_HOST", torch.device("meta"))


def layers(kept, count, evaluation=1, conditions=("positive",)):
    """Refresh so many layers; returns whether each was kept."""
    return [refresh(kept, call(*conditions), evaluation, f"single:{i}") for i in range(count)]


def test_what_has_no_room_on_the_gpu_lies_in_the_host(monkeypatch):
    kept = TieredStore(on_gpu=5, on_host=4)  # two slots and three residuals
    assert layers(kept, 9) == [True] * 7 + [False] * 2
    assert (kept.most_bytes, kept.refused) == (3 * BYTES, 2) and kept.most_host_bytes == sum(kept.pins.now.values()) > 0
    for evaluation in (1, 2):
        for i in range(7):
            assert got(kept, call("positive"), f"single:{i}") == [100 * evaluation]
        assert got(kept, call("positive"), "single:8") is None
        assert layers(kept, 9, evaluation + 1) == [True] * 7 + [False] * 2
    assert len(kept.pins.now) == 4, "a refresh pins no new memory"
    kept.clear()
    assert not kept.pins.now and kept._tiers == {}


def test_each_is_fetched_while_the_one_before_computes():
    """In the order of the refresh, and from then on in that of the evaluation before."""
    kept = TieredStore(on_gpu=2)
    layers(kept, 6)
    order = [0, 1, 2, 3, 4, 5]
    for missed in (1, 0):  # what comes after the last one is known from the second evaluation on
        before, late = kept.stream.done, 0
        for i in order:
            tier = kept._tiers[CPU]
            wanted = kept._found(kept.keys(call("positive"), site(f"single:{i}")))
            late += all(slot.parts != wanted for slot in tier._slots)
            assert got(kept, call("positive"), f"single:{i}") == [100]
        assert late == missed and kept.stream.done - before == len(order) + missed


def test_another_order_of_layers():
    kept = TieredStore(on_gpu=3)
    layers(kept, 6)
    for i in (3, 3, 0, 5, 5, 2, 1, 4, 0):
        assert got(kept, call("positive"), f"single:{i}") == [100]
    layers(kept, 6, evaluation=2)
    for i in (0, 1, 5, 4):
        assert got(kept, call("positive"), f"single:{i}") == [200]


def test_conditions_in_the_host_together_and_apart():
    kept = TieredStore(on_gpu=4)
    assert layers(kept, 3, conditions=("positive", "negative")) == [True] * 3
    for i in range(3):
        assert got(kept, call("positive", "negative"), f"single:{i}") == [100, 101]
        assert got(kept, call("negative"), f"single:{i}") == [101]
        assert got(kept, call("negative", "positive"), f"single:{i}") == [101, 100]
    assert refresh(kept, call("negative"), 2, "single:1")
    assert got(kept, call("positive", "negative"), "single:1") == [100, 200]


def test_no_room_for_slots_and_none_that_can_be_pinned():
    assert layers(TieredStore(on_gpu=1), 3) == [False] * 3
    kept = TieredStore(on_gpu=5, pins=Pins(most=0))
    assert layers(kept, 4) == [True] * 4  # the fourth is dropped, since that shows after it was admitted
    assert kept.refused == 1 and got(kept, call("positive"), "single:3") is None
    assert layers(kept, 6, 2) == [True] * 5 + [False] and got(kept, call("positive"), "single:4") == [200]


def test_a_gpu_that_is_full():
    """A call that can't get its residual is told so; nothing comes of it if that is for the next call."""
    kept = TieredStore(on_gpu=3)
    layers(kept, 3)  # the first one lies on the GPU
    assert got(kept, call("positive"), "single:2") == [100]

    def full(*args):
        raise torch.OutOfMemoryError("no room")

    kept._tiers[CPU]._next_slot = full
    assert got(kept, call("positive"), "single:0") == [100]
    with pytest.raises(torch.OutOfMemoryError):
        got(kept, call("positive"), "single:1")

"""The decision about the memory of residuals, from what an evaluation before the first refresh counts."""
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.call.plan import NodeSettings
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.run import residual_memory
from comfyui_spargeattn.nodes.run.host_memory import SLOTS, Memory
from comfyui_spargeattn.nodes.run.residual_memory import SHARE, ResidualMemory
from comfyui_spargeattn.tests.nodes.stand_ins import attend, sample

pytestmark = pytest.mark.usefixtures("short_runs_refresh")

GPU, OTHER, HOST = torch.device("cpu", 0), torch.device("cpu", 1), torch.device("meta")  # stand for two GPUs
SIZE = 1000
SETTINGS = NodeSettings(SpargeParams(topk=0.25), start_percent=0.3, min_tokens=64, refreshes=2)
LAYERS, TOKENS, HEADS, DIM = 3, 128, 2, 8
BYTES = HEADS * TOKENS * (DIM + 4)


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr(residual_memory, "_HOST", HOST)


class Room:
    """Memory with so many bytes free, of which idle models hold some more."""

    def __init__(self, free, host=0, idle=0):
        self.bytes, self.idle, self.asked = {GPU: free, OTHER: free, HOST: host}, idle, []

    def make_room(self, device, size):
        self.asked.append((device, size))
        freed = min(size, self.idle)
        self.bytes[device] += freed
        self.idle -= freed

    def memory(self):
        return Memory(self.bytes.__getitem__, make_room=self.make_room)


def decided(room, calls=4, devices=(GPU,), uses_host=False, ambiguous=()):
    """(why there is none, the memory) where an evaluation makes so many calls on each device."""
    memory = ResidualMemory(room.memory())
    for evaluation, made in ((1, 2 * calls), (2, calls)):
        for device in devices:
            for layer in range(made):
                memory.count(((device, layer),), device, SIZE, evaluation)
    return memory.decide(ambiguous, lambda device: uses_host), memory


def bytes_for(calls):
    """Free memory of which residuals of so many calls are allowed."""
    return int(calls * SIZE / SHARE)


def test_all_fit_on_the_gpu():
    room = Room(bytes_for(4))
    why, memory = decided(room)
    assert why == "" and memory.counted == 4 * SIZE and room.asked == []


def test_the_last_evaluation_counts_and_calls_that_get_none_do_not():
    assert decided(Room(bytes_for(4)), calls=5)[0]
    why, memory = decided(Room(bytes_for(4)), calls=5, ambiguous={(GPU, 2)})
    assert why == "" and memory.counted == 4 * SIZE


def test_idle_models_make_room():
    room = Room(bytes_for(3), idle=bytes_for(1))
    why, memory = decided(room)
    assert why == "" and room.asked == [(GPU, bytes_for(1))] and memory.limit(GPU) == 4 * SIZE
    assert decided(Room(bytes_for(3), idle=bytes_for(1) - 2))[0]


def test_what_is_not_on_the_gpu_lies_in_the_host():
    enough = bytes_for(SLOTS + 1)
    assert decided(Room(enough, bytes_for(3)), uses_host=True)[0] == ""
    assert decided(Room(enough, bytes_for(2)), uses_host=True)[0]
    assert decided(Room(bytes_for(SLOTS), bytes_for(4)), uses_host=True)[0] == ""
    assert decided(Room(bytes_for(SLOTS) - 2, bytes_for(100)), uses_host=True)[0], "no room for slots"
    assert decided(Room(enough, bytes_for(100)), uses_host=False)[0]


def test_two_gpus_share_the_host():
    for calls, fits in ((6, True), (5, False)):
        why, memory = decided(Room(bytes_for(SLOTS + 1), bytes_for(calls)), devices=(GPU, OTHER), uses_host=True)
        assert (why == "") == fits and memory.counted == 8 * SIZE


def test_the_reason_names_what_is_needed_and_what_is_allowed():
    room = Room(3 << 20, 1 << 20)
    memory = ResidualMemory(room.memory())
    memory.count(("a",), GPU, 5 << 20, 1)
    assert memory.decide((), lambda device: True) == (
        "they need 5 MiB, and they may take 50% of what is free on the GPU and in the host's memory, which is 2 MiB")


def test_nothing_counted():
    memory = ResidualMemory(Room(0).memory())
    assert memory.decide((), lambda device: True) == "" and memory.counted == 0


def run(free, settings=SETTINGS, idle=0, conditions=1):
    """The summary of ten steps of a model of three layers, what is free, and which evaluations were refreshes."""
    room, refreshes = Room(0, idle=idle), []
    room.bytes = {torch.device("cpu"): free}
    override = SpargeOverride(settings, memory=room.memory())

    def layers(x, t, concat, crossattn, control, options):
        refreshes.append(override.run.refresh.due)
        for layer in range(LAYERS):
            attend({**options, "block_index": layer}, TOKENS)

    def evaluate(options):
        override.names.count(layers, None, None, None, None, None, {**options, "uuids": ["a condition"]})

    sample(override, evaluate, slot=override)
    return override.run.summary, room, refreshes


def test_a_run_takes_what_was_counted(caplog):
    """To the byte, with all that a run has to spare."""
    with caplog.at_level("INFO"):
        summary, room, refreshes = run(int(LAYERS * BYTES / SHARE))
    assert sum(refreshes) == 3 and "no memory" not in summary.residuals and room.asked == []
    assert f"added to {summary.sparse} sparse calls, 0 MiB, 0 MiB counted before" in summary.residuals
    assert "residuals take 0 MiB" in caplog.text


def test_a_run_without_room_has_no_refreshes(caplog):
    with caplog.at_level("INFO"):
        summary, room, refreshes = run(int(LAYERS * BYTES / SHARE) - 2)
    assert refreshes == [False] * 10 and summary.residuals.startswith("none: they need 0 MiB")
    assert "refresh of the residuals" not in summary.dense and len(room.asked) == 1
    assert caplog.text.count("no refreshes: they need 0 MiB") == 1


def test_idle_models_are_unloaded_for_a_run():
    summary, room, refreshes = run(int(LAYERS * BYTES / SHARE) - 2, idle=2)
    assert sum(refreshes) == 3 and room.asked == [(torch.device("cpu"), 2)] and "no memory" not in summary.residuals


def test_without_an_evaluation_before_each_call_is_asked_for(caplog):
    with caplog.at_level("INFO"):
        summary, _, refreshes = run(int(2 * BYTES / SHARE), replace(SETTINGS, start_percent=0.0))
    assert sum(refreshes) == 2 and "no memory for 2:" in summary.residuals and "counted" not in summary.residuals
    assert caplog.text.count("no step comes before the first refresh") == 1

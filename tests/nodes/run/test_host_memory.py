"""Residuals in the host's memory, with a stand-in for a GPU's streams: what is copied when, and into which memory."""
from types import SimpleNamespace

import pytest
import torch

from comfyui_spargeattn.kernels import Residual
from comfyui_spargeattn.nodes.run.host_memory import SLOTS, HostTier, Memory

CPU = torch.device("cpu")
HEADS, TOKENS, DIM = 2, 5, 8


class Stream:
    """Copies as late as it may, in order: when they are waited for."""

    def __init__(self):
        self.queued = []
        self.used = []
        self.done = 0

    def submit(self, copies):
        self.queued.append(copies)
        return self.done + len(self.queued)

    def wait(self, copied):
        while self.done < copied:
            self.queued.pop(0)()
            self.done += 1

    def uses(self, *tensors):
        self.used += tensors

    def finish(self):
        self.wait(self.done + len(self.queued))


class Eager(Stream):
    """Copies as early as it may: when it is told to."""

    def submit(self, copies):
        copies()
        self.done += 1
        return self.done


class Pins:
    """Memory that is pinned at the moment, by address; at most so many bytes."""

    def __init__(self, most=1 << 30):
        self.most = most
        self.now = {}

    def pin(self, tensor):
        assert tensor.data_ptr() % 4096 == tensor.nbytes % 4096 == 0 and tensor.data_ptr() not in self.now
        if sum(self.now.values()) + tensor.nbytes > self.most:
            return False
        self.now[tensor.data_ptr()] = tensor.nbytes
        return True

    def unpin(self, tensor):
        assert self.now.pop(tensor.data_ptr()) == tensor.nbytes


@pytest.fixture(params=(Stream, Eager))
def stream(request):
    return request.param()


def residual(seed, batch=1, tokens=TOKENS):
    return Residual.of(torch.randn(batch, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed)))


def part(whole, first=0, last=1):
    return SimpleNamespace(whole=whole, first=first, last=last)


def same(a, b):
    return torch.equal(a.quantised, b.quantised) and torch.equal(a.scale, b.scale)


def tier_of(stream, pins=None):
    pins = pins or Pins()
    return HostTier(CPU, Memory(pin=pins.pin, unpin=pins.unpin), stream)


def test_layers_one_after_another(stream):
    tier, made = tier_of(stream), [residual(i) for i in range(5)]
    parts = [(part(tier.keep(x)),) for x in made]
    for _ in range(3):
        for i, now in enumerate(parts):
            got = tier.load(now)
            tier.prefetch(parts[(i + 1) % len(parts)])  # must not touch what this call reads
            assert same(got, made[i])
            stream.finish()
            assert same(got, made[i])
    assert tier.device_bytes == made[0].bytes * SLOTS


def test_the_next_is_copied_before_it_is_asked_for():
    stream = Eager()
    tier, made = tier_of(stream), [residual(i) for i in range(4)]
    parts = [(part(tier.keep(x)),) for x in made]
    tier.load(parts[0])
    tier.prefetch(parts[1])
    before = stream.done
    tier.load(parts[1])
    assert stream.done == before
    tier.load(parts[3])  # another one than was expected
    assert stream.done == before + 1


def test_making_one_takes_no_memory_that_a_call_reads(stream):
    tier = tier_of(stream)
    first = residual(0)
    got = tier.load((part(tier.keep(first)),))
    for i in range(4):
        tier.keep(residual(i))
    stream.finish()
    assert same(got, first)


def test_conditions_together_apart_and_from_two_places(stream):
    tier, both, other, on_device = tier_of(stream), residual(0, batch=2), residual(1), residual(2)
    both_kept, other_kept = tier.keep(both), tier.keep(other)
    a, b, c, d = part(both_kept), part(both_kept, 1, 2), part(other_kept), part(on_device)
    assert same(tier.load((b,)), both.batch(1, 2))
    assert same(tier.load((a, b)), both)
    got = tier.load((c, a, d))
    assert all(same(got.batch(i, i + 1), x) for i, x in enumerate((other, both.batch(0, 1), on_device)))
    assert any(x.data_ptr() == on_device.scale.data_ptr() for x in stream.used)


def test_larger_ones(stream):
    tier, made = tier_of(stream), [residual(0), residual(1, tokens=3000), residual(2), residual(3, tokens=50)]
    parts = [(part(tier.keep(x)),) for x in made]
    for i, now in enumerate((*parts, *parts)):
        assert same(tier.load(now), made[i % 4])
        tier.prefetch(parts[(i + 1) % 4])


def test_memory_is_used_again(stream):
    pins = Pins()
    tier = tier_of(stream, pins)
    kept = [tier.keep(residual(i)) for i in range(3)]
    tier.load((part(kept[2]),))
    tier.sweep(kept[2:])
    made = [residual(i) for i in range(10, 12)]
    again = [tier.keep(x) for x in made]
    assert len(pins.now) == 3 and tier.host_bytes == 3 * 4096
    assert all(same(tier.load((part(x),)), y) for x, y in zip(again, made))
    assert same(tier.load((part(kept[2]),)), residual(2))


def test_no_more_can_be_pinned(stream):
    tier = tier_of(stream, Pins(most=4096))
    assert tier.keep(residual(0)) is not None and tier.keep(residual(1)) is None


def test_closed():
    stream, pins = Stream(), Pins()
    tier = tier_of(stream, pins)
    tier.keep(residual(0))
    assert stream.queued and pins.now
    tier.close()
    assert not stream.queued and not pins.now and tier.device_bytes == tier.host_bytes == 0

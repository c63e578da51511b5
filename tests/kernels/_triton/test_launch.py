"""The first launch of a kernel that fails, and formats that the hardware lacks."""
import weakref
from types import SimpleNamespace

import pytest
import torch

from comfyui_spargeattn.kernels import FastPathError
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE


class Kernel:
    """A jitted function whose compilation ends in `error`."""

    def __init__(self, error):
        self.error, self.__name__, self.arg_names = error, "_broken_kernel", []

    def __getitem__(self, grid):
        def run(*arguments, **options):
            raise self.error
        return run


def launch(error):
    from comfyui_spargeattn.kernels._triton.launch import launch
    launch(Kernel(error), (1,), torch.device(DEVICE), inputs={}, outputs={}, sizes={}, constants={}, options={})


@pytest.mark.parametrize("error", (RuntimeError("PassManager::run failed"), TypeError("rank mismatch"),
                                   FileNotFoundError("ptxas")), ids=str)
def test_a_first_launch_that_fails(error):
    with pytest.raises(FastPathError, match="kernel _broken_kernel failed") as raised:
        launch(error)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", (torch.OutOfMemoryError("no room"), KeyboardInterrupt(),
                                   RuntimeError("CUDA error: an illegal memory access was encountered")), ids=str)
def test_what_is_raised_as_it_is(error):
    with pytest.raises(type(error)) as raised:
        launch(error)
    assert raised.value is error


class Compiled:
    """A compiled kernel of Triton's, which notes how it is launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.direct, self.public = [], []

    @property
    def run(self):
        return Launcher(self.direct)

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.public.append((grid, stream, arguments))


class Launcher:
    """As one of Triton's: it ends in `launch`."""

    def __init__(self, given):
        self.launch = lambda *arguments: given.append(arguments)

    def __call__(self, *arguments):
        self.launch(*arguments)


@pytest.mark.parametrize("known", (False, True))
def test_a_repeated_launch_goes_past_a_launcher_that_is_known(known, monkeypatch):
    from comfyui_spargeattn.kernels._triton import launch as module
    monkeypatch.setattr(module, "_KNOWN", known)
    compiled = Compiled()
    start, arguments = module._binder(compiled, (4, 1, 1))([1, None])
    start(9, arguments)
    if known:
        assert compiled.direct == [(4, 1, 1, 9, "function", "metadata", None, None, None, 1, None)]
    else:
        assert compiled.public == [((4, 1, 1), 9, (1, None))] and not compiled.direct


@pytest.mark.parametrize("hook", ("launch_enter_hook", "launch_exit_hook", ""))
@pytest.mark.parametrize("chain", (False, True))
def test_a_profiler_sees_every_launch(hook, chain, monkeypatch):
    """Nothing is repeated while it looks."""
    knobs = pytest.importorskip("triton.knobs")
    from comfyui_spargeattn.kernels._triton import launch as module
    monkeypatch.setattr(module, "_RELAUNCHES", True)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda i: i + 5)))
    for name in ("launch_enter_hook", "launch_exit_hook"):
        calls = [print] if name == hook else []
        monkeypatch.setattr(knobs.runtime, name, SimpleNamespace(calls=calls) if chain else calls and calls[0])
    assert module.current_stream(2) == (None if hook else 7)


def test_a_record_holds_no_memory_of_its_call():
    from comfyui_spargeattn.kernels._triton import launch as module
    if not module.HAS_DESCRIPTORS:
        pytest.skip("this Triton has no descriptors")
    [region] = module.allocate(torch.device("cpu"), ((64, 64), torch.int8))
    described, memory, kept = module.descriptor(region, 64, 64, [16, 64]), weakref.ref(region.memory), []
    recording = SimpleNamespace(launched=lambda *record: kept.append(record))
    address = region.data_ptr()
    module._record(recording, None, [described, address, 3], [(0, address, described), (1, address, None)])
    del region, described
    assert memory() is None
    [(_, arguments, [(_, _, moved), plain])] = kept
    assert arguments == [None, address, 3] and plain == (1, address, None)
    assert moved(4096).base.data_ptr() == 4096 and moved(4096).shape == [64, 64]

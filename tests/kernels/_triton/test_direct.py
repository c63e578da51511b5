"""What launches that go past Triton's launcher hand to the driver. tests/gpu/test_runtime.py launches them."""
import importlib
from types import SimpleNamespace

import pytest
import torch

from comfyui_spargeattn.kernels._triton.direct import direct_launch
from comfyui_spargeattn.kernels._triton.replay import Later

GRID, FUNCTION = (4, 2, 1), 1234
COMMON = dict(num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, warp_size=64, gsan_enabled=False,
              global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
              arg_annotations=b"annotations", kernel_signature=b"signature")
KERNEL = {"x": "*fp16", "y": "tensordesc<int8[16, 64]>", "n": "i32", "BLOCK": "constexpr"}


@pytest.fixture(params=("nvidia", "amd"))
def launcher(request, monkeypatch):
    """Makes launchers of this Triton for a signature, whose driver's function adds what it gets to `given`."""
    import triton

    from comfyui_spargeattn.kernels._triton.launch import _KNOWN
    if not _KNOWN:
        pytest.skip("launches of this Triton go through its launcher")
    module = importlib.import_module(f"triton.backends.{request.param}.driver")
    monkeypatch.setattr(type(triton.runtime.driver), "active", SimpleNamespace(
        allocate_default_profile_scratch=None, utils=None), raising=False)

    def make(signature):
        given = []
        made = object.__new__(module.CudaLauncher if request.param == "nvidia" else module.HIPLauncher)
        made.__dict__.update(COMMON, given=given)
        made.launch = module.wrap_handle_tensordesc(lambda *args: given.append(args), signature, [None])
        return made

    return make


def plain(x):
    """Without what makes the collected and the given arguments differ in form alone."""
    return tuple(plain(item) for item in x) if isinstance(x, (list, tuple)) else x


@pytest.mark.parametrize("described", (False, True))
def test_the_driver_gets_what_the_launcher_gives_it(launcher, described):
    from comfyui_spargeattn.kernels._triton.launch import descriptor
    y = descriptor(torch.zeros(64, 64, dtype=torch.int8), 64, 64, [16, 64])
    signature = KERNEL if described else KERNEL | {"y": "*i8"}
    run = launcher(signature)

    def arguments(x):
        return [FUNCTION, "metadata", None, None, None, x, y if described else 5, 7, 64]

    start, kept = direct_launch(run, *GRID, arguments=arguments(Later(3)))
    assert not run.given, "collecting launched something"
    [place] = [i for i, x in enumerate(kept) if isinstance(x, Later)]
    assert kept[place].number == 3
    kept = kept.copy()
    kept[place] = 4096
    start(9, kept)
    run(*GRID, 9, *arguments(4096))
    direct, usual = run.given
    assert plain(direct) == plain(usual) and "4096" in str(usual)


@pytest.mark.parametrize("kind", ("no launch", "memory of a launch", "nothing handed on"))
def test_launchers_that_are_not_known(kind):
    class Launcher:
        profile_scratch_size = 64 * (kind == "memory of a launch")

        def __call__(self, *args):
            if kind != "nothing handed on":
                self.launch(*args)

    run = Launcher()
    if kind != "no launch":
        run.launch = print
    with pytest.raises((AttributeError, NotImplementedError, StopIteration)):
        direct_launch(run, *GRID, arguments=[FUNCTION])

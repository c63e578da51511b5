"""Which calls the fast kernels take, and what is said of the others."""
import re
import sys

import pytest
import torch

from comfyui_spargeattn.kernels import capability, select_implementation
from comfyui_spargeattn.kernels.capability import Facts, arch_of, pv_format, triton_declines

HALF, BF16 = torch.float16, torch.bfloat16
TAKEN = [("cuda", "sm80", HALF, 128), ("cuda", "sm86", BF16, 64), ("cuda", "sm120", torch.float32, 256),
         ("cuda", "gfx942", BF16, 40), ("cuda", "gfx1100", HALF, 72), ("cuda", "gfx1201", HALF, 8),
         ("xpu", "xpu", BF16, 128), ("cpu", "interpreter", HALF, 128), ("cpu", "interpreter", torch.float32, 1)]


@pytest.mark.parametrize("device, arch, dtype, dim", TAKEN)
def test_taken(device, arch, dtype, dim):
    assert triton_declines(Facts(device, arch, dtype, dim, has_triton=True)) is None


DECLINED = [
    (("cpu", None, HALF, 64, True), ["device", "cpu"]),
    (("mps", None, HALF, 64, False), ["device", "mps"]),
    (("cuda", "sm75", HALF, 64, True), ["sm75", "sm80"]),
    (("cuda", "sm61", HALF, 64, False), ["sm61", "sm80"]),
    (("cuda", "gfx90a", HALF, 64, True), ["gfx90a"]),
    (("cuda", "gfx1030", HALF, 64, True), ["gfx1030"]),
    (("cuda", "sm90", HALF, 64, False), ["not installed", "pip install triton"]),
    (("cuda", "sm90", torch.float64, 64, True), ["float64"]),
    (("cpu", "interpreter", BF16, 64, True), ["interpreter", "bfloat16"]),
    (("cuda", "sm90", HALF, 257, True), ["head_dim", "257", "256"]),
]


@pytest.mark.parametrize("facts, says", DECLINED)
def test_declined(facts, says):
    reason = triton_declines(Facts(*facts))
    assert reason is not None
    for part in says:
        assert part in reason


@pytest.mark.parametrize("platform, package", [("linux", "triton"), ("win32", "triton-windows")])
def test_names_the_package_to_install(platform, package, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    reason = triton_declines(Facts("cuda", "sm90", HALF, 64, has_triton=False))
    assert re.search(rf"pip install {package}[)~]", reason), reason


@pytest.mark.parametrize("arch, expected", [("sm80", "int8"), ("sm86", "int8"), ("sm89", "int8"), ("sm90", "int8"),
                                            ("sm120", "int8"), ("gfx942", "fp16"), ("gfx1100", "fp16"), ("xpu", "fp16"),
                                            (None, "fp16")])
@pytest.mark.parametrize("triton", [None, (3, 4), (3, 9)])
def test_format_of_p_times_v(triton, arch, expected, monkeypatch):
    monkeypatch.setattr(capability, "triton_version", lambda: triton)
    assert pv_format("auto", arch, 128) == expected
    assert pv_format("auto", arch, 64) == ("fp16" if arch == "sm80" else expected)
    assert pv_format("auto", arch, 129) == "fp16"
    assert [pv_format(name, arch, 256) for name in ("int8", "fp16", "fp8")] == ["int8", "fp16", "int8"]


@pytest.mark.parametrize("triton", [(3, 2), (3, 3)])
def test_format_of_p_times_v_where_triton_is_old(triton, monkeypatch):
    monkeypatch.setattr(capability, "triton_version", lambda: triton)
    assert pv_format("auto", "sm89", 128) == "fp16" and pv_format("int8", "sm89", 128) == "int8"


def test_cpu_takes_the_reference():
    name, reason = select_implementation(torch.zeros(1, 1, 4, 64))
    assert name == "reference" and "cpu" in reason


def test_meta_device_has_no_architecture():
    assert arch_of(torch.device("meta")) is None

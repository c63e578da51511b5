"""A benchmark on a machine without fast kernels, and what it says."""
import logging

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from comfyui_spargeattn.kernels.benchmark import Job, Shape, run
from comfyui_spargeattn.kernels.benchmark.__main__ import main

CPU = torch.device("cpu")
SHAPE = Shape("model", 24, 16, 30000, batch=2)


def job(dense=scaled_dot_product_attention, **changed):
    return Job(**{**dict(shape=SHAPE, device=CPU, dense=dense, dense_name="SDPA"), **changed})


def test_without_fast_kernels(tmp_path):
    seen = []
    result = run(job(file=tmp_path / "file"), lambda share, doing: seen.append((share, doing)))
    assert (result.shape.batch, result.shape.heads, result.shape.tokens) == (1, 2, 512)
    assert [row.name for row in result.ours] == ["SpargeAttn, all blocks", *(
        f"SpargeAttn, {share}% of the blocks" for share in (50, 30, 10))]
    assert all(row.ms > 0 for row in (result.dense, *result.ours)) and result.ours[0].error < 1e-3
    assert "nothing to tune" in result.notes[0] and "no kernels for device type cpu" in result.notes[0]
    assert not result.tried and not (tmp_path / "file").exists()
    assert [share for share, _ in seen] == sorted(share for share, _ in seen) and seen[-1] == (1.0, "done")
    text = result.text()
    for wanted in ("model: 2 heads × 512 tokens × 16", f"torch {torch.__version__}", "| SDPA |", result.notes[0]):
        assert wanted in text


def test_wrong_results_end_it():
    result = run(job(lambda q, k, v: -scaled_dot_product_attention(q, k, v)))
    assert [row.ms for row in result.ours] == [None]
    assert "its result is wrong" in result.text()


def test_dense_attention_that_fails_is_named():
    def broken(q, k, v):
        raise NotImplementedError("line\nno kernel | for this")

    result = run(job(broken))
    assert result.dense.ms is None and all(row.ms for row in result.ours)
    assert "| SDPA | not timed: no kernel / for this |" in result.text()


@pytest.mark.parametrize("text", ("CUDA error: an illegal memory access was encountered", "stopped"))
def test_a_broken_device_and_the_user_end_it(text):
    class Stop(BaseException):
        pass

    def dense(q, k, v):
        raise RuntimeError(text) if "CUDA" in text else Stop
    with pytest.raises((RuntimeError, Stop)):
        run(job(dense))


def test_python_command(tmp_path, capsys):
    main(["--custom", "2", "16", "300", "--device", "cpu", "--keep", str(tmp_path / "file"), "--seconds", "5"])
    out, line = capsys.readouterr()
    assert "**custom: 2 heads × 300 tokens × 16**" in out and "| PyTorch's SDPA |" in out
    assert "SpargeAttn, 10% of the blocks" in line
    with pytest.raises(SystemExit):
        main(["--shape", "none"])
    assert logging.getLogger("comfyui_spargeattn").level == logging.NOTSET

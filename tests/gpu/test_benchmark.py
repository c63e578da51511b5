"""The benchmark on a card: it times, keeps what is faster, and later calls take that."""
import time
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from comfyui_spargeattn.kernels import FastPathError, SpargeParams, load_configurations, sparge_attention
from comfyui_spargeattn.kernels._triton import measured
from comfyui_spargeattn.kernels._triton.measured_file import Launch, Measured, read, write
from comfyui_spargeattn.kernels.benchmark import Job, Shape, run
from comfyui_spargeattn.kernels.benchmark.clock import Clock, median_ms
from comfyui_spargeattn.kernels.benchmark.shapes import inputs
from comfyui_spargeattn.kernels.call import CallSpec, Thresholds
from comfyui_spargeattn.kernels.capability import card_name
from comfyui_spargeattn.tests.gpu.device import needs_gpu

pytestmark = needs_gpu
SHAPE = Shape("small", 4, 64, 4000)


@pytest.fixture(autouse=True)
def nothing_measured():
    yield
    measured._use({})


def device():
    return torch.device("cuda", torch.cuda.current_device())


def test_what_is_faster_is_kept_and_taken(tmp_path):
    from comfyui_spargeattn.kernels._triton import pipeline
    file, began = tmp_path / "launch.json", time.monotonic()
    result = run(Job(SHAPE, device(), scaled_dot_product_attention, "SDPA", 8e9, file=file, seconds=60))
    print(result.text())
    assert time.monotonic() - began < 150
    assert result.dense.ms > 0 and all(row.ms > 0 for row in result.ours) and result.ours[0].error < 0.06
    assert sum(row.ms is not None for row in result.tried) >= 2
    assert not any("wrong" in row.problem for row in result.tried)
    q, _, _ = inputs(SHAPE, device(), torch.bfloat16)
    table, kept = result.tried[0].config, list(read(file).values())
    assert (result.faster is None) == (kept == [])
    load_configurations(file)
    assert pipeline._configure(q, "auto")[0] == (result.faster or table)
    # As if a neighbour that was timed had been kept: a later process takes it, with the same result.
    other = result.faster or next(row.config for row in result.tried[1:] if row.ms is not None)
    with measured.trial() as trial:
        pipeline.block_of(q, "auto")
    found = Measured(card_name(q.device), measured.triton_name(), trial.padded_dim, trial.pv_format,
                     table.block.q, table.block.k, Launch.of(table), Launch.of(other), 1.5)
    q, k, v = inputs(SHAPE, device(), torch.bfloat16)
    measured._use({})
    expected = sparge_attention(q, k, v, impl="triton")
    write(file, [found])
    load_configurations(file)
    assert pipeline._configure(q, "auto")[0] == other
    torch.testing.assert_close(sparge_attention(q, k, v, impl="triton"), expected, atol=0.02, rtol=0.02)
    write(file, [replace(found, card="another card")])
    load_configurations(file)
    assert pipeline._configure(q, "auto")[0] == table


def test_a_measured_configuration_that_does_not_start(tmp_path, caplog):
    """The table's takes its place, and the kernels stay on."""
    from comfyui_spargeattn.kernels._triton import pipeline
    q, k, v = inputs(Shape("small", 2, 128, 1000), device(), torch.bfloat16)
    with measured.trial() as trial:
        pipeline.block_of(q, "auto")
        entry, broken = trial.entry, Launch(16, 8, None)  # no card has so much shared memory
        trial.config = measured.put(entry, broken)
        with pytest.raises(FastPathError):
            pipeline.attention(q, k, v, torch.empty_like(q), None, CallSpec(Thresholds.of(SpargeParams(), q.device)))
    found = Measured(card_name(q.device), measured.triton_name(), trial.padded_dim, trial.pv_format,
                     entry.block.q, entry.block.k, Launch.of(entry), broken, 1.5)
    expected = sparge_attention(q, k, v, impl="triton")
    write(tmp_path / "file", [found])
    load_configurations(tmp_path / "file")
    assert torch.equal(sparge_attention(q, k, v, impl="triton"), expected)
    assert sum("the pack's own is taken" in message for message in caplog.messages) == 1


def test_device_time_leaves_out_the_host():
    clock, x = Clock(device()), torch.zeros(1 << 20, device=device())

    def slow_host():
        time.sleep(0.0005)
        x.add_(1)

    quick = median_ms(clock, lambda: x.add_(1), lambda: None)
    assert quick > 0 and median_ms(clock, slow_host, lambda: None) < quick + 0.4

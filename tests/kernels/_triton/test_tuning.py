"""The search for the fastest launch configuration: real kernels, and on a CPU a clock that says what a test planted."""
import pytest
import torch

from comfyui_spargeattn.kernels import BlockShape, FastPathError
from comfyui_spargeattn.kernels._triton import measured
from comfyui_spargeattn.kernels._triton.config import AttendConfig
from comfyui_spargeattn.kernels._triton.measured_file import Launch, read
from comfyui_spargeattn.kernels.benchmark import Job, Shape, run, tuning
from comfyui_spargeattn.kernels.benchmark.result import Result
from comfyui_spargeattn.kernels.benchmark.shapes import inputs
from comfyui_spargeattn.kernels.dense import dense_attention
from comfyui_spargeattn.tests.kernels._triton.harness import DEVICE

SHAPE = Shape("small", 1, 32, 100)
DTYPE = torch.float16


class PlantedClock:
    """Says that calls take 300 ms, so that none is repeated often; those of some (warps, stages) what `times` has."""

    def __init__(self, times=(), step=0.0, of_the_table=lambda i: 300.0):
        self.times, self.step, self.of_the_table, self.now, self.calls = dict(times), step, of_the_table, 0.0, 0

    def seconds(self):
        self.now += self.step
        return self.now

    def ms(self, run):
        run()
        trial = measured._thread.trial
        if trial is None or trial.config is None:
            self.calls += 1
            return self.of_the_table(self.calls)
        return self.times.get((trial.config.warps, trial.config.stages), 330.0)


@pytest.fixture(autouse=True)
def nothing_measured():
    yield
    measured._use({})


@pytest.fixture
def tuner(monkeypatch):
    """Makes tuners whose kernels are `attention`, and whose table has four warps and two stages."""
    from comfyui_spargeattn.kernels._triton import pipeline
    entry = AttendConfig(BlockShape(64, 32), 4, 2)
    monkeypatch.setattr(pipeline, "attend_config", lambda *key: entry)
    qkv = inputs(SHAPE, torch.device(DEVICE), DTYPE)

    def make(clock, attention, tick=lambda share, doing: None, deadlines=(1e9, 1e9)):
        made = tuning.Tuner(qkv, "auto", clock, tick, deadlines)
        made._attention = attention
        return made
    return make


def quick(q, k, v, out, lse, call):
    """In place of the kernels: the mean of V, with a configuration as they would ask for it."""
    from comfyui_spargeattn.kernels._triton import pipeline
    pipeline.block_of(q, "auto")
    out.copy_(v.float().mean(2, keepdim=True).expand_as(v))


def tune(tuner):
    result = Result(SHAPE, DTYPE, {}, True)
    return *tuner.run(result), result


def names(result, problem=""):
    return [row.name for row in result.tried if problem in row.problem and bool(problem) == bool(row.problem)]


def test_the_fastest_is_found(tuner):
    key, found, result = tune(tuner(PlantedClock({(4, 1): 270.0, (8, 3): 280.0}), quick))
    assert key == found.key and key[2:] == (32, result.pv_format)
    assert found.launch == Launch(4, 1, None) and found.fits(result.tried[0].config)
    assert found.gain == result.gain == pytest.approx(300 / 270)
    assert (result.faster.warps, result.faster.stages) == (4, 1) and not result.notes
    assert [row.ms for row in result.tried].count(330.0) == len(result.tried) - 3
    assert "faster than the pack's own" in result.verdict and "(taken)" in result.text()


@pytest.mark.parametrize("clock", (PlantedClock({(4, 1): 297.0}), PlantedClock(),
                                   PlantedClock({(4, 1): 270.0}, of_the_table=lambda i: (300.0, 270.0, 420.0)[i % 3])),
                         ids=("1%", "slower", "noise"))
def test_what_is_no_gain_is_not_taken(tuner, clock):
    _, found, result = tune(tuner(clock, quick))
    assert found is None and result.faster is None and "(taken)" not in result.text()
    assert "no launch configuration is faster" in result.verdict


def test_wrong_and_failing_configurations_are_skipped_and_named(tuner):
    def attention(q, k, v, out, lse, call):
        quick(q, k, v, out, lse, call)
        config = measured._thread.trial.config
        if config is not None and config.stages == 1:
            out.mul_(float("nan") if config.warps == 4 else 1.03)
        if config is not None and config.stages == 4:
            raise FastPathError("kernel failed") from RuntimeError("first line\nout of resource: shared memory")
        if config is not None and config.stages == 3:
            raise torch.OutOfMemoryError("no room")
        if config is not None and config.stages == 2 and call.thresholds.numbers[2] == 20:
            raise FastPathError("the λ test does not compile")

    _, found, result = tune(tuner(PlantedClock({(w, s): 240.0 for w in (4, 8) for s in (1, 2, 3, 4)}), attention))
    assert found is None
    assert names(result, "wrong") == ["4 warps, 1 stage", "8 warps, 1 stage"]
    assert names(result, "out of resource: shared memory") == ["4 warps, 4 stages", "8 warps, 4 stages"]
    assert names(result, "no room") == ["4 warps, 3 stages", "8 warps, 3 stages"]
    assert all(row.name in result.text() and row.problem in result.text() for row in result.tried)


def test_time_is_up(tuner):
    clock = PlantedClock({(4, 1): 270.0}, step=1.0)
    _, found, result = tune(tuner(clock, quick, deadlines=(3.5, 3.5)))
    assert len(result.tried) == 4 and found is not None  # the best of those that were tried
    assert "Time was up, and 4 of 7 launch configurations were not tried" in result.notes[0]


def test_the_user_stops_it(tuner):
    class Stop(BaseException):
        pass

    def tick(share, doing):
        shares.append(share)
        if len(shares) == 30:
            raise Stop

    shares = []
    with pytest.raises(Stop):
        tune(tuner(PlantedClock(), quick, tick))
    assert measured._thread.trial is None and shares == sorted(shares) and shares[-1] < 1


def test_real_kernels_and_what_later_calls_take(tmp_path):
    """Every configuration agrees with the table's; the one that is said to be the fastest is kept and taken."""
    file, shares = tmp_path / "launch.json", []
    job = Job(SHAPE, torch.device(DEVICE), dense_attention, "dense", file=file)
    result = run(job, lambda share, doing: shares.append(share), PlantedClock({(4, 1): 150.0, (8, 1): 270.0}))
    assert not names(result, "wrong"), result.text()
    assert (result.faster.warps, result.faster.stages) == (4, 1) and result.gain == 2
    [kept] = read(file).values()
    assert (kept.launch.warps, kept.launch.stages) == (4, 1)
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0, 1)
    assert result.ours[0].error < 0.05 and [row.problem for row in result.ours] == [""] * 4
    q, k, v = inputs(SHAPE, torch.device(DEVICE), DTYPE)
    from comfyui_spargeattn.kernels._triton import pipeline
    assert pipeline._configure(q, "auto")[0] == result.faster
    # The next benchmark finds nothing to gain, and calls take the table's again.
    again = run(job, clock=PlantedClock())
    assert again.faster is None and read(file) == {} and pipeline._configure(q, "auto")[0] == again.tried[0].config


def test_what_can_not_be_tried_or_kept_is_a_note(tmp_path, monkeypatch):
    """And the rest of the benchmark goes on."""
    job = Job(SHAPE, torch.device(DEVICE), dense_attention, "dense", file=tmp_path / "file")
    monkeypatch.setattr(tuning.Tuner, "run", lambda self, result: (("card", "3.6", 32, "fp16"), None))
    monkeypatch.setattr(measured, "keep", lambda *arguments: (_ for _ in ()).throw(OSError("no room")))
    result = run(job, clock=PlantedClock())
    assert result.notes == ["The launch configuration could not be kept for later runs: no room."]
    monkeypatch.setattr(tuning.Tuner, "run", lambda self, result: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    result = run(job, clock=PlantedClock())
    assert result.notes == ["Launch configurations could not be tried: full."] and len(result.ours) == 4


def test_heads_that_take_long_are_left_out():
    shape = Shape("long", 4, 32, 64)
    result = run(Job(shape, torch.device(DEVICE), dense_attention, "dense", tune=False), clock=PlantedClock())
    assert result.shape.heads == 3 and "long: 4 heads" in result.notes[0]  # 300 ms each, and a second for all

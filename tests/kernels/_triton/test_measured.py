"""Which launch configuration a call takes, given a file of measured ones."""
import json
import threading
import types
from dataclasses import replace

import pytest
import torch

from comfyui_spargeattn.kernels import FastPathError, dispatch, failures, load_configurations
from comfyui_spargeattn.kernels._triton import measured
from comfyui_spargeattn.kernels._triton.config import attend_config
from comfyui_spargeattn.kernels._triton.measured_file import Launch, Measured, write

CPU = torch.device("cpu")
ENTRY = attend_config("sm89", 128, "int8")
ENTRY_BLOCK = ENTRY.block.q, ENTRY.block.k
FASTER = Launch(4, 2, None)
TAKEN = replace(ENTRY, warps=4, stages=2, maxnreg=None)


@pytest.fixture(autouse=True)
def nothing_measured():
    yield
    measured._use({})


def entry_of(card="cpu", triton=None, table=Launch.of(ENTRY)):
    return Measured(card, triton or measured.triton_name(), 128, "int8", *ENTRY_BLOCK, table, FASTER, 1.1)


def loaded(path, *entries):
    write(path, entries)
    load_configurations(path)


def take(padded_dim=128, pv_format="int8", entry=ENTRY):
    return measured.configuration(CPU, entry, padded_dim, pv_format)


def test_calls_take_what_was_measured_for_them(tmp_path):
    assert take() is ENTRY
    loaded(tmp_path / "file", entry_of())
    assert take() == TAKEN and take() is take()
    assert take(padded_dim=64) is ENTRY and take(pv_format="fp16") is ENTRY
    assert take(entry=attend_config("sm90", 128, "int8")) is attend_config("sm90", 128, "int8")
    load_configurations(tmp_path / "no such file")
    assert take() is ENTRY


@pytest.mark.parametrize("foreign", (dict(card="NVIDIA H100"), dict(triton="2.1"), dict(table=Launch(8, 1, None))),
                         ids=str)
def test_what_is_of_another_card_triton_or_version_is_ignored_and_told_once(foreign, tmp_path, caplog):
    caplog.set_level("INFO")
    loaded(tmp_path / "file", entry_of(**foreign))
    assert [take(), take(), take(padded_dim=64)][:2] == [ENTRY, ENTRY]
    assert len(caplog.messages) == 1 and "ignored" in caplog.messages[0]


@pytest.mark.parametrize("data", ("{", "[1, 2]", json.dumps({"format": 1, "configurations": [{}]})))
def test_a_file_that_can_not_be_used_is_ignored_and_told_once(data, tmp_path, caplog):
    (tmp_path / "file").write_text(data)
    load_configurations(tmp_path / "file")
    assert [take(), take()] == [ENTRY, ENTRY]
    assert len(caplog.messages) == 1 and "are ignored" in caplog.messages[0]


def test_what_is_kept_is_taken_at_once_and_after_a_restart(tmp_path):
    path, found = tmp_path / "file", entry_of()
    measured.keep(path, found.key, found)
    assert take() == TAKEN
    measured._use({})
    load_configurations(path)
    assert take() == TAKEN
    measured.keep(path, found.key, None)
    assert take() is ENTRY
    load_configurations(path)
    assert take() is ENTRY


def test_a_trial_is_of_its_thread_alone(tmp_path):
    loaded(tmp_path / "file", entry_of())
    other = []
    with measured.trial() as trial:
        assert take() is ENTRY  # not what was measured before
        trial.config = replace(ENTRY, warps=8, stages=1)
        assert take(pv_format="int8") is trial.config
        assert (trial.entry, trial.padded_dim, trial.pv_format) == (ENTRY, 128, "int8")
        thread = threading.Thread(target=lambda: other.append(take()))
        thread.start()
        thread.join()
    assert other == [TAKEN] and take() == TAKEN


def test_many_threads_take_the_same(tmp_path):
    taken, start = [], threading.Barrier(8)

    def many():
        start.wait()
        for i in range(300):
            taken.append(take())
            if i % 50 == 0:
                load_configurations(tmp_path / "file")

    write(tmp_path / "file", [entry_of()])
    load_configurations(tmp_path / "file")
    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 2400 and set(taken) == {TAKEN}


def test_the_tables_is_taken_again_where_a_measured_one_fails(tmp_path, monkeypatch, caplog):
    """And the kernels stay on."""
    loaded(tmp_path / "file", entry_of())
    calls = []

    def attention(q, k, v, out, lse, call):
        calls.append(take())
        if calls[-1] is not ENTRY:
            raise FastPathError("out of resource: shared memory")

    monkeypatch.setattr(dispatch, "_pipeline", lambda: types.SimpleNamespace(attention=attention))
    monkeypatch.setattr(dispatch, "select_implementation", lambda q: ("triton", None))
    from comfyui_spargeattn.kernels import sparge_attention
    q = torch.zeros(1, 1, 8, 16)
    for _ in range(2):
        sparge_attention(q, q, q)
    assert calls == [TAKEN, ENTRY, ENTRY] and failures.remembered(q) is None
    assert len(caplog.messages) == 1 and "the pack's own is taken" in caplog.messages[0]

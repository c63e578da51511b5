"""The line on the node, without ComfyUI."""
import logging
import threading
from dataclasses import replace

import pytest

from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.report import line as module
from comfyui_spargeattn.nodes.report.line import NodeLine, after_run, while_sampling
from comfyui_spargeattn.nodes.run.summary import CallTimes, RunSummary
from comfyui_spargeattn.tests.nodes.report.reported import SETTINGS, run

SPARSE = RunSummary(20, 480, {"cross-attention": 600, "outside start_percent … end_percent": 120}, sparsity=0.621,
                    skipped=0.5, times=(CallTimes(480, 10.0, 19.0),))


@pytest.mark.parametrize("change,expected", (
    ({}, "62% skipped · attention 1.9 × faster"),
    ({"times": (CallTimes(480, 19.0, 9.5),)}, "62% skipped · attention 2.0 × slower"),
    ({"times": (CallTimes(480, 10.0, None),)}, "62% skipped"),
    ({"times": (), "reference": True}, "62% skipped · CPU reference"),
    ({"times": (), "sparsity": 0.042, "skipped": 0.012}, "1.2% skipped · the log says what to change"),
    ({"times": (), "skipped": 0.01},
     "62% skipped · most attention stayed dense: outside start_percent … end_percent"),
    ({"times": (), "dense": {"out of memory": 2}, "details": {"out of memory": "9 tokens"}},
     "62% skipped · 2 dense: out of memory (9 tokens)"),
    ({"unread": "the run was interrupted"}, "the run was interrupted"),
    ({"sparse": 0}, "nothing sparse: outside start_percent … end_percent"),
    ({"sparse": 0, "dense": {"cross-attention": 9, "fewer tokens than min_tokens": 2},
      "details": {"fewer tokens than min_tokens": "8 < 64"}}, "nothing sparse: fewer tokens than min_tokens (8 < 64)"),
    ({"sparse": 0, "dense": {"listed in dense_blocks": 9, "fast kernels failed": 1}},
     "nothing sparse: fast kernels failed"),
    ({"sparse": 0, "dense": {}, "problem": "no attention call arrived"}, "nothing sparse: no attention call arrived"),
))
def test_after_a_run(change, expected):
    assert after_run(replace(SPARSE, **change)) == expected


def test_while_sampling():
    assert while_sampling(SPARSE) == "step 20 · sparse attention calls: 480"
    assert while_sampling(replace(SPARSE, sparse=0, steps=2)) == (
        "step 2 · nothing sparse yet: outside start_percent … end_percent")
    assert while_sampling(replace(SPARSE, dense={"fast kernels failed": 2})).endswith(
        "480 · 2 dense: fast kernels failed")


def test_run_tells_where_it_is_and_how_it_ended(monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 0)
    shown = []
    override = SpargeOverride(SETTINGS, show=shown.append)
    run(override)
    assert shown[0] == "step 1 · nothing sparse yet: outside start_percent … end_percent"
    assert shown[-2] == "step 10 · sparse attention calls: 14"
    assert shown[-1] == "50% skipped · CPU reference"


def test_few_lines_are_shown(monkeypatch):
    shown, clock = [], [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    line = NodeLine(shown.append)
    for i in range(100):
        clock[0] += 0.01
        line.update(str(i).strip)
    assert shown == ["0", "50"] and not NodeLine(None).update(lambda: 1 / 0)
    line.write(lambda: "the end")
    assert shown[-1] == "the end"


def test_line_that_fails_costs_no_run(caplog):
    override = SpargeOverride(SETTINGS, show=lambda text: 1 / 0)
    with caplog.at_level(logging.DEBUG):
        run(override)
    assert override.run.summary.sparse == 14
    failures = [record for record in caplog.records if "line could not be shown" in record.getMessage()]
    assert failures and all(record.levelno == logging.DEBUG for record in failures)


def test_threads_share_a_line(monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 0)
    shown = []
    line = NodeLine(shown.append)
    threads = [threading.Thread(target=line.update, args=(lambda: "text",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shown == ["text"] * 8

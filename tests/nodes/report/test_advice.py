"""What a report and the log advise."""
from dataclasses import replace

import pytest

from comfyui_spargeattn.kernels import SpargeParams
from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.nodes.report.advice import about_little_skipped
from comfyui_spargeattn.nodes.report.panels import run_report
from comfyui_spargeattn.tests.nodes.report.reported import SETTINGS, panels_of, run


@pytest.mark.parametrize("reason,advice", (
    ("fast kernels failed", "C compiler"), ("out of memory", "smaller"), ("no fast kernel", "triton-windows"),
    ("mask that differs from query to query", "only dense attention"), ("unsupported call", "report it"),
    ("unsupported dtype", "16 bits")))
def test_reasons_have_advice(finished, reason, advice):
    """Faults also where other calls of the run went sparse."""
    dense = replace(finished.run.summary, sparse=0, dense={reason: 3}, details={reason: "what happened"})
    panels = run_report(dense, SETTINGS)
    assert any(advice in note for note in panels.notes)
    assert (f"dense: {reason} (what happened)", 3) in panels.calls
    mixed = run_report(replace(dense, sparse=5), SETTINGS)
    fault = reason in ("fast kernels failed", "out of memory", "unsupported call")
    assert any(advice in note for note in mixed.notes) == fault


@pytest.mark.parametrize("params,wanted,unwanted", (
    (SpargeParams(cdf_threshold=0.99, similarity_threshold=0.5),
     ("lower similarity_threshold (0.5)", "less alike", "lower cdf_threshold (0.99)", "topk", "Tune"), "Lower"),
    (SpargeParams(cdf_threshold=0.99, similarity_threshold=-1.0), ("lower cdf_threshold (0.99)",), "similarity"),
    (SpargeParams(topk=0.98, similarity_threshold=0.5), ("Lower keep_percent (98)",), "similarity")))
def test_little_skipped_is_called_so_with_what_to_change(finished, params, wanted, unwanted):
    settings = replace(SETTINGS, params=params)
    for share, amount in ((0.0, "None"), (0.042, "Only 4.2%")):
        summary = replace(finished.run.summary, sparsity=share, skipped=share)
        panels = run_report(summary, settings)
        assert panels.notes[0].startswith(f"{amount} of the attention was skipped. ") and not panels.failed
        assert all(text in panels.notes[0] for text in wanted) and unwanted not in panels.notes[0]
        assert not any("outside start_percent" in note for note in panels.notes)
        assert panels.headline == f"{'4.2%' if share else 'None'} of the attention skipped (CPU reference)"
    enough = replace(finished.run.summary, sparsity=0.05, skipped=0.05)
    assert not any("was skipped" in note for note in run_report(enough, settings).notes)


def test_little_skipped_because_of_dense_calls_says_which(finished):
    summary = replace(finished.run.summary, skipped=0.01)
    notes = run_report(summary, SETTINGS).notes
    assert notes[0] == "Only 1.0% of the attention was skipped, because most of it stayed dense."
    assert any("outside start_percent" in note for note in notes[1:])
    summary = replace(finished.run.summary, skipped=0.045, sparsity=0.06)  # most of it was sparse
    assert "Lower keep_percent" in run_report(summary, SETTINGS).notes[0]


def test_a_share_that_refreshes_replace_needs_them_off(finished):
    settings = replace(SETTINGS, params=SpargeParams(topk=0.1), refreshes=4)
    text = about_little_skipped(replace(finished.run.summary, sparsity=0.01, skipped=0.01), settings)
    assert "at least 99%" in text and "With refreshes 0" in text and "Lower" not in text


def test_log_and_report_agree_on_little(caplog):
    override = SpargeOverride(replace(SETTINGS, params=SpargeParams(cdf_threshold=1.0), start_percent=0.0))
    run(override)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == f"SpargeAttn: {panels_of(override).notes[0]}" and "None of the attention was skipped" in line


def test_tuned_run_that_skips_little_asks_for_other_tuning(finished):
    summary = replace(finished.run.summary, sparsity=0.01, skipped=0.01)
    text = about_little_skipped(summary, replace(SETTINGS, tuned=object()))
    assert "larger l1" in text and "threshold" not in text

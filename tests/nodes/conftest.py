import pytest

# host/ holds tests for ComfyUI's own interpreter; test_comfyui.py runs them there and reports their results here.
collect_ignore = ["host"]


@pytest.fixture
def short_runs_refresh(monkeypatch):
    """Refreshes in runs of fewer steps than pay for them."""
    from comfyui_spargeattn.nodes.run import refresh_schedule  # not in the interpreter that runs host/

    monkeypatch.setattr(refresh_schedule, "FEWEST", 6)

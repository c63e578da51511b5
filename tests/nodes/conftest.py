import pytest

from comfyui_spargeattn.tests.nodes.host_tests import HostTests

# host/ holds tests for ComfyUI's own interpreter; test_comfyui.py reports their results here.
collect_ignore = ["host"]
_HOST_TESTS = pytest.StashKey[HostTests]()


def pytest_collection_finish(session):
    """Start the chosen host tests, which then run beside all others: either takes one core and half of the time."""
    chosen = [item.callspec.params["case"] for item in session.items
              if item.name.startswith("test_in_comfyui[") and item.callspec.params["case"]]
    if chosen and not session.config.option.collectonly:
        session.config.stash[_HOST_TESTS] = HostTests(*chosen)


def pytest_sessionfinish(session):
    if (run := session.config.stash.get(_HOST_TESTS, None)) is not None:
        run.stop()


@pytest.fixture(scope="session")
def host_tests(pytestconfig):
    """The run of the host tests that were chosen."""
    return pytestconfig.stash[_HOST_TESTS]


@pytest.fixture
def short_runs_refresh(monkeypatch):
    """Refreshes in runs of fewer steps than pay for them."""
    from comfyui_spargeattn.nodes.run import refresh_schedule  # not in the interpreter that runs host/

    monkeypatch.setattr(refresh_schedule, "FEWEST", 6)

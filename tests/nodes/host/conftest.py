import json
import os
import sys

# Before torch: threads that spin while they wait would make a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import comfy_host
import pytest

TESTS = comfy_host.REPOSITORY / "tests"


def pytest_runtest_logreport(report):
    """Hand each result to the outer test run, one JSON line a test."""
    path = os.environ.get("SPARGEATTN_HOST_REPORT")
    if path and (report.when == "call" or report.outcome != "passed"):
        with open(path, "a") as file:
            line = {"id": report.nodeid, "outcome": report.outcome, "text": report.longreprtext}
            file.write(json.dumps(line) + "\n")


@pytest.fixture(scope="session")
def comfy_nodes(tmp_path_factory):
    """ComfyUI's `nodes` module after it has loaded this pack from a custom_nodes folder."""
    base = tmp_path_factory.mktemp("comfyui")
    comfy_host.prepare_base_directory(base)
    return comfy_host.start(base)


@pytest.fixture(scope="module")
def short_runs_refresh(comfy_nodes):
    """Refreshes in runs of a few steps, which take a CPU less time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy_host.pack_module(comfy_nodes, "nodes.run.refresh_schedule"), "FEWEST", 6)
        yield


@pytest.fixture(scope="module")
def demo(comfy_nodes):
    """The demo's modules, as a package."""
    sys.path.insert(0, str(TESTS))
    import demo.clips
    import demo.model
    import demo.sampling

    yield demo
    sys.path.remove(str(TESTS))


@pytest.fixture(scope="module")
def clips(demo):
    """How the demo's clips are drawn and shown."""
    return demo.clips

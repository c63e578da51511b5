import pytest

from comfyui_spargeattn.nodes.override import SpargeOverride
from comfyui_spargeattn.tests.nodes.report.reported import SETTINGS, run


@pytest.fixture(scope="module")
def finished():
    """After a run."""
    override = SpargeOverride(SETTINGS)
    run(override)
    return override

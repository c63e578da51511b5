"""The table of models in tests/README.md against a run of each."""
import checkpoints
import comfy_host
import pytest
from bare_models import BARE
from checkpoints import FAMILIES
from sampling import apply, sample

README = (comfy_host.REPOSITORY / "tests/README.md").read_text(encoding="utf-8")
# test → (sparse calls, tokens, numbered blocks, what stays dense)
ROWS = {cells[2]: cells[3:7] for line in README.split("## Models")[1].split("\n## ")[0].splitlines()
        if len(cells := [cell.strip().strip("`") for cell in line.split("|")]) == 9}


def test_every_model_has_a_row():
    assert {name for name in ROWS if name in FAMILIES} == FAMILIES.keys()
    assert all(f"`{name}`" in README for name in BARE)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows(comfy_nodes, tmp_path, monkeypatch, name):
    family = FAMILIES[name]
    checkpoints.write(family, tmp_path / "model.safetensors")
    patched = apply(comfy_nodes, checkpoints.load(family, tmp_path / "model.safetensors", monkeypatch))
    sample(patched, family, steps=1)
    override = patched.model_options["transformer_options"]["optimized_attention_override"]
    summary = override.run.summary
    tokens = sorted((layout.removeprefix("row-major order of ") for layout in summary.tokens), key=len)
    kinds = sorted({block.kind or "yes" for block in override.names.blocks})
    assert ROWS[name] == [f"{summary.sparse} of {family.calls}", ", ".join(tokens), ", ".join(kinds) or "no",
                          ", ".join(sorted(summary.dense))]

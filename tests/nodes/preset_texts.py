"""The table of the presets in the README and on the help pages: `python -m tests.nodes.preset_texts` writes it anew."""
import re
from dataclasses import asdict, fields
from pathlib import Path

from comfyui_spargeattn.nodes.presets import PRESETS, Preset

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "README.md", *sorted((ROOT / "nodes/web/docs/ApplySpargeAttn").glob("*.md"))
HEAD = "| `preset` | `"  # how a line of such a table begins, and no other


def table() -> str:
    """The names of the widgets in it are the same in all languages."""
    names = [field.name for field in fields(Preset)]
    rows = [[f"`{name}`" for name in ("preset", *names)]]
    rows += [[f"`{preset}`", *map(_cell, asdict(values).values())] for preset, values in PRESETS.items()]
    head, *lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return head + "|---" * len(rows[0]) + "|\n" + "".join(lines)


def _cell(value: dict | float | str) -> str:
    if isinstance(value, dict):
        choice, *others = value.items()
        return ", ".join([choice[1], *(f"`{name}` {_cell(other)}" for name, other in others)])
    return f"{value:g}" if isinstance(value, float) else str(value)


def with_table(page: str) -> str:
    """That text with the table of today."""
    return re.sub(rf"^{re.escape(HEAD)}.*\n(\|.*\n)+", table(), page, flags=re.MULTILINE)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")

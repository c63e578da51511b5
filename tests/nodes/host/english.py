"""The English locale, which is the nodes' own text: `python tests/nodes/host/english.py` writes it anew.

ComfyUI's folder is named by the environment variable COMFYUI_PATH.
"""
import json
import tempfile
from pathlib import Path

import comfy_server

FILE = comfy_server.REPOSITORY / "locales/en/nodeDefs.json"


def english(node):
    """The entry of nodeDefs.json for a node of /object_info."""
    inputs = {}

    def add(name, options):
        inputs[name.replace(".", "_")] = {"name": name.rsplit(".", 1)[-1], "tooltip": options.get("tooltip", "")}
        for option in options.get("options") or ():
            for group in option["inputs"].values() if isinstance(option, dict) else ():
                for inner, spec in group.items():
                    add(f"{name}.{inner}", spec[1])

    for group in ("required", "optional"):
        for name, spec in node["input"].get(group, {}).items():
            add(name, spec[1] if len(spec) > 1 else {})
    outputs = {str(index): {"name": name, "tooltip": tooltip or ""}
               for index, (name, tooltip) in enumerate(zip(node["output_name"], node["output_tooltips"]))}
    return {"display_name": node["display_name"], "description": node["description"], "inputs": inputs,
            "outputs": outputs}


def own_nodes(server):
    """{node id: entry of /object_info} of this pack."""
    return {name: node for name, node in server.get("/object_info").items()
            if node["category"].startswith("model/patch/SpargeAttn")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        comfy_server.prepare(Path(folder))
        with comfy_server.running(Path(folder), "--cpu") as server:
            entries = {name: english(node) for name, node in own_nodes(server).items()}
    FILE.write_text(json.dumps(entries, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

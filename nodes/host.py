"""What the pack asks of ComfyUI beyond its nodes."""
from __future__ import annotations

import os
import sys

import folder_paths
from comfy_execution.utils import get_executing_context

from .log import log

# Windows opens paths of up to 260 characters, and Triton's own names take about 150 of them.
_LONGEST_ON_WINDOWS = 100


def running_prompt() -> str | None:
    """ComfyUI's id of the prompt that is being executed."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


def show_on_node(text: str) -> None:
    """Show a line on the node that is running, in the editor that queued it."""
    module = sys.modules.get("server")  # absent where ComfyUI's nodes run without its server
    context, server = get_executing_context(), module and getattr(module.PromptServer, "instance", None)
    if context is not None and server is not None and server.client_id is not None:
        try:
            server.send_progress_text(text, context.node_id, server.client_id)
        except Exception:  # a connection may break in any way, and a line on a node is not worth a run
            log.debug("SpargeAttn: a line could not be shown", exc_info=True)


def keep_compiled_kernels() -> None:
    """Let Triton keep compiled kernels in ComfyUI's user folder, which outlives a container.

    A folder that the user has chosen by TRITON_CACHE_DIR stays.
    """
    folder = folder_paths.get_system_user_directory("triton")
    if sys.platform == "win32" and len(folder) > _LONGEST_ON_WINDOWS:
        return
    os.environ.setdefault("TRITON_CACHE_DIR", folder)

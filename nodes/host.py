"""What the pack asks of ComfyUI beyond its nodes."""
from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import comfy.model_management
import comfy.model_prefetch
import folder_paths
import torch
from comfy_execution.utils import get_executing_context

from ..kernels import load_configurations
from ..kernels.capability import Facts, arch_of, card_name, has_triton, pv_format, triton_declines, triton_version
from ..kernels.failures import is_of_the_device
from .log import log
from .run.host_memory import Memory

# Windows opens paths of up to 260 characters, and Triton's own names take about 150 of them.
_LONGEST_ON_WINDOWS = 100


def running_prompt() -> str | None:
    """ComfyUI's id of the prompt that is being executed."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


def line_on_running_node() -> Callable[[str], None] | None:
    """A function that shows a line on the node that is running now; None outside a prompt.

    The function may be called later and from any thread. The line appears in the editor that queued the prompt.
    """
    context = get_executing_context()
    return None if context is None else functools.partial(_show_on_node, context.node_id)


def _show_on_node(node_id: str, text: str) -> None:
    module = sys.modules.get("server")  # absent where ComfyUI's nodes run without its server
    server = module and getattr(module.PromptServer, "instance", None)
    if server is not None and server.client_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def shared_memory() -> Memory:
    """The memory that the pack shares with ComfyUI, by ComfyUI's own books.

    What is free is read off the device each time, and includes what PyTorch keeps for later. So ComfyUI sees tensors on
    a GPU where it asks whether conditions can be evaluated together, or loads a model. Where they have no room, it is
    asked to unload models that lie idle. Those of the run stay: weights and residuals that have no room both come from
    the host at each step, so that nothing is gained if one makes way for the other.

    Pinned memory has a limit, by which ComfyUI pins the weights that it offloads. Its own functions count towards that
    limit, and unpin weights of idle models where it is reached.
    """
    manager = comfy.model_management
    return Memory(lambda device: int(manager.get_free_memory(device)), manager.pin_memory, manager.unpin_memory,
                  _unload_idle_models)


def _unload_idle_models(device: torch.device, size: int) -> None:
    """Have ComfyUI unload models that no run uses from a device, until so many bytes more are free there, if it can."""
    manager = comfy.model_management
    if device.type == "cpu":
        return
    try:
        in_use = [loaded for loaded in manager.current_loaded_models if loaded.currently_used]
        manager.free_memory(manager.get_free_memory(device) + size, device, keep_loaded=in_use)
    except Exception as error:  # these are ComfyUI's internals, and a run does without
        if is_of_the_device(error):
            raise
        log.warning("SpargeAttn: ComfyUI could not unload idle models", exc_info=True)


def unrecorded() -> AbstractContextManager:
    """Inside, allocations are none of the evaluation's.

    Newer versions of ComfyUI record what an evaluation of a model allocates, and give the next one the same memory.
    A tensor that outlives its evaluation, however small, costs them a page of it.
    """
    pause = getattr(comfy.model_prefetch, "pause_malloc_graph", nullcontext)
    return pause()


def log_fast_kernels() -> None:
    """Log whether this machine has the fast kernels, in one line. Imports no Triton."""
    try:
        log.info("SpargeAttn: %s", _fast_kernels(comfy.model_management.get_torch_device()))
    except Exception:  # drivers may fail in any way, and the nodes work without this line
        log.debug("SpargeAttn: the GPU could not be described", exc_info=True)


def _fast_kernels(device: torch.device) -> str:
    arch, triton = arch_of(device), triton_version()
    declined = triton_declines(Facts(device.type, arch, torch.float16, 128, has_triton(), triton))
    if declined:
        return f"no fast kernels here: {declined}"
    version = "Triton {}.{}".format(*triton) if triton else "Triton"
    return f"fast kernels: {version}, {card_name(device)} ({arch}), P·V in {pv_format('auto', arch, 128).upper()}"


def keep_compiled_kernels() -> None:
    """Let Triton keep compiled kernels in ComfyUI's user folder, which outlives a container.

    A folder that the user has chosen by TRITON_CACHE_DIR stays.
    """
    folder = folder_paths.get_system_user_directory("triton")
    if sys.platform == "win32" and len(folder) > _LONGEST_ON_WINDOWS:
        return
    os.environ.setdefault("TRITON_CACHE_DIR", folder)


def measured_file() -> Path:
    """The file of launch configurations that Benchmark SpargeAttn keeps, in ComfyUI's user folder."""
    return Path(folder_paths.get_system_user_directory("spargeattn"), "launch_configurations.json")


def take_measured_configurations() -> None:
    """Let the kernels take what Benchmark SpargeAttn kept."""
    load_configurations(measured_file())

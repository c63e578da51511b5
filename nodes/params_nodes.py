"""The nodes that save and load tuned parameters, and the folder for them."""
from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .log import log
from .schema import CATEGORY, SPARGE_PARAMS
from .tuned import params_file
from .tuned.params import TunedParams
from .tuned.params_file import ParamsFileError

FOLDER = "sparge_params"  # under ComfyUI's models; extra_model_paths.yaml may name more
NO_FILE = "(no file yet)"  # what the editor offers then, because an empty list looks broken


def register_folder() -> None:
    folder = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, folder)
    try:
        os.makedirs(folder, exist_ok=True)  # ComfyUI notices new files only in folders that were there
    except OSError as problem:
        log.warning("SpargeAttn: can't create %s: %s", folder, problem)


def params_folder() -> Path:
    """Where files are saved."""
    return Path(folder_paths.get_folder_paths(FOLDER)[0])


def _files() -> list[str]:
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(params_file.SUFFIX)]


def _resolve(name: str) -> Path:
    """The file of that name in one of the folders. Raises ParamsFileError where there is none."""
    if name == NO_FILE:
        raise ParamsFileError(f"models/{FOLDER} has no file: save one with Save SpargeAttn Params or put one there, "
                              "press R in the editor and choose it")
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None or os.path.isabs(name) or ".." in Path(name.replace("\\", "/")).parts:
        raise ParamsFileError(f"filename must be a file in models/{FOLDER}; got {name!r}")
    return Path(path)


class SpargeAttnSaveParams(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpargeAttnSaveParams",
            display_name="Save SpargeAttn Params",
            category=CATEGORY,
            description=f"Writes tuned parameters to models/{FOLDER}, a small file that can be shared.",
            search_aliases=["tuned", "preset"],
            is_output_node=True,
            inputs=[
                SPARGE_PARAMS.Input("params", tooltip="From Tune SpargeAttn."),
                io.String.Input("filename", default="tuned", placeholder="wan21_1.3b_480p",
                                tooltip="Name of the file, without a folder: letters, digits, spaces and . _ + -"),
                io.Combo.Input("if_exists", options=["add a number", "overwrite"], default="add a number",
                               tooltip="What to do where a file of this name exists."),
            ],
            outputs=[],
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        """Refuse a name before anything runs: a search may come before this node."""
        try:
            if filename is not None:  # as it is where another node gives it
                params_file.checked_name(filename)
        except ValueError as problem:
            return str(problem)
        return True

    @classmethod
    def execute(cls, params: TunedParams, filename: str, if_exists: str) -> io.NodeOutput:
        path = params_file.save(params, params_folder(), filename, overwrite=if_exists == "overwrite")
        log.info("SpargeAttn: saved %s: %s", path.name, params)
        return io.NodeOutput(ui={"text": (f"{path.name}: {params}",)})


class SpargeAttnLoadParams(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpargeAttnLoadParams",
            display_name="Load SpargeAttn Params",
            category=CATEGORY,
            description=f"Reads tuned parameters from models/{FOLDER} and checks them.",
            search_aliases=["tuned", "preset"],
            inputs=[
                io.Combo.Input("filename", options=_files() or [NO_FILE], tooltip=f"A file in models/{FOLDER}."),
                io.Combo.Input(
                    "if_unusable", options=["stop", "run untuned"], default="stop",
                    tooltip="What to do where the file is damaged or was tuned for another model. stop: an error that "
                            "says why. run untuned: the widgets of Apply SpargeAttn serve all layers."),
            ],
            outputs=[SPARGE_PARAMS.Output(display_name="params", tooltip="For Apply SpargeAttn.")],
        )

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        """Refuse a name without a file before anything runs, in words that say what to do."""
        try:
            if filename is not None:  # as it is where another node gives it
                _resolve(filename)
        except ParamsFileError as problem:
            return str(problem)
        return True

    @classmethod
    def fingerprint_inputs(cls, filename: str, **_) -> tuple:
        """Read again when the file has changed."""
        path = folder_paths.get_full_path(FOLDER, filename)
        return (filename, path and os.stat(path).st_mtime_ns)

    @classmethod
    def execute(cls, filename: str, if_unusable: str) -> io.NodeOutput:
        lenient = if_unusable == "run untuned"
        try:
            tuned = params_file.load(_resolve(filename))
        except ParamsFileError as problem:
            if not lenient:
                raise
            log.warning("SpargeAttn: running untuned: %s", problem)
            return io.NodeOutput(None)
        log.info("SpargeAttn: loaded %s: %s", filename, tuned)
        return io.NodeOutput(replace(tuned, lenient=lenient))

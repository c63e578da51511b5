"""SPARGE_PARAMS as a .safetensors file: thresholds and evidence as tensors, everything else as JSON in its metadata.

Files come from strangers: each size, name, type and value is checked before it is used.
"""
from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from ...kernels import SpargeParams
from .candidates import AMOUNTS, CANDIDATES, PV_THRESHOLDS, SEARCHED_CURVES, TunedSetting
from .params import MOST_REFRESHES, Architecture, TunedLayer, TunedParams, is_plain, plain
from .search import Bounds, LayerSearch

FORMAT = "comfyui_spargeattn.tuned"
# Where parameters were tuned for refreshes the version is 2, because software that does not know of refreshes would use
# thresholds that are far too aggressive without them. Nothing else differs.
VERSIONS = PLAIN, REFRESHED = "1", "2"
SUFFIX = ".safetensors"
_MAX_FILE, _MAX_HEADER = 64 << 20, 8 << 20
_MAX_LAYERS, _MAX_HEADS, _MAX_HEAD_DIM, _MAX_CANDIDATES = 4096, 1024, 256, 4096
_LAYER = re.compile(r"[A-Za-z0-9_:#]{1,64}")
_FILE_NAME = re.compile(r"[\w][\w .+-]{0,99}")
_RESERVED = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)  # devices, on Windows
_MAX_NUMBER = 99_999
_MAX_NAME = 255 - len(f"_{_MAX_NUMBER}{SUFFIX}")  # bytes, of the 255 that file systems take
# Tensors of a layer, with dtype and whether they have a row for each candidate. A dense layer has no thresholds.
_THRESHOLDS = "amount", "similarity_threshold", "pv_threshold"
_EVIDENCE = {"levels": (torch.uint8, True), "kept": (torch.float32, True), "pv_levels": (torch.uint8, False),
             "error": (torch.float32, False), "unseen": (torch.float32, False), "sparsity": (torch.float32, False)}


class ParamsFileError(ValueError):
    """A file that does not hold tuned parameters, with the reason."""


def versions(device: torch.device) -> dict[str, str]:
    """Versions of the software and hardware that tune on `device`."""
    found = {"torch": torch.__version__, "python": platform.python_version(), "device": str(device.type)}
    if find_spec("triton"):
        from importlib.metadata import PackageNotFoundError, version
        for name in ("triton", "triton-windows"):
            try:
                found["triton"] = version(name)
            except PackageNotFoundError:
                continue
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def checked_name(name: str) -> str:
    """The name of a file without its suffix.

    Raises ValueError for a name that is no plain file name on every system.
    """
    name = name.strip().removesuffix(SUFFIX)
    if not _FILE_NAME.fullmatch(name) or name.endswith((".", " ")):
        raise ValueError("filename must be letters, digits, spaces and . _ + -, beginning with a letter or digit, "
                         f"without a folder, at most 100 of them; got {name!r:.120}")
    size = len(name.encode())
    if size > _MAX_NAME:
        raise ValueError(f"filename must have at most {_MAX_NAME} bytes in UTF-8; got {size}, {name!r}")
    if _RESERVED.fullmatch(name):
        raise ValueError(f"filename must not be the name of a device on Windows; got {name!r}")
    return name


def save(tuned: TunedParams, folder: Path, name: str, overwrite: bool = False) -> Path:
    """Write `folder`/`name`.safetensors. Where it exists, the name gets a number, unless `overwrite`.

    The file appears whole or not at all. Raises ValueError for a name that `checked_name` refuses, and
    OSError where the folder can't be written.
    """
    name, data = checked_name(name), _serialise(tuned)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{uuid4().hex}.part"
    try:
        with open(part, "xb") as file:
            file.write(data)
            os.fsync(file.fileno())
        if overwrite:
            return part.replace(folder / f"{name}{SUFFIX}")
        for number in range(1, _MAX_NUMBER + 1):
            path = folder / (f"{name}{SUFFIX}" if number == 1 else f"{name}_{number}{SUFFIX}")
            if _move_where_free(part, path):
                return path
    finally:
        part.unlink(missing_ok=True)
    raise ValueError(f"filename must be one with free numbers in {folder}; got {name!r}")


def _move_where_free(part: Path, path: Path) -> bool:
    """Give a file its name and return True, or False where the name exists, even where it has only just appeared."""
    try:
        os.link(part, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # no hard links, as on exFAT: an empty file takes the name until the whole one replaces it
        pass
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        part.replace(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


def load(path: Path) -> TunedParams:
    """Read what `save` wrote. Raises ParamsFileError naming what is wrong with any other file."""
    try:
        return _deserialise(*_read(path))
    except (ParamsFileError, OSError) as problem:
        raise ParamsFileError(f"{Path(path).name} can't be used as tuned parameters: {problem}") from problem


def _serialise(tuned: TunedParams) -> bytes:
    from safetensors.torch import save as to_bytes

    tensors, layers = {}, {}
    for name, layer in tuned.layers.items():
        search, setting = layer.search, layer.search.setting
        about = {"heads": search.heads, "kv_heads": search.kv_heads, "head_dim": layer.head_dim,
                 "calls": search.calls, "unseen_calls": search.unseen_calls, "tokens": list(layer.tokens)}
        for key, (dtype, _) in _EVIDENCE.items():
            tensors[f"{name}.{key}"] = getattr(search, key).to(dtype, copy=True).contiguous()
        if setting is not None:
            about["setting"] = {"selection": setting.params.selection, "skipped": setting.skipped,
                                "pv_dtype": setting.pv_dtype, "curves": list(setting.curves)}
            for key in _THRESHOLDS:
                value = torch.as_tensor(getattr(setting.params, key), dtype=torch.float32)
                tensors[f"{name}.{key}"] = value.expand(search.heads).clone()
        layers[name] = about
    bounds = tuned.bounds
    about = {"family": tuned.architecture.family, "config": dict(tuned.architecture.config),
             "bounds": {"l1": bounds.l1, "l2": bounds.l2, "min_gain": bounds.min_gain},
             "rules": plain(CANDIDATES), "versions": dict(tuned.versions), "layers": layers,
             "sparsity": tuned.sparsity, "error": tuned.error, "unseen_error": tuned.unseen_error}
    version = PLAIN
    if tuned.refreshes:
        version, about["refreshes"] = REFRESHED, tuned.refreshes
    return to_bytes(tensors, metadata={"format": FORMAT, "version": version, "tuning": json.dumps(about)})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors of a file that is small enough to look at."""
    from safetensors import SafetensorError, safe_open

    size = os.path.getsize(path)
    if size > _MAX_FILE:
        raise ParamsFileError(f"it has {size} bytes, at most {_MAX_FILE} are expected")
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(_MAX_HEADER, size - 8):
        raise ParamsFileError(f"its header of {header} bytes does not fit a file of {size}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") not in VERSIONS:
                raise ParamsFileError(f"its metadata must say format {FORMAT}, version {' or '.join(VERSIONS)}; it "
                                      f"says {metadata.get('format', 'nothing')!r:.80}, "
                                      f"{metadata.get('version')!r:.20}")
            about = json.loads(metadata.get("tuning", ""))
            if isinstance(about, dict) and (metadata["version"] == REFRESHED) != ("refreshes" in about):
                raise ParamsFileError(f"its metadata must have refreshes in version {REFRESHED} alone; it is of "
                                      f"version {metadata['version']}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except ParamsFileError:
        raise
    except SafetensorError as problem:
        raise ParamsFileError(f"it is no intact safetensors file ({problem!s:.200})") from problem
    except (ValueError, RecursionError) as problem:
        raise ParamsFileError(f"its metadata is no JSON ({type(problem).__name__})") from problem
    return about, tensors


def _deserialise(about: Any, tensors: dict[str, Tensor]) -> TunedParams:
    layers = _get(about, "layers", dict)
    _expect(len(layers) <= _MAX_LAYERS, f"at most {_MAX_LAYERS} layers", len(layers))
    numbers = _get(about, "bounds", dict)
    try:
        bounds = Bounds(*(_get(numbers, key, float) for key in ("l1", "l2", "min_gain")))
    except ValueError as problem:
        raise ParamsFileError(str(problem)) from problem
    candidates = _get(about, "rules", list)
    _expect(0 < len(candidates) <= _MAX_CANDIDATES, f"1 to {_MAX_CANDIDATES} rules", len(candidates))
    known = candidates == plain(CANDIDATES)
    found = {name: _layer(name, value, tensors, bounds, len(candidates), known) for name, value in layers.items()}
    if tensors:
        raise ParamsFileError(f"it holds unknown tensors, such as {min(tensors)[:80]!r}")
    config, about_versions = (_get(about, key, dict) for key in ("config", "versions"))
    _expect(all(is_plain(value) for value in (*config.values(), *about_versions.values())),
            "config and versions to hold numbers, text and short lists of them", "something else")
    return TunedParams(Architecture(_get(about, "family", str), config), bounds, MappingProxyType(found),
                       MappingProxyType({key[:40]: str(value)[:200] for key, value in about_versions.items()}), known,
                       refreshes=_count(about, "refreshes", MOST_REFRESHES) if "refreshes" in about else 0)


def _layer(name: str, about: Any, tensors: dict[str, Tensor], bounds: Bounds, candidates: int,
           known: bool) -> TunedLayer:
    """The layer, whose tensors this takes out of `tensors`.

    candidates: how many the file's search had.
    known: whether they are this version's.
    """
    if not _LAYER.fullmatch(name):
        raise ParamsFileError(f"{name[:80]!r} is no name of a layer")
    heads, kv_heads = (_count(about, key, _MAX_HEADS) for key in ("heads", "kv_heads"))
    _expect(heads % kv_heads == 0, f"{name}: heads to be a multiple of kv_heads", f"{heads} and {kv_heads}")
    values = {}
    for key, (dtype, by_candidate) in _EVIDENCE.items():
        values[key] = _take(tensors, f"{name}.{key}", dtype, (candidates, heads) if by_candidate else (heads,))
        if dtype == torch.uint8:
            values[key] = values[key].long()
        else:
            _expect(bool((values[key].isfinite() & (values[key] >= 0)).all()), f"{name}.{key} to be finite and >= 0",
                    f"{values[key].min()} … {values[key].max()}")
    for key in ("kept", "sparsity"):
        _expect(bool((values[key] <= 1).all()), f"{name}.{key} to be at most 1", values[key].max().item())
    _expect(bool((values["pv_levels"] < len(PV_THRESHOLDS)).all()) or not known, f"{name}.pv_levels to be known",
            values["pv_levels"].max().item())
    _expect(bool((values["levels"] <= len(AMOUNTS["cdf"])).all()) or not known, f"{name}.levels to be known",
            values["levels"].max().item())
    setting = _setting(name, about["setting"], tensors, heads, kv_heads) if "setting" in about else None
    search = LayerSearch(heads=heads, kv_heads=kv_heads, bounds=bounds, calls=_count(about, "calls", 1 << 30),
                         unseen_calls=_count(about, "unseen_calls", 1 << 30, 0), setting=setting, **values)
    tokens = _get(about, "tokens", list)
    _expect(all(isinstance(text, str) for text in tokens), f"{name}: tokens to be text", tokens)
    return TunedLayer(search, _count(about, "head_dim", _MAX_HEAD_DIM), tuple(text[:100] for text in tokens[:64]))


def _setting(name: str, about: Any, tensors: dict[str, Tensor], heads: int, kv_heads: int) -> TunedSetting:
    curves = _get(about, "curves", list)
    _expect(len(curves) == kv_heads and all(isinstance(c, str) and c in SEARCHED_CURVES for c in curves),
            f"{name}: {kv_heads} curves among {', '.join(SEARCHED_CURVES)}", curves)
    choices = {}
    for key, allowed in (("selection", tuple(AMOUNTS)), ("skipped", ("drop", "pooled")),
                         ("pv_dtype", ("fp16", "int8", "fp8"))):
        choices[key] = _get(about, key, str)
        _expect(choices[key] in allowed, f"{name}: {key} to be one of {', '.join(allowed)}", choices[key])
    amount, similarity, pv = (_take(tensors, f"{name}.{key}", torch.float32, (heads,)) for key in _THRESHOLDS)
    if (pv == math.inf).all():
        pv = math.inf
    try:
        params = SpargeParams(**{"cdf_threshold" if choices["selection"] == "cdf" else "topk": amount},
                              similarity_threshold=similarity, pv_threshold=pv)
    except ValueError as problem:
        raise ParamsFileError(f"{name}: {problem}") from problem
    # Releases up to 0.1 had FP8 in the place of INT8, with twice the error.
    pv_dtype = "int8" if choices["pv_dtype"] == "fp8" else choices["pv_dtype"]
    return TunedSetting(params, tuple(curves), choices["skipped"], pv_dtype)


def _take(tensors: dict[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise ParamsFileError(f"it has no tensor {name}")
    _expect(tensor.dtype == dtype and tuple(tensor.shape) == shape, f"{name} to be {dtype} {shape}",
            f"{tensor.dtype} {tuple(tensor.shape)}")
    return tensor


def _get(mapping: Any, key: str, kind: type) -> Any:
    if not isinstance(mapping, Mapping) or key not in mapping:
        raise ParamsFileError(f"its metadata has no {key}")
    value = mapping[key]
    if kind is float and type(value) is int and abs(value) < 1 << 53:
        value = float(value)
    _expect(type(value) is kind, f"{key} to be a {kind.__name__}", type(value).__name__)
    if kind is float:
        _expect(math.isfinite(value), f"{key} to be finite", value)
    return value


def _count(about: Any, key: str, most: int, least: int = 1) -> int:
    value = _get(about, key, int)
    _expect(least <= value <= most, f"{key} to lie in {least} … {most}", value)
    return value


def _expect(holds: bool, rule: str, got: object) -> None:
    if not holds:
        raise ParamsFileError(f"expected {rule}; got {got!s:.200}")

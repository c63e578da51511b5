"""Files that somebody damaged or made up: each loads as parameters that can be used, or is refused with the reason."""
import json
import math
import random
import struct
import time
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from comfyui_spargeattn.nodes.call.arguments import AttentionCall
from comfyui_spargeattn.nodes.call.tuned_setting import params_on, setting_for
from comfyui_spargeattn.nodes.tuned import params_file
from comfyui_spargeattn.nodes.tuned.params import Architecture, TunedLayer, TunedParams
from comfyui_spargeattn.nodes.tuned.params_file import ParamsFileError
from comfyui_spargeattn.nodes.tuned.search import SEARCHED_CURVES, Bounds, LayerSearch, Measured

FILES = 500
SECONDS = 2.0  # for one file, most of it for a slow machine
DTYPES = ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "I16", "U16", "F16", "BF16", "I32",
          "U32", "F32", "C64", "F64", "I64", "U64", "F128", "", "f32", None, 32)
NUMBERS = (0, 1, -1, 2, 3, 7, 255, 256, 1024, 1 << 31, 1 << 53, 1 << 63, (1 << 64) - 1, 10 ** 400, -10 ** 30, 0.5, 1.0,
           -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, True, False, None)
TEXTS = ("", " ", "0", "nan", "../../x", "/etc/passwd", "a\0b", "\ud800", "日本", "x" * 100_000, "{}", "cdf", "topk",
         "pooled", "fp8", "spiral", "hilbert", "row-major", "__import__('os')", "single:0", "format", "%s%n", "{0.a}")
MODEL = Architecture("WanModel", {"dim": 256, "patch_size": [1, 2, 2]})


def original():
    """A file with two layers, one of them dense."""
    need = torch.tensor([0.3, 0.5, 0.7, 1.0])

    def measure(setting):
        amount, pv = setting.params.amount, torch.as_tensor(setting.params.pv_threshold)
        return Measured(torch.where(amount >= need, 0.03, 0.3) + (pv < 9) * 0.1, amount)

    start = LayerSearch.start(4, 2, Bounds(0.05, 0.06))
    dense = start.learn(lambda setting: Measured(torch.ones(4), torch.ones(4)))
    layers = {"double:0": TunedLayer(start.learn(measure), 64, ("512: 4×8×16",)), "#2": TunedLayer(dense, 64)}
    return TunedParams(MODEL, Bounds(0.05, 0.06), MappingProxyType(layers), MappingProxyType({"torch": "2"}))


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return params_file.save(original(), tmp_path_factory.mktemp("intact"), "file").read_bytes()


def parts(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + size]), data[8 + size:]


def joined(header, body, size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def anything(rng, depth=2):
    """A JSON value that nobody expects."""
    kind = rng.randrange(6 if depth else 3)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind == 3:
        return [anything(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 4:
        return {rng.choice(TEXTS): anything(rng, depth - 1) for _ in range(rng.randrange(4))}
    return nested(rng.choice((3, 40, 300, 900)))


def nested(depth):
    value = 0
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def places(value, found=None):
    """(container, key) of everything inside a JSON value."""
    found = [] if found is None else found
    for key in (list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        found.append((value, key))
        places(value[key], found)
    return found


def spoil_place(rng, value, keep=()):
    """Change, remove, add or rename something inside a JSON value."""
    container, key = rng.choice([place for place in places(value) if place[1] not in keep])
    action = rng.randrange(5)
    if action == 0:
        del container[key]
    elif action == 1 and isinstance(container, dict):
        container[rng.choice(TEXTS)] = container.pop(key)
    elif action == 2 and isinstance(container, list):
        container.insert(key, anything(rng))
    elif action == 3 and isinstance(container[key], (int, float)):
        container[key] = rng.choice((float(container[key]), str(container[key]), -container[key], *NUMBERS))
    else:
        container[key] = anything(rng)


def truncated(rng, data):
    return data[:rng.randrange(len(data))]


def flipped(rng, data):
    """Bits: a few anywhere, or in the header, or in the tensors."""
    header = 8 + struct.unpack("<Q", data[:8])[0]
    low, high = rng.choice(((0, len(data)), (0, 64), (8, header), (header, len(data))))
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 100))):
        out[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    return bytes(out)


def wrong_size(rng, data):
    size = struct.unpack("<Q", data[:8])[0]
    other = rng.choice((0, 1, 7, size - 1, size + 1, size // 2, len(data), len(data) - 8, 1 << 20, 8 << 20, 1 << 32,
                        1 << 63, (1 << 64) - 1, rng.randrange(1 << 64)))
    return struct.pack("<Q", other) + data[8:]


def wrong_tensor(rng, data):
    """A description of a tensor: dtype, shape, offsets, name."""
    header, body = parts(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    about = header[name]
    kind = rng.randrange(6)
    if kind == 0:
        about["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        about["shape"] = rng.choice(([], [0], [-1], [4.0], [1 << 40], [1 << 63], [0, 1 << 62], [1] * 100, [2, 2], "4",
                                     [*about["shape"], 1], about["shape"][::-1], [True] * 4, None))
    elif kind == 2:
        about["data_offsets"] = rng.choice(([0, 0], [0, len(body)], [len(body), 2 * len(body)], [16, 0], [-4, 12],
                                            [0, 1 << 63], [0], [], None, [0.0, 16.0]))
    elif kind == 3:
        header[rng.choice(TEXTS)] = header.pop(name)
    elif kind == 4:
        spoil_place(rng, about)
    else:
        header[rng.choice(("double:0.extra", "double:1.levels", "../x", "__metadata__2"))] = dict(about)
    return joined(header, body)


def wrong_values(rng, data):
    """Some numbers of a tensor: special ones, other bits, a whole tensor of one value."""
    header, body = parts(data)
    about = header[rng.choice([name for name in header if name != "__metadata__"])]
    low, high = about["data_offsets"]
    out, width = bytearray(body), 4 if about["dtype"] == "F32" else 1
    for start in range(low, high, width) if rng.randrange(3) == 0 else (rng.randrange(low, high, width),):
        special = struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf, -1.0, -0.0, 1e-45, 3e38, 1.5, 1.0, 0.0)))
        out[start:start + width] = special if width == 4 else bytes([rng.choice((11, 12, 30, 31, 32, 128, 255))])
    return joined(header, bytes(out))


def wrong_metadata(rng, data):
    header, body = parts(data)
    metadata = header["__metadata__"]
    kind = rng.randrange(4)
    if kind == 0:
        metadata[rng.choice(("format", "version", "tuning"))] = rng.choice((*TEXTS, "1", "2", 1, None, [], {}))
    elif kind == 1:
        del metadata[rng.choice(list(metadata))]
    elif kind == 2:
        header["__metadata__"] = anything(rng)
    else:
        metadata[rng.choice(TEXTS)] = rng.choice(TEXTS)
    return joined(header, body)


def wrong_tuning(rng, data):
    """The JSON in the metadata, at a place or two."""
    header, body = parts(data)
    tuning = json.loads(header["__metadata__"]["tuning"])
    for _ in range(rng.choice((1, 1, 2))):
        # A sixth of the changes each; the rules would take most of the places.
        target = rng.choice((tuning, tuning["bounds"], tuning["layers"], tuning["layers"], {"config": tuning["config"]},
                             {"rules": tuning["rules"]}) if isinstance(tuning.get("layers"), dict) else (tuning,))
        if places(target):
            spoil_place(rng, target)
    header["__metadata__"]["tuning"] = json.dumps(tuning)
    return joined(header, body)


def wrong_text(rng, data):
    """The JSON as text: duplicate keys, deep nesting, huge numbers, no object at all."""
    header, body = parts(data)
    text = header["__metadata__"]["tuning"]
    deep = rng.choice((10, 500, 900, 950, 2000, 100_000))
    header["__metadata__"]["tuning"] = rng.choice((
        text[:-1] + ', "layers": {}}', text[:-1] + f', "bounds": {anything_plain(rng)}}}',
        text.replace('"config": {', '"config": {"dim": 1, "deep": ' + "[" * deep + "]" * deep + ", "),
        text.replace('"versions": {', '"versions": {"v": ' + '{"a":' * deep + "0" + "}" * deep + ", "),
        text.replace('"heads": 4', '"heads": ' + "9" * rng.choice((20, 4000, 100_000))),
        text.replace('"calls": 1', '"calls": 1e' + str(rng.choice((0, 400)))), text * 2, text[:len(text) // 2],
        text.replace('"layers": {', '"layers": {' + '"double:0": {}, ' * rng.choice((1, 500))),
        "[" * deep + "]" * deep, "[" * deep, "null", "true", '"text"', "1e999", "NaN", "", "\ufeff" + text,
        text.replace("WanModel", "\\ud800" * 10), text.replace("512", "5" * 100_000)))
    if rng.randrange(4) == 0:  # the same twice in the header itself
        about = json.dumps(header).encode()
        name = rng.choice([name for name in header if name != "__metadata__"])
        return joined(about[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}".encode(), body)
    return joined(header, body)


def anything_plain(rng):
    return rng.choice(("{}", "[]", "null", '{"l1": NaN, "l2": 0.06, "min_gain": 0.1}', '{"l1": 1e-400}',
                       '{"l1": 0.05, "l2": 1, "min_gain": 0}', '{"l1": 0.01, "l2": 0.02, "min_gain": 0}'))


def many(rng, data):
    """More layers, heads, tensors or rules than any model has."""
    header, body = parts(data)
    tuning = json.loads(header["__metadata__"]["tuning"])
    kind = rng.randrange(4)
    if kind == 0:
        layer = {**tuning["layers"]["#2"]}
        tuning["layers"] |= {f"single:{i}": layer for i in range(rng.choice((10, 100, 100, 4095)))}
    elif kind == 1:
        header |= {f"single:{i}.error": {"dtype": "F32", "shape": [0], "data_offsets": [len(body)] * 2}
                   for i in range(rng.choice((10, 100, 100, 5000)))}
    elif kind == 2:
        tuning["rules"] *= rng.choice((2, 100))
    else:
        key = rng.choice(("heads", "kv_heads", "head_dim", "calls", "unseen_calls"))
        tuning["layers"]["double:0"][key] = rng.choice((1024, 1 << 30, 1 << 31, 1 << 62, 1 << 64))
    header["__metadata__"]["tuning"] = json.dumps(tuning)
    return joined(header, body)


def noise(rng, data):
    start = rng.choice((b"", b"PK\x03\x04", b"\x80\x04", b"GGUF", data[:8], data[:200], joined({}, b"")))
    return start + rng.randbytes(rng.choice((0, 1, 7, 8, 100, 5000)))


ATTACKS = (truncated, flipped, wrong_size, wrong_tensor, wrong_values, wrong_metadata, wrong_tuning, wrong_tuning,
           wrong_text, many, noise)


def hostile(seed, data):
    """The bytes of file `seed`; the name of the attack."""
    rng = random.Random(seed)
    attack = rng.choice(ATTACKS)
    return attack(rng, data), attack.__name__


def use(params, folder):
    """What the nodes do with parameters that were loaded; fails where they are not what they claim to be."""
    assert 0 < params.bounds.l1 <= params.bounds.l2 < 1 and 0 <= params.sparsity <= 1
    assert all(map(math.isfinite, params.error)) and str(params)
    problem = params.architecture.mismatch(MODEL)
    assert problem is None or len(problem) < 500
    for name, layer in params.layers.items():
        search = layer.search
        q = torch.zeros(1, search.heads, 2, layer.head_dim)
        k = torch.zeros(1, search.kv_heads, 2, layer.head_dim)
        setting = setting_for(params, name, AttentionCall(q, k, k, "BHND"))
        if setting is not None:
            thresholds = params_on(setting, torch.device("cpu"))
            assert thresholds.heads == search.heads and len(setting.curves) == search.kv_heads
            assert set(setting.curves) <= set(SEARCHED_CURVES)
            assert ((0 < thresholds.amount) & (thresholds.amount <= 1)).all()
            assert (thresholds.similarity_threshold.abs() <= 1).all()
            assert (torch.as_tensor(thresholds.pv_threshold) >= 0).all()
        if params.continues and name == "double:0":
            assert search.learn(lambda setting: None).setting is None
    assert params_file.load(params_file.save(params, folder, "again")).layers.keys() == params.layers.keys()


def test_hostile_files_load_as_parameters_or_are_refused(intact, tmp_path):
    loaded, refused, slowest = 0, set(), 0.0
    for seed in range(FILES):
        data, attack = hostile(seed, intact)
        path = tmp_path / "hostile.safetensors"
        path.write_bytes(data)
        start = time.process_time()
        try:
            params = params_file.load(path)
        except ParamsFileError as problem:
            assert str(problem).startswith("hostile.safetensors can't be used") and len(str(problem)) < 1000
            refused.add(attack)
        except BaseException as problem:
            raise AssertionError(f"seed {seed} ({attack})") from problem
        else:
            loaded += 1
            try:
                use(replace(params, lenient=False), tmp_path)
            except BaseException as problem:
                raise AssertionError(f"seed {seed} ({attack}) loads and can't be used") from problem
        slowest = max(slowest, time.process_time() - start)
    print(f"{FILES} files, seeds 0 to {FILES - 1}: {loaded} loaded, slowest {slowest:.2f} s")
    assert refused == {attack.__name__ for attack in ATTACKS} and FILES / 20 < loaded < FILES / 2
    assert slowest < SECONDS

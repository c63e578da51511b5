"""The file of tuned parameters: it comes back as it was, and anything else that claims to be one is refused."""
import json
import math
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_spargeattn.nodes.tuned import params_file
from comfyui_spargeattn.nodes.tuned.params_file import ParamsFileError
from comfyui_spargeattn.tests.nodes.tuned.planted import learnt


def same(a, b):
    if a.setting is None or b.setting is None:
        return a.setting is b.setting
    items = zip(*([(name, torch.as_tensor(value)) for name, value in x.setting.params.items()] for x in (a, b)))
    return ((a.setting.curves, a.setting.skipped, a.setting.pv_dtype) ==
            (b.setting.curves, b.setting.skipped, b.setting.pv_dtype)
            and all(x == y and torch.equal(m, n) for (x, m), (y, n) in items))


def test_comes_back_as_it_was(params, saved):
    loaded = params_file.load(saved)
    assert (loaded.architecture, loaded.bounds, loaded.versions) == (params.architecture, params.bounds,
                                                                     params.versions)
    assert loaded.continues and not loaded.lenient
    assert list(loaded.layers) == list(params.layers)
    for name, layer in params.layers.items():
        other = loaded.layers[name]
        assert (other.head_dim, other.tokens) == (layer.head_dim, layer.tokens)
        assert same(other.search, layer.search)
        for field in ("heads", "kv_heads", "calls", "unseen_calls", "bounds"):
            assert getattr(other.search, field) == getattr(layer.search, field)
        for field in ("levels", "kept", "pv_levels", "error", "unseen", "sparsity"):
            assert torch.equal(getattr(other.search, field), getattr(layer.search, field)), field
    assert str(loaded) == str(params)


def test_a_search_goes_on_from_the_file(params, saved):
    one = params_file.load(saved).layers["double:0"].search.learn(learnt)
    two = params.layers["double:0"].search.learn(learnt)
    assert same(one, two) and torch.equal(one.kept, two.kept) and one.calls == 2


@pytest.mark.parametrize("refreshes", (1, 50))
def test_refreshes_come_back(params, tmp_path, refreshes):
    """Under a version that software without refreshes refuses, because it would use far too aggressive thresholds."""
    path = params_file.save(replace(params, refreshes=refreshes), tmp_path, "refreshed")
    assert parts(path)[0]["__metadata__"]["version"] == "2"
    loaded = params_file.load(path)
    assert loaded.refreshes == refreshes and str(loaded) == str(replace(params, refreshes=refreshes))


def test_without_refreshes_a_file_is_as_it_has_always_been(saved):
    header = parts(saved)[0]["__metadata__"]
    assert header["version"] == "1" and "refreshes" not in json.loads(header["tuning"])
    assert params_file.load(saved).refreshes == 0


@pytest.mark.parametrize("version, value", (("1", 3), ("2", None), ("2", 0), ("2", 51), ("2", 2.0), ("2", "3"),
                                            ("2", True), ("2", -1), ("2", [])))
def test_refreshes_that_are_refused(saved, version, value):
    rewrite(saved, metadata=lambda m: m.update(version=version),
            about=lambda a: a.update({} if value is None else {"refreshes": value}))
    with pytest.raises(ParamsFileError, match="refreshes"):
        params_file.load(saved)


def test_the_metadata_can_be_read_without_this_package(saved):
    header, _ = parts(saved)
    about = json.loads(header["__metadata__"]["tuning"])
    assert about["family"] == "WanModel" and about["bounds"]["l1"] == 0.05
    assert about["layers"]["double:0"]["tokens"] == ["1536: 4×16×24", "512"]
    assert 0 < about["sparsity"] < 1 and len(about["error"]) == 2


def test_a_file_of_another_search_serves_and_does_not_go_on(saved):
    rewrite(saved, about=lambda about: about["rules"][0].__setitem__(0, "other"))
    loaded = params_file.load(saved)
    assert not loaded.continues and loaded.layers["double:0"].search.setting is not None


def parts(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:8 + size]), data[8 + size:]


def rewrite(path, *, about=None, metadata=None, tensors=None):
    """Change the JSON, the metadata or the tensors of a saved file."""
    header, _ = parts(path)
    data, text = load_file(path), header["__metadata__"]
    tuning = json.loads(text["tuning"])
    for change, value in ((about, tuning), (tensors, data)):
        if change is not None:
            change(value)
    text["tuning"] = json.dumps(tuning)
    if metadata is not None:
        metadata(text)
    save_file(data, path, metadata=text)


def raw(header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


@pytest.mark.parametrize("data", (
    b"", b"\0", b"\xff" * 8, struct.pack("<Q", 1 << 62) + b"{}", struct.pack("<Q", 2) + b"{", raw(b"[" * 100_000),
    raw(b"not json"), raw({}), raw({"__metadata__": {"format": "pt"}}), b"\x80\x04]q\x00.", b"PK\x03\x04" + b"\0" * 64,
    raw({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
    raw({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
), ids=range(13))
def test_bytes_that_are_no_such_file(tmp_path, data):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ParamsFileError, match="bad.safetensors can't be used"):
        params_file.load(path)


def test_truncated_anywhere(saved):
    data = saved.read_bytes()
    for size in range(0, len(data), len(data) // 40):
        saved.write_bytes(data[:size])
        with pytest.raises(ParamsFileError):
            params_file.load(saved)


def test_too_large_a_file_is_not_read(tmp_path):
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(ParamsFileError, match="bytes"):
        params_file.load(path)


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ParamsFileError):
            params_file.load(path)


NESTED = "[" * 100_000


@pytest.mark.parametrize("change, reason", (
    (lambda m: m.update(format="pt"), "format"), (lambda m: m.update(version="3"), "version"),
    (lambda m: m.pop("tuning"), "JSON"), (lambda m: m.update(tuning="{"), "JSON"),
    (lambda m: m.update(tuning=NESTED), "JSON"), (lambda m: m.update(tuning="[]"), "layers"),
    (lambda m: m.update(tuning="null"), "layers"), (lambda m: m.update(tuning="9" * 10_000), "JSON"),
), ids=range(8))
def test_metadata_that_is_refused(saved, change, reason):
    rewrite(saved, metadata=change)
    with pytest.raises(ParamsFileError, match=reason):
        params_file.load(saved)


def layer(about):
    return about["layers"]["double:0"]


@pytest.mark.parametrize("change, reason", (
    (lambda a: a.pop("family"), "family"), (lambda a: a.update(family=3), "family"),
    (lambda a: a.update(config=[]), "config"), (lambda a: a.update(layers=[]), "layers"),
    (lambda a: a.update(versions=None), "versions"), (lambda a: a["config"].update(deep=[[[[[0]]]]]), "config"),
    (lambda a: a["versions"].update(torch={"a": 1}), "versions"), (lambda a: a["bounds"].update(l1="0.1"), "l1"),
    (lambda a: a["bounds"].update(l1=math.nan), "l1"), (lambda a: a["bounds"].update(l2=math.inf), "l2"),
    (lambda a: a["bounds"].update(l1=0.5), "l1"), (lambda a: a["bounds"].update(l1=10 ** 400), "l1"),
    (lambda a: a.update(rules=[]), "rules"), (lambda a: a["rules"].pop(), "levels"),
    (lambda a: a["layers"].update({"../x": layer(a)}), "name of a layer"),
    (lambda a: a["layers"].update(extra=layer(a)), "extra"), (lambda a: a["layers"].pop("#2"), "unknown tensors"),
    (lambda a: layer(a).update(heads=3), "heads"), (lambda a: layer(a).update(heads=8), "levels"),
    (lambda a: layer(a).update(heads=10 ** 9), "heads"), (lambda a: layer(a).update(heads=-4), "heads"),
    (lambda a: layer(a).update(heads=True), "heads"), (lambda a: layer(a).update(kv_heads=0), "kv_heads"),
    (lambda a: layer(a).update(kv_heads=4), "curves"), (lambda a: layer(a).update(head_dim=0), "head_dim"),
    (lambda a: layer(a).update(head_dim=128.0), "head_dim"), (lambda a: layer(a).update(calls=0), "calls"),
    (lambda a: layer(a).update(tokens=[1]), "tokens"), (lambda a: layer(a).update(tokens="512"), "tokens"),
    (lambda a: layer(a).update(setting=None), "curves"), (lambda a: layer(a).pop("setting"), "unknown tensors"),
    (lambda a: layer(a)["setting"].update(curves=["hilbert", "spiral"]), "curves"),
    (lambda a: layer(a)["setting"].update(curves=[[], {}]), "curves"),
    (lambda a: layer(a)["setting"].update(skipped="all"), "skipped"),
    (lambda a: layer(a)["setting"].update(pv_dtype="int4"), "pv_dtype"),
    (lambda a: layer(a)["setting"].update(selection="both"), "selection"),
), ids=range(36))
def test_descriptions_that_are_refused(saved, change, reason):
    rewrite(saved, about=change)
    with pytest.raises(ParamsFileError, match=reason):
        params_file.load(saved)


def change_tensor(name, change):
    return lambda tensors: tensors.update({f"double:0.{name}": change(tensors[f"double:0.{name}"])})


def put(value):
    return lambda tensor: tensor.index_fill(tensor.ndim - 1, torch.tensor([1]), value)


@pytest.mark.parametrize("name, change", (
    ("amount", put(math.nan)), ("amount", put(0.0)), ("amount", put(1.5)), ("amount", put(math.inf)),
    ("amount", lambda x: x[:3].clone()), ("amount", lambda x: x[:, None].clone()), ("amount", lambda x: x.double()),
    ("amount", lambda x: x.half()), ("amount", lambda x: x.to(torch.int32)),
    ("similarity_threshold", put(math.nan)), ("similarity_threshold", put(-2.0)), ("similarity_threshold", put(1.1)),
    ("pv_threshold", put(math.nan)), ("pv_threshold", put(-1.0)), ("pv_threshold", put(-math.inf)),
    ("levels", put(200)), ("levels", lambda x: x.to(torch.int64)), ("levels", lambda x: x[:-1].clone()),
    ("pv_levels", put(99)), ("kept", put(math.nan)), ("kept", put(1.5)), ("kept", put(-0.5)),
    ("error", put(math.inf)), ("error", put(-1.0)), ("unseen", put(math.nan)), ("sparsity", put(2.0)),
), ids=lambda value: value if isinstance(value, str) else "")
def test_tensors_that_are_refused(saved, name, change):
    rewrite(saved, tensors=change_tensor(name, change))
    with pytest.raises(ParamsFileError, match="amount|threshold|topk" if name == "amount" else name) as caught:
        params_file.load(saved)
    assert len(str(caught.value)) < 500


def test_missing_and_unknown_tensors(saved):
    original = saved.read_bytes()
    for name in load_file(saved):
        saved.write_bytes(original)
        rewrite(saved, tensors=lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(ParamsFileError, match="no tensor"):
            params_file.load(saved)
    saved.write_bytes(original)
    rewrite(saved, tensors=lambda tensors: tensors.update({"__import__('os')": torch.zeros(1)}))
    with pytest.raises(ParamsFileError, match="unknown tensors"):
        params_file.load(saved)

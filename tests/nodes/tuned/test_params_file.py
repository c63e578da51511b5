"""The file of tuned parameters: it comes back as it was, and anything else that claims to be one is refused."""
import errno
import json
import math
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_spargeattn.nodes.tuned import params_file
from comfyui_spargeattn.nodes.tuned.params import Architecture, TunedLayer, TunedParams
from comfyui_spargeattn.nodes.tuned.params_file import ParamsFileError
from comfyui_spargeattn.nodes.tuned.search import Bounds, LayerSearch, Measured

HEADS, KV_HEADS = 4, 2


def learnt(setting):
    """A layer whose four heads differ, the last one dense."""
    need = torch.tensor([0.3, 0.5, 0.7, 1.0])
    amount, pv = setting.params.amount, torch.as_tensor(setting.params.pv_threshold)
    return Measured(torch.where(amount >= need, 0.03, 0.3) + (pv < 9) * 0.1, amount)


@pytest.fixture(scope="module")
def params():
    search = LayerSearch.start(HEADS, KV_HEADS, Bounds(0.05, 0.06)).learn(learnt).evaluate(learnt)
    dense = LayerSearch.start(HEADS, KV_HEADS, Bounds(0.05, 0.06)).learn(
        lambda setting: Measured(torch.ones(HEADS), torch.ones(HEADS)))
    layers = {"double:0": TunedLayer(search, 128, ("1536: 4×16×24", "512")), "#2": TunedLayer(dense, 64)}
    return TunedParams(Architecture("WanModel", {"dim": 256, "patch_size": [1, 2, 2], "eps": 1e-6, "x": None}),
                       Bounds(0.05, 0.06), MappingProxyType(layers), MappingProxyType({"torch": "2"}))


@pytest.fixture
def saved(params, tmp_path):
    return params_file.save(params, tmp_path, "file")


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


def test_numbers_are_added_and_nothing_is_overwritten(params, tmp_path):
    names = [params_file.save(params, tmp_path, "a").name for _ in range(3)]
    assert names == ["a.safetensors", "a_2.safetensors", "a_3.safetensors"]
    (tmp_path / "a.safetensors").write_bytes(b"mine")
    assert params_file.save(params, tmp_path, "a.safetensors").name == "a_4.safetensors"
    assert (tmp_path / "a.safetensors").read_bytes() == b"mine"
    assert params_file.save(params, tmp_path, "a", overwrite=True).name == "a.safetensors"
    assert params_file.load(tmp_path / "a.safetensors").sparsity == params.sparsity
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", ("", " ", ".", "..", "a/b", "a\\b", "/a", "../a", ".a", "a\nb", "a\0", "C:a", "a.",
                                  "x" * 101, "日" * 80, "\ud800", "CON", "con", "Nul.txt", "aux .tar.gz", "PRN.",
                                  "COM1", "lpt9.safetensors", "com¹", "LPT0.a.b"), ids=lambda name: ascii(name)[:16])
def test_names_that_are_no_file_names(params, tmp_path, name):
    with pytest.raises(ValueError, match="filename") as caught:
        params_file.save(params, tmp_path / "inner", name)
    assert not any(tmp_path.iterdir()) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ("日" * 79, "consol", "CONIN", "com10", "lpt", "null.v1", "x.con", "wan 2.2 +l1-0.05"),
                         ids=lambda name: ascii(name)[:16])
def test_names_that_are_file_names(params, tmp_path, name):
    """The longest one has room for a number."""
    for _ in range(2):
        assert params_file.load(params_file.save(params, tmp_path, name)).layers.keys() == params.layers.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{name}.safetensors", f"{name}_2.safetensors"])


def fail(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def stop(*_, **__):
    raise KeyboardInterrupt


NO_LINKS = "os.link", lambda *_: fail()


@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize("faults", (
    [("os.fsync", fail)], [("os.fsync", stop)], [NO_LINKS, ("pathlib.Path.replace", fail)],
    [NO_LINKS, ("pathlib.Path.touch", fail), ("pathlib.Path.replace", fail)], [("os.link", stop),
                                                                               ("pathlib.Path.replace", stop)],
    [("comfyui_spargeattn.nodes.tuned.params_file._serialise", fail)],
), ids=("full", "stopped", "no rename", "nothing goes", "stopped at the name", "no bytes"))
def test_a_save_that_fails_leaves_the_folder_as_it_was(params, tmp_path, monkeypatch, faults, overwrite):
    params_file.save(params, tmp_path, "a")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        for name, fault in faults:
            patch.setattr(name, fault)
        with pytest.raises((OSError, KeyboardInterrupt)):
            params_file.save(params, tmp_path, "a", overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    expected = "a.safetensors" if overwrite else "a_2.safetensors"
    assert params_file.save(params, tmp_path, "a", overwrite=overwrite).name == expected


@pytest.mark.parametrize("overwrite", (False, True))
@pytest.mark.parametrize("links", (True, False))
def test_a_name_shows_a_whole_file_or_none(params, tmp_path, monkeypatch, overwrite, links):
    """Looked at whenever bytes have gone to the disk; without hard links, an empty file is there for a moment."""
    if not links:
        monkeypatch.setattr(*NO_LINKS)
    sync, seen = os.fsync, []

    def look(descriptor):
        sync(descriptor)
        seen.append([path.stat().st_size for path in tmp_path.glob("*.safetensors")])

    monkeypatch.setattr("os.fsync", look)
    first = params_file.save(params, tmp_path, "a").stat().st_size
    names = [params_file.save(params, tmp_path, "a", overwrite).name for _ in range(2)]
    assert seen == ([[], [first], [first]] if overwrite else [[], [first], [first] * 2])
    assert names == (["a.safetensors"] * 2 if overwrite else ["a_2.safetensors", "a_3.safetensors"])
    assert all(params_file.load(path).layers for path in tmp_path.iterdir())


def test_many_who_save_at_once_each_get_a_name(params, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: params_file.save(params, tmp_path, "a"), range(24)))
    assert len(set(paths)) == 24 and sorted(paths) == sorted(tmp_path.iterdir())
    assert all(params_file.load(path).layers for path in paths)


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
    (lambda m: m.update(format="pt"), "format"), (lambda m: m.update(version="2"), "version"),
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

"""How a file of tuned parameters comes to exist: under which name, whole or not at all."""
import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from comfyui_spargeattn.nodes.tuned import params_file


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

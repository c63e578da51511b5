"""The file of measured launch configurations: what is kept comes back, and what nobody wrote is refused."""
import json
import os
import random
from dataclasses import replace

import pytest

from comfyui_spargeattn.kernels._triton import measured_file
from comfyui_spargeattn.kernels._triton.measured_file import Launch, Measured, MeasuredFileError, change, read, write

FOUND = Measured("NVIDIA GeForce RTX 4090", "3.6", 128, "int8", 128, 64, Launch(8, 3, None), Launch(4, 2, 168), 1.08)


def content(**changed):
    """A file's content; `changed` are values of the only entry."""
    launch = {"warps": 4, "stages": 2, "maxnreg": 168}
    entry = {"card": "NVIDIA GeForce RTX 4090", "triton": "3.6", "padded_dim": 128, "pv_format": "int8", "block_q": 128,
             "block_k": 64, "table": {"warps": 8, "stages": 3, "maxnreg": None}, "launch": launch, "gain": 1.08}
    return {"format": 1, "configurations": [entry | changed]}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "new folder" / "launch.json"


def test_what_is_kept_comes_back(file):
    assert read(file) == {}
    others = replace(FOUND, pv_format="fp16"), replace(FOUND, padded_dim=64)
    for entry in (FOUND, *others):
        change(file, entry.key, entry)
    assert read(file) == {entry.key: entry for entry in (FOUND, *others)}
    newer = replace(FOUND, gain=1.2, launch=Launch(8, 1, None))
    change(file, newer.key, newer)
    change(file, others[0].key, None)
    assert read(file) == {entry.key: entry for entry in (newer, others[1])}


def test_content_is_what_readers_of_other_versions_expect(file):
    write(file, [FOUND])
    assert json.loads(file.read_text()) == content()


@pytest.mark.parametrize("changed", (
    {"card": ""}, {"card": "x" * 201}, {"card": "two\nlines"}, {"card": 7}, {"triton": "3"}, {"triton": 3.6},
    {"triton": "3.6\n"}, {"padded_dim": 96}, {"padded_dim": "128"}, {"padded_dim": True}, {"pv_format": "int4"},
    {"pv_format": ["int8"]}, {"block_q": 0}, {"block_k": 64.0}, {"gain": 1.0}, {"gain": float("nan")},
    {"gain": float("inf")}, {"gain": 2}, {"launch": None}, {"launch": {"warps": 4, "stages": 2}},
    {"launch": {"warps": 3, "stages": 2, "maxnreg": None}}, {"launch": {"warps": True, "stages": 2, "maxnreg": None}},
    {"launch": {"warps": 4, "stages": 99, "maxnreg": None}}, {"launch": {"warps": 4, "stages": 2, "maxnreg": 1 << 40}},
    {"table": {"warps": 8, "stages": 3, "maxnreg": None, "more": 1}}, {"more": 1}), ids=str)
def test_a_field_that_nobody_wrote_is_refused(file, changed):
    file.parent.mkdir()
    file.write_text(json.dumps(content()))
    assert read(file) == {FOUND.key: FOUND}
    file.write_text(json.dumps(content(**changed)))
    with pytest.raises(MeasuredFileError):
        read(file)


@pytest.mark.parametrize("data", (
    b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b'"text"', b"{}", b'{"format": 2, "configurations": []}',
    b'{"format": true, "configurations": []}', b'{"format": 1, "configurations": {}}',
    b'{"format": 1, "configurations": [1]}', b"[" * 100_000, b'{"format": ' + b"9" * 5000 + b"}",
    b" " * (measured_file._MOST_BYTES + 1), b'{"format": 1, "configurations": [' + b"1," * 600 + b"1]}"),
    ids=lambda data: str(data[:24]))
def test_a_file_that_is_none_is_refused(file, data):
    file.parent.mkdir()
    file.write_bytes(data)
    with pytest.raises(MeasuredFileError):
        read(file)
    change(file, FOUND.key, FOUND)  # replaces it
    assert read(file) == {FOUND.key: FOUND}


def test_damaged_files_are_refused_or_as_they_were(file):
    """Whatever byte is another: no other error, and no value out of its range."""
    write(file, [FOUND])
    whole, dice = file.read_bytes(), random.Random(0)
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        file.write_bytes(data)
        try:
            entries = read(file).values()
        except MeasuredFileError:
            continue
        assert all(entry.launch.warps <= 16 and entry.launch.stages <= 8 and 1 < entry.gain < 100 for entry in entries)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_and_a_folder_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(MeasuredFileError, match="plain file"):
            read(path)


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    change(file, FOUND.key, FOUND)
    monkeypatch.setattr(measured_file.os, "replace", lambda *names: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        change(file, FOUND.key, replace(FOUND, gain=1.5))
    assert read(file) == {FOUND.key: FOUND}
    assert list(file.parent.iterdir()) == [file]

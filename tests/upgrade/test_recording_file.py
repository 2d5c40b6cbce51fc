"""Recording files: content survives bit for bit, and anything else is rejected."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bnverify.upgrade import recording
from bnverify.upgrade.recording import RecordingError, read, write

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(sizes=(64, 128)),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
EXTENDED = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4]

STATE = {"containers": "*", "leaves": [["params/w", "float32", [2]]]}
MANIFEST = {
    "content": recording.CONTENT,
    "bnverify": "0",
    "subject": "made by hand",
    "target": "steps.py:make",
    "seed": 0,
    "cases": 3,
    "steps": 1,
    "shapes": [[4, 2]],
    "trees": [{"state": STATE, "after": STATE}],
    "dtypes": {},
    "versions": {"jax": "0.10.2"},
    "python": "3.11.7",
    "machine": "x",
    "flags": {"jax_enable_x64": False},
    "errors": {},
    "laws": {"a_law": {"status": "held", "residual": 0.5}},
    "influence": {"scope": "every N", "proved": True, "matrix": {"params": ["x"]}, "unknown": []},
    "costs": {"program_size": 10.0},
    "notes": [],
    "replays": "",
}
CONTENT = {
    "shape0/case/x": np.ones((3, 4, 2), np.float32),
    "shape0/case/y": np.ones((3, 4), np.float32),
    "shape0/case/lr": np.ones(3, np.float32),
    "shape0/case/seed": np.arange(3),
    "shape0/init/params/w": np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2),
    "shape0/step0/value/params/w": np.zeros((3, 2), np.float32),
    "shape0/step0/noise/params/w": np.zeros((3, 2), np.float32),
}


@pytest.fixture
def sample(tmp_path):
    """A small recording with every kind of content."""
    path = tmp_path / "sample.bnv"
    more = {
        "shape0/step0/value/batch_stats/mean": np.arange(3).astype(ml_dtypes.bfloat16),
        "flags": np.array([True, False]),
        "nothing": np.zeros((0, 3)),
    }
    write(path, MANIFEST, {**CONTENT, **more})
    return path


def forge(path: Path, manifest: object, arrays: dict | None = None, **members: bytes) -> None:
    """Write a file without bnverify, as an attacker might."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    named = {
        "manifest": np.frombuffer(text, np.uint8),
        **(arrays if arrays is not None else CONTENT),
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in named.items():
            file = io.BytesIO()
            np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
            archive.writestr(f"{name}.npy", file.getvalue())
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


# Round trips.


@given(st.dictionaries(NAMES, ARRAYS, max_size=4))
def test_arrays_survive_the_round_trip_bit_for_bit(tmp_path_factory, arrays):
    """Every name, dtype, shape and bit pattern is preserved."""
    path = tmp_path_factory.getbasetemp() / "round_trip.bnv"
    arrays = {f"more/{name}": array for name, array in arrays.items()}
    write(path, MANIFEST, {**CONTENT, **arrays})
    back = read(path)
    assert back.manifest == {**MANIFEST, **as_read()}
    assert back.arrays.keys() == CONTENT.keys() | arrays.keys()
    for name, array in arrays.items():
        assert back.arrays[name].dtype == array.dtype.newbyteorder("=")
        assert back.arrays[name].shape == array.shape
        assert back.arrays[name].tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()
        assert back.arrays[name].flags.writeable


def as_read():
    """Return the parts of the manifest that become tuples when read."""
    leaves = [tuple(row) for row in STATE["leaves"]]
    state = {**STATE, "leaves": leaves}
    return {"shapes": [(4, 2)], "trees": [{"state": state, "after": state}]}


@pytest.mark.parametrize("dtype", EXTENDED)
def test_ml_dtypes_survive(tmp_path, dtype):
    """bfloat16 and other ml_dtypes keep their dtype and bits, including NaN."""
    array = np.array([0, 1, -2, 3.5, np.nan if dtype is not ml_dtypes.int4 else 0]).astype(dtype)
    more = {"a": array, "scalar": array[1], "empty": array[:0]}
    write(tmp_path / "r", MANIFEST, {**CONTENT, **more})
    back = read(tmp_path / "r").arrays
    assert back["a"].dtype == array.dtype
    assert back["a"].tobytes() == array.tobytes()
    assert back["scalar"].shape == ()
    assert back["empty"].shape == (0,)


def test_a_nan_keeps_its_payload(tmp_path):
    """NaNs may differ in their bits, which a bitwise comparison must see."""
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000], np.uint32)
    write(tmp_path / "r", MANIFEST, {**CONTENT, "a": bits.view(np.float32)})
    assert read(tmp_path / "r").arrays["a"].view(np.uint32).tolist() == bits.tolist()


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """The file does not depend on the time, the order of names or the memory layout."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    a = {**CONTENT, "x": array.T[::2]}
    b = {"x": np.ascontiguousarray(array.T[::2]).astype(">f4"), **CONTENT}
    write(tmp_path / "a", MANIFEST, a)
    write(tmp_path / "b", dict(reversed(MANIFEST.items())), b)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_with_the_same_content_is_not_rewritten(tmp_path):
    """Another zlib compresses differently; under version control that must not be a change."""
    path = tmp_path / "r"
    forge(path, MANIFEST)
    other = path.read_bytes()
    write(path, MANIFEST, CONTENT)
    assert path.read_bytes() == other
    write(path, {**MANIFEST, "seed": 1}, CONTENT)
    assert path.read_bytes() != other


def test_numpy_can_read_it(sample):
    """Without bnverify a recording is an archive of arrays."""
    with np.load(sample) as archive:
        assert archive["shape0/case/x"].shape == (3, 4, 2)
        assert json.loads(archive["manifest"].tobytes())["subject"] == "made by hand"


# Invalid content when writing.


@pytest.mark.parametrize(
    ("manifest", "arrays", "message"),
    [
        ({"costs": {"run_time": float("nan")}}, {}, "not JSON compliant"),
        ({"seed": "zero"}, {}, r"Expected `int`, got `str` - at `\$\.seed`"),
        ({}, {"a": np.array([object()])}, "'a' has dtype object"),
        ({}, {"a": np.array(["text"])}, "'a' has dtype str"),
        ({}, {"a": np.zeros(2, [("f", "f4")])}, "'a' has dtype void"),
        ({}, {"manifest": np.zeros(2)}, "'manifest' is not a valid array name"),
        ({}, {"a\0b": np.zeros(2)}, "is not a valid array name"),
    ],
)
def test_content_that_cannot_be_read_back_is_rejected(tmp_path, manifest, arrays, message):
    """The message names the file and the value, and no file is written."""
    with pytest.raises(RecordingError, match=f"cannot write the recording .*{message}"):
        write(tmp_path / "r", {**MANIFEST, **manifest}, arrays)
    assert list(tmp_path.iterdir()) == []


def test_limits_apply_when_writing(tmp_path, monkeypatch):
    """A recording too large to be read is not written."""
    monkeypatch.setattr(recording, "MAX_ARRAYS", 1000)
    with pytest.raises(RecordingError, match="1600 bytes of arrays exceed the limit of 1000"):
        write(tmp_path / "r", MANIFEST, {"a": np.zeros(100), "b": np.zeros(100)})


def test_a_missing_directory_is_one_message(tmp_path):
    """It has the file's name and the operating system's message."""
    with pytest.raises(RecordingError, match=r"cannot write the recording .*absent/r: .*No such"):
        write(tmp_path / "absent" / "r", MANIFEST, {})


# Invalid files when reading.


def refused(path: Path, message: str = ".") -> None:
    """Assert that reading a file raises one line that names it."""
    with pytest.raises(RecordingError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"cannot read the recording {path}: ")


def test_a_missing_file_is_one_message(tmp_path):
    """It has the file's name and the operating system's message."""
    refused(tmp_path / "absent", "No such file")


def test_a_path_that_is_not_a_regular_file_is_rejected_at_once(tmp_path):
    """A named pipe would block for ever, and a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        refused(path, "not a regular file")


def test_a_huge_file_is_rejected_unread(tmp_path):
    """A sparse terabyte is cheap to create, but would take for ever to read."""
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(2**40)
    refused(tmp_path / "giant", "exceeds that of any recording")


def test_a_truncated_file_is_rejected(sample, tmp_path):
    """A file cut at any position is rejected."""
    whole = sample.read_bytes()
    cut = tmp_path / "cut"
    for size in range(0, len(whole), 3):
        cut.write_bytes(whole[:size])
        refused(cut, "truncated, altered")


def test_no_flipped_bit_changes_the_content(sample, tmp_path):
    """A file with one flipped bit is rejected, or still reads as the same recording."""
    whole, content = sample.read_bytes(), read(sample).digest
    flipped = tmp_path / "flipped"
    count = 0
    for bit in random.Random(0).sample(range(8 * len(whole)), 1000):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(damaged)
        try:
            assert read(flipped).digest == content
        except RecordingError:
            count += 1
    assert count > 600  # the others are in dates, attributes and similar fields


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated, altered"),
        (b"PK\x03\x04", "truncated, altered"),
        (b"bnverify-recording 1 anything\n", "format 1; record again"),
    ],
)
def test_files_that_are_not_archives_are_rejected(tmp_path, data, message):
    """The message says what the file is instead."""
    (tmp_path / "r").write_bytes(data)
    refused(tmp_path / "r", message)


def test_other_archives_are_rejected(tmp_path):
    """The message says how to make a recording."""
    with zipfile.ZipFile(tmp_path / "r", "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(tmp_path / "r", "bnverify record -o FILE")


def test_a_zip_bomb_is_rejected_before_it_is_unpacked(tmp_path, monkeypatch):
    """The declared unpacked sizes are added up first."""
    forge(tmp_path / "r", MANIFEST, {**CONTENT, "a": np.zeros(2**20)})
    monkeypatch.setattr(recording, "MAX_ARRAYS", 2**20)
    refused(tmp_path / "r", "bytes of arrays exceed the limit")
    forge(tmp_path / "r", b" " * 2**20)
    monkeypatch.setattr(recording, "MAX_JSON", 2**16)
    refused(tmp_path / "r", "bytes of manifest exceed the limit")


def test_repeated_or_differently_compressed_members_are_rejected(tmp_path):
    """Other readers might read another member, or none."""
    forge(tmp_path / "r", MANIFEST)
    with zipfile.ZipFile(tmp_path / "r", "a") as archive:
        archive.writestr("manifest", b"")
    refused(tmp_path / "r", "repeated")
    forge(tmp_path / "r", MANIFEST)
    with zipfile.ZipFile(tmp_path / "r", "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("more.npy", b"x" * 100)
    refused(tmp_path / "r", "unknown compression method")


def npy(header: str, data: bytes = b"") -> bytes:
    """Return an .npy file with the given header."""
    text = f"{header}\n".encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}", b"1234"), "EOF"),
        (
            npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"12345"),
            "not purely numeric",
        ),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2**60,)}"), "cannot be read"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**60},)}}"), "cannot be read"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), "cannot be read"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"x"), "allow_pickle"),
        (npy("{'descr': '|S9', 'fortran_order': False, 'shape': (0,)}"), "not purely numeric"),
        (npy("{'descr': '|b1', 'fortran_order': False, 'shape': (1,)}", b"\2"), "other than 0 and"),
        (npy("[" * 5000), "cannot be read"),
        (npy("__import__('os').abort()"), "cannot be read"),
        (b"not an array", "cannot be read"),
    ],
)
def test_a_forged_array_is_rejected(tmp_path, content, message):
    """No code, no objects, and exactly as many bytes as declared."""
    forge(tmp_path / "r", MANIFEST, more=content)
    refused(tmp_path / "r", message)


def test_pickled_objects_are_not_loaded(tmp_path):
    """Reading a recording executes none of its content."""

    class Evil:
        def __reduce__(self):
            return os.abort, ()

    forge(tmp_path / "r", MANIFEST, {**CONTENT, "a": np.array([Evil()])})
    refused(tmp_path / "r", "allow_pickle")


@pytest.mark.parametrize(
    "change",
    [
        {"cases": 9},
        {"cases": -1},
        {"cases": 10**9},
        {"cases": 3.5},
        {"steps": 10**9},
        {"shapes": [[4, 2], [5, 1]]},
        {"shapes": [[4]]},
        {"shapes": []},
        {"trees": [{"state": {"containers": "*", "leaves": [["params/u", "float32", [1]]]}}]},
        {"trees": [{"state": {"containers": "*", "leaves": [["params/w", "float32", [9]]]}}]},
        {"trees": [7]},
        {"dtypes": {"absent": "bfloat16"}},
        {"dtypes": {"shape0/case/x": "object"}},
        {"dtypes": {"shape0/case/x": "__file__"}},
        {"dtypes": {"shape0/case/x": "float8_e9m9"}},
        {"laws": []},
        {"laws": {"a": {"status": 1, "residual": None}}},
        {"laws": {"a": {"status": "held"}}},
        {"influence": {"matrix": {"params": 1}}},
        {"influence": {"matrix": []}},
        {"costs": {"run_time": "fast"}},
        {"versions": {"jax": 1}},
        {"notes": [1]},
    ],
    ids=str,
)
def test_an_inconsistent_manifest_is_rejected(tmp_path, change):
    """Only recordings of a step reach the comparison."""
    forge(tmp_path / "r", {**MANIFEST, **change})
    refused(tmp_path / "r")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "manifest is invalid"),
        (b"[]", "manifest is invalid"),
        (b"{}", "missing required field `content`"),
        (b'{"content": 99}', "version 99, not 2; record again"),
        (b'{"content": 2}', "missing required field"),
        (json.dumps(MANIFEST).encode()[:-1], "truncated"),
        (json.dumps({**MANIFEST, "costs": {"a": float("nan")}}).encode(), "manifest is invalid"),
        (b'{"content": 2, "seed": ' + b"9" * 9999 + b"}", "manifest is invalid"),
        (b'{"content": 2, "a": ' + b"[" * 99_999, "manifest is invalid"),
        (b'{"content": 2, "subject": "\xff"}', "manifest is invalid"),
    ],
)
def test_an_invalid_manifest_is_rejected(tmp_path, text, message):
    """It must be JSON and complete."""
    forge(tmp_path / "r", text)
    refused(tmp_path / "r", message)


@given(st.binary(max_size=200))
def test_any_manifest_gives_a_recording_or_a_recording_error(tmp_path_factory, text):
    """No other exception is raised, whatever the bytes."""
    path = tmp_path_factory.getbasetemp() / "noise.bnv"
    forge(path, text)
    refused(path)


def test_a_write_that_fails_leaves_the_old_recording(sample, tmp_path, monkeypatch):
    """A full disk costs no recording, and leaves no half of one beside it."""
    old = sample.read_bytes()

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RecordingError, match="No space left"):
        write(sample, MANIFEST, {**CONTENT, "more": np.ones(2)})
    assert [entry.name for entry in sample.parent.iterdir()] == [sample.name]
    assert sample.read_bytes() == old


def test_a_link_to_a_recording_stays_a_link(tmp_path):
    """The file that the link names is written, with the rights of any other file."""
    (tmp_path / "plain").touch()
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link", MANIFEST, CONTENT)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_module_loads_without_jax():
    """Recordings are read where no jax is, and quickly."""
    code = "import sys, bnverify.upgrade.recording; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

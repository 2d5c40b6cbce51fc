"""The recording's container: what goes in comes out to the bit, and nothing else comes out."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import zlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bnverify.upgrade import recording_file
from bnverify.upgrade.recording_file import RecordingError, read, write

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.complex_number_dtypes(sizes=(64, 128)),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, SHAPES))
NAMES = st.text(max_size=20)
MANIFESTS = st.dictionaries(
    st.text(), st.none() | st.integers(-9, 9) | st.text() | st.lists(st.floats(0, 1))
)
EXTENDED = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4]


@pytest.fixture
def sample(tmp_path):
    """A recording of about a kilobyte, of every kind of content."""
    rng = np.random.default_rng(0)
    arrays = {
        "params/Dense_0/kernel": rng.normal(size=(8, 16)).astype(np.float32),
        "batch_stats/mean": rng.normal(size=16).astype(ml_dtypes.bfloat16),
        "flags": np.array([True, False]),
        "loss": np.float32(0.5),
        "nothing": np.zeros((0, 3)),
    }
    path = tmp_path / "sample.bnv"
    write(path, {"versions": {"jax": "0.10.2"}, "laws": ["held"] * 20}, arrays)
    return path


def forged(document: bytes, data: bytes = b"", *, arrays_size: int | None = None) -> bytes:
    """Return a file whose checksum is right whatever it holds, as an attacker would make it."""
    stream = zlib.compress(document + data)
    size = len(data) if arrays_size is None else arrays_size
    sizes = b" %d %d %d" % (len(stream), len(document), size)
    digest = hashlib.sha256(sizes + stream).hexdigest().encode()
    return b"bnverify-recording 1%s %s\n" % (sizes, digest) + stream


# What goes in comes out


@given(MANIFESTS, st.dictionaries(NAMES, ARRAYS, max_size=4))
def test_a_recording_survives_the_round_trip_to_the_bit(tmp_path_factory, manifest, arrays):
    """Every dtype, shape and bit pattern is read back as it was written."""
    path = tmp_path_factory.getbasetemp() / "round_trip.bnv"
    write(path, manifest, arrays)
    manifest_back, arrays_back = read(path)
    assert manifest_back == manifest
    assert arrays_back.keys() == arrays.keys()
    for name, array in arrays.items():
        back = arrays_back[name]
        assert (back.dtype, back.shape) == (array.dtype.newbyteorder("="), array.shape)
        assert back.tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()
        assert back.flags.writeable


@pytest.mark.parametrize("dtype", EXTENDED)
def test_the_dtypes_of_ml_dtypes_survive(tmp_path, dtype):
    """bfloat16 and its kin keep their dtype and their bits, not-a-number among them."""
    array = np.array([0, 1, -2, 3.5, np.nan if dtype is not ml_dtypes.int4 else 0]).astype(dtype)
    write(tmp_path / "r", {}, {"a": array, "scalar": array[1], "empty": array[:0]})
    back = read(tmp_path / "r")[1]
    assert back["a"].dtype == array.dtype
    assert back["a"].tobytes() == array.tobytes()
    assert back["scalar"].shape == ()
    assert back["empty"].shape == (0,)


def test_not_a_number_keeps_its_payload(tmp_path):
    """NaNs differ in their bits, and a comparison to the bit must see it."""
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000], np.uint32)
    write(tmp_path / "r", {}, {"a": bits.view(np.float32)})
    assert read(tmp_path / "r")[1]["a"].view(np.uint32).tolist() == bits.tolist()


def test_layout_in_memory_does_not_matter(tmp_path):
    """Transposed, strided and big-endian arrays are written by their values."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write(tmp_path / "a", {}, {"x": array.T[::2]})
    write(tmp_path / "b", {}, {"x": np.ascontiguousarray(array.T[::2]).astype(">f4")})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_same_content_is_the_same_bytes(tmp_path):
    """Neither the clock nor the order of the names is in the file."""
    a, b = np.ones(3), np.zeros(2)
    write(tmp_path / "a", {"p": 1, "q": 2}, {"a": a, "b": b})
    write(tmp_path / "b", {"q": 2, "p": 1}, {"b": b, "a": a})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_of_the_same_content_is_left_alone(tmp_path):
    """Another zlib compresses to other bytes; under version control that must be no change."""
    path = tmp_path / "r"
    other = forged(b'{"arrays":[],"manifest":{"a":"' + b"a" * 500 + b'"}}')
    path.write_bytes(other)
    write(path, {"a": "a" * 500}, {})
    assert path.read_bytes() == other
    write(path, {"a": "b" * 500}, {})
    assert path.read_bytes() != other


def test_a_recording_is_compressed(tmp_path):
    """Manifests repeat themselves; the file does not."""
    write(tmp_path / "r", {"laws": ["held"] * 10_000}, {})
    assert (tmp_path / "r").stat().st_size < 1000


# What cannot be recorded


@pytest.mark.parametrize(
    ("manifest", "arrays", "message"),
    [
        ({"a": float("nan")}, {}, r"recording\['manifest'\]\['a'\] is nan.*put it in an array"),
        ({"a": np.float32(1)}, {}, r"\['a'\] is a float32"),
        ({}, {"a": np.array([object()])}, r"arrays\['a'\] has dtype object"),
        ({}, {"a": np.array(["text"])}, r"arrays\['a'\] has dtype str"),
        ({}, {"a": np.zeros(2, [("f", "f4")])}, r"arrays\['a'\] has dtype void"),
        ({}, {"a": np.zeros((0, 2**40), np.int8)}, "too large to record"),
        ({}, {1: np.zeros(2)}, r"not \[name, dtype, shape\]"),
    ],
)
def test_what_would_not_read_back_is_refused_in_writing(tmp_path, manifest, arrays, message):
    """The message names the file and the value, and no file appears."""
    with pytest.raises(RecordingError, match=message):
        write(tmp_path / "r", manifest, arrays)
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_array_form_is_refused(tmp_path):
    """An object that refuses to become an array, as a typed PRNG key does, is named."""

    class Key:
        def __array__(self, dtype=None, copy=None):
            raise TypeError("a key is no array")

    with pytest.raises(RecordingError, match=r"arrays\['key'\] is no array: a key is no array"):
        write(tmp_path / "r", {}, {"key": Key()})


def test_limits_hold_in_writing(tmp_path, monkeypatch):
    """A recording that could not be read again is not written."""
    monkeypatch.setattr(recording_file, "MAX_ARRAYS", 1000)
    with pytest.raises(RecordingError, match="1600 bytes of arrays, of at most 1000"):
        write(tmp_path / "r", {}, {"a": np.zeros(100), "b": np.zeros(100)})


def test_a_missing_directory_is_one_message(tmp_path):
    """The operating system's words become the reason, with the file's name."""
    with pytest.raises(RecordingError, match=r"cannot write the recording .*absent/r: .*No such"):
        write(tmp_path / "absent" / "r", {}, {})


# What is refused in reading


def test_a_missing_file_is_one_message(tmp_path):
    """The operating system's words become the reason, with the file's name."""
    with pytest.raises(RecordingError, match=r"cannot read the recording .*absent: .*No such file"):
        read(tmp_path / "absent")


def test_what_is_not_a_file_is_refused_at_once(tmp_path):
    """A named pipe would block for ever, a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(RecordingError, match="not a regular file"):
            read(path)


def test_a_giant_file_is_refused_unread(tmp_path):
    """A sparse terabyte costs nothing to make and everything to read."""
    with (tmp_path / "giant").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RecordingError, match="more than any recording takes"):
        read(tmp_path / "giant")


def test_truncation_at_every_byte_is_refused(sample, tmp_path):
    """A file cut anywhere is refused, and told from one that never was a recording."""
    whole = sample.read_bytes()
    cut = tmp_path / "cut"
    for size in range(len(whole)):
        cut.write_bytes(whole[:size])
        with pytest.raises(RecordingError, match="truncated"):
            read(cut)


def test_every_flipped_bit_is_refused(sample, tmp_path):
    """All bits of the first line, and a sample of the others: none can change unnoticed."""
    whole = sample.read_bytes()
    first_line = 8 * whole.index(b"\n") + 8
    later = random.Random(0).sample(range(first_line, 8 * len(whole)), 1000)
    flipped = tmp_path / "flipped"
    for bit in [*range(first_line), *later]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        flipped.write_bytes(damaged)
        with pytest.raises(RecordingError, match="cannot read the recording"):
            read(flipped)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"PK\x03\x04", "not a bnverify recording"),
        (b"bnverify-recordings are\n", "not a bnverify recording"),
        (b"bnverify-recording 2 anything\n", "format 2, and this bnverify reads format 1"),
        (b"bnverify-recording 1 1 1 1 abc\n", "first line is damaged"),
        (b"bnverify-recording 1 9 1 9999999999 " + b"0" * 64 + b"\n", "of at most"),
        (b"bnverify-recording 1 9 9999999999 1 " + b"0" * 64 + b"\n", "of at most"),
        (forged(b"{}") + b"x", "1 bytes follow its end"),
    ],
)
def test_what_is_no_recording_of_this_format_is_refused(tmp_path, data, message):
    """Each refusal says what the file is instead."""
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(RecordingError, match=message):
        read(tmp_path / "r")


def test_a_bomb_is_refused_before_it_grows(tmp_path):
    """A small file that unpacks to more than it declares is stopped at what it declared."""
    stream = zlib.compress(bytes(2**26))
    sizes = b" %d 10 10" % len(stream)
    digest = hashlib.sha256(sizes + stream).hexdigest().encode()
    (tmp_path / "r").write_bytes(b"bnverify-recording 1%s %s\n" % (sizes, digest) + stream)
    with pytest.raises(RecordingError, match="not the declared size"):
        read(tmp_path / "r")


@pytest.mark.parametrize("stream", [b"no zlib", zlib.compress(b"abc")[:-4], zlib.compress(b"a")])
def test_a_stream_that_does_not_unpack_is_refused(tmp_path, stream):
    """A right checksum over a wrong stream is still wrong."""
    sizes = b" %d 3 0" % len(stream)
    digest = hashlib.sha256(sizes + stream).hexdigest().encode()
    (tmp_path / "r").write_bytes(b"bnverify-recording 1%s %s\n" % (sizes, digest) + stream)
    with pytest.raises(RecordingError, match=r"does not decompress|not the declared size"):
        read(tmp_path / "r")


@pytest.mark.parametrize(
    ("document", "data", "message"),
    [
        (b"[]", b"", "not an object of arrays and manifest"),
        (b'{"arrays":[],"manifest":{},"more":1}', b"", "not an object of arrays and manifest"),
        (b'{"arrays":{},"manifest":{}}', b"", "not a list"),
        (b'{"arrays":[],"manifest":[]}', b"", "not an object"),
        (b'{"arrays":[["a","int8"]],"manifest":{}}', b"", r"not \[name, dtype, shape\]"),
        (b'{"arrays":[[1,"int8",[]]],"manifest":{}}', b"", r"not \[name, dtype, shape\]"),
        (b'{"arrays":["abc"],"manifest":{}}', b"", r"not \[name, dtype, shape\]"),
        (b'{"arrays":[["a","int8",[-1]]],"manifest":{}}', b"", "impossible shape"),
        (b'{"arrays":[["a","int8",[true]]],"manifest":{}}', b"", "impossible shape"),
        (b'{"arrays":[["a","int8",[1.0]]],"manifest":{}}', b"", "impossible shape"),
        (b'{"arrays":[["a","int8",[' + b"1," * 40 + b'1]]],"manifest":{}}', b"", "impossible"),
        (b'{"arrays":[["a","int8",[99999999999]]],"manifest":{}}', b"", "too large"),
        (b'{"arrays":[["a","int8",[0,99999999999]]],"manifest":{}}', b"", "too large"),
        (b'{"arrays":[["a","object",[1]]],"manifest":{}}', b"12345678", "unknown dtype 'object'"),
        (b'{"arrays":[["a","__file__",[1]]],"manifest":{}}', b"1", "unknown dtype"),
        (b'{"arrays":[["a","float8_e9m9",[1]]],"manifest":{}}', b"1", "newer ml_dtypes"),
        (b'{"arrays":[["a","int8",[2]]],"manifest":{}}', b"1", "beyond the data"),
        (b'{"arrays":[["a","int8",[1]]],"manifest":{}}', b"12", "belong to no array"),
        (b'{"arrays":[["a","bool",[1]]],"manifest":{}}', b"\x02", "neither 0 nor 1"),
        (b'{"arrays":[["a","int8",[0]],["a","int8",[0]]],"manifest":{}}', b"", "repeated"),
        (b'{"arrays":[["b","int8",[0]],["a","int8",[0]]],"manifest":{}}', b"", "out of order"),
        (b'{"arrays":[],"manifest":{},"manifest":{}}', b"", "repeated key"),
        (b'{"arrays":[],"manifest":{"a":NaN}}', b"", "NaN"),
        (b'{"arrays":[],"manifest":{"a":' + b"9" * 99 + b"}}", b"", "an integer of 99"),
        (b'{"arrays":[],"manifest":{"a":' + b"[" * 99_999, b"", "nested deeper"),
    ],
)
def test_a_forged_recording_is_refused(tmp_path, document, data, message):
    """A right checksum is no proof of good faith: every field is checked."""
    (tmp_path / "r").write_bytes(forged(document, data))
    with pytest.raises(RecordingError, match=message):
        read(tmp_path / "r")


@given(st.binary(max_size=200), st.binary(max_size=8))
def test_no_content_escapes_the_one_exception(tmp_path_factory, document, data):
    """Whatever the bytes, the answer is a recording or a RecordingError."""
    path = tmp_path_factory.getbasetemp() / "noise.bnv"
    path.write_bytes(forged(document, data))
    with pytest.raises(RecordingError):
        read(path)


def test_the_module_loads_without_jax():
    """Recordings are read where no jax is, and quickly."""
    code = "import sys, bnverify.upgrade.recording_file; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

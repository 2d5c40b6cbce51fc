"""A recording on disk: one JSON manifest and named arrays in one file.

    write("step.bnv", {"seed": 1}, {"x": x})
    manifest, arrays = read("step.bnv")

The file is one ASCII line and one zlib stream:

    bnverify-recording 1 <payload bytes> <JSON bytes> <array bytes> <sha256>\\n
    zlib( JSON  +  the arrays' bytes, in the order of their names )

where JSON is {"arrays": [[name, dtype, shape], ...], "manifest": {...}} with sorted keys, and an
array is its elements in C order, little-endian, bit for bit: NaN payloads, negative zeros and
bfloat16 survive. The sha256 covers the three sizes and the payload. There are no offsets, no member
names and no code in the file, so there is nothing to traverse, overlap or run; every size is
declared before the payload and checked against a limit before anything is allocated.

This module runs where recordings are made: Python 3.9, numpy 1.23, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import socket
import stat
import zlib
from typing import Any, Dict, Iterator, List, Mapping, Tuple, Union

import numpy as np

FORMAT = 1
MAX_JSON = 32 * 2**20  # bytes; a manifest of the reference takes 20 kB
MAX_ARRAYS = 256 * 2**20  # bytes, uncompressed; a recording of the reference takes 1 MB
MAX_DEPTH = 64  # nesting of the manifest
MAX_RANK = 32  # what numpy 1 allows
MAX_DIGITS = 20  # digits of an integer: 64 bits; longer ones take quadratic time to parse

_MAGIC = b"bnverify-recording"
_HEADER = re.compile(
    _MAGIC + rb" ([1-9][0-9]{0,8}) (0|[1-9][0-9]{0,11}) ([1-9][0-9]{0,11}) (0|[1-9][0-9]{0,11})"
    rb" ([0-9a-f]{64})\n"
)
_HEADER_MAX = 160
_NUMPY_DTYPES = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64"
    " float16 float32 float64 complex64 complex128".split()
)
# One byte an element but bfloat16's two. An allow-list, so that a name in a file is never looked up
# in a module unless it is known to be a dtype.
_ML_DTYPES = frozenset(
    "bfloat16 int2 int4 uint2 uint4 float4_e2m1fn float6_e2m3fn float6_e3m2fn float8_e3m4 float8_e4m3"
    " float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"
    " float8_e8m0fnu".split()
)

Path = Union[str, "os.PathLike[str]"]
Arrays = Dict[str, "np.ndarray[Any, Any]"]


class RecordingError(ValueError):
    """A recording cannot be read or written: which file, what is wrong, and the likely mend."""


class _Wrong(Exception):
    """What is wrong and the likely mend, before the file's name is known."""


def write(path: Path, manifest: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write a recording; after a crash at any moment the old file or the new one is there, whole.

    Where the file already holds the same content it is left alone: compressed bytes differ between
    zlib and zlib-ng, and a recording under version control must not change when nothing did.

    Args:
        path: the file; its directory must exist.
        manifest: JSON values: dict with str keys, list, str, bool, None, finite float, 64-bit int.
            A float that may be NaN or infinite belongs in an array.
        arrays: name -> anything `np.asarray` takes, of any shape, with a dtype of numpy's or
            ml_dtypes's numbers.

    Raises:
        RecordingError: a value has no place in a recording, or the file cannot be written.
    """
    try:
        header, payload, content = _encode(manifest, arrays)
        with contextlib.suppress(_Wrong, OSError):
            if _content(_bytes(path)) == content:
                return
        _replace(os.path.realpath(path), header + payload)
    except (_Wrong, OSError) as error:
        raise RecordingError(f"cannot write the recording {os.fspath(path)}: {error}") from None


def read(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Return the manifest and the arrays of a recording, the arrays writeable and owned.

    Raises:
        RecordingError: the file is missing, truncated, altered, of another format, or hostile.
    """
    try:
        size, raw = _content(_bytes(path))
        return _decode(raw[:size], memoryview(raw)[size:])
    except (_Wrong, OSError) as error:
        raise RecordingError(f"cannot read the recording {os.fspath(path)}: {error}") from None


# Writing


def _encode(
    manifest: Mapping[str, Any], arrays: Mapping[str, Any]
) -> tuple[bytes, bytes, tuple[int, bytes]]:
    table: List[Tuple[str, str, List[int]]] = []
    blobs: List[bytes] = []
    for name in sorted(arrays):
        try:
            array = np.asarray(arrays[name])
        except (TypeError, ValueError) as error:
            raise _Wrong(f"arrays[{name!r}] is no array: {error}") from None
        dtype = array.dtype.name
        if dtype not in _NUMPY_DTYPES and dtype not in _ML_DTYPES:
            raise _Wrong(f"arrays[{name!r}] has dtype {dtype}; it must be a number or a bool")
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        table.append((name, dtype, list(array.shape)))
        blobs.append(array.tobytes())
    document = {"arrays": table, "manifest": dict(manifest)}
    _check(document)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    raw = text + b"".join(blobs)
    _limits(len(text), len(raw) - len(text))
    payload = zlib.compress(raw, 9)
    sizes = b"%d %d %d" % (len(payload), len(text), len(raw) - len(text))
    digest = hashlib.sha256(sizes + payload).hexdigest().encode()
    return b"%s %d %s %s\n" % (_MAGIC, FORMAT, sizes, digest), payload, (len(text), raw)


def _replace(path: str, data: bytes) -> None:
    """Write beside the file, then rename; a killed writer's leavings go with the next write."""
    directory, name = os.path.split(path)
    host = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())
    prefix = f".{name}.{host}-"
    for other in _abandoned(directory, prefix):
        with contextlib.suppress(OSError):
            os.unlink(other)
    temporary = os.path.join(directory, f"{prefix}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        # Not tempfile: its files are 0600, and a recording is shared like any other source file.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _abandoned(directory: str, prefix: str) -> Iterator[str]:
    if os.name != "posix":  # os.kill(pid, 0) asks nothing on Windows: it interrupts
        return
    for name in os.listdir(directory or "."):
        owner = re.fullmatch(re.escape(prefix) + r"([0-9]{1,9})-[0-9a-f]{8}\.tmp", name)
        if owner:
            try:
                os.kill(int(owner[1]), 0)
            except ProcessLookupError:
                yield os.path.join(directory, name)
            except OSError:
                pass  # alive, and somebody else's


# Reading


def _bytes(path: Path) -> bytes:
    status = os.stat(path)  # before opening: a pipe would block
    if not stat.S_ISREG(status.st_mode):
        raise _Wrong("it is not a regular file")
    if status.st_size > _HEADER_MAX + MAX_JSON + MAX_ARRAYS:
        raise _Wrong(f"its {status.st_size} bytes are more than any recording takes")
    with open(path, "rb") as file:
        return file.read()


def _content(data: bytes) -> tuple[int, bytes]:
    """Check the header and the digest; return the JSON's size and the uncompressed content."""
    again = "; record again, or take the file from where it was made"
    if not data:
        raise _Wrong("the file is empty" + again)
    line = data[: data.find(b"\n", 0, _HEADER_MAX) + 1]
    if not data.startswith(_MAGIC + b" "):
        if _MAGIC.startswith(data):
            raise _Wrong("the file is truncated in its first line" + again)
        raise _Wrong("it is not a bnverify recording; `bnverify record -o FILE` makes one")
    version = re.match(_MAGIC + rb" ([0-9]{1,9}) ", data)
    if version and int(version[1]) != FORMAT:
        raise _Wrong(
            f"it has format {int(version[1])}, and this bnverify reads format {FORMAT};"
            " record again with this bnverify, or read it with the one that wrote it"
        )
    if not line:
        raise _Wrong("the file is truncated in its first line" + again)
    fields = _HEADER.fullmatch(line)
    if not fields:
        raise _Wrong("its first line is damaged" + again)
    payload = data[len(line) :]
    declared, text, blob = (int(fields[i]) for i in (2, 3, 4))
    _limits(text, blob)
    if len(payload) < declared:
        raise _Wrong(f"the file is truncated: {len(payload)} of {declared} bytes are there" + again)
    if len(payload) > declared:
        raise _Wrong(f"{len(payload) - declared} bytes follow the end of the recording" + again)
    sizes = b"%d %d %d" % (declared, text, blob)
    if hashlib.sha256(sizes + payload).hexdigest().encode() != fields[5]:
        raise _Wrong("its content does not match its checksum: it was altered" + again)
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(payload, text + blob + 1)
    except zlib.error as error:
        raise _Wrong(f"its content does not decompress ({error})" + again) from None
    if len(raw) != text + blob or not stream.eof or stream.unused_data:
        raise _Wrong("its content is not of the declared size" + again)
    return text, raw


def _limits(text: int, blob: int) -> None:
    for what, size, limit in (("manifest", text, MAX_JSON), ("arrays", blob, MAX_ARRAYS)):
        if size > limit:
            raise _Wrong(f"{what} of {size} bytes: at most {limit}; record fewer or smaller cases")


def _decode(text: bytes, blob: memoryview) -> tuple[dict[str, Any], Arrays]:
    document = _parse(text)
    if not isinstance(document, dict) or sorted(document) != ["arrays", "manifest"]:
        raise _Wrong("its JSON is not {arrays, manifest}")
    table, manifest = document["arrays"], document["manifest"]
    if not isinstance(manifest, dict) or not isinstance(table, list):
        raise _Wrong("its manifest is no object, or its array table no list")
    arrays: Arrays = {}
    names: List[str] = []
    start = 0
    for row in table:
        name, dtype, shape = _row(row)
        end = start + math.prod(shape) * dtype.itemsize
        if end > len(blob):
            raise _Wrong(f"array {name!r} reaches beyond the end of the data")
        piece = blob[start:end]
        if dtype == np.bool_ and max(piece, default=0) > 1:
            raise _Wrong(f"array {name!r} is bool and holds a byte other than 0 and 1")
        array = np.frombuffer(bytearray(piece), np.uint8).view(dtype)
        arrays[name] = array.reshape(shape)
        names.append(name)
        start = end
    if start != len(blob):
        raise _Wrong(f"{len(blob) - start} bytes belong to no array")
    if names != sorted(set(names)):
        raise _Wrong("its arrays are repeated or out of order")
    return manifest, arrays


def _row(row: object) -> tuple[str, np.dtype[Any], list[int]]:
    if not isinstance(row, list) or len(row) != 3:
        raise _Wrong("a row of its array table is not [name, dtype, shape]")
    name, dtype, shape = row
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise _Wrong("a row of its array table is not [name, dtype, shape]")
    if len(shape) > MAX_RANK or any(type(n) is not int or n < 0 for n in shape):
        raise _Wrong(f"array {name!r} has the shape {shape!r:.80}")
    if math.prod(max(n, 1) for n in shape) > MAX_ARRAYS:  # numpy counts a 0 as 1 to size an array
        raise _Wrong(f"array {name!r} of shape {shape!r:.80} is larger than a recording may hold")
    if dtype in _NUMPY_DTYPES:
        return name, np.dtype(dtype), shape
    if dtype not in _ML_DTYPES:
        raise _Wrong(f"array {name!r} has the unknown dtype {dtype!r:.80}")
    try:
        import ml_dtypes  # comes with jax; only needed where a recording holds such an array

        return name, np.dtype(getattr(ml_dtypes, dtype)), shape
    except (ImportError, AttributeError):
        raise _Wrong(f"array {name!r} is {dtype}: install a newer ml_dtypes to read it") from None


# JSON, with everything refused that reads differently elsewhere or costs more than its size


def _parse(text: bytes) -> object:
    try:
        document = json.loads(
            text.decode("ascii"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except RecursionError:
        raise _Wrong(f"its JSON nests deeper than {MAX_DEPTH}") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are two
        raise _Wrong(f"its JSON does not parse ({error})") from None
    _check(document)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Wrong("its JSON repeats a key")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Wrong(f"its JSON holds an integer of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Wrong("its JSON holds a number beyond float64")
    return value


def _constant(name: str) -> float:
    raise _Wrong(f"its JSON holds {name}")


def _check(document: object) -> None:
    """Refuse what would not read back as it was: the same law for writing and for reading."""
    todo: List[Tuple[str, object, int]] = [("", document, 0)]
    while todo:
        where, value, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise _Wrong(f"its JSON nests deeper than {MAX_DEPTH}")
        if isinstance(value, dict):
            for key, item in value.items():
                _check_text(where, key)
                todo.append((f"{where}[{key!r}]" if depth < 4 else where, item, depth + 1))
        elif isinstance(value, (list, tuple)):
            todo += [(where, item, depth + 1) for item in value]
        elif isinstance(value, str):
            _check_text(where, value)
        elif isinstance(value, bool) or value is None:
            pass
        elif isinstance(value, int):
            if not -(2**63) <= value < 2**64:
                raise _Wrong(f"{where} is an integer beyond 64 bits")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise _Wrong(f"{where} is {value}: JSON has none; put it in an array")
        else:
            raise _Wrong(f"{where} is a {type(value).__name__}: not a JSON value")


def _check_text(where: str, text: object) -> None:
    if not isinstance(text, str):
        raise _Wrong(f"{where} has a key that is a {type(text).__name__}: keys are str")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Wrong(f"{where} holds half a surrogate pair: no text") from None

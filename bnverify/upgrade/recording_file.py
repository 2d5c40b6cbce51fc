"""A recording on disk: a JSON manifest and named arrays in one file.

    write("step.bnv", {"seed": 1}, {"x": x})
    manifest, arrays = read("step.bnv")

The file is one ASCII line and one zlib stream:

    bnverify-recording 1 <stream bytes> <JSON bytes> <array bytes> <sha256>
    zlib(JSON, then the arrays' elements, in the order of the arrays' names)

The JSON is {"arrays": [[name, dtype, shape], ...], "manifest": {...}}. An array is its elements in
C order, little-endian, bit for bit: NaN payloads, negative zeros and bfloat16 survive. The sha256
covers the three sizes and the stream. There are no offsets, member names or code in the file, so
there is nothing to overlap, traverse or run; sizes are declared before the stream, and checked
against limits before anything is allocated.

This module runs where recordings are made: Python 3.9, numpy 1.23, and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import stat
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from bnverify import atomic_file
from bnverify.unusable import cause
from bnverify.upgrade import strict_json
from bnverify.upgrade.strict_json import RefusedError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

FORMAT = 1
MAX_JSON = 32 * 2**20  # bytes
MAX_ARRAYS = 256 * 2**20  # bytes, uncompressed
MAX_RANK = 32  # what numpy 1 allows

_MAGIC = b"bnverify-recording"
_SIZE = rb" (0|[1-9][0-9]{0,11})"
_HEADER = re.compile(_MAGIC + rb" [0-9]{1,9}" + 3 * _SIZE + rb" ([0-9a-f]{64})\n")
_AGAIN = "; record again, or copy the file anew from where it was made"

# A dtype's name found in a file is looked up in a module only where it is one of these.
_NUMPY_DTYPE = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")
_ML_DTYPE = re.compile(r"bfloat16|u?int[24]|float[468]_e[0-9]m[0-9](b11)?(fn|fnuz|fnu)?")

AnyPath = Union[str, "os.PathLike[str]"]
Array = np.ndarray[Any, Any]


class RecordingError(ValueError):
    """A recording cannot be read or written: which file, what is wrong, and the likely mend."""


def write(path: AnyPath, manifest: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write a recording; whatever interrupts it, the old file or the new one is there, whole.

    Where the file already holds the same content it is left alone: compressed bytes differ between
    zlib and zlib-ng, and a recording under version control must not change when nothing did.

    Args:
        path: the file; its directory must exist.
        manifest: JSON values, see `strict_json`. A float that may be NaN belongs in an array.
        arrays: name -> what `np.asarray` takes, of any shape, its dtype bool or one of numpy's or
            ml_dtypes's numbers.

    Raises:
        RecordingError: a value has no place in a recording, or the file cannot be written.
    """
    try:
        json_size, content = _encode(manifest, arrays)
        with contextlib.suppress(ValueError, OSError):
            if _open(_load(Path(path))) == (json_size, content):
                return
        stream = zlib.compress(content, 9)
        sizes = b" %d %d %d" % (len(stream), json_size, len(content) - json_size)
        digest = hashlib.sha256(sizes + stream).hexdigest().encode()
        header = b"%s %d%s %s\n" % (_MAGIC, FORMAT, sizes, digest)
        atomic_file.write(Path(path), header + stream)
    except (ValueError, OSError) as error:
        raise RecordingError(f"cannot write the recording {path}: {error}") from None


def read(path: AnyPath) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the manifest and the arrays of a recording, the arrays owned and writeable.

    Raises:
        RecordingError: the file is missing, truncated, altered, of another format, or hostile.
    """
    try:
        json_size, content = _open(_load(Path(path)))
        return _decode(content[:json_size], memoryview(content)[json_size:])
    except (ValueError, OSError) as error:
        raise RecordingError(f"cannot read the recording {path}: {cause(error)}") from None


# Writing


def _encode(manifest: Mapping[str, Any], arrays: Mapping[str, Any]) -> tuple[int, bytes]:
    table = []
    blobs = []
    for name in sorted(arrays, key=str):
        try:
            array = np.asarray(arrays[name])
        except TypeError as error:  # a typed PRNG key, say
            raise RefusedError(f"arrays[{name!r}] is no array: {error}") from None
        dtype = array.dtype.name
        if not (_NUMPY_DTYPE.fullmatch(dtype) or _ML_DTYPE.fullmatch(dtype)):
            raise RefusedError(f"arrays[{name!r}] has dtype {dtype}; it must be bool or a number")
        if array.dtype.byteorder == ">":
            array = array.astype(array.dtype.newbyteorder("<"))
        row = [name, dtype, list(array.shape)]
        _row(row)
        table.append(row)
        blobs.append(array.tobytes())
    document = strict_json.dump({"arrays": table, "manifest": dict(manifest)}, "recording")
    content = document + b"".join(blobs)
    _limits(len(document), len(content) - len(document))
    return len(document), content


# Reading


def _load(path: Path) -> bytes:
    status = path.stat()  # before opening it: a pipe would block
    if not stat.S_ISREG(status.st_mode):
        raise RefusedError("it is not a regular file")
    if status.st_size > MAX_JSON + MAX_ARRAYS + 2**20:
        raise RefusedError(f"its {status.st_size} bytes are more than any recording takes")
    return path.read_bytes()


def _open(data: bytes) -> tuple[int, bytes]:
    """Check header and checksum; return the JSON's size and the uncompressed content."""
    header, line_end, stream = data.partition(b"\n")
    if _MAGIC.startswith(data[: len(_MAGIC)]) and not line_end:
        raise RefusedError("it is truncated in its first line, or empty" + _AGAIN)
    version = re.match(_MAGIC + rb" ([0-9]{1,9}) ", header)
    if not version:
        raise RefusedError("it is not a bnverify recording; `bnverify record -o FILE` makes one")
    if int(version[1]) != FORMAT:
        raise RefusedError(
            f"it has format {int(version[1])}, and this bnverify reads format {FORMAT};"
            " record again with this bnverify, or read it with the one that wrote it"
        )
    fields = _HEADER.fullmatch(header + line_end)
    if not fields:
        raise RefusedError("its first line is damaged" + _AGAIN)
    declared, json_size, arrays_size = (int(fields[i]) for i in (1, 2, 3))
    _limits(json_size, arrays_size)
    if len(stream) < declared:
        raise RefusedError(f"it is truncated: {len(stream)} of {declared} bytes are there" + _AGAIN)
    if len(stream) > declared:
        raise RefusedError(f"{len(stream) - declared} bytes follow its end" + _AGAIN)
    sizes = b" %d %d %d" % (declared, json_size, arrays_size)
    if hashlib.sha256(sizes + stream).hexdigest().encode() != fields[4]:
        raise RefusedError("it was altered: its content does not match its checksum" + _AGAIN)
    total = json_size + arrays_size
    unpack = zlib.decompressobj()
    try:
        content = unpack.decompress(stream, total + 1)
    except zlib.error as error:
        raise RefusedError(f"its content does not decompress ({error})" + _AGAIN) from None
    if len(content) != total or not unpack.eof or unpack.unused_data:
        raise RefusedError("its content has not the declared size" + _AGAIN)
    return json_size, content


def _limits(json_size: int, arrays_size: int) -> None:
    for what, size, most in (
        ("manifest", json_size, MAX_JSON),
        ("arrays", arrays_size, MAX_ARRAYS),
    ):
        if size > most:
            raise RefusedError(f"{size} bytes of {what}, of at most {most}; record fewer cases")


def _decode(text: bytes, data: memoryview) -> tuple[dict[str, Any], dict[str, Array]]:
    document = strict_json.parse(text, "recording")
    if not isinstance(document, dict) or sorted(document) != ["arrays", "manifest"]:
        raise RefusedError("its JSON is not an object of arrays and manifest")
    table, manifest = document["arrays"], document["manifest"]
    if not isinstance(table, list) or not isinstance(manifest, dict):
        raise RefusedError("its table of arrays is not a list, or its manifest not an object")
    arrays: dict[str, Array] = {}
    start = 0
    last = None
    for row in table:
        name, dtype, shape = _row(row)
        if last is not None and name <= last:
            raise RefusedError(f"its array {name!r} is repeated or out of order")
        end = start + math.prod(shape) * dtype.itemsize
        if end > len(data):
            raise RefusedError(f"its array {name!r} reaches beyond the data")
        arrays[name] = np.ndarray(shape, dtype, buffer=bytearray(data[start:end]))
        if dtype == np.bool_ and (arrays[name].view(np.uint8) > 1).any():
            raise RefusedError(f"its array {name!r} is bool, with a byte that is neither 0 nor 1")
        start, last = end, name
    if start != len(data):
        raise RefusedError(f"{len(data) - start} bytes of its data belong to no array")
    return manifest, arrays


def _row(row: object) -> tuple[str, np.dtype[Any], list[int]]:
    """Check one row of the table of arrays, the same way in writing and in reading."""
    if not isinstance(row, list) or len(row) != 3:
        raise RefusedError("a row of its table of arrays is not [name, dtype, shape]")
    name, dtype, shape = row
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise RefusedError("a row of its table of arrays is not [name, dtype, shape]")
    if len(shape) > MAX_RANK or any(type(n) is not int or n < 0 for n in shape):
        raise RefusedError(f"array {name!r:.80} has the impossible shape {shape!s:.80}")
    if math.prod(max(n, 1) for n in shape) > MAX_ARRAYS:  # numpy sizes arrays with 0 as 1
        raise RefusedError(f"array {name!r:.80} has the shape {shape}: too large to record")
    if _NUMPY_DTYPE.fullmatch(dtype):
        return name, np.dtype(dtype), shape
    if not _ML_DTYPE.fullmatch(dtype):
        raise RefusedError(f"array {name!r:.80} has the unknown dtype {dtype!r:.80}")
    try:
        import ml_dtypes  # comes with jax; needed only for a recording that holds such an array

        return name, np.dtype(getattr(ml_dtypes, dtype)), shape
    except (ImportError, AttributeError):
        raise RefusedError(
            f"array {name!r:.80} is {dtype}: reading needs a newer ml_dtypes"
        ) from None

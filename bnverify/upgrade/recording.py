"""A recording: a file with the inputs of a training step and its results.

    write("step.bnv", manifest, arrays)
    recording = read("step.bnv")

The file is an `.npz` archive, also readable with `numpy.load`. Its member `manifest` is JSON text
described by `Manifest`; every other member is an array with a leading axis of cases:

    shape0/case/x, shape0/init/LEAF, shape0/same_stream/LEAF,
    shape0/step1/value/LEAF and shape0/step1/noise/LEAF; and draws/LEAF, see `record`.

NumPy has no bfloat16 or float8: such arrays are stored as unsigned integers with the same bits, and
the manifest names their dtypes. A recording may come from an untrusted source. Reading one executes
none of its content (`allow_pickle=False`), uses no more memory than the limits below, and checks
everything that a comparison relies on.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import msgspec
import numpy as np

from bnverify.errors import UsageError, cause

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTENT = 2
"""The version of the format; version 1 was not an `.npz` archive."""

MAX_JSON = 32 * 2**20  # bytes
MAX_ARRAYS = 256 * 2**20  # bytes, uncompressed
MAX_MEMBERS = 65_535  # the limit of an archive without zip64

_BITS = {1: np.uint8, 2: np.uint16}
_ML_DTYPE = re.compile(r"bfloat16|u?int[24]|float[468]_e[0-9]m[0-9](b11)?(fn|fnuz|fnu)?")
_AGAIN = "record again, or copy the original file again"


class Tree(TypedDict):
    """A pytree: the nesting of its containers, and [path, dtype, shape] of each leaf, in order."""

    containers: str
    leaves: list[tuple[str, str, list[int]]]


class LawVerdict(TypedDict):
    """The status of a law; the residual is None if it is not a finite number."""

    status: str
    residual: float | None


class Influence(TypedDict, total=False):
    """The influence matrix as in reports; empty if the step was not traced."""

    scope: str
    proved: bool
    matrix: dict[str, list[str]]
    unknown: list[str]


class Manifest(TypedDict):
    """The description of a recording. Counts are limited, so that no file takes long to read."""

    content: int
    bnverify: str
    subject: str
    target: str
    seed: int
    cases: Annotated[int, msgspec.Meta(ge=0, le=4096)]
    steps: Annotated[int, msgspec.Meta(ge=0, le=64)]
    shapes: Annotated[list[tuple[int, int]], msgspec.Meta(max_length=16)]
    trees: Annotated[list[dict[str, Tree]], msgspec.Meta(max_length=16)]
    dtypes: dict[str, str]
    versions: dict[str, str]
    python: str
    machine: str
    flags: dict[str, bool | int | str | None]
    errors: dict[str, str]
    laws: dict[str, LawVerdict]
    influence: Influence
    costs: dict[str, float]
    notes: list[str]
    replays: str


class _Version(TypedDict):
    content: int


class RecordingError(UsageError):
    """A recording cannot be read or written; the message names the file, the problem and a fix."""


@dataclass(frozen=True)
class Recording:
    """The content of a recording.

    Attributes:
        manifest: its description.
        arrays: name -> array, see the module.
        source: the file it was read from.
    """

    manifest: Manifest
    arrays: Mapping[str, Any]
    source: str = ""

    @cached_property
    def digest(self) -> str:
        """A hash of the content, independent of compression."""
        total = hashlib.sha256(_text({**self.manifest, "dtypes": {}}))  # arrays include dtypes
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            total.update(f"{name} {array.dtype.name} {array.shape}".encode())
            total.update(array.tobytes())
        return total.hexdigest()

    def under(self, prefix: str) -> dict[str, Any]:
        """Return the arrays named `prefix/REST`, by REST."""
        head = f"{prefix}/"
        return {name[len(head) :]: a for name, a in self.arrays.items() if name.startswith(head)}

    def leaves(self, index: int, tree: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return path -> (dtype, shape) of a tree at the index-th shape, in order."""
        described = self.manifest["trees"][index].get(tree)
        rows = described["leaves"] if described else []
        return {path: (dtype, tuple(shape)) for path, dtype, shape in rows}

    def before(self, index: int, step: int) -> dict[str, Any]:
        """Return path -> values (cases, ...) of the state before a step, in the tree's order."""
        home = f"shape{index}/init" if step == 0 else f"shape{index}/step{step - 1}/value"
        values = self.under(home)
        return {path: values[path] for path in self.leaves(index, "state")}


def write(path: str | os.PathLike[str], manifest: Manifest, arrays: Mapping[str, Any]) -> None:
    """Write a recording atomically: the file is complete, old or new, even if interrupted.

    A file with the same content is left alone: compressed bytes differ between zlib and zlib-ng,
    and a recording under version control should only change if its content does.

    Args:
        path: the file; its directory must exist.
        manifest: the description; its `dtypes` is replaced. Floats that may be NaN must be arrays.
        arrays: name -> anything that `np.asarray` accepts, of any shape, with a bool or numeric
            dtype of NumPy or ml_dtypes.

    Raises:
        RecordingError: a value cannot be stored, or the file cannot be written.
    """
    try:
        kept = {name: _portable(name, value) for name, value in sorted(arrays.items())}
        dtypes = {name: array.dtype.name for name, array in kept.items() if _extended(array.dtype)}
        manifest = {**manifest, "dtypes": dtypes}
        text = _text(msgspec.convert(manifest, Manifest))
        _limit("manifest", len(text), MAX_JSON)
        _limit("arrays", sum(array.nbytes for array in kept.values()), MAX_ARRAYS)
        if _holds(path, Recording(manifest, kept).digest):
            return
        members: dict[str, Any] = {
            name: array.view(_BITS[array.itemsize]) if name in dtypes else array
            for name, array in kept.items()
        }
        file = io.BytesIO()
        np.savez_compressed(file, manifest=np.frombuffer(text, np.uint8), **members)
        _replace(Path(path).resolve(), file.getvalue())  # a link to the file stays one
    except (ValueError, TypeError, OSError, msgspec.ValidationError) as error:
        raise RecordingError(f"cannot write the recording {path}: {cause(error)}") from None


def _replace(path: Path, data: bytes) -> None:
    """Write a file beside ``path``, then rename it: a run that is cut short leaves the old recording."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> Recording:
    """Read a recording; its arrays are writeable.

    Raises:
        RecordingError: the file is missing, damaged, in another format, malicious, or inconsistent.
    """
    try:
        manifest, arrays = _unpack(Path(path))
        recording = Recording(manifest, arrays, str(path))
        if manifest["shapes"] or not manifest["replays"]:  # no shapes: the target did not run
            _check_arrays(recording)
    except OSError as error:
        problem = cause(error)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError) as error:
        problem = f"it is truncated, altered or not a recording ({error}); {_AGAIN}"
    except (ValueError, TypeError, KeyError, MemoryError, msgspec.MsgspecError) as error:
        problem = f"it is inconsistent ({error}); {_AGAIN}"
        if isinstance(error, _InvalidError):
            problem = str(error)
    else:
        return recording
    raise RecordingError(f"cannot read the recording {path}: {problem}")


def without_values(manifest: Manifest) -> Manifest:
    """Return the manifest of a replay in which the target did not run."""
    bare = manifest.copy()
    bare["cases"] = bare["steps"] = 0
    bare["shapes"], bare["trees"] = [], []
    bare["laws"], bare["influence"], bare["costs"] = {}, {}, {}
    return bare


class _InvalidError(ValueError):
    """The message is complete, with the fix."""


def _text(manifest: Any) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _portable(name: str, value: Any) -> np.ndarray[Any, Any]:
    """Return a little-endian array of a dtype that a recording can hold."""
    array = np.asarray(value)
    if name == "manifest" or "\0" in name:
        raise _InvalidError(f"{name!r} is not a valid array name")
    if array.dtype.kind not in "biufc" and not _extended(array.dtype):
        raise _InvalidError(f"{name!r} has dtype {array.dtype.name}; it must be bool or numeric")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(array.shape)


def _extended(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is from ml_dtypes."""
    return _ML_DTYPE.fullmatch(dtype.name) is not None and dtype.itemsize in _BITS


def _limit(what: str, size: int, most: int) -> None:
    if size > most:
        raise _InvalidError(
            f"{size} bytes of {what} exceed the limit of {most}; record fewer cases"
        )


def _holds(path: str | os.PathLike[str], digest: str) -> bool:
    try:
        return read(path).digest == digest
    except RecordingError:
        return False


def _unpack(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Return the manifest and the arrays of a file, each checked on its own."""
    status = path.stat()  # before opening it: a pipe would block
    if not stat.S_ISREG(status.st_mode):
        raise _InvalidError("it is not a regular file")
    if status.st_size > MAX_JSON + MAX_ARRAYS + 2**20:
        raise _InvalidError(f"its size, {status.st_size} bytes, exceeds that of any recording")
    with path.open("rb") as file:
        if file.read(18) == b"bnverify-recording":
            raise _InvalidError("it was written by an earlier bnverify, in format 1; record again")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) != len(archive.infolist()) or len(members) > MAX_MEMBERS:
            raise _InvalidError("it has repeated members, or too many")
        if "manifest" not in members:
            raise _InvalidError("it is not a recording; `bnverify record -o FILE` makes one")
        described = members.pop("manifest")
        _limit("manifest", described.file_size, MAX_JSON)
        _limit("arrays", sum(info.file_size for info in members.values()), MAX_ARRAYS)
        manifest = _manifest(_array(archive, described).tobytes())
        arrays = {name: _array(archive, info) for name, info in members.items()}
    for name, dtype in manifest["dtypes"].items():
        if name not in arrays or not _ML_DTYPE.fullmatch(dtype):
            raise _InvalidError(f"array {name!r:.80} has the unknown dtype {dtype!r:.80}")
        arrays[name] = arrays[name].view(_ml_dtype(dtype))
    return manifest, arrays


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """Return one array; its checksum must match, and nothing may follow it."""
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise _InvalidError(f"array {member.filename!r:.80} has an unknown compression method")
    content = io.BytesIO(archive.read(member))
    array: np.ndarray[Any, Any]
    try:
        array = np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:  # noqa: BLE001 - NumPy may raise anything on a malicious header
        raise _InvalidError(f"array {member.filename!r:.80} cannot be read: {error}") from None
    if content.read(1) or array.dtype.kind not in "biufc":
        raise _InvalidError(f"array {member.filename!r:.80} is not purely numeric")
    if array.dtype == np.bool_ and (array.view(np.uint8) > 1).any():
        raise _InvalidError(
            f"array {member.filename!r:.80} is bool, but has a byte other than 0 and 1"
        )
    return array


def _manifest(text: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(text, type=_Version)["content"]
        if version != CONTENT:
            raise _InvalidError(f"its format is version {version}, not {CONTENT}; record again")
        manifest: Manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _InvalidError(f"its manifest is invalid: {error}; {_AGAIN}") from None
    return manifest


def _ml_dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes  # a dependency of jax; only needed for arrays with such dtypes

    if not hasattr(ml_dtypes, name):
        raise _InvalidError(f"it contains {name}, which needs a newer ml_dtypes")
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


def _check_arrays(recording: Recording) -> None:
    """Raise if an array described by the manifest is missing or has another shape."""
    manifest = recording.manifest
    count = manifest["cases"]
    if len(manifest["trees"]) != len(manifest["shapes"]) or not manifest["shapes"]:
        raise _InvalidError("its manifest does not describe the trees of each shape")
    for index, (rows, features) in enumerate(manifest["shapes"]):
        case = recording.under(f"shape{index}/case")
        expected = {"x": (count, rows, features), "y": (count, rows), "lr": (count,)}
        for name, shape in {**expected, "seed": (count,)}.items():
            _expect(f"case/{name}", case[name], shape)
        init = recording.under(f"shape{index}/init")
        for path, (_, shape) in recording.leaves(index, "state").items():
            _expect(path, init[path], (count, *shape))
        for step in range(manifest["steps"]):
            home = f"shape{index}/step{step}"
            values, noise = recording.under(f"{home}/value"), recording.under(f"{home}/noise")
            for tree in manifest["trees"][index]:
                for path, (_, shape) in recording.leaves(index, tree).items():
                    if tree != "state" and path in values:
                        _expect(path, values[path], (count, *shape))
            for path, array in noise.items():
                _expect(f"noise of {path}", array, values[path].shape)


def _expect(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise _InvalidError(f"{name} has shape {array.shape}, not {shape}; {_AGAIN}")

"""A recording: one file that holds what a training step was given and what came out of it.

    write("step.bnv", manifest, arrays)
    recording = read("step.bnv")

The file is an `.npz` archive, to be read by `numpy.load` too. Its member `manifest` is the bytes of
a JSON text that fits `Manifest`; every other member is an array with one row a case:

    shape0/case/x, shape0/init/LEAF, shape0/same_stream/LEAF,
    shape0/step1/value/LEAF and shape0/step1/noise/LEAF; and draws/LEAF, see `record`.

NumPy has no bfloat16 and no float8: such an array is written as the integers of its bits, and the
manifest names its dtype. A recording may come from anybody. Reading one runs no code of its own
(`allow_pickle=False`), takes no more memory than the limits below, and checks everything that a
comparison relies on.
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
"""The version of the format; 1 was another container."""

MAX_JSON = 32 * 2**20  # bytes
MAX_ARRAYS = 256 * 2**20  # bytes, uncompressed
MAX_MEMBERS = 65_535  # what an archive without zip64 holds

_BITS = {1: np.uint8, 2: np.uint16}
_ML_DTYPE = re.compile(r"bfloat16|u?int[24]|float[468]_e[0-9]m[0-9](b11)?(fn|fnuz|fnu)?")
_AGAIN = "record again, or copy the file anew from where it was made"


class Tree(TypedDict):
    """A pytree: how its containers are nested, and [path, dtype, shape] of each leaf, in order."""

    containers: str
    leaves: list[tuple[str, str, list[int]]]


class LawVerdict(TypedDict):
    """What is known of a law; the residual is None where it is not a finite number."""

    status: str
    residual: float | None


class Influence(TypedDict, total=False):
    """What reaches what, as reports show it; empty where it was not read."""

    scope: str
    proved: bool
    matrix: dict[str, list[str]]
    unknown: list[str]


class Manifest(TypedDict):
    """What a recording says of itself. A file must not decide how long it takes to read."""

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
    """A recording cannot be read or written: which file, what is wrong, and the likely fix."""


@dataclass(frozen=True)
class Recording:
    """A recording's content.

    Attributes:
        manifest: what it says of itself.
        arrays: name -> array, see the module.
        source: the file it was read from.
    """

    manifest: Manifest
    arrays: Mapping[str, Any]
    source: str = ""

    @cached_property
    def digest(self) -> str:
        """A hash of all the content, the same however it was compressed."""
        total = hashlib.sha256(_text({**self.manifest, "dtypes": {}}))  # the arrays have theirs
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            total.update(f"{name} {array.dtype.name} {array.shape}".encode())
            total.update(array.tobytes())
        return total.hexdigest()

    def under(self, prefix: str) -> dict[str, Any]:
        """Return the arrays whose names begin with `prefix/`, by the rest of their names."""
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
    """Write a recording; whatever interrupts it, the old file or the new one is there, whole.

    Where the file already holds the same content it is left alone: compressed bytes differ between
    zlib and zlib-ng, and a recording under version control must not change when nothing did.

    Args:
        path: the file; its directory must exist.
        manifest: what `dtypes` says in it is replaced. A float that may be NaN belongs in an array.
        arrays: name -> what `np.asarray` takes, of any shape; its dtype is bool or a number of
            NumPy's or ml_dtypes's.

    Raises:
        RecordingError: a value has no place in a recording, or the file cannot be written.
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
    """Return the recording in a file, its arrays writeable.

    Raises:
        RecordingError: the file is missing, damaged, of another format, hostile, or its parts do not
            fit together.
    """
    try:
        manifest, arrays = _unpack(Path(path))
        recording = Recording(manifest, arrays, str(path))
        if manifest["shapes"] or not manifest["replays"]:  # without, the target did not run there
            _check_arrays(recording)
    except OSError as error:
        problem = cause(error)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError) as error:
        problem = f"it is truncated or altered, or no recording ({error}); {_AGAIN}"
    except (ValueError, TypeError, KeyError, MemoryError, msgspec.MsgspecError) as error:
        problem = f"its parts do not fit together ({error}); {_AGAIN}"
        if isinstance(error, _RefusedError):
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


class _RefusedError(ValueError):
    """The text says all."""


def _text(manifest: Any) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _portable(name: str, value: Any) -> np.ndarray[Any, Any]:
    """Return a little-endian array of a dtype that a recording can hold."""
    array = np.asarray(value)
    if name == "manifest" or "\0" in name:
        raise _RefusedError(f"no array can be named {name!r}")
    if array.dtype.kind not in "biufc" and not _extended(array.dtype):
        raise _RefusedError(f"{name!r} has dtype {array.dtype.name}; it must be bool or a number")
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(array.shape)


def _extended(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is one of ml_dtypes's."""
    return _ML_DTYPE.fullmatch(dtype.name) is not None and dtype.itemsize in _BITS


def _limit(what: str, size: int, most: int) -> None:
    if size > most:
        raise _RefusedError(f"{size} bytes of {what}, of at most {most}; record fewer cases")


def _holds(path: str | os.PathLike[str], digest: str) -> bool:
    try:
        return read(path).digest == digest
    except RecordingError:
        return False


def _unpack(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """Return the manifest and the arrays of a file, each checked by itself."""
    status = path.stat()  # before opening it: a pipe would block
    if not stat.S_ISREG(status.st_mode):
        raise _RefusedError("it is not a regular file")
    if status.st_size > MAX_JSON + MAX_ARRAYS + 2**20:
        raise _RefusedError(f"its {status.st_size} bytes are more than any recording takes")
    with path.open("rb") as file:
        if file.read(18) == b"bnverify-recording":
            raise _RefusedError("an earlier bnverify wrote it, in format 1; record again")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) != len(archive.infolist()) or len(members) > MAX_MEMBERS:
            raise _RefusedError("its members are repeated, or too many")
        if "manifest" not in members:
            raise _RefusedError("it is not a recording; `bnverify record -o FILE` makes one")
        described = members.pop("manifest")
        _limit("manifest", described.file_size, MAX_JSON)
        _limit("arrays", sum(info.file_size for info in members.values()), MAX_ARRAYS)
        manifest = _manifest(_array(archive, described).tobytes())
        arrays = {name: _array(archive, info) for name, info in members.items()}
    for name, dtype in manifest["dtypes"].items():
        if name not in arrays or not _ML_DTYPE.fullmatch(dtype):
            raise _RefusedError(f"array {name!r:.80} has the unknown dtype {dtype!r:.80}")
        arrays[name] = arrays[name].view(_ml_dtype(dtype))
    return manifest, arrays


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray[Any, Any]:
    """Return one array; its checksum is checked, and so is that nothing follows it."""
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise _RefusedError(f"array {member.filename!r:.80} is compressed in an unknown way")
    content = io.BytesIO(archive.read(member))
    array: np.ndarray[Any, Any]
    try:
        array = np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:  # noqa: BLE001 - whatever NumPy's parser makes of a hostile header
        raise _RefusedError(f"array {member.filename!r:.80} cannot be read: {error}") from None
    if content.read(1) or array.dtype.kind not in "biufc":
        raise _RefusedError(f"array {member.filename!r:.80} is not of numbers alone")
    if array.dtype == np.bool_ and (array.view(np.uint8) > 1).any():
        raise _RefusedError(
            f"array {member.filename!r:.80} is bool, with a byte other than 0 and 1"
        )
    return array


def _manifest(text: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(text, type=_Version)["content"]
        if version != CONTENT:
            raise _RefusedError(f"its content is of version {version}, not {CONTENT}; record again")
        manifest: Manifest = msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _RefusedError(f"its manifest is not that of a recording: {error}; {_AGAIN}") from None
    return manifest


def _ml_dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes  # comes with jax; only a recording that holds such an array needs it

    if not hasattr(ml_dtypes, name):
        raise _RefusedError(f"it holds {name}: reading that needs a newer ml_dtypes")
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


def _check_arrays(recording: Recording) -> None:
    """Raise where an array that the manifest speaks of is missing or has another shape."""
    manifest = recording.manifest
    count = manifest["cases"]
    if len(manifest["trees"]) != len(manifest["shapes"]) or not manifest["shapes"]:
        raise _RefusedError("its manifest describes no trees, or not one a shape")
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
        raise _RefusedError(f"{name} has shape {array.shape}, not {shape}; {_AGAIN}")

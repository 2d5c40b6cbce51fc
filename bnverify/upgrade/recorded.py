"""A recording that was read: what it holds, by name, checked for being one of a training step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify.upgrade import recording_file, strict_json

if TYPE_CHECKING:
    from collections.abc import Mapping

VERSION = 1  # of what the manifest means; the file's own format has another number

_FIELDS: Mapping[str, Any] = {
    "content": int,
    "bnverify": str,
    "subject": str,
    "target": str,
    "seed": int,
    "cases": int,
    "steps": int,
    "shapes": list,
    "trees": list,
    "versions": dict,
    "python": str,
    "machine": str,
    "flags": dict,
    "errors": dict,
    "laws": dict,
    "influence": dict,
    "costs": dict,
    "notes": list,
    "replays": str,
}

_MOST = {"cases": 4096, "steps": 64, "shapes": 16}  # a file must not decide how long we read it


@dataclass(frozen=True)
class Recorded:
    """A recording's content.

    Attributes:
        manifest: see ``bnverify.upgrade.recording``.
        arrays: name -> array. ``shape0/case/x``, ``shape0/init/LEAF``, ``shape0/same_stream/LEAF``,
            ``shape0/step1/value/LEAF`` and ``.../noise/LEAF``, all with one row a case;
            ``draws/LEAF``, see ``bnverify.upgrade.draws``.
        source: the file it was read from.
    """

    manifest: Mapping[str, Any]
    arrays: Mapping[str, Any]
    source: str = ""
    _digest: list[str] = field(default_factory=list, repr=False, compare=False)

    @property
    def digest(self) -> str:
        """A hash of all the content, the same however it was compressed."""
        if not self._digest:
            total = hashlib.sha256(strict_json.dump(dict(self.manifest)))
            for name in sorted(self.arrays):
                array = np.ascontiguousarray(self.arrays[name])
                total.update(f"{name} {array.dtype.name} {array.shape}".encode())
                total.update(array.tobytes())
            self._digest.append(total.hexdigest())
        return self._digest[0]

    def under(self, prefix: str) -> dict[str, Any]:
        """Return the arrays whose names begin with ``prefix/``, by the rest of their names."""
        head = f"{prefix}/"
        return {name[len(head) :]: a for name, a in self.arrays.items() if name.startswith(head)}

    def leaves(self, index: int, tree: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return path -> (dtype, shape) of a tree at the index-th shape, in order."""
        described = self.manifest["trees"][index].get(tree, {"leaves": []})
        return {path: (dtype, tuple(shape)) for path, dtype, shape in described["leaves"]}

    def before(self, index: int, step: int) -> dict[str, Any]:
        """Return path -> values (cases, ...) of the state before a step, in the tree's order."""
        home = f"shape{index}/init" if step == 0 else f"shape{index}/step{step - 1}/value"
        values = self.under(home)
        return {path: values[path] for path in self.leaves(index, "state")}


def read(path: Any) -> Recorded:
    """Return the recording in a file.

    Raises:
        RecordingError: it cannot be read, or is a recording of something else.
    """
    manifest, arrays = recording_file.read(path)
    recorded = Recorded(manifest, arrays, str(path))
    problem = _problem(recorded)
    if problem:
        raise recording_file.RecordingError(f"cannot use the recording {path}: {problem}")
    return recorded


def _problem(recorded: Recorded) -> str:
    """Return why the content is no recording of a training step, or ""."""
    manifest = recorded.manifest
    if manifest.get("content") != VERSION:
        return f"its content is of version {manifest.get('content')!r}, not {VERSION}; record again"
    for name, kind in _FIELDS.items():
        if type(manifest.get(name)) is not kind:
            return f"its manifest has no {name} that is a {kind.__name__}"
    problem = _badly_told(manifest)
    if problem or (manifest["replays"] and not manifest["shapes"]):
        return problem  # without shapes, the target did not run there
    try:
        _check_values(recorded)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"its parts do not fit together ({type(error).__name__}: {error})"
    return ""


def _badly_told(manifest: Mapping[str, Any]) -> str:
    """Return which part of the manifest is too large or not of the form that reports rely on."""
    for name, most in _MOST.items():
        size = manifest[name] if isinstance(manifest[name], int) else len(manifest[name])
        if not 0 <= size <= most:
            return f"its {name} are {size}, and no recording has more than {most}"
    for name in ("versions", "errors", "laws", "influence", "costs", "notes"):
        if not _told(name, manifest[name]):
            return f"its {name} are not what a recording tells"
    return ""


def _told(name: str, value: Any) -> bool:
    """Return whether a part of the manifest that reports show has the form they rely on."""
    if name == "notes":
        return all(type(each) is str for each in value)
    if name == "influence":
        matrix = value.get("matrix", {})
        rows = list(matrix.values()) if type(matrix) is dict else [None]
        return type(value.get("scope", "")) is str and all(
            type(row) is list and all(type(each) is str for each in row) for row in rows
        )
    if name == "laws":
        return all(
            type(each) is dict
            and type(each.get("status")) is str
            and ("residual" in each and type(each["residual"]) in {float, int, type(None)})
            for each in value.values()
        )
    kinds = {float, int} if name == "costs" else {str}
    return all(type(each) in kinds for each in value.values())


def _check_values(recorded: Recorded) -> None:
    """Raise where an array that the manifest speaks of is missing or has another shape."""
    manifest = recorded.manifest
    count = manifest["cases"]
    if len(manifest["trees"]) != len(manifest["shapes"]):
        raise ValueError("as many trees as shapes")
    for index, (rows, features) in enumerate(manifest["shapes"]):
        case = recorded.under(f"shape{index}/case")
        expected = {"x": (count, rows, features), "y": (count, rows), "lr": (count,)}
        for name, shape in {**expected, "seed": (count,)}.items():
            _expect(f"case {name}", case[name], shape)
        init = recorded.under(f"shape{index}/init")
        for path, (_, shape) in recorded.leaves(index, "state").items():
            _expect(path, init[path], (count, *shape))
        for step in range(manifest["steps"]):
            home = f"shape{index}/step{step}"
            values, noise = recorded.under(f"{home}/value"), recorded.under(f"{home}/noise")
            for tree in manifest["trees"][index]:
                for path, (_, shape) in recorded.leaves(index, tree).items():
                    if tree != "state" and path in values:
                        _expect(path, values[path], (count, *shape))
            for path, array in noise.items():
                _expect(f"noise of {path}", array, values[path].shape)


def _expect(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, not {shape}")

"""Ways to save a state, restore it and copy it.

``flax.serialization`` needs a template to restore into: a state of the same structure, here one
that was initialised from another seed, so that a value that is not restored is noticed.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bnverify import flax_module
from bnverify.errors import UsageError
from bnverify.lazy import LazyModule, jax, jnp
from bnverify.parallel.subject import Parallel
from bnverify.subject import State, Subject

serialization: Any = LazyModule("flax.serialization")
ocp: Any = LazyModule("orbax.checkpoint")


@dataclass(frozen=True)
class Way:
    """A way to save and restore.

    Attributes:
        save: (state) -> anything.
        restore: (a template, what ``save`` returned) -> the state.
    """

    save: Callable[[State], Any]
    restore: Callable[[State, Any], Any]


@dataclass(frozen=True)
class CheckpointedSubject:
    """A subject with its user's own way to save and restore.

    Attributes:
        subject: the training step.
        save: (state) -> anything, by value: it must not keep a reference to the state.
        restore: (a state initialised from another seed, what ``save`` returned) -> the state.
        begin: called as each life begins: where checkpoints go to a directory, empty it here.
    """

    subject: Subject
    save: Callable[[State], Any]
    restore: Callable[[State, Any], Any]
    begin: Callable[[], None] | None = None

    @property
    def name(self) -> str:
        """The name of the training step."""
        return self.subject.name


def subject_of(lived: Subject | CheckpointedSubject | Parallel) -> Subject:
    """Return the training step of ``lived``, on one device.

    Raises:
        UsageError: it is none of the three.
    """
    if isinstance(lived, Parallel):
        return lived.single
    given: Any = lived.subject if isinstance(lived, CheckpointedSubject) else lived
    if not isinstance(given, Subject):
        called = type(given).__name__
        raise UsageError(f"a bnverify.Subject is needed, got a {called}{flax_module.advice(given)}")
    return given


def _save_bytes(state: State) -> Any:
    return serialization.to_bytes(state)


def _restore_bytes(template: State, data: Any) -> Any:
    return serialization.from_bytes(template, data)


def _restore_state_dict(template: State, data: Any) -> Any:
    return serialization.from_state_dict(template, data)


def _save_state_dict(state: State) -> Any:
    # By value: a training loop that overwrites its buffers must not reach the checkpoint.
    as_dict = serialization.to_state_dict(state)
    return jax.tree_util.tree_map(lambda leaf: jnp.array(leaf, copy=True), as_dict)


class _Folder:
    """A directory that is removed when nothing refers to it any more."""

    def __init__(self) -> None:
        home = tempfile.mkdtemp(prefix="bnverify-")
        self.path = Path(home) / "state"
        weakref.finalize(self, shutil.rmtree, home, ignore_errors=True)


def _save_orbax(state: State) -> Any:
    folder = _Folder()
    with warnings.catch_warnings():
        # Releases of orbax for jax 0.4 use what that jax deprecates; it says nothing of the state.
        warnings.simplefilter("ignore")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.path, state)
    return folder


def _restore_orbax(template: State, folder: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in _save_orbax
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.path, template)


WAYS: dict[str, Way] = {
    "bytes": Way(_save_bytes, _restore_bytes),
    "state_dict": Way(_save_state_dict, _restore_state_dict),
}
"""The ways of ``flax.serialization``: quick enough to be drawn a hundred times."""

ORBAX = Way(_save_orbax, _restore_orbax)
"""Orbax's own, into a directory on disk: a few tenths of a second each."""


def has_orbax() -> bool:
    """Return whether orbax is installed, and works with this jax.

    orbax 0.11.24 needs ``jax.monitoring.record_scalar``, which jax 0.5.3 lacks; 0.11.0 does not.
    """
    try:
        version = metadata.version("orbax-checkpoint")
    except metadata.PackageNotFoundError:
        return False
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    return numbers <= (0, 11, 0) or hasattr(jax.monitoring, "record_scalar")


def ways(lived: Subject | CheckpointedSubject | Parallel) -> Mapping[str, Way]:
    """Return the ways in which ``lived`` is saved: its own, or the libraries'."""
    if isinstance(lived, CheckpointedSubject):
        return {"own": Way(lived.save, lived.restore)}
    return {**WAYS, "orbax": ORBAX} if has_orbax() else WAYS


def _copied(state: State) -> Any:
    return jax.tree_util.tree_map(jnp.copy, state)


def _put(state: State) -> Any:
    return jax.device_put(state)


def _rebuilt(state: State) -> Any:
    leaves, structure = jax.tree_util.tree_flatten(state)
    return jax.tree_util.tree_unflatten(structure, leaves)


COPIES: dict[str, Callable[[State], Any]] = {
    "jnp.copy": _copied,
    "device_put": _put,
    "unflatten": _rebuilt,
}
"""Ways to copy a state; each keeps everything."""

"""From a requirement to exact pins, and the Python on which they are to be had."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnverify.upgrade import interpreters
from bnverify.upgrade.interpreters import Interpreter
from bnverify.upgrade.layers import NO_BNVERIFY
from bnverify.upgrade.requirements import NEEDED, normal, release
from bnverify.upgrade.uv import UvError

if TYPE_CHECKING:
    from bnverify.upgrade.requirements import Requirement
    from bnverify.upgrade.store import Store
    from bnverify.upgrade.uv import Uv

_FORMAT = 1  # raise it when the same requirement shall resolve otherwise


class _UnsettledError(Exception):
    """A resolution that another day may change, and so is not kept."""


def resolve(requirement: Requirement, store: Store, uv: Uv) -> tuple[Interpreter, list[str]]:
    """Return the Python to use, and the pins there, as `Uv.compile` gives them.

    Where a file pins all that it brings, the answer is the same every day, and is kept: the next
    time neither the index nor uv is asked.

    Raises:
        UvError: the requirement resolves on no Python that was found.
    """
    own = interpreters.running()
    lines, caps = requirement.lines(), requirement.constraints()
    parts = [_FORMAT, requirement.kind, lines, caps, own.name, str(own.path.resolve())]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    fresh: list[tuple[Interpreter, list[str]]] = []

    def make(_place: Path) -> dict[str, Any]:
        interpreter, pins = _resolve(requirement, caps, uv)
        fresh.append((interpreter, pins))
        pinned = requirement.pinned()
        # Of a file that holds pins alone, the options are this machine's: in force anyway, and
        # perhaps with a credential in them.
        pins = [pin for pin in pins if not pin.startswith("--")]
        if any(normal(pin.partition("==")[0]) not in pinned for pin in pins):
            raise _UnsettledError
        return {"python": str(interpreter.path), "version": interpreter.name, "pins": pins}

    try:
        _, told = store.get("resolutions", key, make, uv.token)
    except _UnsettledError:
        return fresh[0]
    interpreter = interpreters.probe(Path(told["python"]))
    if interpreter is None or interpreter.name != told["version"]:  # it was replaced since
        return _resolve(requirement, caps, uv)
    return interpreter, told["pins"]


def _resolve(
    requirement: Requirement, constraints: list[str], uv: Uv
) -> tuple[Interpreter, list[str]]:
    """Return the first Python on which the requirement resolves, and the pins there.

    `latest` is the newest jax, flax and optax of any Python found: the running one may be too old
    for them, and would resolve to older releases without a word.
    """
    named = requirement.path or uv.write("list.in", requirement.lines())
    sources = [named, uv.write("needed.in", NEEDED)]
    resolved: list[tuple[Interpreter, list[str]]] = []
    first_error: UvError | None = None
    for interpreter in interpreters.found():
        try:
            pins = uv.compile(
                sources, interpreter, constraints=constraints, overrides=[NO_BNVERIFY]
            )
        except UvError as error:
            if not error.wants_another_python:
                raise
            first_error = first_error or error
            continue
        resolved.append((interpreter, pins))
        if requirement.kind != "latest":
            break
    if not resolved:
        assert first_error is not None  # the running interpreter is always tried
        raise first_error
    return max(resolved, key=lambda found: _newness(found[1]))  # the first of equals


def _newness(pins: list[str]) -> list[tuple[int, ...]]:
    versions = dict(pin.split("==", 1) for pin in pins if "==" in pin)
    return [release(versions.get(name, "")) for name in ("jax", "flax", "optax")]

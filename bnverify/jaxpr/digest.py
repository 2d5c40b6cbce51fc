"""Two programs with one digest are the same program: the name by which what was made of one is kept.

Everything counts that a reading could look at: each equation's primitive and parameters, the
literals and captured arrays, the types of all variables and how they are joined. What cannot be
told apart for certain (Python functions, foreign code, objects that print their address) has no
digest.
"""

from __future__ import annotations

import enum
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr.interpreter import CALLS, hides_code, is_jaxpr, open_jaxpr

# JAX's own random generators: tuples of functions, that no other may be named like.
_GENERATORS = frozenset({"rbg", "threefry2x32", "unsafe_rbg"})

_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")


class _Unsure(Exception):
    """Something in the program cannot be told from something else."""


def digest(jaxpr: Any) -> str | None:
    """Return a name of a program that no other has; None where that is not certain.

    Args:
        jaxpr: closed or open, as ``jax.make_jaxpr`` gives it.
    """
    try:
        return hashlib.sha256("\n".join(_lines(jaxpr)).encode()).hexdigest()
    except _Unsure:
        return None


def _lines(jaxpr: Any) -> Iterable[str]:
    inner, consts = open_jaxpr(jaxpr)
    numbers: dict[Any, int] = {}

    def named(var: Any) -> str:
        number = numbers.setdefault(var, len(numbers))
        return f"{number}:{var.aval}{' weak' * bool(getattr(var.aval, 'weak_type', False))}"

    def read(atom: Any) -> str:
        if hasattr(atom, "val"):
            return f"{_value(atom.val)}:{atom.aval}"
        return str(numbers[atom])

    yield " ".join(map(named, inner.invars))
    if len(consts) != len(inner.constvars):
        raise _Unsure
    for var, const in zip(inner.constvars, consts, strict=True):
        yield f"{named(var)} = {_value(const)}"
    for eqn in inner.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS:  # what is entered; its Python functions derive, and nothing reads them
            params = {key: value for key, value in params.items() if not callable(value)}
        elif hides_code(eqn) and any(callable(value) for value in params.values()):
            raise _Unsure
        yield f"{name} {' '.join(map(read, eqn.invars))} {_value(params)}"
        yield " ".join(map(named, eqn.outvars))
    yield " ".join(map(read, inner.outvars))


def _value(value: Any) -> str:
    """Return what stands for a parameter, a literal or a captured array."""
    if is_jaxpr(value):
        return "(" + "\n".join(_lines(value)) + ")"
    if isinstance(value, (np.ndarray, np.generic, jax.Array)) or hasattr(value, "__array__"):
        return _array(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(value[key])}" for key in sorted(value)) + "}"
    if getattr(value, "name", None) in _GENERATORS:
        value = value.name
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}[{', '.join(map(_value, value))}]"
    if isinstance(value, (bool, int, float, complex, str, bytes, type, np.dtype, enum.Enum)):
        return repr(value)
    told = repr(value)
    if callable(value) or _ADDRESS.search(told):
        raise _Unsure
    return f"{type(value).__name__} {told}"


def _array(value: Any) -> str:
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):  # PRNG keys
        return f"{value.dtype} {_array(jax.random.key_data(value))}"
    array = np.asarray(value)
    if array.dtype == object:
        raise _Unsure
    return f"{array.dtype}{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"

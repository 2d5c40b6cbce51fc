"""Interpret a jaxpr: one loop over its equations, with a pluggable ``Reading``.

The ``Reading`` decides what a value is: a set of labels, a graph node, a float64 array with its
rounding error. ``read`` enters calls, hands loops and branches to the reading with their bodies
as functions, and treats everything else as a plain equation.

Only attributes of jaxprs are used (``eqns``, ``invars``, ``params``): their classes have moved
between JAX releases, these attributes have not.

Source: https://docs.jax.dev/en/latest/jaxpr.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

from bnverify.compat import scan_split

V = TypeVar("V")

Body = Callable[[Sequence[V]], list[V]]

# Primitives that run their inner jaxpr exactly once on exactly these inputs. The list is closed: an
# unknown primitive that carries a jaxpr may run it many times, as ``reduce`` does.
CALLS = frozenset(
    {
        "jit",
        "pjit",  # jax < 0.7
        "closed_call",
        "core_closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",  # jax < 0.5
        "custom_vmap_call",  # its rule applies under vmap only
        "composite",
        "shard_map",
        "xla_pmap",
    }
)

# Foreign code whose parameters hold no Python callable.
_FOREIGN = frozenset({"ffi_call", "custom_call", "tpu_custom_call", "infeed", "outfeed"})


class Reading(Protocol[V]):
    """How values and equations of a program are interpreted."""

    def constant(self, value: Any, aval: Any, /) -> V:
        """Read a literal or a captured array."""

    def equation(self, eqn: Any, inputs: Sequence[V]) -> Sequence[V]:
        """Read an equation without an inner jaxpr; return one value for each output."""

    def call(self, eqn: Any, inputs: Sequence[V], body: Body[V]) -> Sequence[V]:
        """Read a call; ``body(inputs)`` interprets the called jaxpr."""

    def scan(
        self, eqn: Any, split: tuple[int, int], inputs: Sequence[V], body: Body[V]
    ) -> Sequence[V]:
        """Read a scan; ``body`` maps (consts, carry, slices of xs) to (carry, slices of ys).

        ``split`` is (number of consts, number of carries); the rest of the inputs are xs.
        """

    def while_loop(
        self, eqn: Any, inputs: Sequence[V], predicate: Body[V], body: Body[V]
    ) -> Sequence[V]:
        """Read a while loop; ``predicate`` and ``body`` take their own consts, then the carry."""

    def cond(self, eqn: Any, inputs: Sequence[V], branches: Sequence[Body[V]]) -> Sequence[V]:
        """Read a branch; ``inputs[0]`` is the index, the rest are inputs of every branch."""


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Return the open jaxpr and its constants, for a jaxpr that may be closed or open."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def is_jaxpr(value: Any) -> bool:
    """Return whether ``value`` is a jaxpr, closed or open."""
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Return every jaxpr among an equation's parameters."""
    found: list[Any] = []
    for value in eqn.params.values():
        candidates = value if isinstance(value, (tuple, list)) else (value,)
        found += [each for each in candidates if is_jaxpr(each)]
    return found


def hides_code(eqn: Any) -> bool:
    """Return whether ``eqn`` carries a jaxpr or a Python callback, or calls foreign code."""
    callback = any(callable(value) and "callback" in key for key, value in eqn.params.items())
    return callback or eqn.primitive.name in _FOREIGN or bool(inner_jaxprs(eqn))


def called_jaxpr(eqn: Any) -> Any | None:
    """Return the jaxpr that ``eqn`` calls exactly once, or None if it is not a plain call."""
    if eqn.primitive.name not in CALLS:
        return None
    bodies = inner_jaxprs(eqn)
    if len(bodies) != 1:
        return None
    inner, _ = open_jaxpr(bodies[0])
    fits = len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(eqn.outvars)
    return bodies[0] if fits else None


def live(jaxpr: Any, output: int | None = None) -> Any:
    """Return ``jaxpr`` reduced to the equations that its outputs depend on.

    Args:
        jaxpr: closed or open.
        output: the number of the only output that is wanted; None: all are.
    """
    inner, consts = open_jaxpr(jaxpr)
    outvars = inner.outvars if output is None else [inner.outvars[output]]
    needed = set(map(id, outvars))
    kept = []
    for eqn in reversed(inner.eqns):
        if any(id(var) in needed for var in eqn.outvars):
            needed.update(map(id, eqn.invars))
            kept.append(eqn)
    pruned = SimpleNamespace(
        eqns=kept[::-1], invars=inner.invars, constvars=inner.constvars, outvars=outvars
    )
    return SimpleNamespace(jaxpr=pruned, consts=consts)


def read(jaxpr: Any, reading: Reading[V], inputs: Sequence[V]) -> list[V]:
    """Interpret a jaxpr and return the values of its outputs.

    Args:
        jaxpr: closed or open, as returned by ``jax.make_jaxpr`` or carried by an equation.
        reading: how values and equations are interpreted.
        inputs: one value for each input of ``jaxpr``.

    Raises:
        ValueError: ``inputs`` has the wrong length.
    """
    inner, consts = open_jaxpr(jaxpr)
    if len(inputs) != len(inner.invars):
        raise ValueError(f"the program takes {len(inner.invars)} inputs, got {len(inputs)}")
    env: dict[Any, V] = dict(zip(inner.invars, inputs, strict=True))
    for var, const in zip(inner.constvars, consts, strict=True):
        env[var] = reading.constant(const, var.aval)

    def look_up(atom: Any) -> V:
        if hasattr(atom, "val"):  # a literal
            return reading.constant(atom.val, atom.aval)
        return env[atom]

    last = _last_uses(inner)
    for number, eqn in enumerate(inner.eqns):
        outputs = _read_equation(eqn, reading, [look_up(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outputs, strict=True))
        for var in last.get(number, ()):  # keep memory bounded for large models
            env.pop(var, None)
    return [look_up(atom) for atom in inner.outvars]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Return equation number -> the variables whose last use it is."""
    seen = {id(atom) for atom in jaxpr.outvars}
    found: dict[int, list[Any]] = {}
    for number in range(len(jaxpr.eqns) - 1, -1, -1):
        eqn = jaxpr.eqns[number]
        for var in (*eqn.outvars, *eqn.invars):
            if id(var) not in seen and not hasattr(var, "val"):
                seen.add(id(var))
                found.setdefault(number, []).append(var)
    return found


def _read_equation(eqn: Any, reading: Reading[V], inputs: Sequence[V]) -> Sequence[V]:
    def body(jaxpr: Any) -> Body[V]:
        return lambda values: read(jaxpr, reading, values)

    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        split = scan_split(eqn)
        if split is not None:
            return reading.scan(eqn, split, inputs, body(params["jaxpr"]))
    if name == "while":
        predicate, step = body(params["cond_jaxpr"]), body(params["body_jaxpr"])
        return reading.while_loop(eqn, inputs, predicate, step)
    if name == "cond":
        return reading.cond(eqn, inputs, [body(branch) for branch in params["branches"]])
    called = called_jaxpr(eqn)
    if called is not None:
        return reading.call(eqn, inputs, body(called))
    return reading.equation(eqn, inputs)

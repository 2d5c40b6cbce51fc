"""One loop over the equations of a jaxpr, with a pluggable reading of what they mean.

``read`` walks a traced program. What a value is (a set of labels, a node of a graph, a float64
array with its rounding error) is up to the ``Reading``. Calls are entered here; loops and
branches are handed to the reading with their bodies as functions; everything else is a plain
equation.

Jaxprs are read by their attributes alone (``eqns``, ``invars``, ``params``), because their
classes have moved between releases while those attributes have not.

Source: https://docs.jax.dev/en/latest/jaxpr.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

from bnverify.compat import scan_split

V = TypeVar("V")

Body = Callable[[Sequence[V]], list[V]]

# Equations that mean "run the inner program once on exactly these inputs". A closed list: a
# primitive that merely carries a jaxpr (``reduce``, some fixed-point loop yet to come) may run
# it many times, and entering it once would claim too much.
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
        "custom_vmap_call",  # its rule counts under vmap alone
        "composite",
        "shard_map",
        "xla_pmap",
    }
)

# Foreign code without a Python callable to give it away.
_FOREIGN = frozenset({"ffi_call", "custom_call", "tpu_custom_call", "infeed", "outfeed"})


class Reading(Protocol[V]):
    """What a program's values and equations mean."""

    def constant(self, value: Any, aval: Any, /) -> V:
        """Read a literal or a captured array."""

    def equation(self, eqn: Any, inputs: Sequence[V]) -> Sequence[V]:
        """Read one equation without a body to enter; one value for each of its outputs."""

    def call(self, eqn: Any, inputs: Sequence[V], body: Body[V]) -> Sequence[V]:
        """Read a call; ``body(inputs)`` enters it."""

    def scan(
        self, eqn: Any, split: tuple[int, int], inputs: Sequence[V], body: Body[V]
    ) -> Sequence[V]:
        """Read a scan; ``body`` maps consts, carry and slices to carry and slices.

        ``split`` says how many of the inputs are consts, and how many after them the carry.
        """

    def while_loop(
        self, eqn: Any, inputs: Sequence[V], predicate: Body[V], body: Body[V]
    ) -> Sequence[V]:
        """Read a while loop; both bodies take their own consts, then the carry."""

    def cond(self, eqn: Any, inputs: Sequence[V], branches: Sequence[Body[V]]) -> Sequence[V]:
        """Read a branch; ``inputs[0]`` picks, the rest are every branch's inputs."""


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Return a jaxpr's equations' owner and its captured constants, closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def is_jaxpr(value: Any) -> bool:
    """Return whether a parameter of an equation is a program."""
    return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def inner_jaxprs(eqn: Any) -> list[Any]:
    """Return every program among an equation's parameters."""
    found: list[Any] = []
    for value in eqn.params.values():
        candidates = value if isinstance(value, (tuple, list)) else (value,)
        found += [each for each in candidates if is_jaxpr(each)]
    return found


def hides_code(eqn: Any) -> bool:
    """Return whether ``eqn`` carries a program or a Python function, or calls foreign code."""
    callback = any(callable(value) and "callback" in key for key, value in eqn.params.items())
    return callback or eqn.primitive.name in _FOREIGN or bool(inner_jaxprs(eqn))


def called_jaxpr(eqn: Any) -> Any | None:
    """Return the program that ``eqn`` calls exactly once, or None where it is no plain call."""
    if eqn.primitive.name not in CALLS:
        return None
    bodies = inner_jaxprs(eqn)
    if len(bodies) != 1:
        return None
    inner, _ = open_jaxpr(bodies[0])
    fits = len(inner.invars) == len(eqn.invars) and len(inner.outvars) == len(eqn.outvars)
    return bodies[0] if fits else None


def live(jaxpr: Any, output: int) -> Any:
    """Return what of a program makes one of its outputs, which is then its only one."""
    inner, consts = open_jaxpr(jaxpr)
    outvars = [inner.outvars[output]]
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
    """Return what ``reading`` makes of a program's outputs.

    Args:
        jaxpr: closed or open, as ``jax.make_jaxpr`` gives it or an equation carries it.
        reading: what values and equations mean.
        inputs: one value for each input of ``jaxpr``.

    Raises:
        ValueError: the number of inputs is not the program's.
    """
    inner, consts = open_jaxpr(jaxpr)
    if len(inputs) != len(inner.invars):
        raise ValueError(f"the program takes {len(inner.invars)} inputs, got {len(inputs)}")
    env: dict[Any, V] = dict(zip(inner.invars, inputs, strict=True))
    for var, const in zip(inner.constvars, consts, strict=True):
        env[var] = reading.constant(const, var.aval)

    def look_up(atom: Any) -> V:
        if hasattr(atom, "val"):  # a literal; variables have no value
            return reading.constant(atom.val, atom.aval)
        return env[atom]

    last = _last_uses(inner)
    for number, eqn in enumerate(inner.eqns):
        outputs = _read_equation(eqn, reading, [look_up(atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outputs, strict=True))
        for var in last.get(number, ()):  # values of large models would fill the memory
            env.pop(var, None)
    return [look_up(atom) for atom in inner.outvars]


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Return number of an equation -> the variables that nothing after it reads."""
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

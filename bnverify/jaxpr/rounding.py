"""How far the float32 arithmetic of a program may take its results from the exact ones.

The program's own jaxpr is evaluated in float64, once exactly and ROWS times with coarser
rounding (``bnverify.jaxpr.noise``), in one vectorised run. The distance of the coarse rows from
the exact one is the tolerance: nothing is assumed about the model, and an ill-conditioned input
widens its own tolerance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr import arithmetic, kinks, tracing
from bnverify.jaxpr.draws import Which
from bnverify.jaxpr.interpreter import read
from bnverify.jaxpr.noise import ROWS, Rows
from bnverify.jaxpr.sums import added
from bnverify.jaxpr.values import Value, is_float, widen

if TYPE_CHECKING:
    from collections.abc import Callable

SAFETY = 1.25


class Rounded(NamedTuple):
    """A program's results without rounding, and how far rounding may move them.

    Attributes:
        exact: the results in float64; integers and booleans as they are.
        noise: like ``exact``: the tolerance of each number, infinite where nothing is known.
    """

    exact: Any
    noise: Any

    @property
    def reliable(self) -> Any:
        """Return a tree like ``exact``, of scalar bools: all of a leaf's noise is finite."""
        return jax.tree_util.tree_map(lambda bound: jnp.all(jnp.isfinite(bound)), self.noise)


class Rounding:
    """The rounding of one traced program.

    Attributes:
        program: what was traced.
        unknown: names of primitives whose rounding is not known; filled by ``evaluate``.
    """

    def __init__(self, program: tracing.Program, rows: int = ROWS, seed: int = 0) -> None:
        self.program = program
        self.rows = rows
        self.seed = seed
        self.unknown: frozenset[str] = frozenset()

    def evaluate(self, *args: Any, rows: Any = None) -> Rounded:
        """Return what the program gives on ``args``, and its rounding noise.

        Under ``jax.jit`` and ``jax.vmap``, and only within ``bnverify.compat.enable_x64()``.

        Args:
            *args: trees of arrays like those the program was traced on.
            rows: which coarse rows to take, (held,) int from 1 to ``self.rows``; None: all. The
                squares of what disjoint rows give add up to the square of what all of them do.

        Raises:
            RuntimeError: float64 is not enabled.
        """
        if jnp.asarray(np.zeros(())).dtype != jnp.float64:
            raise RuntimeError("rounding is read in float64: call within compat.enable_x64()")
        which = Which.all(self.rows)
        if rows is not None:
            which = Which(jnp.concatenate([jnp.zeros(1, jnp.int32), rows]), self.rows)
        reading = Rows(which, self.seed, added(self.program.jaxpr))
        results = read(self.program.jaxpr, reading, self._inputs(args))
        types = jax.tree_util.tree_leaves(self.program.out)
        outputs = [
            kinks.harden(value) if kinks.is_soft(value, aval.dtype) else value
            for value, aval in zip(results, types, strict=True)
        ]
        self.unknown = frozenset(reading.unknown)
        exact = [value.array[0] if value.rows else jnp.asarray(value.array) for value in outputs]
        treedef = jax.tree_util.tree_structure(self.program.out)
        return Rounded(
            jax.tree_util.tree_unflatten(treedef, exact),
            jax.tree_util.tree_unflatten(treedef, _noises(outputs, [t.dtype for t in types])),
        )

    def _inputs(self, args: Any) -> list[Value]:
        expected: Any = jax.tree_util.tree_structure(self.program.args)
        given: Any = jax.tree_util.tree_structure(args)
        if given != expected:
            raise TypeError(f"traced on {expected}, called with {given}")
        leaves = jax.tree_util.tree_leaves(args)
        abstract = jax.tree_util.tree_leaves(self.program.args)
        return [
            Value(widen(leaf, aval.dtype), rows=False)
            for leaf, aval in zip(leaves, abstract, strict=True)
        ]


def _noises(values: list[Value], dtypes: list[Any]) -> list[Any]:
    """Return the noise of each of ``values``, which the program holds in ``dtypes``."""
    noises = [jnp.zeros(_shape(value), jnp.float64) for value in values]
    floats = []
    for number, value in enumerate(values):
        if value.rows and is_float(value.array.dtype):
            floats.append(number)
        elif value.rows:
            steady = jnp.all(value.array == value.array[:1], axis=0)
            noises[number] = jnp.where(steady, 0.0, jnp.inf)
    if not floats:
        return noises
    # All numbers in one array: a program of few large steps compiles faster than of many small.
    arrays = [values[number].array for number in floats]
    together = jnp.concatenate([array.reshape(array.shape[0], -1) for array in arrays], axis=1)
    ends = np.cumsum([array[0].size for array in arrays])[:-1]
    for number, part in zip(floats, jnp.split(_length(together), ends), strict=True):
        noises[number] = part.reshape(_shape(values[number])) + arithmetic.faint(dtypes[number])
    return noises


def _shape(value: Value) -> tuple[int, ...]:
    shape: tuple[int, ...] = jnp.shape(value.array)
    return shape[1:] if value.rows else shape


def _length(rows: Any) -> Any:
    """Return the length of the vector of the rows' distances from the first, times SAFETY.

    It is steadier than the largest distance, and never below it, so that a jump which only one
    row made counts in full.
    """
    distance = rows[1:] - rows[:1]
    noise = SAFETY * jnp.sqrt(jnp.sum(distance * distance, axis=0))
    return jnp.where(jnp.isfinite(noise), noise, jnp.inf)


def rounding(function: Callable[..., Any], *args: Any, rows: int = ROWS, seed: int = 0) -> Rounding:
    """Return the rounding of ``function``, traced on arguments of these types.

    Args:
        function: anything that traces under ``jax.jit``. Trace it outside ``enable_x64``, with
            the dtypes it is to be judged in.
        *args: trees of ``Abstract``, ``jax.ShapeDtypeStruct`` or arrays, of concrete shapes.
        rows: how many coarse runs to take.
        seed: of their draws.
    """
    return Rounding(tracing.trace(function, *args), rows, seed)

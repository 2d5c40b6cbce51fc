"""Steps that differ from process to process. Each is a target: ``tests.faults.processes:NAME``.

Each has a correct twin, of which every process computes the same.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnverify import State, Subject
from tests.faults.catalogue import Fault
from tests.faults.steps import CanonicalStep, mapped

LAW = "another_process_computes_the_same"
MISTAKE = "differs_between_processes"

NAMES = ("stem", "first", "second", "third", "fourth", "fifth", "sixth", "head")
"""There are so many that hardly two processes iterate over a set of them in the same order."""

DRAWN = np.random.default_rng().normal()
"""Another number in each process."""


class Named(CanonicalStep):
    """The canonical step with params that are perturbed for each of ``NAMES``."""

    def ordered(self) -> Any:
        """Return the names in the order in which they are drawn for."""
        return NAMES

    def number(self, name: str) -> int:
        """Return the number that is folded into the key for a name."""
        return zlib.crc32(name.encode())

    def init(self, seed: Any, x: Any) -> State:
        state = super().init(seed, x)
        key = jax.random.key(seed)
        for place, name in enumerate(self.ordered(), 1):
            key = jax.random.fold_in(key, self.number(name))
            shift = 1e-2 * place * jax.random.normal(key)
            state = state._replace(params=mapped(lambda p, by=shift: p + by, state.params))
        return state


def layers_from_a_set() -> Subject:
    """Keys are drawn in the order of a set of names."""

    class Parts(Named):
        def ordered(self) -> Any:
            return set(NAMES)

    return Parts().subject("layers_from_a_set")


def key_from_a_hash() -> Subject:
    """The key for each name is derived from Python's hash of it."""

    class Parts(Named):
        def number(self, name: str) -> int:
            return hash(name) % 2**31

    return Parts().subject("key_from_a_hash")


def rate_drawn_at_import() -> Subject:
    """The learning rate is scaled by a number that NumPy draws when the module is imported."""

    class Parts(CanonicalStep):
        def tx(self, lr: Any) -> Any:
            return self.optimizer(lr * float(1 + 0.1 * DRAWN))

    return Parts().subject("rate_drawn_at_import")


def keys_from_sorted_names() -> Subject:
    """Names in a tuple, and the numbers of a checksum."""
    return Named().subject("keys_from_sorted_names")


def penalty_summed_over_a_set() -> Subject:
    """A set decides only the order of a sum, in which float32 rounding alone differs."""

    class Parts(CanonicalStep):
        def tx(self, lr: Any) -> Any:
            weights = {name: 0.1 * place for place, name in enumerate(NAMES, 1)}
            total = sum(weights[name] for name in set(NAMES))
            return optax.sgd(jnp.float32(total) * lr)

    return Parts().subject("penalty_summed_over_a_set")


PROCESS_FAULTS = {
    make.__name__: Fault(make.__name__, "process", MISTAKE, str(make.__doc__), make, LAW)
    for make in (layers_from_a_set, key_from_a_hash, rate_drawn_at_import)
}
PROCESS_CONTROLS = ("keys_from_sorted_names", "penalty_summed_over_a_set")

"""Histories of a state: scripted ones in which everything happens, and others drawn from a seed.

They are not drawn by Hypothesis, whose draws depend on the constants in whatever modules happen to
be imported: the same seed must give the same histories.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bnverify.case import Case
from bnverify.evidence import Call
from bnverify.lifetime.checkpoint import COPIES
from bnverify.shapes import Shape

# Small numbers of few digits: they stay far from overflow, and a counterexample reads well.
QUARTERS = 8
"""The largest number in a batch, in quarters."""
RATES = (0.125, 0.0, 0.5)
SEEDS = 4
LONGEST = 12
"""Calls in a drawn history after the first."""


def scripted(way: str, shape: Shape) -> tuple[list[Call], list[Call]]:
    """Return two histories: one in which everything happens, and one with a resumed process.

    Args:
        way: how the first is saved.
        shape: (N, D) of the batches.
    """
    rng = np.random.default_rng(0)
    first, second = (_batch(rng, shape) for _ in range(2))
    train, again = Call("train", first), Call("train", second)
    save, restore = Call("save", way), Call("restore")
    copies = [Call("copy", name) for name in COPIES]
    begin, evaluate = Call("begin", first), Call("evaluate", second)
    # Twice saved: what a first checkpoint gets right a second may not.
    saved = [begin, train, evaluate, save, again, save, train, restore, *copies, train, again]
    return saved, [begin, train, Call("resume"), again]


def drawn(seed: int, count: int, ways: Sequence[str], shape: Shape) -> Iterator[list[Call]]:
    """Yield ``count`` histories, the same ones for the same arguments.

    Args:
        seed: from which they are drawn.
        count: how many.
        ways: in which a state can be saved; empty: none is saved.
        shape: (N, D) of the batches.
    """
    for index in range(count):
        yield _history(np.random.default_rng((seed, index)), ways, shape)


def _history(rng: np.random.Generator, ways: Sequence[str], shape: Shape) -> list[Call]:
    calls = [Call("begin", _batch(rng, shape))]
    saved = False
    for _ in range(rng.integers(1, LONGEST + 1)):
        names = ["train", "train", "evaluate", "copy", "resume"]
        names += ["save"] * bool(ways) + ["restore", "restore"] * saved
        name = _one_of(rng, names)
        saved = saved or name == "save"
        argument = {"copy": tuple(COPIES), "save": ways}.get(name, ())
        if name in {"train", "evaluate"}:
            calls.append(Call(name, _batch(rng, shape)))
        else:
            calls.append(Call(name, _one_of(rng, argument) if argument else None))
    return calls


def _batch(rng: np.random.Generator, shape: Shape) -> Case:
    def numbers(of: Any) -> Any:
        return rng.integers(-QUARTERS, QUARTERS + 1, of) / 4

    return Case.of(int(rng.integers(SEEDS)), numbers(shape), numbers(shape[0]), _one_of(rng, RATES))


def _one_of(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    return items[int(rng.integers(len(items)))]

"""What breaks no law and is still seldom meant: choices of the user's own, told as notes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from bnverify.jaxpr.influence import Influence
from bnverify.lazy import jax
from bnverify.mistakes import MISTAKES, Mistake
from bnverify.proof import asked
from bnverify.pytree import path_name
from bnverify.subject import Subject

MASK_HANDS_ON = Mistake(
    "mask_hands_gradients_on",
    "optax.masked hands the gradients of the other leaves on as they are",
    "optax.multi_transform, with optax.set_to_zero() for what is to rest",
    "https://github.com/google-deepmind/optax/issues/159",
)
UPDATES_CLIPPED = Mistake(
    "updates_clipped",
    "the optimizer's updates are clipped, not its gradients: the clip stands behind the learning rate",
    "clip first: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr))",
    "https://optax.readthedocs.io/en/latest/api/transformations.html#optax.clip_by_global_norm",
)
SELDOM = 0.5  # a weight of the old value below it forgets a batch within a step or two


def remarks(subject: Subject, influence: Influence | None, *, ask: bool = True) -> Iterator[str]:
    """Yield what a report should say of a subject besides the laws, a line for each mistake.

    Args:
        subject: what is verified.
        influence: what reaches what in it; None where it does not trace.
        ask: whether to run the optimizer, for what only its answers tell.
    """
    if subject.momentum is not None and 0 < subject.momentum < SELDOM:
        yield _line(f"the old value weighs {subject.momentum:.4g}", "momentum_reversed")
    if influence is not None:
        untrained = _evaluated_untrained(influence)
        if untrained:
            what = f"for evaluation, not for training: {_listed(untrained)}"
            yield _line(what, "statistics_trained_as_params")
    answers = _answers(subject) if ask else None
    if answers is None:
        return
    norms = _norms(answers.paths, answers.owners)
    if decayed := norms & answers.decayed:
        yield _line(f"moved by a gradient of 0: {_listed(decayed)}", "decay_of_norm_parameters")
    if answers.coupled:
        what = f"params four times as large decay no more: {_listed(answers.coupled)}"
        yield _line(what, "decay_coupled")
    if answers.squared:
        yield _line(
            "the update grows with the learning rate's square", "learning_rate_applied_twice"
        )
    elif answers.uphill:
        yield _line(f"uphill: {_listed(answers.uphill)}", MASK_HANDS_ON)
    if answers.clipped:
        yield _line("a larger learning rate makes no larger update", UPDATES_CLIPPED)


class _Answers(NamedTuple):
    """How an optimizer answers gradients of 0 and of 1, at params of 1 and a rate of 1.

    Attributes:
        paths: of all params.
        owners: paths of the layers that keep running statistics.
        decayed: paths of the params that a gradient of 0 moves.
        coupled: those of them that it moves as far from another value: an adaptive optimizer has
            been given the decay as a gradient.
        uphill: paths of those that a gradient of 1 makes larger.
        clipped: whether updates are kept below some size.
        squared: whether updates grow with the square of the learning rate.
    """

    paths: tuple[str, ...]
    owners: frozenset[str]
    decayed: set[str]
    coupled: set[str]
    uphill: set[str]
    clipped: bool
    squared: bool


def _answers(subject: Subject) -> _Answers | None:
    """Ask the subject's optimizer; None where it is hidden or does not answer."""
    if subject.optimizer is None:
        return None
    shape: Any = jax.ShapeDtypeStruct
    x = shape((4, subject.features[0] if subject.features else 3), "float32")
    try:
        state = jax.eval_shape(subject.init, shape((), "int32"), x)
    except Exception:  # noqa: BLE001 - whatever a user's code raises
        return None
    answers = asked(subject.optimizer, state.params, (0.0, 1.0), 1.0)
    if answers is None:
        return None
    still, pushed = answers
    paths = _paths(state.params)
    named = list(zip(paths, still, pushed, strict=True))
    larger = asked(subject.optimizer, state.params, (0.0,), 1.0, at=4.0)
    kept = [] if larger is None else list(zip(paths, still, larger[0], strict=True))
    small, middle, large = _sizes(subject.optimizer, state.params)
    return _Answers(
        tuple(paths),
        frozenset(path.rpartition("/")[0] for path in _paths(state.batch_stats)),
        {path for path, at_rest, _ in named if np.any(at_rest != 0)},
        {
            path
            for path, one, four in kept
            if np.any(one != 0) and np.all(abs(four) < 1.5 * abs(one))
        },
        {path for path, _, at_one in named if np.any(at_one > 0)},
        # In proportion to the rate up to some size, and no further.
        0.99e3 * small < middle < 1.01e3 * small and large < 0.5e6 * middle,
        0.99e6 * small < middle < 1.01e6 * small,
    )


def _sizes(optimizer: Any, params: Any) -> tuple[float, float, float]:
    """Return the lengths of the updates at learning rates of 1e-6, 1e-3 and 1e3; 0 where unknown."""
    found = []
    for rate in (1e-6, 1e-3, 1e3):
        answers = asked(optimizer, params, (1.0,), rate)
        leaves = answers[0] if answers is not None else []
        found.append(float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves))))
    return found[0], found[1], found[2]


def _paths(tree: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _norms(paths: Collection[str], owners: Collection[str]) -> set[str]:
    return {path for path in paths if path.rpartition("/")[0] in owners}


def _evaluated_untrained(influence: Influence) -> set[str]:
    """Return the params that may reach the eval loss and cannot reach the training loss."""
    if "loss" not in influence.leaves or "eval_loss" not in influence.leaves:
        return set()
    missing = influence.leaves["eval_loss"] - influence.leaves["loss"]
    return {leaf for leaf in missing if leaf.startswith("params/")}


def _listed(paths: Collection[str]) -> str:
    first, *others = sorted(paths)
    return first + (f" and {len(others)} more" if others else "")


def _line(seen: str, mistake: Mistake | str) -> str:
    found = MISTAKES[mistake] if isinstance(mistake, str) else mistake
    return f"{found.name}: {found.title} ({seen}). Unless it is meant: {found.fix}"

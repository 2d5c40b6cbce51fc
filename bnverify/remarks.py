"""Notes in a report: choices that violate no law but are rarely intended."""

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

MASKED_GRADIENTS = Mistake(
    "mask_hands_gradients_on",
    "optax.masked passes the gradients of the masked-out leaves on unchanged, as their updates",
    "use optax.multi_transform, with optax.set_to_zero() for frozen leaves",
    "https://github.com/google-deepmind/optax/issues/159",
)
UPDATES_CLIPPED = Mistake(
    "updates_clipped",
    "the updates are clipped instead of the gradients: the clip comes after the learning rate",
    "clip first: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(lr))",
    "https://optax.readthedocs.io/en/latest/api/transformations.html#optax.clip_by_global_norm",
)
LOW_MOMENTUM = 0.5  # with a smaller momentum the statistics are mostly those of the last batch


def remarks(subject: Subject, influence: Influence | None, *, ask: bool = True) -> Iterator[str]:
    """Yield the notes about a subject, one line each.

    Args:
        subject: the subject.
        influence: which inputs affect which outputs; None if the subject does not trace.
        ask: whether to run the optimizer, which some notes need.
    """
    if subject.momentum is not None and 0 < subject.momentum < LOW_MOMENTUM:
        yield _line(f"the momentum is {subject.momentum:.4g}", "momentum_reversed")
    if influence is not None:
        untrained = _evaluated_untrained(influence)
        if untrained:
            what = f"used in evaluation but not in training: {_listed(untrained)}"
            yield _line(what, "statistics_trained_as_params")
    answers = _answers(subject) if ask else None
    if answers is None:
        return
    norms = _norms(answers.paths, answers.owners)
    if decayed := norms & answers.decayed:
        yield _line(f"a gradient of 0 changes {_listed(decayed)}", "decay_of_norm_parameters")
    if answers.uphill:
        yield _line(f"against descent: {_listed(answers.uphill)}", MASKED_GRADIENTS)
    if answers.clipped:
        yield _line("a larger learning rate does not make the update larger", UPDATES_CLIPPED)


class _Answers(NamedTuple):
    """An optimizer's updates for gradients of 0 and of 1, with params of 1 and lr = 1.

    Attributes:
        paths: the paths of all params.
        owners: the paths of the layers with running statistics.
        decayed: the paths of the params that a gradient of 0 changes.
        uphill: the paths of the params that a gradient of 1 increases.
        clipped: whether the size of the updates is limited.
    """

    paths: tuple[str, ...]
    owners: frozenset[str]
    decayed: set[str]
    uphill: set[str]
    clipped: bool


def _answers(subject: Subject) -> _Answers | None:
    """Return the updates of the subject's optimizer; None if it is unknown or raises."""
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
    return _Answers(
        tuple(paths),
        frozenset(path.rpartition("/")[0] for path in _paths(state.batch_stats)),
        {path for path, at_rest, _ in named if np.any(at_rest != 0)},
        {path for path, _, at_one in named if np.any(at_one > 0)},
        _is_clipped(subject.optimizer, state.params),
    )


def _is_clipped(optimizer: Any, params: Any) -> bool:
    """Return whether the update stops growing with the learning rate above some size."""
    sizes = []
    for rate in (1e-6, 1e-3, 1e3):
        answers = asked(optimizer, params, (1.0,), rate)
        if answers is None:
            return False
        sizes.append(float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in answers[0]))))
    small, middle, large = sizes
    return 0.99e3 * small < middle < 1.01e3 * small and large < 0.5e6 * middle


def _paths(tree: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _norms(paths: Collection[str], owners: Collection[str]) -> set[str]:
    return {path for path in paths if path.rpartition("/")[0] in owners}


def _evaluated_untrained(influence: Influence) -> set[str]:
    """Return the params that may affect the eval loss but cannot affect the training loss."""
    if "loss" not in influence.leaves or "eval_loss" not in influence.leaves:
        return set()
    missing = influence.leaves["eval_loss"] - influence.leaves["loss"]
    return {leaf for leaf in missing if leaf.startswith("params/")}


def _listed(paths: Collection[str]) -> str:
    first, *others = sorted(paths)
    return first + (f" and {len(others)} more" if others else "")


def _line(seen: str, mistake: Mistake | str) -> str:
    found = MISTAKES[mistake] if isinstance(mistake, str) else mistake
    return f"{found.name}: {found.title} ({seen}). Unless intended: {found.fix}"

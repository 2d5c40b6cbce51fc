"""Notes in a report: choices that violate no law but are rarely intended."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from bnverify.jaxpr.influence import Influence
from bnverify.lazy import jax
from bnverify.mistakes import MISTAKES, Mistake
from bnverify.model import Subject
from bnverify.proof import asked
from bnverify.pytree import path_name

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


def remarks(subject: Subject, influence: Influence | None) -> Iterator[str]:
    """Yield the notes for a report, one line for each mistake.

    Args:
        subject: the subject.
        influence: which inputs of the step affect which outputs; None if it does not trace.
    """
    if subject.momentum is not None and 0 < subject.momentum < LOW_MOMENTUM:
        yield _line(f"the momentum is {subject.momentum:.4g}", "momentum_reversed")
    state = _initial(subject)
    if influence is not None:
        untrained = _evaluated_untrained(influence)
        if untrained:
            what = f"used in evaluation but not in training: {_listed(untrained)}"
            yield _line(what, "statistics_trained_as_params")
        if unfound := _statistics_not_found(subject, state, influence):
            yield (
                "no running statistics were found in the state, but evaluation reads "
                f"{_listed(unfound)}. If these are running statistics, declare them: "
                f'statistics="{_shared_path(unfound)}"'
            )
    if subject.optimizer is not None and state is not None:
        yield from _of_optimizer(subject.optimizer, state)


def _of_optimizer(optimizer: Any, state: Any) -> Iterator[str]:
    """Yield notes about the optimizer: its updates for gradients of 0 and 1, at params of 1 and lr = 1."""
    answers = asked(optimizer, state.params, (0.0, 1.0), 1.0)
    if answers is None:
        return
    paths = _paths(state.params)
    layers = {path.rpartition("/")[0] for path in _paths(state.batch_stats)}
    at_zero, at_one = (dict(zip(paths, each, strict=True)) for each in answers)
    decayed = {path for path, update in at_zero.items() if np.any(update != 0)}
    if decayed and all(np.all(at_zero[path] > 0) for path in decayed):
        yield _line(f"a gradient of 0 enlarges {_listed(decayed)}", "decay_grows_params")
    elif of_norms := {path for path in decayed if path.rpartition("/")[0] in layers}:
        yield _line(f"a gradient of 0 changes {_listed(of_norms)}", "decay_of_norm_parameters")
    # An adaptive optimizer that receives the decay as a gradient makes it an update of constant size.
    at_four = asked(optimizer, state.params, (0.0,), 1.0, at=4.0) if decayed else None
    if at_four is not None:
        larger = dict(zip(paths, at_four[0], strict=True))
        if coupled := {p for p in decayed if np.all(abs(larger[p]) < 1.5 * abs(at_zero[p]))}:
            what = f"params four times as large decay no faster: {_listed(coupled)}"
            yield _line(what, "decay_coupled")
    small, middle, large = _update_sizes(optimizer, state.params)
    if 0.99e6 * small < middle < 1.01e6 * small:
        what = "the update grows with the square of the learning rate"
        yield _line(what, "learning_rate_applied_twice")
    elif uphill := {path for path, update in at_one.items() if np.any(update > 0)}:
        yield _line(f"against descent: {_listed(uphill)}", MASKED_GRADIENTS)
    if 0.99e3 * small < middle < 1.01e3 * small and large < 0.5e6 * middle:
        yield _line("a larger learning rate does not make the update larger", UPDATES_CLIPPED)


def _initial(subject: Subject) -> Any:
    """Return the shapes of the initial state; None if it cannot be traced."""
    shape: Any = jax.ShapeDtypeStruct
    x = shape((4, subject.width(3)), "float32")
    try:
        return jax.eval_shape(subject.init, shape((), "int32"), x)
    except Exception:  # noqa: BLE001 - whatever a user's code raises
        return None


def _statistics_not_found(subject: Subject, state: Any, influence: Influence) -> set[str]:
    """Return the floats in ``extra`` that may affect the eval loss, if batch_stats is empty.

    A subject that was analysed has a note about those that the step updates from the batch.
    """
    if state is None or subject.look is not None or _paths(state.batch_stats):
        return set()
    leaves = jax.tree_util.tree_flatten_with_path(state.extra)[0]
    floats = {f"extra/{path_name(path)}" for path, leaf in leaves if leaf.dtype.kind == "f"}
    return floats & influence.leaves.get("eval_loss", frozenset())


def _shared_path(paths: Collection[str]) -> str:
    """Return the path of the smallest tree with these leaves of ``extra``, as adapters take it."""
    leaves = [path.removeprefix("extra/").removeprefix("fields/") for path in paths]
    return posixpath.commonpath([leaf.rpartition("/")[0] for leaf in leaves]) or "..."


def _update_sizes(optimizer: Any, params: Any) -> tuple[float, float, float]:
    """Return the norms of the updates at learning rates of 1e-6, 1e-3 and 1e3; 0 if unknown."""
    found = []
    for rate in (1e-6, 1e-3, 1e3):
        answers = asked(optimizer, params, (1.0,), rate)
        leaves = answers[0] if answers is not None else []
        found.append(float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves))))
    return found[0], found[1], found[2]


def _paths(tree: Any) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _evaluated_untrained(influence: Influence) -> set[str]:
    """Return the params that may affect the eval loss but cannot affect the training loss.

    Without copies of trained params, such as the slow ones of a lookahead optimizer.
    """
    if "loss" not in influence.leaves or "eval_loss" not in influence.leaves:
        return set()
    missing = influence.leaves["eval_loss"] - influence.leaves["loss"]
    trained = {
        _within_copy(leaf) for leaf in influence.leaves["loss"] if leaf.startswith("params/")
    }
    return {leaf for leaf in missing if leaf.startswith("params/")} - {
        leaf for leaf in missing if leaf.count("/") > 2 and _within_copy(leaf) in trained
    }


def _within_copy(leaf: str) -> str:
    """Return the path of a param within its copy: "BatchNorm_0/bias" for "params/slow/BatchNorm_0/bias"."""
    return leaf.split("/", 2)[-1]


def _listed(paths: Collection[str]) -> str:
    first, *others = sorted(paths)
    return first + (f" and {len(others)} more" if others else "")


def _line(seen: str, mistake: Mistake | str) -> str:
    found = MISTAKES[mistake] if isinstance(mistake, str) else mistake
    return f"{found.name}: {found.title} ({seen}). Unless intended: {found.fix}"

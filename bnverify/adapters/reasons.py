"""Laws that do not apply to some kinds of step, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from bnverify.adapters.flows import DRAWS, changed, reached
from bnverify.adapters.layers import Survey
from bnverify.pytree import path_name
from bnverify.subject import State

RANDOM = "random numbers"


def random_in_training() -> dict[str, str]:
    """Return the laws that do not hold of a training pass that draws random numbers."""
    reason = "the training pass draws random numbers for each row"
    return dict.fromkeys(
        (
            "row_order_changes_nothing",
            "doubling_the_batch_changes_nothing",
            "eval_at_the_batchs_own_moments_is_the_training_loss",
        ),
        reason,
    )


def random_in_evaluation() -> dict[str, str]:
    """Return the laws that do not hold of an evaluation that draws random numbers."""
    reason = "evaluation draws random numbers for each row"
    return dict.fromkeys(("row_order_changes_nothing", "eval_rows_are_independent"), reason)


def extra_moves(names: Iterable[str]) -> dict[str, str]:
    """Return the laws that compare two passes between which other variables must not move.

    Args:
        names: what moves: "dropout keys", "the collection spectral".
    """
    what = " and ".join(names)
    return {
        "equal_steps_converge_geometrically": f"what moves between two equal steps and reaches them: {what}",
        "eval_at_the_batchs_own_moments_is_the_training_loss": f"what moves in training and reaches the loss: {what}",
    }


def of_survey(seen: Survey) -> dict[str, str]:
    """Return the laws that do not hold of a model, from what its layers are."""
    several = several_momenta(seen.declared) if len(seen.declared) > 1 else {}
    return several | (repeated(seen.repeated) if seen.repeated else {})


def several_momenta(momenta: Iterable[float]) -> dict[str, str]:
    """Return the laws that do not hold of a model whose layers declare different momenta."""
    listed = ", ".join(f"{m:.4g}" for m in sorted(momenta))
    return {
        "one_momentum_for_the_whole_model": f"its layers weigh the old value differently: {listed}"
    }


def repeated(paths: Iterable[str]) -> dict[str, str]:
    """Return the laws that look at a step's one new batch of moments, where a layer folds in more.

    The moments of several calls are mixed, and may cancel where the errors of each do not.
    """
    return dict.fromkeys(
        (
            "batch_stats_change_only_by_ema",
            "batch_like_the_statistics_is_a_fixed_point",
            "equal_steps_converge_geometrically",
            "eval_at_the_batchs_own_moments_is_the_training_loss",
        ),
        f"called more than once in a pass, each time with moments of its own: {', '.join(paths)}",
    )


def penalty() -> dict[str, str]:
    """Return the laws that take the reported loss for the one that is differentiated."""
    return {
        "gradients_are_gradients_of_the_loss": "the loss that is differentiated has a term of "
        "params alone, a penalty, that the reported one lacks"
    }


def online(jaxpr: Any, state: State) -> dict[str, str]:
    """Return the laws that do not hold where training normalises by the running values, too.

    Args:
        jaxpr: of the training pass: state, x, y -> loss, statistics, extra.
        state: its leaves need only have shapes.
    """
    said = "the model is declared to normalise by its running values in training too"
    laws = [
        "training_is_free_of_old_statistics",
        "eval_at_the_batchs_own_moments_is_the_training_loss",
    ]
    if _statistics_mix(jaxpr, state):
        said += ", so that the statistics of one layer reach those of the next"
        laws += [
            "batch_stats_change_only_by_ema",
            "one_momentum_for_the_whole_model",
            "momentum_is_as_declared",
            "batch_moments_are_the_layers_own",
            "batch_like_the_statistics_is_a_fixed_point",
            "equal_steps_converge_geometrically",
        ]
    return dict.fromkeys(laws, said)


def _statistics_mix(jaxpr: Any, state: State) -> bool:
    """Return whether a new statistic depends on the old value of another one."""
    first = len(jax.tree_util.tree_leaves(state.params))
    count = len(jax.tree_util.tree_leaves(state.batch_stats))
    for index in range(count):
        new = reached(jaxpr, {first + index})[1 : 1 + count]
        if any(is_reached for other, is_reached in enumerate(new) if other != index):
            return True
    return False


def of_pass(jaxpr: Any, state: State, *, train: bool) -> dict[str, str]:
    """Return the laws that do not hold of a pass, from its program.

    Args:
        jaxpr: of state, x, y -> loss, statistics, extra.
        state: its leaves need only have shapes.
        train: whether it is the training pass.
    """
    before = len(jax.tree_util.tree_leaves(state[:3]))
    statistics = len(jax.tree_util.tree_leaves(state.batch_stats))
    seen = 1 + statistics  # outputs that laws look at: the loss and the statistics
    extra = jax.tree_util.tree_flatten_with_path(state.extra)[0]
    found: dict[str, str] = {}
    if train:
        moving = [
            path_name(extra[index][0])
            for index in changed(jaxpr, before, seen, len(extra))
            if any(reached(jaxpr, {before + index})[:seen])
        ]
        names = sorted({RANDOM if _is_stream(path) else f"the variable {path}" for path in moving})
        found = extra_moves(names) if names else {}
    if any(reached(jaxpr, primitives=DRAWS)[:seen]):
        found |= random_in_training() if train else random_in_evaluation()
    return found


def _is_stream(path: str) -> bool:
    return path == "key" or path.startswith("streams/")

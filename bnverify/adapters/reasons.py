"""Laws that do not apply to some kinds of step, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable


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
        "equal_steps_converge_geometrically": f"{what} differ in the second of two equal steps",
        "eval_at_the_batchs_own_moments_is_the_training_loss": f"{what} differ between the modes",
    }


def several_momenta(momenta: Iterable[float]) -> dict[str, str]:
    """Return the laws that do not hold of a model whose layers declare different momenta."""
    listed = ", ".join(f"{m:.4g}" for m in sorted(momenta))
    return {
        "one_momentum_for_the_whole_model": f"its layers weigh the old value differently: {listed}"
    }

"""What of the life of a state a subject can be asked about."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from bnverify.case import Case
from bnverify.lazy import jax
from bnverify.lifetime.checkpoint import Lived
from bnverify.lifetime.life import ways
from bnverify.lifetime.programs import Programs
from bnverify.pytree import is_floating
from bnverify.subject import Subject
from bnverify.unusable import first_line

SHAPES = ((2, 2), (4, 3), (24, 3))  # 24: a step may split its batch in 2, 3, 4, 6 or 8


class Untraceable(ValueError):
    """A subject that does not trace at any of the shapes tried; one line says why."""


def shape_of(subject: Subject) -> tuple[int, int]:
    """Return the smallest of a few shapes that the subject takes when it is traced.

    Raises:
        Untraceable: it takes none of them.
    """
    failure: Exception | None = None
    for rows, features in SHAPES:
        shape = rows, subject.features[0] if subject.features else features
        case = Case.of(0, np.zeros(shape), np.zeros(shape[0]), 0.0)
        try:
            jax.eval_shape(functools.partial(_whole, subject), case)
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises
            failure = error
        else:
            return shape
    assert failure is not None
    sizes = ", ".join(str(rows) for rows, _ in SHAPES)
    raise Untraceable(
        f"{subject.name} traces at none of {sizes} rows: {first_line(failure)}"
    ) from failure


def _whole(subject: Subject, case: Case) -> Any:
    state, info = subject.step(subject.init(case.seed, case.x), case.x, case.y, case.lr)
    return info, subject.evaluate(state, case.x, case.y)


def refused(
    lived: Subject | Lived, way: str, programs: Programs, shape: tuple[int, int]
) -> str | None:
    """Return why the libraries cannot save any state of this subject in this way, or None.

    A user's own way is never refused: where it raises, that is a violation.
    """
    if isinstance(lived, Lived):
        return None
    state = programs.init(np.int32(0), np.zeros(shape, np.float32))
    try:
        ways(lived)[way].save(state)
    except Exception as error:  # noqa: BLE001 - whatever a library raises on a user's types
        return f"{way} cannot save it: {first_line(error)}"
    return None


def exemption(
    name: str, subject: Subject, programs: Programs, shape: tuple[int, int]
) -> str | None:
    """Return why a claim does not apply to ``subject``, or None."""
    if name in subject.exempt:
        return subject.exempt[name]
    if name == "evaluation_between_steps_changes_nothing" and programs.after_eval is None:
        return "the subject's evaluation cannot write"
    if name == "statistics_fold_each_batch_once":
        if "batch_stats_change_only_by_ema" in subject.exempt:
            return subject.exempt["batch_stats_change_only_by_ema"]
        state = jax.eval_shape(subject.init, np.int32(0), np.zeros(shape, np.float32))
        if not any(map(is_floating, jax.tree_util.tree_leaves(state.batch_stats))):
            return "the subject keeps no running statistics"
    return None

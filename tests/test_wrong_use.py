"""The functions of the package, wrongly called: one line that names the argument, and the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import pytest

import bnverify
from bnverify import reference
from bnverify.errors import UsageError

SGD = reference.sgd()
CASE = bnverify.Case.of(0, [[1.0]], [1.0], 0.1)
NET: Any = nn.BatchNorm()
WRAP = r"got a BatchNorm; .* with a Flax module, write subject = bnverify.linen\(BatchNorm\(\)\)"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bnverify.verify(NET), WRAP),
        (lambda: bnverify.check_life(NET), WRAP),
        (lambda: bnverify.suite(NET), WRAP),
        (lambda: bnverify.replay(NET, CASE, "eval_loss_is_finite"), WRAP),
        (lambda: bnverify.suite("reference"), "a bnverify.Subject is needed, got a str"),  # type: ignore[arg-type]
        (lambda: bnverify.verify(SGD, select="structur"), "'structur'; did you mean 'structure'"),
        (lambda: bnverify.verify(SGD, ignore=["xyz"]), "'xyz'; see `bnverify list`"),
        (lambda: bnverify.verify(SGD, seed=-1), "seed must be a whole number, .*, got -1"),
        (lambda: bnverify.verify(SGD, seed="x"), "seed must be a whole number, .*, got 'x'"),  # type: ignore[arg-type]
        (lambda: bnverify.verify(SGD, "fast"), "profile must be one of .*, got 'fast'"),
        (
            lambda: bnverify.replay(SGD, CASE, "eval_loss_is_finit"),
            "did you mean 'eval_loss_is_fini",
        ),
        (lambda: bnverify.check_parallel(SGD), "takes a Parallel or .*, got a Subject"),  # type: ignore[arg-type]
        (lambda: bnverify.load(SGD), "a target is module:name or .*, got Subject"),  # type: ignore[arg-type]
    ],
)
def test_it_says_what_is_needed(call: Callable[[], Any], said: str) -> None:
    """A ValueError, before anything is traced."""
    with pytest.raises(ValueError, match=said):
        call()


def test_a_function_that_makes_no_subject_is_refused() -> None:
    """A suite's function is called when the first of its tests runs."""
    test: Any = bnverify.suite(lambda: NET)
    with pytest.raises(UsageError, match=WRAP):
        test.bnverify_suite.subject  # noqa: B018 - made here


def test_one_name_may_stand_for_a_list() -> None:
    """The family or law by itself is what was meant."""
    report = bnverify.verify(
        SGD, select="structure", ignore="eval_loss_has_shape_one", proofs_only=True
    )
    assert {evidence.family for evidence in report.results} == {"structure"}
    assert "eval_loss_has_shape_one" not in {evidence.law for evidence in report.results}

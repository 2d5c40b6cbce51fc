"""Which laws a subject can be held to, and their residuals on observed transitions."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from bnverify import compat
from bnverify.laws import Law
from bnverify.laws.residuals import wide
from bnverify.lazy import jax, jnp
from bnverify.subject import Subject
from bnverify.transition import Transition

HIDDEN = {
    "optimizer": "the subject does not show its optimizer",
    "grads": "the subject does not show its gradients",
    "loss": "the subject does not show its training loss",
    "lr": "the subject's step does not take the learning rate",
    "momentum": "the subject does not declare its momentum",
    "layer_inputs": "the subject does not show what its normalisation layers are given",
    "after_eval": "the subject's evaluation cannot write",
    "biases_before_norm": "no bias stands right before a normalisation",
    "solution": "the subject is not one function of seed, batch and lr",
    "oracle": "no independent derivation exists for this subject",
    "batch_stats": "the subject keeps no running statistics",
    "opt_state": "the optimizer keeps no state, and no other can stand in for it",
    "plain_sgd": "the optimizer is not plain SGD",
    "row_losses": "the eval loss is not a mean over rows",
    "eval_is_training_loss": "evaluation and training use different losses",
}


def exemption(law: Law, subject: Subject, shown: Collection[str]) -> str | None:
    """Return why ``law`` does not apply to ``subject``, or None.

    Args:
        law: the law.
        subject: what is verified.
        shown: which of the things a law can require the subject shows.
    """
    if law.name in subject.exempt:
        return subject.exempt[law.name]
    for required in law.requires:
        if required not in shown:
            return HIDDEN[required]
    return None


def shown_by(subject: Subject, abstract: Transition, probe: object = None) -> frozenset[str]:
    """Return what ``subject`` shows of what laws can require.

    Args:
        subject: what is verified.
        abstract: a transition of it whose leaves have shapes and dtypes, no values.
        probe: not None where a stateful optimizer stands in for one without a state.
    """
    leaves = jax.tree_util.tree_leaves
    shown = {
        name
        for name in ("optimizer", "layer_inputs", "after_eval", "solution", "oracle")
        if getattr(subject, name) is not None
    }
    if subject.momentum is not None:
        shown.add("momentum")
    if subject.biases_before_norm:
        shown.add("biases_before_norm")
    shown |= {name for name in ("loss", "grads") if getattr(abstract.info, name) is not None}
    shown |= {
        name for name in ("batch_stats", "opt_state") if leaves(getattr(abstract.before, name))
    }
    if probe is not None:
        shown.add("opt_state")
    if is_plain_sgd(subject, abstract):
        shown.add("plain_sgd")
    shown |= set(subject.shows)
    return frozenset(shown)


def is_plain_sgd(subject: Subject, abstract: Transition) -> bool:
    """Return whether the optimizer has no state and turns a gradient g into -lr * g."""
    if subject.optimizer is None or jax.tree_util.tree_leaves(abstract.before.opt_state):
        return False
    one = {"w": jnp.ones((2,), jnp.float32)}
    try:
        tx = subject.optimizer(jnp.float32(0.25))
        updates, _ = tx.update(one, tx.init(one), one)
    except Exception:  # noqa: BLE001 - an optimizer that needs the real tree is no plain SGD
        return False
    return bool(jnp.all(updates["w"] == -0.25))


def static_facts(subject: Subject, abstract: Transition) -> dict[str, Any]:
    """Return the facts about ``subject`` that are the same for every case."""
    floating = [
        leaf
        for leaf in jax.tree_util.tree_leaves(abstract.before.batch_stats)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    return {
        "momenta": [subject.momentum] * len(floating),
        "biases_before_norm": subject.biases_before_norm,
    }


def judged(laws: Iterable[Law], available: Collection[str]) -> list[Law]:
    """Return the laws with a residual whose needs are all ``available``."""
    return [law for law in laws if law.kind != "structure" and set(law.needs) <= set(available)]


class Judge:
    """Residuals of some laws on transitions of one subject, compiled with 64-bit types on.

    Args:
        subject: what is verified.
        laws: the laws; each must find what it needs in the transitions.
        facts: static facts, see :func:`static_facts`.
        stacked: whether transitions carry a leading stack axis.
    """

    def __init__(
        self, subject: Subject, laws: Collection[Law], facts: dict[str, Any], *, stacked: bool
    ) -> None:
        def residuals(t: Transition) -> dict[str, Any]:
            t = t._replace(facts={**t.facts, **facts})
            if subject.oracle is not None:
                t.facts["oracle"] = derivation(subject, t)
            return {law.name: law.check(t) for law in laws}

        self._call = jax.jit(jax.vmap(residuals) if stacked else residuals)

    def __call__(self, t: Transition) -> dict[str, Any]:
        """Return law name -> residual, a scalar or, stacked, one for each transition."""
        with compat.enable_x64():
            return self._call(t)  # type: ignore[no-any-return] # jax.jit keeps no return type


def derivation(subject: Subject, t: Transition) -> Any:
    """Return what the subject's oracle expects: of the step, and of evaluation in its outcome."""
    assert subject.oracle is not None
    before, after, case = jax.tree_util.tree_map(wide, (t.before, t.after, t.case))
    expected = subject.oracle.expected(before, case.x, case.y, case.lr, xp=jnp)
    loss = subject.oracle.evaluate(after.params, after.batch_stats, case.x, case.y, xp=jnp)
    return expected._replace(eval_loss=loss)

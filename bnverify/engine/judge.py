"""Which laws a subject can be held to, and their residuals on observed transitions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bnverify import compat
from bnverify.case import Case
from bnverify.compiled import Compiled
from bnverify.engine.budget import Budget, Fixed
from bnverify.engine.noise import PORTION, Noise
from bnverify.kept import Identity
from bnverify.laws import Law
from bnverify.laws.residuals import wide
from bnverify.lazy import jax, jnp
from bnverify.pytree import form, stacks
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


def shown_by(
    subject: Subject, abstract: Transition, probe: object = None, *, ask: bool = True
) -> frozenset[str]:
    """Return what ``subject`` shows of what laws can require.

    Args:
        subject: what is verified.
        abstract: a transition of it whose leaves have shapes and dtypes, no values.
        probe: not None where a stateful optimizer stands in for one without a state.
        ask: whether to run the optimizer; else one without a state counts as plain SGD.
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
    if (is_plain_sgd if ask else _is_stateless)(subject, abstract):
        shown.add("plain_sgd")
    shown |= set(subject.shows)
    return frozenset(shown)


def _is_stateless(subject: Subject, abstract: Transition) -> bool:
    """Return whether the subject shows an optimizer, and that one keeps no state."""
    state = jax.tree_util.tree_leaves(abstract.before.opt_state)
    return subject.optimizer is not None and not state


def is_plain_sgd(subject: Subject, abstract: Transition) -> bool:
    """Return whether the optimizer has no state and turns a gradient g into -lr * g."""
    if not _is_stateless(subject, abstract):
        return False
    assert subject.optimizer is not None

    def ones(leaf: Any) -> Any:
        # In the params' own tree and ranks, since masks go by names and by ranks.
        sizes = (size if isinstance(size, int) else 2 for size in leaf.shape)
        return jnp.ones(tuple(sizes), leaf.dtype)

    one = jax.tree_util.tree_map(ones, abstract.before.params)
    try:
        tx = subject.optimizer(jnp.float32(0.25))
        updates, _ = tx.update(one, tx.init(one), one)
    except Exception:  # noqa: BLE001 - an optimizer may refuse sizes that are not the step's
        return False
    return all(bool(jnp.all(leaf == -0.25)) for leaf in jax.tree_util.tree_leaves(updates))


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


FALLIBLE = frozenset({"expected_update"})
"""What a subject can fail to give; the laws that need it are not judged then."""

READ = {"noise": None, "directional_derivative": "slope", "layer_input_noise": "layer_inputs"}
"""What laws need of the rounding -> what to ask ``Noise`` for besides the outcome's."""

_PROGRAMS: dict[Any, Compiled] = {}
"""Laws know nothing of the step: two subjects with trees alike share the compiled laws."""


class Judge:
    """Residuals of laws on transitions of one subject, with the step's rounding as tolerance.

    Transitions of one shape are compiled for stacks of one size, whatever is asked, so that one
    program serves stacked and single runs.

    Args:
        subject: what is verified.
        facts: static facts, see :func:`static_facts`.
        block: how many transitions a stack has, or what says so of each shape (N, D).
        seed: of the draws by which rounding is read.

    Attributes:
        block: from the shape (N, D) of a case to how many transitions a stack has.
        at_once: from that shape to how many stacks may run at the same time.
        often: whether so many stacks are run that optimising whatever they run pays.
        incomparable: names of the laws that could not be judged, because the state's structure
            or shapes change, or a loss has another shape than it should.
    """

    def __init__(
        self,
        subject: Subject,
        facts: Mapping[str, Any],
        block: int | Budget,
        *,
        seed: int = 0,
    ) -> None:
        budget = block if isinstance(block, Budget) else Fixed(subject, block)
        self.block = budget.block
        self.at_once = budget.at_once
        self.often = budget.often
        self.incomparable: set[str] = set()
        self._subject = subject
        portion = None if budget.often else PORTION  # stacks without end: a call costs 1 ms, too
        self._noise = Noise(
            subject, optimise=budget.pays, seed=seed, held=budget.held, portion=portion
        )
        self._facts = {name: tuple(value) for name, value in facts.items()}

    def residuals(
        self, t: Transition, laws: Sequence[Law], count: int | None = None
    ) -> dict[str, Any]:
        """Return law name -> residuals, (block,), of stacked transitions.

        Args:
            t: the transitions.
            laws: which laws.
            count: how many of the stack count; the residuals of the others mean nothing.
        """
        laws = [law for law in laws if not FALLIBLE & set(law.needs) - set(t.facts)]
        if not laws:
            return {}
        needs = {need for law in laws for need in law.needs}
        if not needs.isdisjoint(READ):
            also = [name for need, name in READ.items() if need in needs and name is not None]
            known = self._noise(t.before, t.case, also, count)
            noise, inputs = _unless_faint(t.case, (known.noise, known.layer_inputs))
            facts = {
                "direction": known.direction,
                "directional_derivative": known.slope,
                "layer_input_noise": inputs,
            }
            t = t._replace(exact=known.exact, noise=noise, facts={**t.facts, **facts})
        if not _regular(t):
            laws = self._comparable(t, laws)
        names = tuple(law.name for law in laws)
        key = (names, tuple(self._facts.items()), self._subject.oracle, self.often)
        if key not in _PROGRAMS:
            _PROGRAMS[key] = Compiled(
                jax.vmap(self._program(laws)),
                optimise=self.often,
                identity=self._identity(laws),
            )
        with compat.enable_x64():
            out = _PROGRAMS[key](t)
        return {name: np.asarray(values) for name, values in out.items()}

    def _comparable(self, t: Transition, laws: Sequence[Law]) -> list[Law]:
        """Return the laws that can be judged of results that have not the form they should."""
        found = []
        for law in laws:
            try:
                with compat.enable_x64():
                    out = jax.eval_shape(jax.vmap(self._program([law])), t)
            except (LookupError, TypeError, ValueError):  # trees or shapes that do not match
                out = {}
            if out and out[law.name].shape == t.case.seed.shape:
                found.append(law)
            else:
                self.incomparable.add(law.name)
        return found

    def each(self, transitions: Sequence[Transition], laws: Sequence[Law]) -> list[dict[str, Any]]:
        """Return law name -> residual, a float, for each of some transitions of one shape."""
        found: list[dict[str, Any]] = []
        block = self.block(transitions[0].case.shape)
        for stacked, count in stacks(transitions, block):
            out = self.residuals(stacked, laws, count)
            found += [{name: float(v[i]) for name, v in out.items()} for i in range(count)]
        return found

    def _program(self, laws: Sequence[Law]) -> Callable[[Transition], dict[str, Any]]:
        facts, oracle = self._facts, self._subject.oracle

        def residuals(t: Transition) -> dict[str, Any]:
            known = {**t.facts, **facts}
            if oracle is not None:
                known["oracle"] = derivation(oracle, t)
            t = t._replace(facts=known)
            return {law.name: law.check(t) for law in laws}

        return residuals

    def _identity(self, laws: Sequence[Law]) -> Identity | None:
        """Return what tells these laws of this subject from others; None where others wrote some."""
        oracle = getattr(self._subject.oracle, "__name__", "")
        modules = [law.check.__module__ for law in laws] + [oracle] * (oracle != "")
        if not all(module.startswith("bnverify.") for module in modules):
            return None
        names = [law.name for law in laws]
        out = jax.tree_util.tree_structure(dict.fromkeys(names, 0))
        return Identity(f"laws {names} {self._facts} {oracle}", out)


def _regular(t: Transition) -> bool:
    """Return whether a stacked step keeps its state's form, and its losses are what they should."""
    stack = t.case.seed.shape
    scalar = t.info.loss is None or t.info.loss.shape == stack
    kept = form(t.before) == form(t.after)
    return bool(scalar and kept and t.eval_loss.shape == (*stack, 1))


FAINT = 2.0**-60
"""Where all of a batch is smaller, its squares and slopes underflow."""


def _unless_faint(case: Case, noise: Any) -> Any:
    """Return ``noise``, infinite for a batch so faint that its squares and slopes underflow.

    Rounding is read as if a value were flushed to zero once; where all of x is below 2^-60 whole
    chains of values are, and what is left of them is no measure of a step.
    """
    largest = np.max(np.abs(case.x), axis=(-2, -1))
    faint = (largest > 0) & (largest < FAINT)
    if not faint.any():
        return noise

    def leaf(value: Any) -> Any:
        value = np.asarray(value)
        return np.where(faint.reshape(-1, *[1] * (value.ndim - 1)), np.inf, value)

    return jax.tree_util.tree_map(leaf, noise)


def derivation(oracle: Any, t: Transition) -> Any:
    """Return what an oracle expects: of the step, and of evaluation in the step's outcome."""
    before, after, case = jax.tree_util.tree_map(wide, (t.before, t.after, t.case))
    expected = oracle.expected(before, case.x, case.y, case.lr, xp=jnp)
    loss = oracle.evaluate(after.params, after.batch_stats, case.x, case.y, xp=jnp)
    return expected._replace(eval_loss=loss)

"""What can be known of a step without running it: its structure and what reaches what."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bnverify.case import Case
from bnverify.errors import first_line
from bnverify.evidence import Evidence
from bnverify.jaxpr.influence import Influence, influence
from bnverify.jaxpr.retrace import changed_by_tracing
from bnverify.jaxpr.rounding import evaluate
from bnverify.jaxpr.shapes import Run, TraceError, Traces, trace_subject
from bnverify.jaxpr.tracing import Abstract, Tracer, trace
from bnverify.laws import Law
from bnverify.lazy import jax, jnp
from bnverify.observe import CompiledSubject, observe
from bnverify.pytree import stack, take
from bnverify.subject import Subject
from bnverify.transition import Transition

MISSING_CAPABILITY = {
    "optimizer": "the subject does not show its optimizer",
    "grads": "the subject does not show its gradients",
    "loss": "the subject does not show its training loss",
    "lr": "the subject's step does not take the learning rate",
    "momentum": "the subject does not declare its momentum",
    "layer_inputs": "the subject does not show what its normalisation layers are given",
    "after_eval": "eval_step returns no state",
    "biases_before_norm": "no bias stands right before a normalisation",
    "solution": "the subject is not one function of seed, batch and lr",
    "oracle": "no independent derivation exists for this subject",
    "batch_stats": "the subject keeps no running statistics",
    "opt_state": "the optimizer keeps no state, and no other can stand in for it",
    "plain_sgd": "the optimizer is not plain SGD",
    "row_losses": "the eval loss is not a mean over rows",
    "eval_is_training_loss": "evaluation and training use different losses",
    "look": "the program of a Subject written by hand is read by bnverify.load and bnverify.declare",
    "draws": "the step draws no random numbers",
    "passes": "no layer is given several batches, or one batch several times, in a step",
    "copies": "the step carries no copy of the params that has statistics of its own",
    "pretrained": "training does not start from a trained model",
    "frozen_params": "no params are frozen",
    "frozen_statistics": "no statistics are frozen",
    "scaled": "no frozen param has a gradient that the optimizer is given",
    "axes": "no normalisation stands behind a convolution or a product with params",
    "masks": "no mask of rows is found in a loss",
    "schedules": "no gradients are accumulated over a known number of batches",
    "rates": "no float32 param is known to move with the learning rate",
    "papers": "no call of an Optax optimizer whose paper bnverify knows makes the optimizer",
    "row_weights": "no weights of rows are declared",
}
"""What laws can require of a subject -> why they are exempt where it is missing."""

PROBED = "by a momentum probe, since the optimizer's own state is empty"


@dataclass(frozen=True)
class Traced:
    """A subject and its traces."""

    tracer: Tracer
    traces: Traces

    @property
    def subject(self) -> Subject:
        """The subject."""
        subject: Subject = self.tracer.subject
        return subject

    @property
    def abstract(self) -> Transition:
        """The first traced run, whose leaves have shapes and dtypes, no values."""
        return _abstract(self.traces.runs[0])

    @cached_property
    def transitions(self) -> list[Transition]:
        """Each traced run, with what the optimizer's init gives for params alone."""
        return [
            _abstract(run)._replace(facts=_expected_opt_state(self.subject, run.before.params))
            for run in self.traces.runs
        ]


@dataclass(frozen=True)
class Reading:
    """A subject as its traces show it.

    Attributes:
        traced: the subject with its traces; None where it does not trace.
        influence: what may reach what; None likewise.
        refusal: why it does not trace; empty where it does.
        probe: the same step around SGD with momentum, where the subject's own optimizer keeps
            no state and another can stand in for it.
        ran: where it does not trace, one run of it; None where it does not run either.
    """

    traced: Traced | None
    influence: Influence | None
    refusal: str = ""
    probe: Traced | None = None
    ran: Transition | None = None

    def tracer(self, subject: Subject) -> Tracer:
        """Return what traced the subject; a new one where it does not trace."""
        return self.traced.tracer if self.traced is not None else Tracer(subject)

    @property
    def abstract(self) -> Transition | None:
        """A transition whose leaves have shapes and dtypes, and values only where it was run."""
        return self.ran if self.traced is None else self.traced.abstract


def read(subject: Subject) -> Reading:
    """Return ``subject`` as its traces show it; nothing is compiled."""
    tracer = Tracer(subject)
    try:
        traces = trace_subject(subject, tracer=tracer)
    except TraceError as error:
        return Reading(None, None, refusal=str(error), ran=_run(subject))
    probe = None
    if not jax.tree_util.tree_leaves(traces.runs[0].before.opt_state):
        probe = _probe(subject)
    return Reading(Traced(tracer, traces), influence(traces), probe=probe)


def _run(subject: Subject) -> Transition | None:
    """Return one run of a subject, uncompiled; None where it raises."""
    width = subject.features[0] if subject.features else 3
    x = np.linspace(-1, 1, 4 * width, dtype=np.float32).reshape(4, width)
    case = Case.of(0, x, x[:, 0], 0.1)
    try:
        t = take(observe(CompiledSubject(subject, "eager"), stack([case]), ()), 0)
    except Exception:  # noqa: BLE001 - whatever a user's code raises
        return None
    return t._replace(facts=_expected_opt_state(subject, t.before.params))


def _probe(subject: Subject) -> Traced | None:
    if subject.with_optimizer is None:
        return None
    probe = Tracer(subject.with_optimizer(_momentum))
    try:
        return Traced(probe, trace_subject(probe.subject, tracer=probe, corners=False))
    except TraceError:  # the probe only adds evidence
        return None


def _momentum(lr: Any) -> Any:
    import optax

    return optax.sgd(lr, momentum=0.9)


def _abstract(run: Run) -> Transition:
    return Transition(
        case=None,  # type: ignore[arg-type] # an abstract transition has no values
        before=run.before,
        after=run.after,
        info=run.info,
        eval_loss=run.eval_loss,
        reruns={},
        evals={},
        facts={},
    )


def _expected_opt_state(subject: Subject, params: Any) -> dict[str, Any]:
    if subject.optimizer is None:
        return {}
    optimizer = subject.optimizer
    shaped, lr = jax.tree_util.tree_map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (params, Abstract((), np.dtype(np.float32))),
    )
    shapes = jax.eval_shape(lambda params, lr: optimizer(lr).init(params), shaped, lr)
    return {"expected_opt_state": shapes}


def exemption(law: Law, subject: Subject, capabilities: Collection[str]) -> str | None:
    """Return why ``law`` does not apply to ``subject``, or None.

    Args:
        law: the law.
        subject: what is verified.
        capabilities: which of the things a law can require the subject shows.
    """
    if law.name in subject.exempt:
        return subject.exempt[law.name]
    for required in law.capabilities:
        if required not in capabilities:
            return MISSING_CAPABILITY[required]
    return None


def capabilities(subject: Subject, abstract: Transition, probe: object = None) -> frozenset[str]:
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
    if subject.row_weights is not None:
        shown.add("row_weights")
    if subject.look is not None:
        shown |= {"look", *(n for n, found in subject.look._asdict().items() if found)}
    shown |= {name for name in ("loss", "grads") if getattr(abstract.info, name) is not None}
    shown |= {
        name for name in ("batch_stats", "opt_state") if leaves(getattr(abstract.before, name))
    }
    if probe is not None:
        shown.add("opt_state")
    if is_plain_sgd(subject, abstract):
        shown.add("plain_sgd")
    return frozenset(shown | set(subject.capabilities))


def is_plain_sgd(subject: Subject, abstract: Transition) -> bool:
    """Return whether the optimizer has no state and turns a gradient g into -lr * g."""
    if subject.optimizer is None or jax.tree_util.tree_leaves(abstract.before.opt_state):
        return False
    answers = asked(subject.optimizer, abstract.before.params, (1.0,), 0.25)
    return answers is not None and all(np.all(leaf == -0.25) for leaf in answers[0])


def asked(
    optimizer: Any, params: Any, gradients: Collection[float], lr: float, at: float = 1.0
) -> Any | None:
    """Return how an optimizer's first update answers gradients that are one number throughout.

    Its traced update is evaluated in NumPy.

    Args:
        optimizer: ``lr -> optax.GradientTransformation``.
        params: a tree like the params; a size that is no number counts as 2.
        gradients: the numbers.
        lr: the learning rate.
        at: what every param is.

    Returns:
        A list of the update's leaves for each gradient; None where the optimizer does not answer, or
        changes the tree.
    """

    def ones(leaf: Any) -> Any:
        # In the params' own tree and ranks, since masks go by names and by ranks.
        sizes = (size if isinstance(size, int) else 2 for size in leaf.shape)
        return np.full(tuple(sizes), at, leaf.dtype)

    def update(params: Any, gradients: Any, rate: Any) -> Any:
        tx = optimizer(rate)
        grads = jax.tree_util.tree_map(lambda p: jnp.full_like(p, gradients), params)
        return tx.update(grads, tx.init(params), params)[0]

    one = jax.tree_util.tree_map(ones, params)
    given = [(one, np.float32(gradient), np.float32(lr)) for gradient in gradients]
    try:
        program = trace(update, *given[0])
    except Exception:  # noqa: BLE001 - a user's optimizer may need more than params and gradients
        return None
    answers = [jax.tree_util.tree_leaves(evaluate(program, *each)) for each in given]
    return answers if len(answers[0]) == len(jax.tree_util.tree_leaves(params)) else None


def judge_structure(law: Law, reading: Reading) -> Evidence:
    """Return the evidence for a law of structure from the traces."""
    traced, note = reading.traced, ""
    if traced is not None and not {"look", "retraced"}.isdisjoint(law.observes):
        return _judge_seen(law, traced)
    if "opt_state" in law.capabilities and reading.probe is not None:
        traced, note = reading.probe, f", {PROBED}"
    if traced is None:
        if reading.ran is None or "retraced" in law.observes:
            return Evidence(law.name, law.family, "untriggered", reason=reading.refusal)
        lines = law.check(reading.ran)
        scope = f"in one run, since it does not trace: {reading.refusal}"
        if lines:
            return Evidence(law.name, law.family, "violated", 1, reason=f"{lines[0]} [{scope}]")
        return Evidence(law.name, law.family, "held", 1, reason=scope)
    traces = traced.traces
    for transition in traced.transitions:
        lines = law.check(transition)
        if lines:
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            return Evidence(
                law.name,
                law.family,
                "violated",
                cases=1,
                reason=f"{lines[0]}{more} [{traces.scope}{note}]",
            )
    status, why = ("proved", "") if traces.proved else ("held", f": {traces.narrowed}")
    return Evidence(
        law.name,
        law.family,
        status,  # type: ignore[arg-type] # one of the two literals above
        cases=0 if traces.proved else 1,
        reason=f"{traces.scope}{note}{why}",
    )


def _judge_seen(law: Law, traced: Traced) -> Evidence:
    """Return the evidence for a law about what a look at the step shows, or a second trace of it.

    It is no proof that the law holds: a look tells what may happen, and at one batch size.
    """
    facts: dict[str, Any] = {"look": traced.subject.look}
    reason = "as read from the traced step"
    if "retraced" in law.observes:
        reason, subject = "as two traces compute one batch", traced.subject
        try:
            width = subject.features[0] if subject.features else 3
            facts["retraced"] = changed_by_tracing(subject, 4, width)
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises
            return Evidence(law.name, law.family, "untriggered", reason=first_line(error))
    lines = law.check(traced.abstract._replace(facts=facts))
    if not lines:
        return Evidence(law.name, law.family, "held", 1, reason=reason)
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return Evidence(law.name, law.family, "violated", 1, reason=f"{lines[0]}{more}")


def prove_influence(law: Law, reading: Reading) -> Evidence | None:
    """Return a proof that nothing the law forbids can flow, or None where there is none.

    A flow in the matrix is no violation: it may cancel. Running decides.
    """
    flows = reading.influence
    if flows is None or not flows.proved:
        return None
    if law.returns_unchanged:
        return _prove_handed_on(law, flows)
    if not law.must_not_reach:
        return None
    absent = [output for output, _ in law.must_not_reach if output not in flows.matrix]
    if absent or forbidden(law, flows):
        return None
    return Evidence(
        law.name,
        law.family,
        "proved",
        reason=f"all values, {flows.scope}: "
        + ", ".join(f"no {i} -> {o}" for o, i in law.must_not_reach),
    )


def _prove_handed_on(law: Law, flows: Influence) -> Evidence | None:
    """Return a proof that the very values of some trees are handed on, or None where there is none."""
    named = dict(law.returns_unchanged)
    leaves = [leaf for leaf in flows.leaves if leaf.split("/", 1)[0] in named]
    for leaf in leaves:
        tree, _, path = leaf.partition("/")
        origin = f"{named[tree]}/{path}" if path else named[tree]
        if flows.unchanged.get(leaf) != origin:
            return None
    if not leaves:
        return None
    reason = f"all values, {flows.scope}: what is handed back is what was given"
    return Evidence.of(law.name, "proved", reason=reason)


def prove_missing(law: Law, reading: Reading) -> Evidence | None:
    """Return a proof that what the law demands cannot happen, or None where there is none.

    What the trace shows may reach an output is for a run to decide; what it shows cannot, cannot.
    Statistics whose declared momentum is 0 forget by design, so those are left to the run.
    """
    flows = reading.influence
    if flows is None or not flows.proved or reading.traced is None:
        return None
    if reading.traced.subject.momentum == 0:
        return None
    missing = [
        (output, source)
        for output, source in law.must_reach
        if output in flows.matrix and source not in flows.matrix[output]
    ]
    kept = [tree for tree in law.must_change if _handed_back(tree, flows)]
    if not missing and not kept:
        return None
    said = [f"{source} cannot change {output}" for output, source in missing]
    said += [f"the step hands back the old {tree}" for tree in kept]
    reason = f"proved from the trace, all values, {flows.scope}: {' and '.join(said)}"
    return Evidence.of(law.name, "violated", reason=reason)


def _handed_back(tree: str, flows: Influence) -> bool:
    """Return whether every leaf of a tree comes out of the step as it went in."""
    leaves = [leaf for leaf in flows.leaves if leaf.split("/", 1)[0] == tree]
    return bool(leaves) and all(flows.unchanged.get(leaf) == leaf for leaf in leaves)


def forbidden(law: Law, flows: Influence) -> list[tuple[str, str]]:
    """Return the (output, input) pairs that ``law`` forbids and the step may have.

    An evaluation that hands back the very leaf it was given lets nothing else flow into it.
    """
    return [
        (output, source)
        for output, source in law.must_not_reach
        if source in flows.matrix.get(output, frozenset())
    ]


def explain(law: Law, reading: Reading) -> str:
    """Return the path of a forbidden dependency in one line; empty where there is none."""
    if reading.influence is None:
        return ""
    for output, source in forbidden(law, reading.influence):
        return reading.influence.explain(source, output)
    return ""


def offending_path(law: Law, reading: Reading) -> tuple[str, ...]:
    """Return the same step by step, see ``Evidence.path``."""
    if reading.influence is None:
        return ()
    for output, source in forbidden(law, reading.influence):
        return reading.influence.steps(source, output)
    return ()


def user_line(law: Law, reading: Reading, leaf: str = "") -> str | None:
    """Return ``path:line`` in the user's code that a violation leads to, where the trace knows it.

    It is the last line on the way of a forbidden flow; without one, that which computes ``leaf``.
    Lines of bnverify's own, such as an adapter's loss, are nobody's to mend.
    """
    flows = reading.influence
    if flows is None:
        return None
    ways = [(source, output) for output, source in forbidden(law, flows)]
    ways += [(source, leaf) for source in ("params", "batch_stats", "x") if leaf]
    for source, output in ways:
        for link in reversed(flows.path(source, output) or ()):
            place = (link.source or "").rsplit(" (", 1)[0]
            if place and not place.startswith(_OWN):
                return place
    return None


_OWN = f"{Path(__file__).parent}{os.sep}"

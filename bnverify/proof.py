"""Proofs: what the traced step shows without running it, its structure and its dependencies."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bnverify.errors import first_line
from bnverify.evidence import Evidence
from bnverify.jaxpr.influence import Influence, influence
from bnverify.jaxpr.retrace import changed_by_tracing
from bnverify.jaxpr.rounding import evaluate
from bnverify.jaxpr.shapes import Run, TraceError, Traces, trace_subject
from bnverify.jaxpr.tracing import Abstract, Tracer, trace
from bnverify.laws import Law
from bnverify.lazy import jax, jnp
from bnverify.model import Case, Subject, Transition
from bnverify.observe import CompiledSubject, observe
from bnverify.pytree import stack, take

MISSING_CAPABILITY = {
    "optimizer": "the subject's optimizer is unknown. In a loop it is seen where the step updates all params "
    "of a network in one call, outside jax.vmap and, if it is not in the state, outside functions that the "
    "step compiles; it must not be created in each step. A Subject written by hand has optimizer=",
    "grads": "the gradients of the step are unknown. In a loop they are seen where the step passes those of "
    "all params of a network to an optimizer in one call, outside jax.vmap. A Subject written by hand "
    "returns them",
    "loss": "the training loss of the step is unknown: report it as 'loss', or name it with loss=",
    "lr": "the step does not use the learning rate that it is given",
    "momentum": "the momentum of the normalisation layers is unknown, or differs between them; "
    "if all have one, declare it: momentum=0.9",
    "layer_inputs": "the inputs of the normalisation layers are unknown",
    "after_eval": "eval_step returns no state",
    "biases_before_norm": "no bias is added right before a normalisation",
    "solution": "the subject is not one function of seed, batch and lr",
    "oracle": "there is no independent derivation of this step",
    "batch_stats": "the step has no running statistics",
    "opt_state": "the optimizer has no state, and cannot be replaced by one that has",
    "plain_sgd": "the optimizer is not plain SGD",
    "row_losses": "the eval loss is not a mean over rows",
    "eval_is_training_loss": "evaluation and training use different losses",
    "look": "only bnverify.load and bnverify.declare analyse the trace of a Subject written by hand",
    "draws": "the step draws no random numbers",
    "passes": "no layer processes several batches, or one batch several times, in a step",
    "parts": "no loop inside the step normalises the batch in parts",
    "teachers": "no network that is never trained makes targets of the training loss",
    "lookaheads": "no params are those of optax.lookahead",
    "copies": "the state has no copy of the params with its own running statistics",
    "pretrained": "training does not start from a pretrained model",
    "frozen_params": "no params are frozen",
    "frozen_statistics": "no running statistics are frozen",
    "scaled": "no gradient of a frozen param is passed to the optimizer",
    "axes": "no normalisation follows a convolution or a matrix product with params",
    "masks": "no loss masks rows out",
    "pairings": "no loss combines rows with other rows by elementwise arithmetic",
    "schedules": "gradients are not accumulated over a known number of batches",
    "rates": "no float32 param is known to change with the learning rate",
    "papers": "the optimizer is made by no call of an Optax optimizer whose paper bnverify knows",
    "row_weights": "no row weights are declared",
}
"""Capability that laws require of a subject -> the reason for the exemption if it is missing."""

PROBED = "checked with momentum SGD, because the optimizer's own state is empty"


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
        """The first traced run; its leaves have shapes and dtypes but no values."""
        return _abstract(self.traces.runs[0])

    @cached_property
    def transitions(self) -> list[Transition]:
        """Each traced run, with the shapes of tx.init(params) as a fact."""
        return [
            _abstract(run)._replace(facts=_expected_opt_state(self.subject, run.before.params))
            for run in self.traces.runs
        ]


@dataclass(frozen=True)
class Reading:
    """The result of tracing a subject.

    Attributes:
        traced: the subject with its traces; None if it does not trace.
        influence: which inputs may affect which outputs; None if it does not trace.
        refusal: why it does not trace; empty if it does.
        probe: the same step with momentum SGD, if the subject's optimizer has no state and can be
            replaced; else None.
        ran: one run of a subject that does not trace; None if it traces, or does not run.
    """

    traced: Traced | None
    influence: Influence | None
    refusal: str = ""
    probe: Traced | None = None
    ran: Transition | None = None

    def tracer(self, subject: Subject) -> Tracer:
        """Return the tracer of the subject, or a new one if it does not trace."""
        return self.traced.tracer if self.traced is not None else Tracer(subject)

    @property
    def abstract(self) -> Transition | None:
        """A transition with shapes and dtypes; it has values only if the subject does not trace."""
        return self.ran if self.traced is None else self.traced.abstract


def read(subject: Subject) -> Reading:
    """Trace ``subject``, without compiling anything."""
    tracer = Tracer(subject)
    try:
        traces = trace_subject(subject, tracer=tracer)
    except TraceError as error:
        return Reading(None, None, refusal=str(error), ran=_run(subject))
    probe = None
    if not jax.tree_util.tree_leaves(traces.runs[0].before.opt_state):
        probe = _probe(subject, tracer.multiple)
    return Reading(Traced(tracer, traces), influence(traces), probe=probe)


def _run(subject: Subject) -> Transition | None:
    """Return one run of a subject without jit; None if it raises."""
    width = subject.width(3)
    x = np.linspace(-1, 1, 4 * width, dtype=np.float32).reshape(4, width)
    case = Case.of(0, x, x[:, 0], 0.1)
    try:
        t = take(observe(CompiledSubject(subject, "eager"), stack([case]), ()), 0)
    except Exception:  # noqa: BLE001 - user code may raise anything
        return None
    return t._replace(facts=_expected_opt_state(subject, t.before.params))


def _probe(subject: Subject, multiple: int) -> Traced | None:
    if subject.with_optimizer is None:
        return None
    probe = Tracer(subject.with_optimizer(_momentum), multiple)
    try:
        return Traced(probe, trace_subject(probe.subject, tracer=probe, corners=False))
    except TraceError:  # the probe only adds evidence
        return None


def _momentum(lr: Any) -> Any:
    import optax

    return optax.sgd(lr, momentum=0.9)


def _abstract(run: Run) -> Transition:
    return Transition(
        case=None,  # type: ignore[arg-type] # an abstract transition has no case
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
    """Return why ``law`` does not apply to ``subject``; None if it does.

    Args:
        law: the law.
        subject: the subject.
        capabilities: the capabilities of the subject; see :func:`capabilities`.
    """
    if law.name in subject.exempt:
        return subject.exempt[law.name]
    for required in law.capabilities:
        if required not in capabilities:
            return MISSING_CAPABILITY[required]
    return None


def capabilities(subject: Subject, abstract: Transition, probe: object = None) -> frozenset[str]:
    """Return the capabilities of ``subject``, keys of ``MISSING_CAPABILITY``.

    Args:
        subject: the subject.
        abstract: a transition of it with shapes and dtypes.
        probe: the same step with a stateful optimizer; None if there is none.
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
    """Return an optimizer's first update for gradients that are constant throughout.

    Its traced update is evaluated in NumPy.

    Args:
        optimizer: ``lr -> optax.GradientTransformation``.
        params: a tree like the params; symbolic sizes are taken as 2.
        gradients: the values of the gradients.
        lr: the learning rate.
        at: the value of every param.

    Returns:
        For each gradient a list of the update's leaves; None if the optimizer raises, or if the
        update is not a tree like params.
    """

    def ones(leaf: Any) -> Any:
        # The tree and ranks of params are kept, since masks may depend on names and ranks.
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
    """Return the evidence for a law of structure, from the traces."""
    traced, note = reading.traced, ""
    if traced is not None and not {"look", "retraced"}.isdisjoint(law.observes):
        return _judge_seen(law, traced)
    if "opt_state" in law.capabilities and reading.probe is not None:
        traced, note = reading.probe, f", {PROBED}"
    if traced is None:
        if reading.ran is None or "retraced" in law.observes:
            return Evidence(law.name, law.family, "untriggered", reason=reading.refusal)
        lines = law.check(reading.ran)
        scope = f"in one run, because the step does not trace: {reading.refusal}"
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
    """Return the evidence for a law that is read off the traced program, or off a second trace.

    "held" and not "proved", because the program is read at one batch size and may be misread.
    """
    facts: dict[str, Any] = {"look": traced.subject.look}
    reason = "as read from the traced step"
    if "retraced" in law.observes:
        reason = "two traces agree on a batch"
        try:
            facts["retraced"] = changed_by_tracing(traced.tracer)
        except Exception as error:  # noqa: BLE001 - whatever a user's code raises
            return Evidence(law.name, law.family, "untriggered", reason=first_line(error))
    lines = law.check(traced.abstract._replace(facts=facts))
    if not lines:
        return Evidence(law.name, law.family, "held", 1, reason=reason)
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return Evidence(law.name, law.family, "violated", 1, reason=f"{lines[0]}{more}")


def prove_influence(law: Law, reading: Reading) -> Evidence | None:
    """Return a proof that no forbidden dependency exists; None if the trace does not prove it.

    A dependency in the trace is no violation, because it may cancel: running decides.
    """
    flows = reading.influence
    if flows is None or not flows.proved:
        return None
    if law.returns_unchanged:
        return _prove_unchanged(law, flows)
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


def _prove_unchanged(law: Law, flows: Influence) -> Evidence | None:
    """Return a proof that certain trees are returned unchanged; None if the trace does not prove it."""
    named = dict(law.returns_unchanged)
    leaves = [leaf for leaf in flows.leaves if leaf.split("/", 1)[0] in named]
    for leaf in leaves:
        tree, _, path = leaf.partition("/")
        origin = f"{named[tree]}/{path}" if path else named[tree]
        if flows.unchanged.get(leaf) != origin:
            return None
    if not leaves:
        return None
    reason = f"all values, {flows.scope}: the input is returned unchanged"
    return Evidence.of(law.name, "proved", reason=reason)


def prove_missing(law: Law, reading: Reading) -> Evidence | None:
    """Return a proof that a required dependency does not exist; None if the trace does not prove it.

    With a declared momentum of 0, the new statistics do not depend on the old ones by design: None.
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
    kept = [tree for tree in law.must_change if _returned_unchanged(tree, flows)]
    if not missing and not kept:
        return None
    said = [f"{source} cannot change {output}" for output, source in missing]
    said += [f"the step returns {tree} unchanged" for tree in kept]
    reason = f"proved from the trace, all values, {flows.scope}: {' and '.join(said)}"
    return Evidence.of(law.name, "violated", reason=reason)


def _returned_unchanged(tree: str, flows: Influence) -> bool:
    """Return whether the step returns every leaf of a tree unchanged."""
    leaves = [leaf for leaf in flows.leaves if leaf.split("/", 1)[0] == tree]
    return bool(leaves) and all(flows.unchanged.get(leaf) == leaf for leaf in leaves)


def forbidden(law: Law, flows: Influence) -> list[tuple[str, str]]:
    """Return the (output, input) pairs that ``law`` forbids but the trace contains."""
    return [
        (output, source)
        for output, source in law.must_not_reach
        if source in flows.matrix.get(output, frozenset())
    ]


def offending_path(law: Law, reading: Reading) -> tuple[str, ...]:
    """Return how a forbidden dependency comes about, step by step; empty where there is none."""
    flows = reading.influence
    if flows is None:
        return ()
    paths = (flows.steps(source, output) for output, source in forbidden(law, flows))
    return next(filter(None, paths), ())


def user_line(law: Law, reading: Reading, leaf: str = "") -> str | None:
    """Return ``path:line`` of the user's code behind a violation; None if it is unknown.

    It is the last line on the path of a forbidden dependency, or else the line that computes ``leaf``.
    Lines of bnverify itself, such as an adapter's loss, are skipped.
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

"""Analysing the traces of a Subject: its normalisation layers, and which laws apply to it.

Every adapter first makes a plain Subject of a user's code: init, step and evaluate. Here each is traced
once (``programs``). What was recorded during tracing gives the layers, what the step does by design
(``by_design``), and facts that laws judge (``look``). A law that a step violates by design becomes
exempt, with the reason. What cannot be determined is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any, Unpack

import jax

from bnverify.adapters.averages import Averages, unrecognised_moments
from bnverify.adapters.by_design import (
    GRADIENT,
    HINTS,
    INITIAL,
    OWN_EVALUATION,
    Declarations,
    Declared,
    Design,
    because,
    declared_by,
)
from bnverify.adapters.inputs import differing_inputs
from bnverify.adapters.look import carried_name, look_at, read_by_evaluation
from bnverify.adapters.optimizer import updates_every
from bnverify.adapters.programs import Layers, Programs, example_of
from bnverify.adapters.trees import extra_of
from bnverify.errors import UsageError
from bnverify.jaxpr.tracing import leaf_names
from bnverify.model import Copy, State, Subject, Tree
from bnverify.pytree import by_path, path_name


def completed(
    subject: Subject,
    declared: Declared | None = None,
    *,
    batch: Callable[[Any, Any], Any] | None = None,
    makers: Sequence[Callable[..., Any]] = (),
    written_by_hand: bool = False,
) -> Subject:
    """Return ``subject`` completed by an analysis of its traces.

    Args:
        subject: init, step and evaluate; attributes that are already set are kept.
        declared: the user's declarations.
        batch: the function that makes the batch from x and y; None if it is unknown.
        makers: the user's functions that create the optimizer.
        written_by_hand: whether a user wrote the Subject; then missing statistics are a note
            instead of an error.

    Raises:
        UsageError: the statistics of normalisation layers are not found, or a loss has a gradient
            of 0 everywhere.
    """
    declared = declared or Declared()
    programs = Programs(subject)
    layers = Layers(programs, declared.passes)
    patterns = [*declared.carried, *(declared.frozen or ()), *layers.carried()]
    others = {
        path: reason
        for path, reason in Averages(programs, layers).others().items()
        if not any(fnmatchcase(path, pattern) for pattern in patterns)
    }
    if patterns or others:
        subject = _carrying(subject, [*patterns, *map(escape, others)])
        programs = Programs(subject)
        layers = Layers(programs, declared.passes)
    design = Design(programs, layers, declared, batch)
    notes = [*subject.notes]
    missing = layers.without_statistics()
    if missing and not written_by_hand:
        raise UsageError(missing)
    notes += [missing] if missing else []
    differing = differing_inputs(programs)
    notes += [differing] if differing else []
    notes += Averages(programs, layers).notes(others)
    if not written_by_hand:
        _refuse_flat(design)
    every = max(updates_every(subject, programs.state), subject.updates_every)
    makers = [*makers, *filter(None, [subject.optimizer])]
    seen = look_at(programs, layers, declared, every, makers)
    found = {**unrecognised_moments(programs.state.batch_stats), **design.exempt(seen.pairings)}
    found |= _of_an_evaluated_copy(programs, seen.copies)
    if declared.pretrained or any(with_statistics for _, with_statistics in seen.pretrained):
        told = "pretrained=True: " if declared.pretrained else ""
        found |= because(f"{told}training starts from a pretrained model", INITIAL)
    penalty = declared.penalty
    if penalty is None:
        penalty = not written_by_hand and design.has_penalty()
    if penalty and not set(GRADIENT) & set(found):
        said = "the differentiated loss has a penalty on the params that the reported loss lacks"
        if declared.penalty:
            said = "the differentiated loss is declared to differ from the reported one"
        found |= because(said, GRADIENT)
    biases = () if design.is_online() else layers.biases()
    analysed = replace(
        subject,
        exempt={**found, **subject.exempt, **declared.exempt},
        momentum=_momentum(subject, declared, layers),
        layer_inputs=subject.layer_inputs or layers.layer_inputs(),
        capabilities=subject.capabilities
        - ({"lr"} if written_by_hand and _keeps_its_rate(programs) else set()),
        biases_before_norm=subject.biases_before_norm or biases,
        notes=tuple(notes),
        hints={**HINTS, **subject.hints},
        row_weights=declared.weights or subject.row_weights,
        updates_every=every,
        look=seen,
    )
    return replace(analysed, with_optimizer=_with_optimizer(subject, analysed))


def _with_optimizer(
    subject: Subject, analysed: Subject
) -> Callable[[Callable[[Any], Any]], Subject] | None:
    """Return ``with_optimizer`` for an analysed subject; another optimizer needs no second analysis."""
    plain = subject.with_optimizer
    if plain is None:
        return None

    def with_optimizer(optimizer: Callable[[Any], Any]) -> Subject:
        other = plain(optimizer)
        return replace(
            analysed,
            name=other.name,
            init=other.init,
            step=other.step,
            evaluate=other.evaluate,
            after_eval=other.after_eval,
            optimizer=other.optimizer,
            with_optimizer=None,
            capabilities=other.capabilities,
            updates_every=1,
        )

    return with_optimizer


def declare(subject: Subject, **declared: Unpack[Declarations]) -> Subject:
    """Return a Subject written by hand, completed by an analysis of its traces and by declarations.

    ``bnverify.load`` does the same without declarations.

    Args:
        subject: init, step and evaluate; attributes that are already set are kept.
        **declared: see ``bnverify.adapters.by_design.Declared``.

    Raises:
        TypeError: there is no such declaration.
    """
    return completed(subject, declared_by(declared), written_by_hand=True)


def _of_an_evaluated_copy(programs: Programs, copies: Sequence[Copy]) -> dict[str, str]:
    """Return the law that an evaluation of averaged params violates by design, with the reason."""
    read = read_by_evaluation(programs)
    if any(path.startswith("batch_stats/") for path in read):
        return {}
    for copy in copies:
        if copy.written and any(carried_name(p).startswith(f"{copy.batch_stats}/") for p in read):
            said = f"evaluation uses {copy.params} and {copy.batch_stats}, which follow the model's own"
            return because(said, OWN_EVALUATION)
    return {}


def _momentum(subject: Subject, declared: Declared, layers: Layers) -> float | None:
    """Return the momentum of all layers: what the Subject says, what is declared, or what is found."""
    told = subject.momentum if subject.momentum is not None else declared.momentum
    return layers.momentum() if told is None else told


def _keeps_its_rate(programs: Programs) -> bool:
    """Return whether a step ignores the learning rate, and its optimizer is unknown."""
    flows, rate = programs.flows, programs.inputs["lr"]
    return programs.subject.optimizer is None and not flows.depends_on([rate])


def _refuse_flat(design: Design) -> None:
    what = design.flat()
    if what is not None:
        option = "eval_loss" if what == "eval_step" else "loss"
        without = "; or leave eval_step out, to use the training loss in eval mode"
        raise UsageError(
            f"the loss of {what} has a gradient of 0 everywhere: is it an accuracy? Give the loss with "
            f"{option}=, a key or a function of (report, batch)"
            + (without if what == "eval_step" else "")
        )


@dataclass(frozen=True)
class _Carrying:
    """Moves statistics that are no moving averages from ``batch_stats`` to ``extra``, and back."""

    subject: Subject
    patterns: tuple[str, ...]

    def apart(self, state: State) -> State:
        averages, carried = partition(state.batch_stats, self.patterns)
        if not carried:
            return state
        extra = {
            **extra_of(state),
            "carried": carried,
        }
        return state._replace(batch_stats=averages, extra=extra)

    def whole(self, state: State, x: Any) -> State:
        extra = extra_of(state)
        carried = extra.pop("carried", {})
        seed, inputs, _ = example_of(x.shape)
        template = jax.eval_shape(self.subject.init, seed, inputs).batch_stats
        joined = union(state.batch_stats, carried, template)
        return state._replace(batch_stats=joined, extra=extra or ())


def _carrying(subject: Subject, patterns: Sequence[str]) -> Subject:
    """Return the same step with the statistics that match a pattern in ``State.extra``."""
    way = _Carrying(subject, tuple(patterns))
    evaluate, step, after_eval = subject.evaluate, subject.step, subject.after_eval

    def stepped(state: State, x: Any, y: Any, lr: Any) -> Any:
        after, info = step(way.whole(state, x), x, y, lr)
        return way.apart(after), info

    def left(state: State, x: Any, y: Any) -> State:
        assert after_eval is not None
        return way.apart(after_eval(way.whole(state, x), x, y))

    other = subject.with_optimizer
    return replace(
        subject,
        init=lambda seed, x: way.apart(subject.init(seed, x)),
        step=stepped,
        evaluate=lambda state, x, y: evaluate(way.whole(state, x), x, y),
        after_eval=None if after_eval is None else left,
        with_optimizer=None if other is None else lambda tx: _carrying(other(tx), patterns),
    )


def partition(tree: Tree, patterns: Sequence[str]) -> tuple[Tree, dict[str, Any]]:
    """Return (a tree without the leaves whose path matches a pattern, a dict of those leaves).

    Args:
        tree: any pytree. Leaves are removed from nested dicts, and replaced by None elsewhere.
        patterns: ``fnmatch`` patterns of paths joined by "/".
    """
    if not patterns:
        return tree, {}
    taken: dict[str, Any] = {}

    def kept(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            taken[name] = leaf
            return None
        return leaf

    return _pruned(jax.tree_util.tree_map_with_path(kept, tree)), taken


def _pruned(tree: Tree) -> Tree:
    if not isinstance(tree, Mapping):
        return tree
    inner = {key: _pruned(value) for key, value in tree.items()}
    return {
        k: v
        for k, v in inner.items()
        if v is not None and not (not jax.tree_util.tree_leaves(v) and tree[k] != v)
    }


def union(tree: Tree, taken: Mapping[str, Any], whole: Any) -> Tree:
    """Undo ``partition``.

    Args:
        tree: the tree without the leaves that were taken.
        taken: path -> leaf that was taken.
        whole: a tree with the structure of the whole.
    """
    if not taken:
        return tree
    left = by_path(tree)
    leaves = [taken[name] if name in taken else left[name] for name in leaf_names(whole)]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(whole), leaves)

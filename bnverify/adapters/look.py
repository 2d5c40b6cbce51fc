"""A Subject completed by a look at its program: what its layers are, and which laws apply to it.

Every adapter makes a plain Subject of a user's code: init, step and evaluation. Here each is traced
once, for shapes only; what was marked on the way (``bnverify.adapters.watch``) and what reaches
what in the programs (``bnverify.adapters.traced``) tells the rest. What cannot be told is left out,
and a law that a step breaks by design is exempt with the reason that was found.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.adapters import declared as laws
from bnverify.adapters.declared import HINTS, Declared, because
from bnverify.adapters.explain import is_library
from bnverify.adapters.traced import (
    DRAWS,
    Evaluation,
    Flows,
    labels,
    labels_anywhere,
    layer_input,
    links,
    marked,
)
from bnverify.adapters.trees import partition, union
from bnverify.adapters.watch import Call, Recording, watching
from bnverify.jaxpr.interpreter import live, read
from bnverify.pytree import path_name
from bnverify.subject import LayerInput, State, Subject
from bnverify.unusable import Unusable

ROWS = 24  # of the traces: a size that no feature has by chance, and that a step may split evenly
FEATURES = 6  # where any will do
RATE = 0.1
WARMUPS = 3  # so many updates a case takes at most: two of warm-up, and its own
FLAT = frozenset({"sign", "floor", "ceil", "round", "stop_gradient"})  # no slope goes through them


def completed(
    subject: Subject,
    declared: Declared | None = None,
    *,
    batch: Callable[[Any, Any], Any] | None = None,
    written_by_hand: bool = False,
) -> Subject:
    """Return ``subject`` with all that a look at its programs shows.

    Args:
        subject: init, step and evaluation; what it says already stays.
        declared: what its user says of it.
        batch: makes the step's batch of x and y, where that is known.
        written_by_hand: whether a user wrote the Subject, who may keep anything anywhere: what
            would be refused of a loop is a note then.

    Raises:
        Unusable: normalisation layers run, and their statistics are nowhere to be found; a loss
            has no slope anywhere.
    """
    declared = declared or Declared()
    look = Look(subject)
    patterns = [*declared.carried, *declared.frozen, *look.carried()]
    if patterns:
        subject = _carrying(subject, patterns)
        look = Look(subject)
    notes = [*subject.notes, *look.notes()]
    missing = look.without_statistics()
    if missing and not written_by_hand:
        raise Unusable(missing)
    notes += [missing] if missing else []
    if not written_by_hand:
        _refuse_flat(look)
    found = look.exempt(declared, batch)
    every = _updates_every(subject, look.state)
    if every > WARMUPS:
        said = f"optax.MultiSteps moves the params at every {every}th step only"
        found |= because(said, laws.MOVES_PARAMS)
    penalty = declared.penalty
    if penalty is None:
        penalty = not written_by_hand and look.has_penalty()
    if penalty and not set(laws.GRADIENT) & set(found):
        said = "the loss that is differentiated has a term of params alone, a penalty, that the "
        found |= because(f"{said}reported one lacks", laws.GRADIENT)
    return replace(
        subject,
        exempt={**found, **subject.exempt, **declared.exempt},
        momentum=subject.momentum if subject.momentum is not None else look.momentum(declared),
        layer_inputs=subject.layer_inputs or look.layer_inputs(),
        biases_before_norm=subject.biases_before_norm
        or (() if look.is_online(declared) else look.biases()),
        notes=tuple(notes),
        hints={**HINTS, **subject.hints},
        row_weights=declared.weights or subject.row_weights,
        updates_every=max(every, subject.updates_every),
        frozen=tuple(f"carried/{path}" for path in look.frozen_paths(declared.frozen)),
    )


def _traced(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Return the program of a function, and its result's shapes; traced anew each time."""
    # JAX keeps the program of a function that it has traced before.
    anew = partial(function)
    found: tuple[Any, Any] = jax.make_jaxpr(anew, return_shape=True)(*args)
    return found


def sizes_of(features: tuple[int, ...] | None) -> tuple[int, int]:
    """Return the (N, D) of the traces."""
    return ROWS, features[0] if features else FEATURES


class Look:
    """What one trace of a subject's functions shows.

    Args:
        subject: a training step.

    Attributes:
        state: the state before the first step, of shapes without values.
        recording: what was noted while the step was traced.
    """

    def __init__(self, subject: Subject) -> None:
        shape: Any = jax.ShapeDtypeStruct
        sizes = sizes_of(subject.features)
        x, y = shape(sizes, "float32"), shape(sizes[:1], "float32")
        self.subject = subject
        self.state: State = jax.eval_shape(subject.init, shape((), "int32"), x)
        self.init = _traced(subject.init, np.int32(0), x)[0]
        given = (self.state, x, y)
        with watching() as self.recording:
            self.step, out = _traced(subject.step, *given, np.float32(RATE))
        if self.state.batch_stats and not self.recording.calls:
            # A function compiled inside of the step may have been traced before, unwatched.
            jax.clear_caches()
            with watching() as self.recording:
                self.step, out = _traced(subject.step, *given, np.float32(RATE))
        self.after, self.info = out
        with watching() as self.evaluation:
            self.evaluate, _ = _traced(subject.evaluate, *given)
        self._flows = Flows(self.step)
        self._eval_flows = Flows(self.evaluate)
        self._inline, self._anywhere = labels(self.step), labels_anywhere(self.step)
        names = leaf_paths(self.state)
        self._inputs = dict(zip(names, self._flows.inputs, strict=False))
        self._inputs |= dict(zip(("x", "y", "lr"), self._flows.inputs[len(names) :], strict=True))
        self._eval_inputs = dict(zip((*names, "x", "y"), self._eval_flows.inputs, strict=True))
        after = leaf_paths(self.after)
        self._outputs = dict(zip(after, self._flows.outputs, strict=False))
        self._loss = self._flows.outputs[len(after)] if self.info.loss is not None else None

    # The layers.

    @cached_property
    def owners(self) -> dict[str, list[Any]]:
        """Path of a layer in the statistics -> its floating-point leaves."""
        found: dict[str, list[Any]] = defaultdict(list)
        for path, leaf in jax.tree_util.tree_flatten_with_path(self.state.batch_stats)[0]:
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                found[path_name(path).rpartition("/")[0]].append(leaf)
        return found

    @cached_property
    def calls(self) -> dict[str, list[str]]:
        """Path of a layer in the statistics -> the labels of its calls."""
        found: dict[str, list[str]] = defaultdict(list)
        for label, call in self.recording.calls.items():
            path = self._owner(label, call)
            if path is not None and self._anywhere[label]:
                found[path].append(label)
        return found

    def _owner(self, label: str, call: Call) -> str | None:
        """Return whose call it is, by where its statistics come from, or else by their names."""
        if call.known:
            return call.path if call.path in self.owners else None
        fitting = [p for p in self.owners if p == call.path or p.endswith(f"/{call.path}")]
        for name in call.names:
            for node in self._flows.of_label(f"{label} old {name}"):
                behind = self._flows.origins([node])
                own = [p for p in fitting if self._inputs.get(f"batch_stats/{p}/{name}") in behind]
                elsewhere = {self._inputs[p] for p in self._inputs if p.startswith("extra/")}
                if len(own) == 1 or (not own and elsewhere & set(self._flows.operands(node))):
                    return own[0] if own else None
        return fitting[0] if len(fitting) == 1 else None

    @cached_property
    def _ambiguous(self) -> set[str]:
        """Layers that a call may belong to, or not."""
        found: set[str] = set()
        for label, call in self.recording.calls.items():
            if call.training and not any(label in each for each in self.calls.values()):
                found |= {p for p in self.owners if p.endswith(f"/{call.path}")}
        return found

    def _training(self, path: str) -> list[str]:
        return [label for label in self.calls.get(path, ()) if self.recording.calls[label].training]

    def writes(self, path: str) -> int | None:
        """Return how many batches a layer folds in during a step; None where it cannot be told.

        A layer shared within one pass writes twice by design. So does one that is given several
        batches; a second pass of one and the same batch is a mistake.
        """
        writing = [label for label in self._training(path) if self._is_trained_by(label, path)]
        if path in self._ambiguous:
            return None
        if all(self._inline[label] for label in writing):
            turns: Counter[int] = Counter()
            for label in writing:
                turns[self.recording.calls[label].turn] += self._inline[label]
            most: dict[Any, int] = {}
            for turn, count in turns.items():
                given = self._given_to(turn)
                most[given] = max(count, most.get(given, 0))
            return max(1, sum(most.values()))
        # In a loop or a vmapped module every turn has a slice of its own, or writes again.
        traced = [self.recording.calls[label] for label in self.calls[path]]
        features = max(len(call.feature_axes) for call in traced)
        sliced = len(writing) == 1 and all(len(leaf.shape) > features for leaf in self.owners[path])
        return 1 if sliced else None

    def _is_trained_by(self, label: str, path: str) -> bool:
        """Return whether a layer's call has a part in the update of its own network's params.

        A generator learns by what its discriminator says; what the discriminator's layers are given
        then is no batch that they train on.
        """
        own = self._updates_of(path)
        if not own:
            return True
        marks = {n for update in self._gradient_nodes for n in update}
        goals = {n for index in own for n in self._gradient_nodes[index]}
        calls = self._flows.of_label(label)
        reached = self._flows.reached(calls, through=lambda n: n in goals or n not in marks)
        return bool(reached & goals) or not calls

    @cached_property
    def _gradient_nodes(self) -> list[set[int]]:
        return [
            {node for label in names.values() for node in self._flows.of_label(label)}
            for names in self.recording.updates
        ]

    def _updates_of(self, path: str) -> list[int]:
        """Return which updates are of the network that a layer belongs to; [] where that is not plain."""
        params = {
            path_name(p): leaf.size
            for p, leaf in jax.tree_util.tree_flatten_with_path(self.state.params)[0]
        }
        found = []
        for index, names in enumerate(self.recording.updates):
            inner = {"/".join(name): self._size(label) for name, label in names.items()}
            first = next(iter(inner), "")
            ends = [p.removesuffix(first) for p in params if first and p.endswith(first)]
            heads = [
                head
                for head in ends
                if all(params.get(head + name) == size for name, size in inner.items())
            ]
            if len(heads) != 1:
                return []
            found += [index] if path.startswith(heads[0]) else []
        return found

    def _size(self, label: str) -> int | None:
        nodes = self._flows.of_label(label)
        return int(self._flows.equation(nodes[0]).outvars[0].aval.size) if nodes else None

    def _given_to(self, turn: int) -> Any:
        """Return a number that two passes of a model share where they are given the same values."""
        label = self.recording.turns[turn - 1] if turn else None
        nodes = self._flows.of_label(label) if label else []
        return self._flows.number(self._flows.operands(nodes[0])[0]) if nodes else None

    def momentum(self, declared: Declared) -> float | None:
        """Return the one weight of the old value after a step; None: several, or not all known."""
        momenta = set(self._momenta(declared).values())
        return momenta.pop() if len(momenta) == 1 else None

    def _momenta(self, declared: Declared) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for path in self.owners:
            said = {self.recording.calls[label].momentum for label in self.calls.get(path, ())}
            momentum = said.pop() if len(said) == 1 else None
            writes = declared.passes or self.writes(path)
            told = momentum is not None and writes is not None
            found[path] = float(momentum**writes) if told else None  # type: ignore[operator]
        return found

    def biases(self) -> tuple[str, ...]:
        """Return the biases whose only way to the loss leads through a normalisation over rows."""
        uses: Counter[str] = Counter()
        for label, times in self._inline.items():
            if label in self.recording.biases:
                uses[self.recording.biases[label]] += times
        params = [
            path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(self.state.params)[0]
        ]
        found = []
        for source, target in sorted(links(self.step)):
            bias, call = self.recording.biases.get(source), self.recording.calls.get(target)
            if bias is None or call is None or uses[bias] != 1:
                continue
            fitting = [p for p in params if p == bias or p.endswith(f"/{bias}")]
            # The bias runs along the last axis: reduced over, it would no longer be a constant.
            last = call.feature_axes[-1:] == (len(call.shape) - 1,)
            if call.training and last and len(fitting) == 1:
                found += fitting
        return tuple(found)

    def layer_inputs(self) -> Callable[..., Mapping[str, LayerInput]] | None:
        """Return what tells the input of each layer in training; None where none can be told.

        Left out is a layer called more than once, one inside a loop, one under ``vmap``.
        """
        once = {
            labels[0]: path
            for path in self.owners
            if len(labels := self._training(path)) == 1
            and self._inline[labels[0]] == 1
            and path not in self._ambiguous
        }
        step = self.subject.step

        def inputs(state: State, x: Any, y: Any) -> dict[str, LayerInput]:
            with watching() as recording:
                values = marked(step, state, x, y, jnp.float32(RATE))
            return _inputs_of(values, recording, once)

        if not once:
            return None
        shape: Any = jax.ShapeDtypeStruct
        sizes = sizes_of(self.subject.features)
        given = (self.state, shape(sizes, "float32"), shape(sizes[:1], "float32"))
        return inputs if jax.eval_shape(inputs, *given) else None

    def without_statistics(self) -> str:
        """Return what to say where layers train whose statistics the State does not hold; "" else."""
        training = {c.path for c in self.recording.calls.values() if c.training}
        if not training or self.owners or self._carried_paths():
            return ""
        return (
            f"normalisation layers run in training ({_listed(training)}), but no running statistics "
            "are among the variables that the step carries, so none of them could be checked. Say "
            'where they lie, as in statistics="model_state/batch_stats"; if the step drops them, '
            "carry them on: mutable=[...] and what apply returns"
        )

    def _carried_paths(self) -> list[str]:
        extra = dict(self.state.extra or {}) if isinstance(self.state.extra, Mapping) else {}
        return list(extra.get("carried", {}))

    def carried(self) -> list[str]:
        """Return patterns of the statistics that are no moving averages, or frozen by design."""
        found = [
            pattern
            for path in sorted(self.recording.power_iterated | self.evaluation.power_iterated)
            for pattern in (f"{path}/*", f"*/{path}/*")
        ]
        whole = jax.tree_util.tree_flatten_with_path(self.state.batch_stats)[0]
        counters = [
            path_name(p) for p, leaf in whole if not jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        return [*found, *counters, *(f"{path}/*" for path in self._frozen())]

    def _frozen(self) -> list[str]:
        """Return the layers that rest as a whole beside others that train: a frozen backbone."""
        trained = self._flows.reached([self._inputs["x"], self._inputs["y"]])
        moving = [path for path in self.owners if self._training(path)]
        found = []
        for path in self.owners:
            own = {n: node for n, node in self._outputs.items() if n.startswith(f"params/{path}/")}
            resting = own and not trained & set(own.values())
            if moving and resting and self.calls.get(path) and not self._training(path):
                found.append(path)
        return found

    def frozen_paths(self, patterns: Sequence[str]) -> list[str]:
        """Return the paths of carried statistics that match a pattern."""
        kept = dict.fromkeys(self._carried_paths(), 0)
        return list(partition(kept, [p.replace("/", "?") for p in patterns])[1]) if patterns else []

    # The laws.

    def is_online(self, declared: Declared) -> bool:
        """Return whether training normalises by running values, too, by design."""
        return bool(declared.online) or (declared.online is None and bool(self._renormalised()))

    def _renormalised(self) -> set[int]:
        """Return where a gradient is stopped at a value made of running statistics."""
        statistics = [n for path, n in self._inputs.items() if path.startswith("batch_stats/")]
        return self._stopped(statistics)

    def _stopped(self, sources: Iterable[int]) -> set[int]:
        """Return where a user's line stops the gradient of a value made of ``sources`` in the loss."""
        if self._loss is None:
            return set()
        on_the_way = self._flows.reached(sources) & self._flows.origins([self._loss])
        stops = set(self._flows.of_primitives({"stop_gradient"})) & on_the_way
        return {node for node in stops if not _of_library(self._flows.equation(node))}

    def exempt(self, declared: Declared, batch: Callable[[Any, Any], Any] | None) -> dict[str, str]:
        """Return the laws that do not hold of the step by design, each with the reason."""
        return {
            **self._of_variables(),
            **self._of_layers(declared),
            **self._of_targets(declared, batch),
            **self._of_rows(declared),
            **self._of_updates(),
            **self._of_start(declared),
        }

    def _of_variables(self) -> dict[str, str]:
        """Return the laws that other variables and random numbers break."""
        seen = [n for p, n in self._outputs.items() if p.startswith("batch_stats/")]
        seen += [] if self._loss is None else [self._loss]
        found: dict[str, str] = {}
        moving = [
            path.removeprefix("extra/")
            for path, node in self._inputs.items()
            if path.startswith("extra/")
            and self._outputs.get(path) != node
            and set(seen) & self._flows.reached([node])
        ]
        if moving:
            names = sorted(
                {"random numbers" if _is_stream(p) else f"the variable {_field(p)}" for p in moving}
            )
            what = " and ".join(names)
            found |= because(
                f"what moves between two equal steps and reaches them: {what}",
                ("equal_steps_converge_geometrically",),
            )
            found |= because(
                f"what moves in training and reaches the loss: {what}",
                ("eval_at_the_batchs_own_moments_is_the_training_loss",),
            )
        draws = self._eval_flows.of_primitives(DRAWS)
        if set(self._eval_flows.outputs) & self._eval_flows.reached(draws):
            found |= because(
                "evaluation draws random numbers for each row",
                ("row_order_changes_nothing", "eval_rows_are_independent"),
            )
        if set(seen) & self._flows.reached(self._flows.of_primitives(DRAWS)):
            found |= because(
                "the training pass draws random numbers for each row",
                (
                    "row_order_changes_nothing",
                    "doubling_the_batch_changes_nothing",
                    "eval_at_the_batchs_own_moments_is_the_training_loss",
                ),
            )
        return found

    def _of_layers(self, declared: Declared) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.is_online(declared):
            said = "the model is declared to normalise by its running values in training too"
            if not declared.online:
                at = self._flows.where(min(self._renormalised()))
                said = "training normalises by running values too, as batch renormalisation does"
                said += f": no gradient flows through them at {at}" if at else ""
            found |= because(said, laws.OLD_STATISTICS)
            if self._statistics_mix():
                said += ", so that the statistics of one layer reach those of the next"
                found |= because(said, laws.OLD_STATISTICS, laws.MIXED_STATISTICS)
        momenta = {m for m in self._momenta(declared).values() if m is not None}
        if len(momenta) > 1:
            listed = ", ".join(f"{m:.4g}" for m in sorted(momenta))
            said = f"its layers weigh the old value differently: {listed}"
            found |= because(said, ("one_momentum_for_the_whole_model",))
        several = {path: self.writes(path) for path in self.owners if self.writes(path) != 1}
        if declared.passes and declared.passes > 1:
            several = dict.fromkeys(self.owners, declared.passes)
        counted = [path for path, writes in several.items() if writes is not None]
        untold = [path for path, writes in several.items() if writes is None]
        if untold:
            said = "runs in a loop, or in one of several networks alike, so its calls cannot be counted"
            found |= because(f"{said}: {_listed(untold)}", laws.ONE_FOLD)
        if counted:
            said = "called more than once in a step, each time with moments of its own: "
            found |= because(said + _listed(counted), laws.ONE_FOLD)
        return found

    def _statistics_mix(self) -> bool:
        """Return whether a new statistic depends on the old value of another one."""
        paths = [path for path in self._inputs if path.startswith("batch_stats/")]
        for path in paths:
            reached = self._flows.reached([self._inputs[path]])
            if any(self._outputs.get(other) in reached for other in paths if other != path):
                return True
        return False

    def _of_targets(
        self, declared: Declared, batch: Callable[[Any, Any], Any] | None
    ) -> dict[str, str]:
        if declared.targets is False:
            return because("the loss is declared to have no targets", laws.TARGETS)
        if declared.targets is None and batch is not None and not self._enters(batch):
            return because("the batch is made without y", laws.TARGETS)
        if declared.targets is None and not self._uses_targets():
            return because("y reaches neither the step nor its evaluation", laws.TARGETS)
        return {}

    def _uses_targets(self) -> bool:
        return any(
            set(flows.outputs) & flows.reached([inputs["y"]])
            for flows, inputs in (
                (self._flows, self._inputs),
                (self._eval_flows, self._eval_inputs),
            )
        )

    def _enters(self, batch: Callable[[Any, Any], Any]) -> bool:
        shape: Any = jax.ShapeDtypeStruct
        sizes = sizes_of(self.subject.features)
        jaxpr = jax.make_jaxpr(lambda x, y: jax.tree_util.tree_leaves(batch(x, y)))(
            shape(sizes, "float32"), shape(sizes[:1], "float32")
        )
        flows = Flows(jaxpr)
        return bool(set(flows.outputs) & flows.reached(flows.inputs[1:]))

    def _of_rows(self, declared: Declared) -> dict[str, str]:
        if declared.row_losses is not None:
            said = "the loss is declared to be no mean over rows"
            return {} if declared.row_losses else because(said, laws.ROWS)
        found: dict[str, str] = {}
        if declared.weights is None:
            count = self._divides_by_the_batch()
            if count is not None:
                at = self._eval_flows.where(count)
                said = "the eval loss divides by a number that the batch gives"
                found |= because(said + (f" ({at})" if at else ""), laws.ROWS[:1])
        for flows, inputs, reached in (
            (self._flows, self._inputs, laws.ROWS),
            (self._eval_flows, self._eval_inputs, laws.ROWS),
        ):
            for node in _pairs_of_rows(flows, inputs["x"]):
                at = flows.where(node)
                said = "the loss compares rows with each other"
                found |= because(said + (f" ({at})" if at else ""), reached)
        return found

    def _divides_by_the_batch(self) -> int | None:
        flows, inputs = self._eval_flows, self._eval_inputs
        data = flows.reached([inputs["x"], inputs["y"]])
        of_params = flows.reached(n for p, n in inputs.items() if p.startswith("params/"))
        behind = flows.origins(flows.outputs)
        for node in flows.of_primitives({"div"}):
            above, below = flows.equation(node).invars
            parents = flows.operands(node)
            scalar = below.aval.ndim == 0 and above.aval.ndim <= 1
            if scalar and len(parents) == 2 and node in behind & of_params and parents[1] in data:
                return node
        return None

    def _of_updates(self) -> dict[str, str]:
        found: dict[str, str] = {}
        inputs, flows = self._inputs, self._flows
        of_targets = flows.reached([inputs["y"]])
        calls = {label: call for label, call in self.recording.calls.items() if call.training}
        given: set[str] = set()  # calls in passes that are given the targets
        moved_since: set[str] = set()  # calls that the targets reach another way
        for label, call in calls.items():
            mark = self.recording.turns[call.turn - 1] if call.turn else None
            of_pass = set(flows.of_label(mark)) if mark else set()
            if set(flows.of_label(label)) & of_targets:
                first = call.turn <= 1 and not mark
                (given if of_pass & of_targets or first else moved_since).add(label)
        if given:
            found |= because("the model is given the targets too", laws.FREE_STATISTICS)
        elif self.updates() > 1:
            moving = [
                n for p, n in inputs.items() if p in ("y", "lr") or p.startswith("opt_state/")
            ]
            moved = flows.reached(moving)
            if any(n in moved for p, n in self._outputs.items() if p.startswith("batch_stats/")):
                said = "a step updates params several times, and normalises by what it updated"
                found |= because(said, laws.FREE_STATISTICS)
        elif moved_since:
            said = (
                "the gradient is taken at another point than the params, one that a gradient gave"
            )
            found |= because(said, laws.GRADIENT)
        if self.updates() > 1:
            said = "a step makes several updates, each along the gradient of a loss of its own"
            found |= because(said, laws.GRADIENT)
        stops = self._stopped(n for p, n in inputs.items() if p.startswith("params/"))
        if stops:
            at = flows.where(min(stops))
            said = "the loss holds jax.lax.stop_gradient, so its slope is not what is followed"
            found |= because(said + (f" ({at})" if at else ""), laws.GRADIENT)
        return found

    def updates(self) -> int:
        """Return how often optimizers update params in a step; 2 stands for a loop."""
        count = 0
        for names in self.recording.updates:
            label = next(iter(names.values()), None)
            if label is None:
                count += 1
            elif self._anywhere[label]:
                count += self._inline[label] or 2
        return count

    def _of_start(self, declared: Declared) -> dict[str, str]:
        if declared.pretrained:
            return because("training is declared to start from a trained model", laws.INITIAL)
        if declared.pretrained is None and self._pretrained and not self._fresh_statistics():
            return because(
                "the initial params and statistics are arrays that init holds", laws.INITIAL
            )
        return {}

    @cached_property
    def _start(self) -> tuple[Flows, dict[str, int]]:
        flows = Flows(self.init)
        return flows, dict(zip(leaf_paths(self.state), flows.outputs, strict=True))

    @cached_property
    def _pretrained(self) -> list[str]:
        """The params that no seed makes and that are no constants: those of a trained model."""
        flows, outputs = self._start
        seeded, held = flows.reached(flows.inputs[:1]), flows.reached(flows.captured)
        return [p for p, n in outputs.items() if p.startswith("params/") and n in held - seeded]

    def _fresh_statistics(self) -> list[str]:
        flows, outputs = self._start
        held = flows.reached(flows.captured)
        return [p for p, n in outputs.items() if p.startswith("batch_stats/") and n not in held]

    # What a report should say besides.

    def notes(self) -> list[str]:
        """Return what breaks no law, and is seldom meant."""
        found = []
        fresh = self._fresh_statistics() if self._pretrained else []
        owners = {path.rpartition("/")[0].removeprefix("batch_stats/") for path in fresh}
        pretrained = {path.rpartition("/")[0].removeprefix("params/") for path in self._pretrained}
        if owners & pretrained:
            found.append(
                "fresh_statistics: the params are those of a trained model, its running statistics "
                f"are not ({_listed(owners & pretrained)}). Unless it is meant: take batch_stats from "
                "where the params come from"
            )
        copies = self._copies_left_behind()
        if copies:
            found.append(
                f"stale_statistics: {copies[0]} follows the params, {copies[1]} is never written. "
                "Unless it is meant: copy batch_stats wherever the params are copied"
            )
        return found

    def _copies_left_behind(self) -> tuple[str, str] | None:
        """Return a copy of the params that a step moves, and one of the statistics that none does."""
        moved = [at for at, moves in self._copies("params") if moves]
        copies = self._copies("batch_stats")
        if moved and copies and not any(moves for _, moves in copies):
            return moved[0], copies[0][0]
        return None

    def _copies(self, part: str) -> list[tuple[str, bool]]:
        """Return (path, whether it moves) of the trees in ``extra`` that have the leaves of a part."""
        ends = [p.removeprefix(part) for p in self._inputs if p.startswith(f"{part}/")]
        extra = [p for p in self._inputs if p.startswith("extra/")]
        heads = {p.removesuffix(ends[0]) for p in extra if ends and p.endswith(ends[0])}
        found = []
        for head in sorted(heads):
            own = [head + end for end in ends]
            if all(path in self._inputs for path in own):
                moves = any(self._outputs.get(path) != self._inputs[path] for path in own)
                found.append((head.removeprefix("extra/").removeprefix("fields/"), moves))
        return found

    # The losses.

    def flat(self) -> str | None:
        """Return which loss depends on the params and has a slope nowhere; None: neither."""
        pairs = (
            ("eval_step", self._eval_flows, self._eval_inputs, self._eval_flows.outputs[0]),
            ("train_step", self._flows, self._inputs, self._loss),
        )
        for what, flows, inputs, loss in pairs:
            params = [node for path, node in inputs.items() if path.startswith("params/")]
            depends = loss is not None and loss in flows.reached(params)
            if depends and loss not in flows.reached(params, through=_has_slope(flows)):
                return what
        return None

    def has_penalty(self) -> bool:
        """Return whether a gradient has a term of params alone that the reported loss lacks."""
        if self._loss is None:
            return False
        inputs, flows = self._inputs, self._flows
        params = flows.reached(n for path, n in inputs.items() if path.startswith("params/"))
        others = [n for p, n in inputs.items() if p in ("x", "y") or p.startswith("extra/")]
        data = flows.reached(others)

        def of_params_alone(node: int) -> bool:
            return any(each in params - data for each in _terms(flows, node))

        gradients = [
            node
            for names in self.recording.updates
            for label in names.values()
            for node in flows.of_label(label)
        ]
        return any(map(of_params_alone, gradients)) and not of_params_alone(self._loss)


SUMS = frozenset({"add", "add_any", "sub", "neg"})
UNCHANGED = frozenset(
    {"name", "convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "transpose", "copy"}
    | {"psum", "psum_invariant", "pvary", "pbroadcast"}
)


def _terms(flows: Flows, node: int) -> list[int]:
    """Return the nodes that a value is a sum of, scaled by constants or not."""
    found, pending, seen = [], [node], {node}
    while pending:
        each = pending.pop()
        eqn, operands = flows.equation(each), flows.operands(each)
        name = eqn.primitive.name if eqn is not None else ""
        scaled = [n for n in operands if not flows.is_constant(n)]
        if name in SUMS | UNCHANGED or (
            name in ("mul", "div") and len(scaled) == 1 < len(operands)
        ):
            pending += [n for n in scaled if n not in seen]
            seen.update(scaled)
        else:
            found.append(each)
    return found


def _has_slope(flows: Flows) -> Callable[[int], bool]:
    def passes(node: int) -> bool:
        eqn = flows.equation(node)
        if eqn is None:
            return True
        floating = any(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in eqn.outvars)
        return floating and eqn.primitive.name not in FLAT

    return passes


def _refuse_flat(look: Look) -> None:
    what = look.flat()
    if what is not None:
        option = "eval_loss" if what == "eval_step" else "loss"
        without = "; or leave eval_step out: the training loss in eval mode is taken then"
        raise Unusable(
            f"the number taken for the loss of {what} has no slope anywhere: is it an accuracy? Name "
            f"the loss with {option}=, a key or a function of (report, batch)"
            + (without if what == "eval_step" else "")
        )


def _pairs_of_rows(flows: Flows, x: int) -> list[int]:
    """Return the products of rows with rows: of two values of the batch, over no common axis."""
    data = flows.reached([x])
    found = []
    for node in flows.of_primitives({"dot_general"}):
        eqn = flows.equation(node)
        (contracted, batched) = eqn.params["dimension_numbers"]
        sides = zip(eqn.invars, contracted, strict=True)
        free = [[n for i, n in enumerate(v.aval.shape) if i not in axes] for v, axes in sides]
        rows = all(any(n and n % ROWS == 0 for n in sizes) for sizes in free)
        # One operand: a value times itself.
        if not batched[0] and rows and set(flows.operands(node)) <= data:
            found.append(node)
    return found


def _inputs_of(
    values: Mapping[str, list[Any]], recording: Recording, once: Mapping[str, str]
) -> dict[str, LayerInput]:
    found = {}
    for label, path in once.items():
        call, given = recording.calls.get(label), values.get(label, [])
        if call is None or len(given) != 1:
            continue
        masks = values.get(f"{label} mask", [])
        mask = masks[0] if call.masked and masks else None
        shown = layer_input(given[0], mask, call.shape, call.feature_axes)
        if shown is not None:
            found[path] = shown
    return found


def leaf_paths(state: State) -> list[str]:
    """Return the path of every leaf of a State: "params/Dense_0/kernel"."""
    return [
        f"{name}/{path_name(path)}" if path else name
        for name, tree in zip(state._fields, state, strict=True)
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def _field(path: str) -> str:
    """Return the field of a carried object that a path in ``State.extra`` begins with."""
    return "/".join(
        path.removeprefix("fields/").split("/")[: 1 if path.startswith("fields/") else 2]
    )


def _is_stream(path: str) -> bool:
    return path == "key" or path.startswith("streams/")


def _listed(paths: Iterable[str]) -> str:
    first, *others = sorted(paths)
    return (first or "the model itself") + (f" and {len(others)} more" if others else "")


def _of_library(eqn: Any) -> bool:
    """Return whether a library's own line stops a gradient, as ``jax.nn.softmax`` does."""
    try:
        frames = list(eqn.source_info.traceback.frames)
        own = [i for i, frame in enumerate(frames) if frame.function_name == "stop_gradient"]
        caller = frames[own[-1] + 1].file_name  # a derivative's rule may stop it once more, inside
    except (AttributeError, TypeError, IndexError):  # no public promise
        return False
    return is_library(caller)


@dataclass(frozen=True)
class _Carrying:
    """A subject's functions around a State whose carried statistics lie in ``extra``."""

    subject: Subject
    patterns: tuple[str, ...]

    def apart(self, state: State) -> State:
        averages, carried = partition(state.batch_stats, self.patterns)
        if not carried:
            return state
        extra = {
            **(dict(state.extra) if isinstance(state.extra, Mapping) else {}),
            "carried": carried,
        }
        return state._replace(batch_stats=averages, extra=extra)

    def whole(self, state: State, x: Any) -> State:
        extra = dict(state.extra) if isinstance(state.extra, Mapping) else {}
        carried = extra.pop("carried", {})
        shape: Any = jax.ShapeDtypeStruct
        sizes = shape(x.shape, "float32")
        template = jax.eval_shape(self.subject.init, shape((), "int32"), sizes).batch_stats
        joined = union(state.batch_stats, carried, template)
        return state._replace(batch_stats=joined, extra=extra or ())


def _carrying(subject: Subject, patterns: Sequence[str]) -> Subject:
    """Return the same step, the statistics that match a pattern carried in ``State.extra``."""
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


def _updates_every(subject: Subject, state: State) -> int:
    """Return how many steps make one update, where ``optax.MultiSteps`` counts them."""
    counts = [p for p in leaf_paths(state) if p.startswith("opt_state/") and "mini_step" in p]
    if not counts or subject.optimizer is None:
        return 1
    zeros = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.params)
    tx = subject.optimizer(jnp.float32(RATE))
    kept = jax.eval_shape(tx.init, zeros)
    program, after = jax.make_jaxpr(lambda k: tx.update(zeros, k, zeros)[1], return_shape=True)(
        kept
    )
    names = [path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(after)[0]]
    place = next(i for i, name in enumerate(names) if name.endswith("mini_step"))
    # Of the whole update only the count is run, from one step to the next.
    counting = live(program, place)
    leaves = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree_util.tree_leaves(kept)]
    for count in range(1, 65):
        (leaves[place],) = read(counting, Evaluation(), leaves)
        if int(leaves[place]) == 0:
            return count
    return 1

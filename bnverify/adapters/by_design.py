"""The laws that a step violates by design, with the reasons: declared by its user, or found in its traces.

Such a law is exempt. ``Declared`` is what a user may say of a step, the same for every adapter; the report
on a violation says which declaration would make the law exempt. ``Design`` reads the traced programs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.adapters.programs import ROWS, Layers, Programs, listed, under
from bnverify.adapters.reported import computed_beside
from bnverify.adapters.rows import statistic_of_targets
from bnverify.adapters.traced import DRAWS, SAME_VALUES, Flows
from bnverify.jaxpr.rounding import evaluate
from bnverify.jaxpr.tracing import trace
from bnverify.jaxpr.undrawn import draws_can_be_equal
from bnverify.model import Pairing

TARGETS = (
    "targets_reach_the_params",
    "targets_belong_to_their_rows",
    "targets_reach_the_evaluation",
)
DOUBLING = (
    "doubling_the_batch_changes_nothing",
    "doubling_changes_nothing_if_draws_are_equal",
)
INDEPENDENT_ROWS = ("eval_rows_are_independent", *DOUBLING)
PAIRED = ("predictions_meet_their_own_targets",)
ONE_FOLD = (
    "batch_stats_change_only_by_ema",
    "batch_like_the_statistics_is_a_fixed_point",
    "equal_steps_converge_geometrically",
    "eval_at_the_batchs_own_moments_is_the_training_loss",
)
PARTS = ("row_order_changes_nothing", *DOUBLING)
OLD_STATISTICS = (
    "training_is_free_of_old_statistics",
    "eval_at_the_batchs_own_moments_is_the_training_loss",
)
MIXED_STATISTICS = (
    "batch_stats_change_only_by_ema",
    "one_momentum_for_the_whole_model",
    "momentum_is_as_declared",
    "batch_moments_are_the_layers_own",
    "batch_like_the_statistics_is_a_fixed_point",
    "equal_steps_converge_geometrically",
)
GRADIENT = ("gradients_are_gradients_of_the_loss",)
NO_GRADIENT = ("bias_before_norm_has_no_gradient",)
FREE_STATISTICS = ("batch_stats_are_free_of_targets",)
OWN_EVALUATION = ("eval_uses_the_running_statistics",)
INITIAL = ("initial_statistics_are_zero_and_one",)

HINTS = {
    "eval_rows_are_independent": "if rows are compared by design: row_losses=False; if they have "
    "weights or a mask: weights=",
    **dict.fromkeys(PAIRED, "if rows are compared by design: row_losses=False"),
    **dict.fromkeys(DOUBLING, "if rows are compared by design: row_losses=False"),
    **dict.fromkeys(TARGETS, "if the loss has no targets: targets=False"),
    "training_is_free_of_old_statistics": "if training also normalises by running statistics by "
    "design: online=True; if some layers are frozen: frozen=[...]",
    "momentum_is_as_declared": "if a layer processes several batches per step by design: passes=",
    "one_momentum_for_the_whole_model": "if a layer processes several batches per step by design: "
    "passes=",
    "initial_statistics_are_zero_and_one": "if training starts from a pretrained model: "
    "pretrained=True",
    "each_step_draws_anew": "if the same numbers are intended: exempt=",
    "every_pass_reaches_the_statistics": "if a forward pass is left out by design: passes=",
    "every_part_reaches_the_statistics": "if the statistics of some parts are left out by design: "
    "exempt=",
    "teachers_predict_in_eval_mode": "if its predictions should depend on the batch: exempt=",
    "each_batch_is_folded_in_once": "if a layer processes several batches per step by design: passes=",
    "layers_keep_the_feature_axis": "if another axis is normalised by design: exempt=",
    "frozen_statistics_stay": "if the statistics should follow the new data: frozen=False",
    "frozen_params_stay": "if only the statistics are frozen: frozen=['LAYER/mean', 'LAYER/var']",
    "trained_params_come_with_their_statistics": "if nothing is pretrained: pretrained=False",
    "schedule_counts_updates": "if training has another number of batches: batches=",
    "step_moves_the_statistics": "if they are frozen by design: frozen=[...]",
    "inputs_reach_the_statistics": "if they are frozen by design: frozen=[...]",
    "batch_stats_change_only_by_ema": "if some of these variables are not moving averages: "
    "carried=[...]",
    "gradients_are_gradients_of_the_loss": "if the reported loss is not the differentiated one by "
    "design (it lacks a penalty, or smooths no labels): penalty=True; if some gradients are zeroed by "
    "design: frozen=[...]",
    "eval_at_the_batchs_own_moments_is_the_training_loss": "if the two losses differ by design: "
    "same_loss=False",
}
"""Law -> what to declare if a step violates it by design."""


@dataclass(frozen=True)
class Declared:
    """What a user declares about a step. None: bnverify finds out.

    Attributes:
        targets: whether the loss has targets. None: if y is in the batch and is used.
        row_losses: whether the eval loss is a mean over independent rows. None: unless it divides by
            a number that depends on the batch, or multiplies rows with rows.
        online: whether training also normalises by running statistics. None: if a gradient through
            running statistics is stopped, as in batch renormalisation, or if the model makes inputs of
            its own training pass in eval mode, as an adversarial attack does.
        carried: patterns (``fnmatch``) of paths in batch_stats that are no moving averages.
        frozen: patterns of paths in params and batch_stats that no step may change: "backbone/*" for
            a whole layer, "backbone/mean" for one statistic. False: the statistics of layers with
            frozen params may change. Empty: frozen layers are found.
        passes: the number of batches that each layer processes per step. None: counted.
        momentum: the weight of the old value in the moving averages of user-written layers, per step.
            None: that of Flax's own layers.
        weights: (x, y) -> (N,), the weight of each row in the loss.
        pretrained: whether params and statistics start from a pretrained model. None: found.
        batches: the number of batches in training, with gradient accumulation; a learning-rate
            schedule must be shorter. None: an integer in the user's code whose name says so.
        same_loss: whether training and evaluation compute the same loss of outputs and targets.
        penalty: whether the differentiated loss differs from the reported one: it has a penalty on
            the params, or smoothed labels. None: whether the trace shows a penalty.
        exempt: law name -> why it does not apply.
    """

    targets: bool | None = None
    row_losses: bool | None = None
    online: bool | None = None
    carried: Sequence[str] = ()
    frozen: Sequence[str] | Literal[False] = ()
    passes: int | None = None
    momentum: float | None = None
    weights: Callable[[Any, Any], Any] | None = None
    pretrained: bool | None = None
    batches: int | None = None
    same_loss: bool = False
    penalty: bool | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)


class Declarations(TypedDict, total=False):
    """The fields of ``Declared`` as keywords."""

    targets: bool | None
    row_losses: bool | None
    online: bool | None
    carried: Collection[str]
    frozen: Collection[str] | Literal[False]
    passes: int | None
    momentum: float | None
    weights: Callable[[Any, Any], Any] | None
    pretrained: bool | None
    batches: int | None
    same_loss: bool
    penalty: bool | None
    exempt: Mapping[str, str] | None


def declared_by(given: Declarations) -> Declared:
    """Return the declarations in some keyword arguments.

    Raises:
        TypeError: there is no such declaration.
    """
    unknown = sorted(set(given) - set(Declarations.__annotations__))
    if unknown:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}")
    said: Any = {**given, "exempt": dict(given.get("exempt") or {})}
    return Declared(**said)


def _combines_rows(batch: Callable[[Any, Any], Any], shape: tuple[int, int]) -> bool:
    """Return whether a row of what ``batch`` makes depends on other rows than its own of x and y."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=size).astype(np.float32) for size in (shape, shape[:1]))
    order = rng.permutation(len(x))
    try:
        program = trace(batch, x, y)
        one, other = (evaluate(program, *each) for each in ((x, y), (x[order], y[order])))
    except Exception:  # noqa: BLE001 - it may need values, or refuse these
        return False
    return any(
        a.shape[:1] == (len(x),) and not np.array_equal(a[order], b, equal_nan=a.dtype.kind == "f")
        for a, b in zip(*map(jax.tree_util.tree_leaves, (one, other)), strict=True)
    )


def _with_place(said: str, place: str | None) -> str:
    """Return a reason with the line of the user's code in brackets, if it is known."""
    return f"{said} ({place})" if place else said


def because(reason: str, *laws: Iterable[str]) -> dict[str, str]:
    """Return a dict from each law in some groups to ``reason``."""
    return dict.fromkeys((law for group in laws for law in group), reason)


# What the traces show.


FLAT = frozenset({"sign", "floor", "ceil", "round", "stop_gradient"})  # their gradient is 0


class Design:
    """What a step does by design.

    Args:
        programs: the traced functions of the step.
        layers: its normalisation layers.
        declared: the user's declarations.
        batch: the function that makes the batch from x and y; None if it is unknown.
    """

    def __init__(
        self,
        programs: Programs,
        layers: Layers,
        declared: Declared,
        batch: Callable[[Any, Any], Any] | None,
    ) -> None:
        self._of = programs
        self._layers = layers
        self._declared = declared
        self._batch = batch

    def is_online(self) -> bool:
        """Return whether training also normalises by running statistics, by design."""
        return bool(self._declared.online) or (
            self._declared.online is None and bool(self._renormalised() or self._is_attacked())
        )

    def _is_attacked(self) -> bool:
        """Return whether a model makes inputs of its training pass in eval mode, as an attack does.

        A layer that never trains does not count: it may be in eval mode by mistake.
        """
        recording, flows = self._of.recording, self._of.flows
        calls = recording.calls.items()
        trained = {call.path for _, call in calls if call.training}
        made = flows.reached(
            [
                node
                for label, call in calls
                if not call.training and call.path in trained
                for node in flows.of_label(label)
            ]
        )
        turns = {call.turn for _, call in calls if call.training and call.turn}
        marks = [mark for turn in turns if (mark := recording.turns[turn - 1]) is not None]
        return any(not made.isdisjoint(flows.of_label(mark)) for mark in marks)

    def _renormalised(self) -> set[int]:
        """Return the nodes where gradients through running statistics are stopped."""
        return self._of.stopped(under(self._of.inputs, "batch_stats/"))

    def exempt(self, pairings: Iterable[Pairing]) -> dict[str, str]:
        """Return the laws that the step violates by design, each with the reason.

        Args:
            pairings: where the losses combine every row with every row.
        """
        return {
            **self._of_variables(),
            **self._of_layers(),
            **self._of_targets(),
            **self._of_rows(pairings),
            **self._of_updates(),
            **self._of_optimizers(),
        }

    def _of_variables(self) -> dict[str, str]:
        """Return the laws that do not apply because of other variables and random numbers."""
        seen = under(self._of.outputs, "batch_stats/")
        seen += [] if self._of.loss is None else [self._of.loss]
        found: dict[str, str] = {}
        moving = [
            path.removeprefix("extra/")
            for path, node in self._of.inputs.items()
            if path.startswith("extra/")
            and self._of.outputs.get(path) != node
            and set(seen) & self._of.flows.reached([node])
        ]
        if moving:
            names = sorted(
                {"random numbers" if _is_stream(p) else f"the variable {_field(p)}" for p in moving}
            )
            what = " and ".join(names)
            found |= because(
                f"the new statistics depend on state that changes in every step: {what}",
                ("equal_steps_converge_geometrically",),
            )
            found |= because(
                f"the training loss depends on state that changes in every step: {what}",
                ("eval_at_the_batchs_own_moments_is_the_training_loss",),
            )
        statistics = set(under(self._of.outputs, "batch_stats/"))
        by_chance = self._of.flows.reached(self._of.flows.of_primitives(DRAWS))
        of_x = self._of.flows.reached([self._of.inputs["x"]])
        generates = statistics and not statistics & of_x and statistics & by_chance
        trained = under(self._of.outputs, "params/")
        if generates and not of_x.isdisjoint(trained):
            found |= because(
                "the layers normalise random numbers and not x, as a generator's do",
                ("inputs_reach_the_statistics",),
            )
        draws = self._of.eval_flows.of_primitives(DRAWS)
        if self._of.eval_flows.depends_on(draws):
            found |= because(
                "evaluation draws random numbers for each row",
                ("row_order_changes_nothing", "eval_rows_are_independent"),
            )
        if {*trained, *seen} & by_chance:
            found |= because(
                "the training pass draws random numbers for each row",
                (
                    "row_order_changes_nothing",
                    "doubling_the_batch_changes_nothing",
                    "eval_at_the_batchs_own_moments_is_the_training_loss",
                ),
            )
            if not draws_can_be_equal(self._of.step):
                found |= because(
                    "some of its random numbers cannot be held equal: they are drawn until one is "
                    "accepted, as from a gamma or beta distribution",
                    ("doubling_changes_nothing_if_draws_are_equal",),
                )
        return found

    def _of_layers(self) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.is_online():
            said = "online=True: training also normalises by running statistics"
            if not self._declared.online and not self._renormalised():
                said = "the model makes inputs of its training pass in eval mode, as an attack does"
            elif not self._declared.online:
                at = self._of.flows.where(min(self._renormalised()))
                said = "training also normalises by running statistics, like batch renormalisation"
                said += f": their gradient is stopped at {at}" if at else ""
            found |= because(said, OLD_STATISTICS)
            if self._statistics_mix():
                said += ", so the statistics of one layer depend on those of another"
                found |= because(said, OLD_STATISTICS, MIXED_STATISTICS)
        momenta = {m for m in self._layers.momenta().values() if m is not None}
        if len(momenta) > 1:
            numbers = ", ".join(f"{m:.4g}" for m in sorted(momenta))
            said = f"its layers have different momenta: {numbers}"
            found |= because(said, ("one_momentum_for_the_whole_model",))
        parts = self._layers.parts()
        if parts:
            rows, of = min(parts.values()), self._of.x.shape[0]
            said = f"a batch is normalised in parts, {rows} of {of} rows at once: {listed(parts)}"
            found |= because(said, PARTS)
            # Averages of the parts' moments may cancel, to the rounding of each.
            found |= because(f"{said}, each with moments of its own", ONE_FOLD)
        several = {
            path: self._layers.writes(path)
            for path in self._layers.owners
            if self._layers.writes(path) != 1
        }
        if self._declared.passes and self._declared.passes > 1:
            several = dict.fromkeys(self._layers.owners, self._declared.passes)
        counted = [path for path, writes in several.items() if writes is not None]
        untold = [path for path, writes in several.items() if writes is None]
        if untold:
            said = "called in a loop, or in one of several identical networks, so calls cannot be counted"
            found |= because(f"{said}: {listed(untold)}", ONE_FOLD)
            if len(self._layers.owners) > 1:
                one = ("one_momentum_for_the_whole_model",)
                found |= because(f"{said}: {listed(untold)}", one)
        if counted:
            said = "called several times in a step, with different batches: "
            found |= because(said + listed(counted), ONE_FOLD)
        return found

    def _statistics_mix(self) -> bool:
        """Return whether a new statistic depends on the old value of another one."""
        paths = [path for path in self._of.inputs if path.startswith("batch_stats/")]
        for path in paths:
            reached = self._of.flows.reached([self._of.inputs[path]])
            if any(self._of.outputs.get(other) in reached for other in paths if other != path):
                return True
        return False

    def _of_targets(self) -> dict[str, str]:
        if self._declared.targets is False:
            return because("targets=False: the loss has no targets", TARGETS)
        if (
            self._declared.targets is None
            and self._batch is not None
            and not self._enters(self._batch)
        ):
            return because("the batch does not contain y", TARGETS)
        if self._declared.targets is None and not self._uses_targets():
            return because("neither the step nor its evaluation uses y", TARGETS)
        if self._have_a_pass_of_their_own():
            said = "y has its own forward pass, and its rows do not correspond to those of x"
            return because(said, ("targets_belong_to_their_rows",))
        return {}

    def _have_a_pass_of_their_own(self) -> bool:
        """Return whether y is the input of a separate forward pass, never combined with rows of x."""
        flows = self._of.flows
        of_x, of_y = (flows.reached([self._of.inputs[name]]) for name in ("x", "y"))
        given = {n for label in self._of.recording.turns if label for n in flows.of_label(label)}
        if not given & of_y - of_x:
            return False

        def has_rows(node: int) -> bool:
            return any(size and size % ROWS == 0 for size in flows.shape(node) or ())

        behind = flows.origins([self._of.loss]) if self._of.loss is not None else set()
        return not any(has_rows(node) for node in of_x & of_y & behind)

    def _uses_targets(self) -> bool:
        of = self._of
        return of.flows.depends_on([of.inputs["y"]]) or of.eval_flows.depends_on(
            [of.eval_inputs["y"]]
        )

    def _enters(self, batch: Callable[[Any, Any], Any]) -> bool:
        made = jax.make_jaxpr(lambda x, y: jax.tree_util.tree_leaves(batch(x, y)))
        flows = Flows(made(self._of.x, self._of.y))
        return flows.depends_on(flows.inputs[1:])

    def _of_rows(self, pairings: Iterable[Pairing]) -> dict[str, str]:
        if self._declared.row_losses is not None:
            said = "row_losses=False: the loss is not a mean over rows"
            return {} if self._declared.row_losses else because(said, INDEPENDENT_ROWS, PAIRED)
        found: dict[str, str] = {}
        if self._batch is not None and _combines_rows(self._batch, self._of.x.shape):
            said = "batch= makes rows from other rows of x and y"
            found |= because(said, ("row_order_changes_nothing",), INDEPENDENT_ROWS)
        if self._declared.weights is None:
            count = self._divides_by_the_batch()
            if count is not None:
                at = self._of.eval_flows.where(count)
                said = "the eval loss divides by a number that depends on the batch"
                found |= because(_with_place(said, at), INDEPENDENT_ROWS[:1])
            scaled = statistic_of_targets(self._of)
            if scaled is not None:
                at = self._of.eval_flows.where(scaled)
                said = "the eval loss compares the targets with a statistic of their batch"
                found |= because(_with_place(said, at), INDEPENDENT_ROWS[:1])
        if counts := self._counts_of_rows():
            said = (
                f"the step weighs a batch by the number of rows that it has seen: {listed(counts)}"
            )
            found |= because(said, DOUBLING)
        compared = [pairing.at for pairing in pairings if pairing.by_design]
        for flows, inputs in (
            (self._of.flows, self._of.inputs),
            (self._of.eval_flows, self._of.eval_inputs),
        ):
            compared += map(flows.where, _pairs_of_rows(flows, inputs["x"]))
        for at in compared:
            said = _with_place("the loss compares rows with each other", at)
            found |= because(said, INDEPENDENT_ROWS)
        return found

    def _counts_of_rows(self) -> list[str]:
        """Return the values beside the statistics to which a step adds its number of rows, and uses."""
        of, flows, found = self._of, self._of.flows, []
        used = {*under(of.outputs, "params/", "batch_stats/"), of.loss}
        for path, start in of.inputs.items():
            if not path.startswith("extra/") or path not in of.outputs:
                continue
            node = flows.value(of.outputs[path])
            eqn = flows.equation(node)
            if eqn is None or eqn.primitive.name != "add":
                continue
            added = [atom.val for atom in eqn.invars if hasattr(atom, "val")]
            of_rows = [n for n in added if jnp.ndim(n) == 0 and n == of.x.shape[0]]
            if of_rows and start in flows.operands(node) and used & flows.reached([start]):
                found.append(_field(path.removeprefix("extra/")))
        return found

    def _divides_by_the_batch(self) -> int | None:
        flows, inputs = self._of.eval_flows, self._of.eval_inputs
        data = flows.reached([inputs["x"], inputs["y"]])
        of_params = flows.reached(under(inputs, "params/"))
        behind = flows.origins(flows.outputs)
        for node in flows.of_primitives({"div"}):
            above, below = flows.equation(node).invars
            parents = flows.operands(node)
            scalar = below.aval.ndim == 0 and above.aval.ndim <= 1 and len(set(parents)) == 2
            if scalar and node in behind & of_params and parents[1] in data:
                return node
        return None

    def _of_updates(self) -> dict[str, str]:
        found: dict[str, str] = {}
        inputs, flows = self._of.inputs, self._of.flows
        of_targets = flows.reached([inputs["y"]])
        calls = {label: call for label, call in self._of.recording.calls.items() if call.training}
        given: set[str] = set()  # calls in forward passes that have the targets as an input
        moved_since: set[str] = set()  # other calls that the targets affect
        for label, call in calls.items():
            mark = self._of.recording.turns[call.turn - 1] if call.turn else None
            of_pass = set(flows.of_label(mark)) if mark else set()
            if set(flows.of_label(label)) & of_targets:
                first = call.turn <= 1 and not mark
                (given if of_pass & of_targets or first else moved_since).add(label)
        masks = [label for label, call in calls.items() if call.masked]
        if given:
            found |= because("the targets are an input of the model", FREE_STATISTICS)
        elif any(set(flows.of_label(f"{label} mask")) & of_targets for label in masks):
            found |= because("a layer masks rows according to their targets", FREE_STATISTICS)
        elif self._of.updates() > 1:
            moved = flows.reached(under(inputs, "y", "lr", "opt_state/"))
            if not moved.isdisjoint(under(self._of.outputs, "batch_stats/")):
                said = "a step updates params several times and runs the model on updated params"
                found |= because(said, FREE_STATISTICS)
        elif moved_since:
            said = "the gradient is taken at perturbed params, as in sharpness-aware minimisation"
            found |= because(said, GRADIENT) | self._of_adapted_params(moved_since)
        if self._of.updates() > 1:
            said = "a step makes several updates, each with the gradient of a different loss"
            found |= because(said, GRADIENT)
        if self._are_clipped():
            said = (
                "gradients are scaled by a number made of them before the optimizer, as by a clip"
            )
            found |= because(said, GRADIENT)
        found |= self._of_changed_gradients()
        beside = computed_beside(self._of) if not set(GRADIENT) & set(found) else None
        if beside is not None:
            said = "the reported loss is not the differentiated one: it is computed beside it"
            found |= because(_with_place(said, beside), GRADIENT)
        stops = self._of.stopped(under(inputs, "params/"))
        if stops:
            at = flows.where(min(stops))
            said = "the loss contains jax.lax.stop_gradient, so the gradient is not its slope"
            found |= because(_with_place(said, at), GRADIENT)
        return found

    def _of_adapted_params(self, labels: Collection[str]) -> dict[str, str]:
        """Return the laws that these calls violate if they process another batch, as in meta-learning."""
        if not self._have_another_batch(labels):
            return {}
        said = "the model runs on another batch with params that are adapted to the targets"
        found = because(said, FREE_STATISTICS)
        if "eval_is_training_loss" in self._of.subject.capabilities:
            said = "evaluation adapts the params to its batch, as training does"
            found |= because(said, INDEPENDENT_ROWS[:1])
        return found

    def _of_optimizers(self) -> dict[str, str]:
        if self._of.lookaheads():
            said = "optax.lookahead moves fast and slow params to each other, whatever the learning rate"
            return because(said, ("zero_learning_rate_moves_nothing",))
        if not self._computes_params_from_its_own():
            return {}
        said = (
            "the optimizer keeps a copy of the params and computes the new ones from it: it rounds"
        )
        return because(said, ("zero_learning_rate_moves_nothing",))

    def _computes_params_from_its_own(self) -> bool:
        """Return whether the optimizer state starts with all params and reaches the new ones."""
        flows, nodes = self._of.start
        params = {flows.value(node) for node in under(nodes, "params/")}
        copies = [
            path
            for path, node in nodes.items()
            if path.startswith("opt_state/") and flows.value(node) in params
        ]
        if not params or not params <= {flows.value(nodes[path]) for path in copies}:
            return False
        reached = self._of.flows.reached([self._of.inputs[path] for path in copies])
        return not reached.isdisjoint(under(self._of.outputs, "params/"))

    def _have_another_batch(self, labels: Collection[str]) -> bool:
        """Return whether the forward passes of these calls have other inputs than all others."""
        recording, flows = self._of.recording, self._of.flows
        inputs: dict[bool, set[int]] = {True: set(), False: set()}
        for label, call in recording.calls.items():
            mark = recording.turns[call.turn - 1] if call.turn and call.training else None
            if mark is not None:
                inputs[label in labels].update(map(flows.number, flows.of_label(mark)))
        return bool(inputs[True]) and inputs[True].isdisjoint(inputs[False])

    def _of_changed_gradients(self) -> dict[str, str]:
        """Return the laws that gradients violate which are changed by hand before an optimizer."""
        flows, inputs = self._of.flows, self._of.inputs
        varying = flows.reached(under(inputs, "params/", "x", "y"))
        noise = flows.reached(flows.of_primitives(DRAWS)) - varying
        gradients = set().union(*self._of.gradients)
        if self._declared.frozen and not gradients <= varying:
            said = "frozen=[...]: the gradients of some params are replaced by constants"
            return because(said, GRADIENT)
        for node in self._of.after_backward(gradients):
            name, at = flows.equation(node).primitive.name, flows.where(node)
            operands = flows.operands(node)
            own = [n for n in operands if n in varying]
            if own and name in CUTS:
                said = "gradients are cut off entry by entry before the optimizer"
                return because(_with_place(said, at), GRADIENT)
            if name in SUMS and own and noise.intersection(operands):
                said = "noise is added to the gradients before the optimizer"
                return because(_with_place(said, at), GRADIENT, NO_GRADIENT)
            if name in SUMS and any(a in flows.origins([b]) for a in own for b in own if a != b):
                said = "a part of the gradients is taken from them before the optimizer"
                return because(_with_place(said, at), GRADIENT)
        return {}

    def _are_clipped(self) -> bool:
        """Return whether the user scales gradients by their own norm before an optimizer."""
        return any(
            self._of.before_a_clip([node], shape)
            for update in self._of.gradients
            for node in update
            if (shape := self._of.flows.shape(node)) is not None
        )

    def flat(self) -> str | None:
        """Return which loss depends on params but has a gradient of 0 everywhere; None: neither."""
        pairs = (
            (
                "eval_step",
                self._of.eval_flows,
                self._of.eval_inputs,
                self._of.eval_flows.outputs[0],
            ),
            ("train_step", self._of.flows, self._of.inputs, self._of.loss),
        )
        for what, flows, inputs, loss in pairs:
            params = under(inputs, "params/")
            depends = loss is not None and loss in flows.reached(params)
            if depends and loss not in flows.reached(params, through=_has_slope(flows)):
                return what
        return None

    def has_penalty(self) -> bool:
        """Return whether the differentiated loss has a penalty on params that the reported one lacks."""
        if self._of.loss is None:
            return False
        inputs, flows = self._of.inputs, self._of.flows
        params = flows.reached(under(inputs, "params/"))
        data = flows.reached(under(inputs, "x", "y", "extra/"))
        # The scale of dynamic loss scaling is not constant, but independent of params and batch.
        varying = params | flows.reached(under(inputs, "x", "y"))

        def of_params_alone(node: int) -> bool:
            return any(each in params - data for each in _terms(flows, node, varying))

        gradients = [node for update in self._of.gradients for node in update]
        return any(map(of_params_alone, gradients)) and not of_params_alone(self._of.loss)


SUMS = frozenset({"add", "add_any", "sub", "neg"})
CUTS = frozenset({"max", "min", "clamp", "sign", "round", "tanh"})
"""What bounds each entry of a gradient by hand."""
UNCHANGED = SAME_VALUES | {"psum", "psum_invariant", "pvary", "pbroadcast"}


def _terms(flows: Flows, node: int, varying: Set[int]) -> list[int]:
    """Return the terms of a sum; factors that are not ``varying`` are ignored."""
    found, pending, seen = [], [node], {node}
    while pending:
        each = pending.pop()
        eqn, operands = flows.equation(each), flows.operands(each)
        name = eqn.primitive.name if eqn is not None else ""
        scaled = [n for n in operands if n in varying]
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
        return eqn is None or (flows.is_floating(node) and eqn.primitive.name not in FLAT)

    return passes


def _pairs_of_rows(flows: Flows, x: int) -> list[int]:
    """Return the matrix products of rows with rows, such as those of a contrastive loss."""
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


def _field(path: str) -> str:
    """Return the name of the field that a path in ``State.extra`` starts with."""
    return "/".join(
        path.removeprefix("fields/").split("/")[: 1 if path.startswith("fields/") else 2]
    )


def _is_stream(path: str) -> bool:
    return path == "key" or path.startswith("streams/")

"""Which values that a step carries are moving averages of the batch, and what of them is not checked.

The laws of the running statistics are about exponential moving averages of a batch's mean and variance.
Other values are often kept beside them: a count and a cumulative average, vectors of a power iteration, an
average of the params, what the first batch initialised. Those are found here by what the traced step does
with them, and left out of these laws (``carried``). Every value that the laws do not fully check is named in
a note of the report, with what to declare.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from bnverify.adapters.programs import Layers, Programs, listed, under
from bnverify.pytree import by_path, is_floating
from bnverify.statistic_names import has_both, moment_of

STATISTICS, EXTRA = "batch_stats/", "extra/"

OF_PARAMS = "they follow the params, not the batch"
SET_ONCE = "a flag in the state decides whether they are set"
CUMULATIVE = "they count, or are averages weighted by a count"
MIXED = "they depend on each other's old values"

LOW_MOMENTUM = 0.5
"""With a smaller weight of the old value, statistics are mostly those of the last batch."""


class Averages:
    """The values that the step of a subject carries, told apart by the traced programs.

    Args:
        programs: the traced functions of the subject.
        layers: its normalisation layers.
    """

    def __init__(self, programs: Programs, layers: Layers) -> None:
        self._of = programs
        self._layers = layers

    @cached_property
    def _written(self) -> dict[str, list[str]]:
        """Path of a layer -> its floating statistics that the step changes, as paths in batch_stats."""
        found: dict[str, list[str]] = defaultdict(list)
        for path, node in self._of.inputs.items():
            moves = path.startswith(STATISTICS) and self._of.outputs.get(path, node) != node
            if moves and self._of.is_floating(path):
                name = path.removeprefix(STATISTICS)
                found[name.rpartition("/")[0]].append(name)
        return found

    def others(self) -> dict[str, str]:
        """Return path in batch_stats -> why it is no exponential moving average of the batch."""
        found: dict[str, str] = {}
        for names in self._written.values():
            counted, mixed = self._counted(names), self._mixed(names)
            for name in names:
                if name in counted:
                    found[name] = CUMULATIVE
                elif self._is_set_once(name):
                    found[name] = SET_ONCE
                elif moment_of(name):
                    continue
                elif self._follows_params(name):
                    found[name] = OF_PARAMS
                elif name in mixed:
                    found[name] = MIXED
        return found

    def _follows_params(self, name: str) -> bool:
        flows, inputs = self._of.flows, self._of.inputs
        gradients = set().union(*self._of.gradients)
        new = self._of.outputs[STATISTICS + name]
        of_params = flows.reached(under(inputs, "params/"), around=gradients)
        return new in of_params and new not in flows.reached([inputs["x"]], around=gradients)

    def _is_set_once(self, name: str) -> bool:
        """Return whether a flag in the state selects between the old value and another one."""
        flows, inputs = self._of.flows, self._of.inputs
        node = flows.value(self._of.outputs[STATISTICS + name])
        eqn = flows.equation(node)
        if eqn is None or eqn.primitive.name != "select_n":
            return False
        flag, *values = flows.operands(node)
        flags = [
            n for p, n in inputs.items() if p in self._of.types and not self._of.is_floating(p)
        ]
        behind = flows.origins([flag]) & set(flows.inputs)
        kept = inputs[STATISTICS + name] in map(flows.value, values)
        return kept and bool(behind) and behind <= set(flags)

    def _counted(self, names: Iterable[str]) -> set[str]:
        """Return the counters among a layer's statistics, and what depends on one."""
        flows, found = self._of.flows, set[str]()
        for name in names:
            start, new = (at[STATISTICS + name] for at in (self._of.inputs, self._of.outputs))
            node = flows.value(new)
            eqn, operands = flows.equation(node), flows.operands(node)
            if eqn is None or eqn.primitive.name != "add" or len(operands) != 2:
                continue
            others = [n for n in operands if flows.value(n) != start]
            if len(others) == 1 and flows.origins(others).isdisjoint(flows.inputs):
                reached = flows.reached([start])
                found |= {n for n in names if self._of.outputs[STATISTICS + n] in reached}
        return found

    def _mixed(self, names: Sequence[str]) -> set[str]:
        """Return a layer's statistics if none is a moment and one depends on another's old value."""
        if any(moment_of(name) for name in names):
            return set()
        for name in names:
            reached = self._of.flows.reached([self._of.inputs[STATISTICS + name]])
            if any(self._of.outputs[STATISTICS + n] in reached for n in names if n != name):
                return set(names)
        return set()

    # Notes.

    def notes(self, reasons: Mapping[str, str]) -> Iterator[str]:
        """Yield a note for all values that the laws of the running statistics do not fully check.

        Args:
            reasons: path in batch_stats -> why it was found to be no moving average; see ``others``.
        """
        for reason in dict.fromkeys(reasons.values()):
            names = [STATISTICS + name for name, why in reasons.items() if why == reason]
            yield (
                f"the laws of the running statistics do not apply to {listed(names)}: {reason}. "
                "Nothing else checks how they are updated"
            )
        yield from self._uncompared()
        yield from self._outside()
        for name, momentum in self._low_momenta():
            yield (
                f"momentum_reversed: {STATISTICS}{name} keeps only {momentum:.4g} of its old value in "
                "each step, so it is mostly that of the last batch. Unless intended, swap the weights "
                "m and 1 - m"
            )

    def _uncompared(self) -> Iterator[str]:
        """Yield notes about averages of which it is unknown what they should be averages of."""
        compared = set(self._layers.compared().values())
        unnamed: list[str] = []
        unseen: list[str] = []
        for path, names in self._written.items():
            calls = [self._of.recording.calls[n] for n in self._layers.calls.get(path, ())]
            if path in compared or any(call.of_flax for call in calls):
                continue
            (unseen if has_both(names) else unnamed).extend(STATISTICS + name for name in names)
        if unnamed:
            yield (
                f"{listed(unnamed)}: checked as moving averages, but not what they average, because "
                "their names are not those of a layer's mean and variance. If that is what they are, "
                "call them mean and var, or running_mean and running_var"
            )
        if unseen:
            yield (
                f"{listed(unseen)}: checked as moving averages, but not what they average, because no "
                "layer is known whose input has these moments: its input must have an axis of their "
                "size, and no params of its own may come between the input and the statistics"
            )

    def _outside(self) -> Iterator[str]:
        """Yield a note about values in ``State.extra`` that are updated from the batch and used."""
        flows, inputs, outputs = self._of.flows, self._of.inputs, self._of.outputs
        # What follows the params or the running statistics, as a target network does, is no average.
        around = set().union(*self._of.gradients, under(outputs, STATISTICS))

        of_batch = flows.reached([inputs["x"]], around=around, through=flows.is_floating)
        if self._of.loss is not None:  # the average of a loss is a metric
            of_batch -= flows.reached([self._of.loss]) - {self._of.loss}
        behind_eval = self._of.eval_flows.origins(self._of.eval_flows.outputs)
        found = [
            path
            for path in inputs
            if path.startswith(EXTRA) and not path.startswith(f"{EXTRA}carried/")
            if self._of.is_floating(path)
            if outputs.get(path) in of_batch and outputs[path] != inputs[path]
            if self._of.eval_inputs[path] in behind_eval
        ]
        if not found:
            return
        names = [path.removeprefix(EXTRA).removeprefix("fields/") for path in found]
        if all(path.startswith(f"{EXTRA}others/") for path in found):
            fix = "hold them in variables of the type nnx.BatchStat"
        else:
            fix = f'declare them: statistics="{_shared(names)}"'
        yield (
            f"the step updates {listed(names)} from the batch and evaluation uses them, but they were "
            f"not found as running statistics, so no law of those was checked. If they are exponential "
            f"moving averages, {fix}"
        )

    def _low_momenta(self) -> Iterator[tuple[str, float]]:
        """Yield (a layer's first statistic, its weight of the old value) where that weight is low."""
        for path, names in self._written.items():
            calls = [self._of.recording.calls[n] for n in self._layers.calls.get(path, ())]
            told = any(call.momentum is not None for call in calls)
            momentum = None if told else self._momentum(names[0])
            if momentum is not None and 0 < momentum < LOW_MOMENTUM:
                yield names[0], momentum

    def _momentum(self, name: str) -> float | None:
        """Return m if the step computes a statistic as m * old + ..., with a constant m."""
        flows, start = self._of.flows, self._of.inputs[STATISTICS + name]
        node = flows.value(self._of.outputs[STATISTICS + name])
        eqn = flows.equation(node)
        of_old = flows.reached([start])
        terms = [flows.value(n) for n in flows.operands(node) if n in of_old]
        if eqn is None or eqn.primitive.name != "add" or len(terms) != 1:
            return None
        product = flows.equation(terms[0])
        if product is None or product.primitive.name != "mul":
            return None
        if start not in map(flows.value, flows.operands(terms[0])):
            return None
        factors = [atom.val for atom in product.invars if hasattr(atom, "val")]
        return float(factors[0]) if len(factors) == 1 and jnp.ndim(factors[0]) == 0 else None


def unrecognised_moments(statistics: Any) -> dict[str, str]:
    """Return the laws that no running statistic of a step is subject to, each with the reason.

    Args:
        statistics: ``State.batch_stats``.
    """
    layers: dict[str, list[str]] = defaultdict(list)
    for path, leaf in by_path(statistics).items():
        if is_floating(leaf):
            layers[path.rpartition("/")[0]].append(path)
    kinds = {moment_of(name) for names in layers.values() for name in names}
    found = {}
    if layers and "var" not in kinds:
        found["variance_is_never_negative"] = "no running statistic has the name of a variance"
    if layers and not any(map(has_both, layers.values())):
        said = "no layer has statistics with the names of a mean and a variance"
        found["unlike_rows_have_a_variance"] = said
    if layers and kinds == {None}:
        said = "no running statistic has the name of a mean or a variance"
        found["initial_statistics_are_zero_and_one"] = said
    return found


def _shared(names: Iterable[str]) -> str:
    """Return the path of the smallest tree with these leaves."""
    trees = [name.split("/")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*trees, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "/".join(shared) or "..."

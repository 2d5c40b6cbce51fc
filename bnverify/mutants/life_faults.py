"""Faults in the life of a state: in saving, restoring and resuming, or over a history of steps.

Each is a way to save and restore around a correct step, or a step whose fault one transition from
fresh state does not show: ``bnverify.check_life`` must see them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bnverify.lazy import LazyModule, jax, jnp
from bnverify.lifetime.life import serialization
from bnverify.model import CheckpointedSubject, State, StepInfo, Subject
from bnverify.mutants.beyond_one_step import Fault, enter
from bnverify.mutants.carrying import CallsCountedInPython
from bnverify.mutants.evaluation import EvalWritesStatistics
from bnverify.mutants.trees import mapped
from bnverify.mutants.two_steps import FirstBatchReplacesTheInitialStatistics

reference: Any = LazyModule("bnverify.reference")
np: Any = LazyModule("numpy")


LIFE_FAULTS: dict[str, Fault] = {}

VALUES = "a_checkpoint_keeps_every_value"
TYPES = "a_checkpoint_keeps_types_and_containers"
RESTORED = "a_restored_run_continues_to_the_bit"
RESUMED = "a_resumed_process_continues_to_the_bit"
EVALUATED = "evaluation_between_steps_changes_nothing"
FOLDED = "statistics_fold_each_batch_once"


class Checkpoint:
    """A correct way to save and restore with ``flax.serialization``: a fault replaces a part."""

    def subject(self) -> Subject:
        """Return the step whose state is saved: Adam, which has moments and a count to lose."""
        made: Subject = reference.adam()
        return made

    def begin(self) -> None:
        """Forget the checkpoints of another life."""

    def kept(self, state: State) -> Any:
        """Return what of the state goes into the checkpoint."""
        return state

    def save(self, state: State) -> Any:
        """Return the checkpoint."""
        return serialization.to_bytes(self.kept(state))

    def read(self, template: State, data: Any) -> Any:
        """Return what of the state comes out of the checkpoint."""
        return serialization.from_bytes(self.kept(template), data)

    def restore(self, template: State, data: Any) -> Any:
        """Return the whole state."""
        return self.read(template, data)

    def lived(self) -> CheckpointedSubject:
        """Return the step with this way to save and restore."""
        return CheckpointedSubject(self.subject(), self.save, self.restore, self.begin)


def fault(mistake: str, expected: str) -> Callable[[type[Any]], type[Any]]:
    """Enter the decorated Checkpoint, or step of the catalogue's kind."""

    def made(parts: type[Any], name: str) -> Subject | CheckpointedSubject:
        step = parts()
        if isinstance(step, Checkpoint):
            return step.lived()
        subject: Subject = step.subject(f"mutant[{name}]")
        return subject

    return enter(LIFE_FAULTS, mistake, expected, made)


@fault("checkpoint_drops_statistics", VALUES)
class StatisticsNotSaved(Checkpoint):
    """Only params and the optimizer's state are saved; the statistics are a fresh model's."""

    def kept(self, state: State) -> Any:
        """Leave the statistics out."""
        return {"params": state.params, "opt_state": state.opt_state}

    def restore(self, template: State, data: Any) -> Any:
        """Take the statistics from the template."""
        read = self.read(template, data)
        return template._replace(params=read["params"], opt_state=read["opt_state"])


@fault("checkpoint_drops_optimizer_state", VALUES)
class OptimizerStateNotSaved(Checkpoint):
    """The optimizer starts anew when a run is restored."""

    def restore(self, template: State, data: Any) -> Any:
        """Take the optimizer's state from the template."""
        return self.read(template, data)._replace(opt_state=template.opt_state)


@fault("checkpoint_drops_key", VALUES)
class KeyNotSaved(Checkpoint):
    """The key of the input's noise starts anew when a run is restored."""

    def subject(self) -> Subject:
        """Return a step that carries a key."""
        return noisy()

    def restore(self, template: State, data: Any) -> Any:
        """Take the key from the template."""
        return self.read(template, data)._replace(extra=template.extra)


@fault("counter_reset_on_restore", VALUES)
class CountResetOnRestore(Checkpoint):
    """Adam's count of steps is zero again after a restore; its moments are kept."""

    def restore(self, template: State, data: Any) -> Any:
        """Zero every integer of the optimizer's state."""
        state = self.read(template, data)
        zeroed = mapped(
            lambda leaf: jnp.zeros_like(leaf) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf,
            state.opt_state,
        )
        return state._replace(opt_state=zeroed)


@fault("restored_in_other_types", TYPES)
class OptimizerStateRestoredAsDicts(Checkpoint):
    """Restored without a template, the optimizer's named tuples are dictionaries."""

    def read(self, template: State, data: Any) -> Any:
        """Restore into nothing."""
        read = serialization.msgpack_restore(data)
        return State(read["params"], read["batch_stats"], read["opt_state"])


@fault("restored_in_other_types", TYPES)
class CountRestoredAsPythonNumber(Checkpoint):
    """The count comes back as a Python int."""

    def restore(self, template: State, data: Any) -> Any:
        """Turn every integer scalar into a Python number."""
        state = self.read(template, data)
        as_number = mapped(
            lambda leaf: int(leaf) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf,
            state.opt_state,
        )
        return state._replace(opt_state=as_number)


@fault("restored_in_other_types", TYPES)
class StatisticsRestoredInFloat64(Checkpoint):
    """The statistics come back as float64, as NumPy makes them of decimal text."""

    def restore(self, template: State, data: Any) -> Any:
        """Widen the statistics."""
        state = self.read(template, data)
        widened = mapped(lambda leaf: np.asarray(leaf, np.float64), state.batch_stats)
        return state._replace(batch_stats=widened)


@fault("restored_in_other_types", TYPES)
class StatisticsRestoredFrozen(Checkpoint):
    """The statistics come back in a FrozenDict where a dict was saved."""

    def restore(self, template: State, data: Any) -> Any:
        """Freeze the statistics."""
        from flax.core import freeze

        state = self.read(template, data)
        return state._replace(batch_stats=freeze(state.batch_stats))


@fault("checkpoint_loses_digits", VALUES)
class SavedInBfloat16(Checkpoint):
    """Every float is saved in bfloat16 and comes back as float32."""

    def kept(self, state: State) -> Any:
        """Narrow the floats."""
        return mapped(
            lambda leaf: (
                leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
            ),
            state,
        )

    def restore(self, template: State, data: Any) -> Any:
        """Widen them again."""
        return mapped(
            lambda leaf, like: jnp.asarray(leaf).astype(like.dtype),
            self.read(template, data),
            template,
        )


@fault("checkpoint_not_used", VALUES)
class RestoredValueIgnored(Checkpoint):
    """What from_bytes returns is dropped, as if it filled its template in place."""

    def restore(self, template: State, data: Any) -> Any:
        """Return the template."""
        self.read(template, data)
        return template


@fault("checkpoint_is_stale", VALUES)
class FirstCheckpointForEver(Checkpoint):
    """A checkpoint is written once and never again: later saves find the file and skip it."""

    first: Any = None

    def begin(self) -> None:
        """Start in an empty directory."""
        self.first = None

    def save(self, state: State) -> Any:
        """Write where nothing is written yet."""
        if self.first is None:
            self.first = super().save(state)
        return self.first


@fault("checkpoint_is_stale", VALUES)
class StatisticsOfTheSaveBefore(Checkpoint):
    """The statistics are written one save late."""

    late: Any = None

    def begin(self) -> None:
        """Start with no save before."""
        self.late = None

    def save(self, state: State) -> Any:
        """Write the statistics of the last save, if there was one."""
        late, self.late = self.late, state.batch_stats
        return super().save(state if late is None else state._replace(batch_stats=late))


@fault("restored_in_another_order", VALUES)
class MeanAndVarianceExchanged(Checkpoint):
    """The leaves of a layer are saved as a list and read back in another order."""

    def restore(self, template: State, data: Any) -> Any:
        """Exchange the mean and the variance of every layer."""
        state = self.read(template, data)
        exchanged = {
            layer: {"mean": leaves["var"], "var": leaves["mean"]}
            for layer, leaves in state.batch_stats.items()
        }
        return state._replace(batch_stats=exchanged)


@fault("hidden_state", RESUMED)
class RateCountedInPython(CallsCountedInPython):
    """A Python counter sets the rate: the process that resumes counts from the start."""


@fault("eval_in_train_mode", EVALUATED)
class EvaluationFoldsItsBatch(EvalWritesStatistics):
    """Evaluating between two steps moves the statistics."""


@fault("statistics_reinitialised", FOLDED)
class FirstBatchTakenWhole(FirstBatchReplacesTheInitialStatistics):
    """The first batch replaces the initial statistics; all later ones are averaged in."""


@fault("ema_applied_twice", FOLDED)
class EverySecondBatchTwice(Checkpoint):
    """Every second step folds its batch in twice: a pass for logging moves the statistics."""

    def subject(self) -> Subject:
        """Return a step that counts."""

        def twice(state: State, x: Any, y: Any, new: State) -> Any:
            _, again = reference.loss_fn(state.params, new.batch_stats, x, y)
            odd = state.extra["steps"] % 2 == 1
            return mapped(lambda one, two: jnp.where(odd, two, one), new.batch_stats, again)

        return counting(twice)


@fault("new_statistics_dropped", FOLDED)
class ThirdBatchForgotten(Checkpoint):
    """Every third step keeps the old statistics."""

    def subject(self) -> Subject:
        """Return a step that counts."""

        def dropped(state: State, x: Any, y: Any, new: State) -> Any:
            third = state.extra["steps"] % 3 == 2
            return mapped(
                lambda old, now: jnp.where(third, old, now), state.batch_stats, new.batch_stats
            )

        return counting(dropped)


def counting(statistics: Callable[[State, Any, Any, State], Any]) -> Subject:
    """Return the reference with a count of steps, and its statistics changed by a function."""
    plain: Subject = reference.momentum()

    def init(seed: Any, x: Any) -> State:
        return plain.init(seed, x)._replace(extra={"steps": jnp.int32(0)})

    def step(state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        new, info = plain.step(state._replace(extra=()), x, y, lr)
        carried = {"steps": state.extra["steps"] + 1}
        return new._replace(batch_stats=statistics(state, x, y, new), extra=carried), info

    return replace(plain, name="counting", init=init, step=step, with_optimizer=None)


def noisy() -> Subject:
    """Return the reference with noise on its input, from a key that the state carries."""
    plain: Subject = reference.adam()

    def init(seed: Any, x: Any) -> State:
        return plain.init(seed, x)._replace(extra={"key": jax.random.PRNGKey(seed)})

    def step(state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        key, now = jax.random.split(state.extra["key"])
        noise = 0.125 * jax.random.normal(now, x.shape)
        new, info = plain.step(state._replace(extra=()), x + noise, y, lr)
        return new._replace(extra={"key": key}), info

    return replace(plain, name="noisy", init=init, step=step, with_optimizer=None)


def correct() -> dict[str, Subject | CheckpointedSubject]:
    """Return correct lives, to which no claim may object."""
    return {
        "noisy": noisy(),
        "counting": counting(lambda state, x, y, new: new.batch_stats),
        "own_checkpoint": Checkpoint().lived(),
    }

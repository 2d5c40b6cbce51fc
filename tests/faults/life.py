"""Faults of saving, restoring and resuming, and faults that only several steps show.

Each is a correct step with a wrong way to save and restore, or a step whose fault the first step does not
show. ``bnverify.check_life`` must detect them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.core import freeze

from bnverify import CheckpointedSubject, State, StepInfo, Subject, reference
from tests.faults import FAULTS
from tests.faults.carrying import is_integer
from tests.faults.catalogue import Fault, edit
from tests.faults.steps import carried, mapped


class Checkpoint:
    """A correct way to save and restore with ``flax.serialization``; a fault replaces a part of it."""

    def trained(self) -> Subject:
        """Return the step whose state is saved: one with Adam, whose state has moments and a count."""
        return reference.adam()

    def begin(self) -> None:
        """Remove the checkpoints of another run."""

    def kept(self, state: State) -> Any:
        """Return the part of the state to save."""
        return state

    def save(self, state: State) -> Any:
        """Return the checkpoint."""
        return serialization.to_bytes(self.kept(state))

    def read(self, template: State, data: Any) -> Any:
        """Return the part of the state that was saved."""
        return serialization.from_bytes(self.kept(template), data)

    def restored(self, template: State, read: Any) -> Any:
        """Return the whole state, given the saved part."""
        return read

    def restore(self, template: State, data: Any) -> Any:
        """Return the restored state."""
        return self.restored(template, self.read(template, data))

    def subject(self, name: str) -> CheckpointedSubject:
        """Return the step with this way to save and restore."""
        return CheckpointedSubject(self.trained(), self.save, self.restore, self.begin)


def counting(statistics: Callable[[State, Any, Any, State], Any]) -> Subject:
    """Return the reference step with a step counter and with statistics changed by a function."""
    plain = reference.momentum()

    def init(seed: Any, x: Any) -> State:
        return plain.init(seed, x)._replace(extra={"steps": jnp.int32(0)})

    def step(state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        new, info = plain.step(state._replace(extra=()), x, y, lr)
        extra = {"steps": state.extra["steps"] + 1}
        return new._replace(batch_stats=statistics(state, x, y, new), extra=extra), info

    return replace(plain, name="counting", init=init, step=step, with_optimizer=None)


def noisy() -> Subject:
    """Return the reference step with noise on its inputs, from a key in the state."""
    plain = reference.adam()

    def init(seed: Any, x: Any) -> State:
        return plain.init(seed, x)._replace(extra={"key": jax.random.PRNGKey(seed)})

    def step(state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        key, now = jax.random.split(state.extra["key"])
        noise = 0.125 * jax.random.normal(now, x.shape)
        new, info = plain.step(state._replace(extra=()), x + noise, y, lr)
        return new._replace(extra={"key": key}), info

    return replace(plain, name="noisy", init=init, step=step, with_optimizer=None)


def correct() -> dict[str, Subject | CheckpointedSubject]:
    """Return correct subjects, which must not violate any law."""
    return {
        "noisy": noisy(),
        "counting": counting(lambda state, x, y, new: new.batch_stats),
        "own_checkpoint": Checkpoint().subject("own_checkpoint"),
    }


LIFE_FAULTS: dict[str, Fault] = {}


def fault(name: str, mistake: str, law: str, sentence: str, **parts: Any) -> None:
    """Add the Checkpoint with ``parts`` replaced, which ``law`` must detect."""
    make = edit(Checkpoint, parts, f"fault[{name}]")
    LIFE_FAULTS[name] = Fault(name, "life", mistake, sentence, make, law)


def of_step(name: str, mistake: str, law: str, sentence: str, other: str) -> None:
    """Add a step of the catalogue whose fault a sequence of steps shows as well."""

    def make() -> Subject:
        step: Subject = FAULTS[other].make()
        return replace(step, name=f"fault[{name}]")

    LIFE_FAULTS[name] = Fault(name, "life", mistake, sentence, make, law)


def count_as_number(template: Any, read: Any) -> Any:
    return mapped(lambda leaf: int(leaf) if is_integer(leaf) else leaf, read)


def count_zeroed(template: Any, read: Any) -> Any:
    return mapped(lambda leaf: jnp.zeros_like(leaf) if is_integer(leaf) else leaf, read)


def read_into_nothing(s: Any, template: State, data: Any) -> State:
    read = serialization.msgpack_restore(data)
    return State(read["params"], read["batch_stats"], read["opt_state"])


def floats_narrowed(s: Any, state: State) -> Any:
    def narrowed(leaf: Any) -> Any:
        return leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return mapped(narrowed, state)


def floats_widened(s: Any, template: State, read: Any) -> Any:
    return mapped(lambda leaf, like: jnp.asarray(leaf).astype(like.dtype), read, template)


def forgotten(s: Any) -> None:
    """Start in an empty directory, with no save before."""
    s.before = None


def written_once(s: Any, state: State) -> Any:
    if s.before is None:
        s.before = s.right.save(state)
    return s.before


def statistics_a_save_late(s: Any, state: State) -> Any:
    """Write the statistics of the last save, if there was one."""
    late, s.before = s.before, state.batch_stats
    return s.right.save(state if late is None else state._replace(batch_stats=late))


def mean_and_variance_exchanged(template: Any, read: Any) -> Any:
    return {layer: {"mean": leaves["var"], "var": leaves["mean"]} for layer, leaves in read.items()}


def every_second_batch_twice(state: State, x: Any, y: Any, new: State) -> Any:
    _, again = reference.loss_fn(state.params, new.batch_stats, x, y)
    odd = state.extra["steps"] % 2 == 1
    return mapped(lambda one, two: jnp.where(odd, two, one), new.batch_stats, again)


def third_batch_forgotten(state: State, x: Any, y: Any, new: State) -> Any:
    third = state.extra["steps"] % 3 == 2
    return mapped(lambda old, now: jnp.where(third, old, now), state.batch_stats, new.batch_stats)


# Each row in as few lines as it takes:
# fmt: off

VALUES = "a_checkpoint_keeps_every_value"
TYPES = "a_checkpoint_keeps_types_and_containers"
FOLDED = "statistics_fold_each_batch_once"

fault("statistics_not_saved", "checkpoint_drops_statistics", VALUES,
      "Only params and the optimizer's state are saved; the statistics are the initial ones.",
      kept=lambda s, state: {"params": state.params, "opt_state": state.opt_state},
      restored=lambda s, template, read: template._replace(**read))
fault("optimizer_state_not_saved", "checkpoint_drops_optimizer_state", VALUES,
      "The optimizer's state is initialised again when a run is restored.",
      restored=carried(opt_state=lambda template, read: template))
fault("key_not_saved", "checkpoint_drops_key", VALUES,
      "The key of the input noise is the initial one when a run is restored.",
      trained=lambda s: noisy(), restored=carried(extra=lambda template, read: template))
fault("count_reset_on_restore", "counter_reset_on_restore", VALUES,
      "Adam's count of steps is zero again after a restore; its moments are kept.",
      restored=carried(opt_state=count_zeroed))
fault("optimizer_state_restored_as_dicts", "restored_in_other_types", TYPES,
      "Without a template, the optimizer's named tuples are restored as dictionaries.",
      read=read_into_nothing)
fault("count_restored_as_python_number", "restored_in_other_types", TYPES,
      "The count is restored as a Python int.",
      restored=carried(opt_state=count_as_number))
fault("statistics_restored_in_float64", "restored_in_other_types", TYPES,
      "The statistics are restored as float64, as when NumPy reads decimal text.",
      restored=carried(batch_stats=lambda template, read:
          mapped(lambda leaf: np.asarray(leaf, np.float64), read)))
fault("statistics_restored_frozen", "restored_in_other_types", TYPES,
      "The statistics are saved in a dict and restored in a FrozenDict.",
      restored=carried(batch_stats=lambda template, read: freeze(read)))
fault("saved_in_bfloat16", "checkpoint_loses_digits", VALUES,
      "Every float is saved in bfloat16 and restored as float32.",
      kept=floats_narrowed, restored=floats_widened)
fault("restored_value_ignored", "checkpoint_not_used", VALUES,
      "The result of from_bytes is dropped, as if it modified its template.",
      restored=lambda s, template, read: template)
fault("first_checkpoint_for_ever", "checkpoint_is_stale", VALUES,
      "A checkpoint is written once and never again: later saves find the file and skip it.",
      before=None, begin=forgotten, save=written_once)
fault("statistics_of_the_save_before", "checkpoint_is_stale", VALUES,
      "Each save writes the statistics of the save before.",
      before=None, begin=forgotten, save=statistics_a_save_late)
fault("mean_and_variance_exchanged", "restored_in_another_order", VALUES,
      "The leaves of a layer are saved as a list and read back in another order.",
      restored=carried(batch_stats=mean_and_variance_exchanged))
of_step("rate_counted_in_python", "hidden_state", "a_resumed_process_continues_to_the_bit",
        "A Python counter sets the learning rate; a resumed process counts from the start.",
        "calls_counted_in_python")
of_step("evaluation_folds_its_batch", "eval_in_train_mode",
        "evaluation_between_steps_changes_nothing",
        "Evaluating between two steps moves the statistics.",
        "eval_writes_statistics")
of_step("first_batch_taken_whole", "statistics_reinitialised", FOLDED,
        "The first batch's moments replace the initial statistics; later ones are averaged.",
        "first_batch_replaces_the_initial_statistics")
fault("every_second_batch_twice", "ema_applied_twice", FOLDED,
      "Every second step folds its batch in twice, the second time in a pass for logging.",
      trained=lambda s: counting(every_second_batch_twice))
fault("third_batch_forgotten", "new_statistics_dropped", FOLDED,
      "Every third step keeps the old statistics.",
      trained=lambda s: counting(third_batch_forgotten))

"""Each law is violated by a fault made for it; tests/test_runs.py tests that a correct step violates none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnverify
from bnverify import reference
from bnverify.laws import LAWS
from bnverify.model import State, Subject
from bnverify.parallel.devices import on_devices
from bnverify.profile import Profile
from tests.faults import FAULTS
from tests.faults.libraries import LOOP_FAULTS
from tests.faults.life import LIFE_FAULTS
from tests.faults.parallel import PARALLEL_FAULTS
from tests.faults.processes import PROCESS_FAULTS

FEW = Profile("few", tiny=1, shapes=0, block=64, examples=4)
SGD = reference.sgd()
NUMBER = jax.ShapeDtypeStruct((), jnp.float32)


def statistics_begin_at_one() -> Subject:
    """All initial statistics are 1, including the mean."""

    def init(seed: Any, x: Any) -> State:
        state = SGD.init(seed, x)
        ones = jax.tree_util.tree_map(jnp.ones_like, state.batch_stats)
        return state._replace(batch_stats=ones)

    return replace(SGD, init=init)


def everything_doubled() -> Subject:
    """Loss, gradient and eval loss are doubled, so they remain consistent with each other."""

    def step(state: State, x: Any, y: Any, lr: Any) -> Any:
        after, info = SGD.step(state, x, y, lr)
        return after, jax.tree_util.tree_map(lambda leaf: 2 * leaf, info)

    return replace(SGD, step=step, evaluate=lambda s, x, y: 2 * SGD.evaluate(s, x, y))


def counts_its_calls() -> Subject:
    """A Python counter makes the training loss and the eval loss grow from call to call."""
    calls = count(1)

    def grown(value: Any) -> Any:
        more = jax.pure_callback(
            lambda _: np.float32(next(calls)), NUMBER, jnp.float32(0), vmap_method="sequential"
        )
        return value * (1 + more)

    def step(state: State, x: Any, y: Any, lr: Any) -> Any:
        after, info = SGD.step(state, x, y, lr)
        return after, info._replace(loss=grown(info.loss))

    return replace(SGD, step=step, evaluate=lambda s, x, y: grown(SGD.evaluate(s, x, y)))


def state_written_in_place() -> Subject:
    """The step writes the new mean into the caller's dictionary."""

    def step(state: State, x: Any, y: Any, lr: Any) -> Any:
        after, info = SGD.step(state, x, y, lr)
        state.batch_stats["BatchNorm_0"]["mean"] = after.batch_stats["BatchNorm_0"]["mean"]
        return after, info

    return replace(SGD, step=step)


def trains_only_when_traced() -> Subject:
    """Without jit, the step does not change params."""

    def step(state: State, x: Any, y: Any, lr: Any) -> Any:
        after, info = SGD.step(state, x, y, lr)
        return after if isinstance(x, jax.core.Tracer) else after._replace(
            params=state.params
        ), info

    return replace(SGD, step=step)


def another_rule_under_vmap() -> Subject:
    """A function with a wrong custom rule for vmap."""

    @jax.custom_batching.custom_vmap
    def scaled(rate: Any) -> Any:
        return rate * 1

    @scaled.def_vmap
    def _(axis_size: int, in_batched: Any, rate: Any) -> Any:
        del axis_size
        return rate * 2, in_batched[0]

    return replace(SGD, step=lambda s, x, y, lr: SGD.step(s, x, y, scaled(lr)))


def seed_is_rounded() -> Subject:
    """The one-call function rounds its seed, and evaluates before the step."""

    def solution(seed: Any, x: Any, y: Any, lr: Any) -> Any:
        del lr
        state = SGD.init(round(seed), x)
        return SGD.evaluate(state, x, y)

    return replace(SGD, solution=solution)


def restored_weakly() -> bnverify.CheckpointedSubject:
    """A number comes back with a weak type, like a Python scalar."""
    scale = 1.001

    def init(seed: Any, x: Any) -> State:
        return SGD.init(seed, x)._replace(extra={"scale": jnp.float32(scale)})

    def step(state: State, x: Any, y: Any, lr: Any) -> Any:
        x = (x.astype(jnp.bfloat16) * state.extra["scale"]).astype(jnp.float32)
        after, info = SGD.step(state._replace(extra=SGD.init(0, x).extra), x, y, lr)
        return after._replace(extra=state.extra), info

    def restore(template: State, data: State) -> State:
        del template
        return data._replace(extra={"scale": jnp.asarray(scale)})

    def evaluate(state: State, x: Any, y: Any) -> Any:
        return SGD.evaluate(state._replace(extra=SGD.init(0, x).extra), x, y)

    subject = replace(SGD, init=init, step=step, evaluate=evaluate, after_eval=None)
    return bnverify.CheckpointedSubject(subject, lambda state: state, restore)


@jax.tree_util.register_pytree_node_class
class Turning:
    """A container whose flatten and unflatten are not inverse: it reverses its children."""

    def __init__(self, value: Any, turned: bool = False) -> None:
        self.value, self.turned = value, turned

    def tree_flatten(self) -> tuple[tuple[Any], bool]:
        return (self.value,), self.turned

    @classmethod
    def tree_unflatten(cls, turned: bool, children: tuple[Any]) -> Turning:
        return cls(children[0], not turned)


def container_turns_over() -> Subject:
    """The state contains a container that changes when it is copied."""

    def init(seed: Any, x: Any) -> State:
        return SGD.init(seed, x)._replace(extra=Turning(jnp.float32(1)))

    def step(state: State, x: Any, y: Any, lr: Any) -> Any:
        after, info = SGD.step(state._replace(extra=SGD.init(0, x).extra), x, y, lr)
        return after._replace(extra=state.extra), info

    def evaluate(state: State, x: Any, y: Any) -> Any:
        return SGD.evaluate(state._replace(extra=SGD.init(0, x).extra), x, y)

    return replace(SGD, init=init, step=step, evaluate=evaluate, after_eval=None)


RED: dict[str | Callable[[], Any], tuple[str, ...]] = {
    "gradient_of_all_variables": ("gradients_match_params",),
    "params_become_half": ("params_keep_their_tree", "state_signature_is_a_fixed_point"),
    "variance_missing": ("batch_stats_keep_their_tree", "batch_stats_change_only_by_ema"),
    "nnx_statistics_are_params": ("params_hold_no_statistics",),
    "adam_on_all_variables": (
        "optimizer_state_is_that_of_params",
        "optimizer_state_excludes_batch_stats",
    ),
    "loss_has_one_axis": ("training_loss_is_a_scalar",),
    "eval_loss_not_reduced": ("eval_loss_has_shape_one",),
    "statistics_in_bfloat16": ("batch_stats_are_float32",),
    "train_step_in_eval_mode": (
        "training_is_free_of_old_statistics",
        "inputs_reach_the_statistics",
        "step_moves_the_statistics",
        "one_momentum_for_the_whole_model",
        "bias_before_norm_has_no_gradient",
        "shift_before_norm_changes_no_loss",
    ),
    "eval_in_train_mode_writes": (
        "eval_statistics_are_the_ones_passed_in",
        "eval_writes_nothing",
        "eval_uses_the_running_statistics",
        "eval_rows_are_independent",
    ),
    "update_dropped": (
        "targets_reach_the_params",
        "step_moves_the_params",
        "params_follow_the_optimizer",
        "sgd_moves_params_by_minus_lr_times_gradient",
    ),
    "broadcast_loss": ("targets_belong_to_their_rows",),
    "batch_baked_in": ("inputs_reach_the_params", "loss_reads_params_and_inputs"),
    "statistics_reinitialised": ("old_statistics_reach_the_new",),
    "batch_baked_into_the_evaluation": ("inputs_reach_the_evaluation",),
    "evaluation_of_the_predictions_alone": ("targets_reach_the_evaluation",),
    "nnx_norm_shared": ("momentum_is_as_declared",),
    "sample_variance": (
        "batch_moments_are_the_layers_own",
        "eval_at_the_batchs_own_moments_is_the_training_loss",
        "doubling_the_batch_changes_nothing",
    ),
    "statistics_trained_as_params": ("batch_stats_are_free_of_targets",),
    "mean_and_variance_swapped": ("variance_is_never_negative",),
    "deviations_averaged_then_squared": ("batch_like_the_statistics_is_a_fixed_point",),
    "statistics_only_move_on_the_first_step": ("equal_steps_converge_geometrically",),
    statistics_begin_at_one: ("initial_statistics_are_zero_and_one",),
    "moments_in_half": ("statistics_stay_finite",),
    "old_adam_state_kept": ("optimizer_state_follows_the_optimizer",),
    "learning_rate_fixed": ("zero_learning_rate_moves_nothing",),
    everything_doubled: (
        "gradients_equal_the_hand_derivation",
        "training_loss_equals_the_hand_derivation",
        "eval_loss_equals_the_hand_derivation",
    ),
    "epsilon_forgotten": ("eval_loss_is_finite",),
    counts_its_calls: ("eval_repeats_to_the_bit", "same_input_repeats_to_the_bit"),
    "last_row_dropped": ("row_order_changes_nothing",),
    state_written_in_place: ("step_leaves_its_inputs_alone",),
    trains_only_when_traced: ("jit_equals_eager",),
    another_rule_under_vmap: ("vmap_equals_loop",),
    seed_is_rounded: (
        "float_seeds_act_as_their_integer_part",
        "solution_is_init_step_evaluate",
    ),
    "statistics_not_saved": ("a_checkpoint_keeps_every_value",),
    "statistics_restored_in_float64": ("a_checkpoint_keeps_types_and_containers",),
    container_turns_over: ("a_copy_keeps_everything",),
    restored_weakly: ("a_restored_run_continues_to_the_bit",),
    "rate_counted_in_python": ("a_resumed_process_continues_to_the_bit",),
    "evaluation_folds_its_batch": ("evaluation_between_steps_changes_nothing",),
    "every_second_batch_twice": ("statistics_fold_each_batch_once",),
}
"""Fault -> the laws that it must violate, without the family "parallel"."""

PARALLEL: dict[str, tuple[str, ...]] = {
    "statistics_not_synchronised": (
        "vmap_with_an_axis_equals_one_device",
        "pmap_equals_one_device",
        "shard_map_equals_one_device",
        "replicas_agree_to_the_bit",
    ),
    "padding_enters_the_loss": ("unequal_shards_equal_one_device",),
    "statistics_per_chunk_under_jit": ("jit_with_shardings_equals_one_device",),
}
"""The same for the family "parallel"."""


def test_every_law_has_a_fault() -> None:
    """Every law has a fault, since a law without one might be impossible to violate."""
    # tests/faults/test_loops.py and test_processes.py
    elsewhere = {fault.law for fault in (*LOOP_FAULTS.values(), *PROCESS_FAULTS.values())}
    seen = [*elsewhere, *(law for laws in (*RED.values(), *PARALLEL.values()) for law in laws)]
    assert sorted(seen) == sorted(LAWS)


def made(fault: str | Callable[[], Any]) -> Any:
    """Return the wrong step."""
    if callable(fault):
        return fault()
    return {**FAULTS, **LIFE_FAULTS}[fault].make()


@pytest.mark.parametrize("fault", RED, ids=lambda fault: getattr(fault, "__name__", fault))
def test_a_fault_breaks_the_laws_that_it_is_made_for(fault: str | Callable[[], Any]) -> None:
    """A few cases detect the fault, with a small counterexample."""
    laws = RED[fault]
    structure = all(LAWS[law].kind == "structure" for law in laws)
    report = bnverify.verify(made(fault), FEW, select=laws, proofs_only=structure)
    for found in report.results:
        assert found.status == "violated", (found.law, found.status, found.reason)
        assert found.counterexample is not None
        assert found.shape is None or max(found.shape) <= 2
        if LAWS[found.law].kind == "residual":
            assert found.mismatch is not None or ": got " in found.reason


def test_a_fault_of_many_devices_breaks_the_laws_that_it_is_made_for() -> None:
    """The same for parallel laws, all in one process with four simulated devices."""
    targets = {f"tests.faults.parallel:{name}": laws for name, laws in PARALLEL.items()}
    assert set(PARALLEL) <= set(PARALLEL_FAULTS)
    names = [law for laws in PARALLEL.values() for law in laws]
    found = on_devices(list(targets), FEW, 0, names)
    for target, laws in targets.items():
        broken = {each.law for each in found[target][0] if each.status == "violated"}
        assert set(laws) <= broken, target

"""Laws of checkpoints: saving, restoring, copying or evaluating a state does not change training.

They are judged by running histories of steps, evaluations, copies and checkpoints.
"""

from __future__ import annotations

from bnverify.laws.law import beyond_one_step

FLAX_SAVING = "Flax, saving and loading checkpoints: flax.serialization"

beyond_one_step(
    "life",
    "a_checkpoint_keeps_every_value",
    "Saving and restoring a state keeps every value bit-identical.",
    mistakes=("checkpoint_drops_statistics", "checkpoint_drops_optimizer_state"),
    source=FLAX_SAVING,
)
beyond_one_step(
    "life",
    "a_checkpoint_keeps_types_and_containers",
    "A restored state has the same containers, shapes and dtypes as the saved one.",
    mistakes=("restored_in_other_types",),
    source="https://github.com/google/flax/issues/1550",
)
beyond_one_step(
    "life",
    "a_copy_keeps_everything",
    "Copying a state, or jax.device_put of it, keeps its values, dtypes, weak types and containers.",
    mistakes=("restored_in_other_types",),
    source="JAX, pytrees: unflattening is the inverse of flattening",
)
beyond_one_step(
    "life",
    "a_restored_run_continues_to_the_bit",
    "A run restored from a checkpoint continues bit-identically to one that was not interrupted.",
    mistakes=("restored_in_other_types", "hidden_state"),
    source=FLAX_SAVING,
)
beyond_one_step(
    "life",
    "a_resumed_process_continues_to_the_bit",
    "A run continues bit-identically when the step is traced again, as in a new process.",
    mistakes=("hidden_state",),
    source="JAX, pure functions: state that is not an argument is lost with the process",
)
beyond_one_step(
    "life",
    "evaluation_between_steps_changes_nothing",
    "Evaluating between two steps leaves the state bit-identical.",
    mistakes=("eval_in_train_mode",),
    source="Ioffe & Szegedy 2015, algorithm 2: inference only reads the statistics",
)
beyond_one_step(
    "life",
    "statistics_fold_each_batch_once",
    "After any history, batch_stats is the moving average of its batches, each counted once.",
    mistakes=("ema_applied_twice", "statistics_reinitialised", "new_statistics_dropped"),
    source="Ioffe & Szegedy 2015, algorithm 1; the bound is derived in bnverify/lifetime/fold.py",
)

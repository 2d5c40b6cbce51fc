"""What must hold in the life of a state, whatever happens between two steps."""

from __future__ import annotations

from bnverify.claim import Claim

FLAX_SAVING = "Flax, saving and loading checkpoints: flax.serialization"

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            "a_checkpoint_keeps_every_value",
            "life",
            "A state that is saved and restored has every value it had, to the bit.",
            ("checkpoint_drops_statistics", "checkpoint_drops_optimizer_state"),
            FLAX_SAVING,
        ),
        Claim(
            "a_checkpoint_keeps_types_and_containers",
            "life",
            "A restored state has the containers, shapes and dtypes of the saved one.",
            ("restored_in_other_types",),
            "https://github.com/google/flax/issues/1550",
        ),
        Claim(
            "a_copy_keeps_everything",
            "life",
            "Copying a state, or putting it on a device, keeps values, types, weak types and "
            "containers.",
            ("restored_in_other_types",),
            "JAX, pytrees: flattening and unflattening are inverse",
        ),
        Claim(
            "a_restored_run_continues_to_the_bit",
            "life",
            "A run that was restored goes on as one that was never saved, to the bit.",
            ("restored_in_other_types", "hidden_state"),
            FLAX_SAVING,
        ),
        Claim(
            "a_resumed_process_continues_to_the_bit",
            "life",
            "A step that is traced again, as a new process does, goes on to the bit.",
            ("hidden_state",),
            "JAX, pure functions: what is no argument vanishes with the process",
        ),
        Claim(
            "evaluation_between_steps_changes_nothing",
            "life",
            "Evaluating between two steps leaves the state as it is, to the bit.",
            ("eval_in_train_mode",),
            "Ioffe & Szegedy 2015, algorithm 2: inference only reads the statistics",
        ),
        Claim(
            "statistics_fold_each_batch_once",
            "life",
            "After any history the statistics are the moving average of its batches, each once.",
            ("ema_applied_twice", "statistics_reinitialised", "new_statistics_dropped"),
            "Ioffe & Szegedy 2015, algorithm 1; the bound is derived in bnverify/lifetime/fold.py",
        ),
    )
}

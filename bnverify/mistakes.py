"""The mistakes that a report names, each with its fix and its code, wrong and right.

To add one, call ``mistake`` below: the title says what was done in one clause, ``fix`` what to write
instead, ``wrong`` and ``right`` are the shortest real code that shows it. Then name it in the
``mistakes=`` of each law that notices it, the most likely first. That is enough for a report to
name it; where the same law has several mistakes, a rule in ``bnverify/diagnose.py`` can tell by which
numbers it is recognised.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One known way to get a training step wrong.

    Attributes:
        name: how laws and faults refer to it.
        title: what was done, in one clause.
        fix: what to write instead.
        source: where users met it, a public address; empty where it is elementary.
        looks: what its author sees: what a run looks like; empty where the title says it.
        wrong: a few lines of Flax or Optax code with the mistake; empty where none are given.
        right: the same lines without it.
    """

    name: str
    title: str
    fix: str
    source: str = ""
    looks: str = ""
    wrong: str = ""
    right: str = ""


MISTAKES: dict[str, Mistake] = {}


def described(mistake: Mistake) -> str:
    """Return a mistake in one line: its name, what was done, how to fix it and where it was seen."""
    seen = f" Seen at {mistake.source}" if mistake.source else ""
    return f"{mistake.name}: {mistake.title}. Fix: {mistake.fix}.{seen}"


def mistake(
    name: str,
    title: str,
    fix: str,
    source: str = "",
    *,
    looks: str = "",
    wrong: str = "",
    right: str = "",
) -> Mistake:
    """Enter a mistake into ``MISTAKES``, and return it; see :class:`Mistake`.

    Raises:
        ValueError: another one has that name.
    """
    if name in MISTAKES:
        raise ValueError(f"two mistakes are named {name}")
    code = (textwrap.dedent(text).strip("\n") for text in (wrong, right))
    MISTAKES[name] = Mistake(name, title, fix, source, looks, *code)
    return MISTAKES[name]


# How the optimizer is used.
mistake(
    "optimizer_on_all_variables",
    "the optimizer was initialised on all variables",
    "tx.init(params), not tx.init(variables): split variables before the optimizer sees them",
)
mistake(
    "gradient_of_all_variables",
    "the gradient was taken of all variables",
    "differentiate argument 0 only, and let it be params; pass batch_stats as another argument",
)
mistake(
    "statistics_trained_as_params",
    "the running statistics are trained, or stored, as params",
    "keep them in the batch_stats collection and overwrite them with the forward pass's own",
    "https://github.com/intel/ipex-llm/issues/1599",
)
mistake(
    "statistics_fed_to_the_optimizer",
    "the optimizer sees running statistics or something computed from them",
    "give tx.update the gradients, its own state and params, nothing else",
)
mistake(
    "wrong_sign",
    "the update has the wrong sign",
    "optax.apply_updates adds: pass it what tx.update returns, not the gradient, not its negative",
)
mistake(
    "update_dropped",
    "the new params are not the updated ones",
    "return optax.apply_updates(params, updates); state.replace and tx.update return, never mutate",
    "https://github.com/borisdayma/dalle-mini/pull/71",
)
mistake(
    "update_applied_twice",
    "the update is applied more than once",
    "call optax.apply_updates once a step",
)
mistake(
    "old_optimizer_state_kept",
    "the optimizer's old state is carried on",
    "updates, opt_state = tx.update(...): return that opt_state",
    "https://github.com/google/flax/issues/2467",
)
mistake(
    "optimizer_reinitialised",
    "the optimizer's state is made anew in each step",
    "call tx.init once, before the first step, and thread opt_state through the steps",
)
mistake(
    "learning_rate_ignored",
    "the learning rate does not scale the update, or not once",
    "build the optimizer with the step's lr and do not scale the updates again",
)
mistake(
    "decay_outside_the_learning_rate",
    "params shrink by a decay that the learning rate does not scale",
    "use optax.adamw or add_decayed_weights inside the chain, masked to the kernels",
    "https://github.com/google-deepmind/optax/issues/25",
)
mistake(
    "decay_of_norm_parameters",
    "weight decay reaches the scale or bias of a normalisation",
    "mask the decay: optax.masked(add_decayed_weights(d), mask) with kernels alone",
    "https://github.com/google-deepmind/optax/issues/25",
)

# How the gradient is taken.
mistake(
    "wrong_gradient",
    "the gradient is not that of the training loss",
    "take jax.value_and_grad of the very loss that is reported, and change nothing in between",
)
mistake(
    "gradient_of_another_loss",
    "the reported loss is not the one that was differentiated",
    "report the value that jax.value_and_grad returns",
)
mistake(
    "has_aux_forgotten",
    "value_and_grad was not told that the loss returns a second value",
    "jax.value_and_grad(loss_fn, has_aux=True) where loss_fn returns (loss, new_batch_stats)",
)
mistake(
    "mutable_forgotten",
    "batch_stats was not declared mutable",
    'model.apply(variables, x, train=True, mutable=["batch_stats"]) and keep what it returns',
    "https://github.com/google/evojax/issues/60",
)

# The loss.
mistake(
    "broadcast_loss",
    "predictions (N, 1) and targets (N,) broadcast to (N, N) in the loss",
    "out.reshape(-1) or out.squeeze(-1) before subtracting y",
)
mistake(
    "loss_not_reduced",
    "the loss does not have the shape it should",
    "reduce the training loss to a scalar with jnp.mean; the eval loss is that, reshaped to (1,)",
)
mistake(
    "sum_instead_of_mean",
    "the loss is a sum over the batch where a mean is meant",
    "jnp.mean over the batch, so that the step does not depend on the batch's size",
)
mistake(
    "rows_treated_unequally",
    "some rows of the batch count more than others, or not at all",
    "use every row with the same weight in the forward pass and in the loss",
    "https://github.com/google/flax/issues/1850",
)
mistake(
    "loss_reads_old_statistics",
    "the training loss reads the old running statistics",
    "normalise by the batch's own moments in training: use_running_average=False",
    "https://github.com/patrick-kidger/equinox/pull/675",
)
mistake("targets_ignored", "the targets do not reach the params", "use y in the training loss")
mistake(
    "inputs_ignored",
    "something else is used than the inputs that are passed in",
    "pass the batch to the jitted function: what it closes over is baked in when it is traced",
)

# The statistics.
mistake(
    "train_step_in_eval_mode",
    "the training step runs the model in eval mode",
    "train=True (use_running_average=False) in the training loss",
)
mistake(
    "new_statistics_dropped",
    "the new statistics are not carried on",
    'return updated["batch_stats"] as aux and put it into the next state',
    "https://github.com/HomericIntelligence/Odyssey/issues/5532",
)
mistake(
    "statistics_reinitialised",
    "the statistics do not start from the old ones",
    "initialise them once (mean 0, variance 1) and pass the carried ones to model.apply",
    "https://github.com/google/flax/issues/2232",
)
mistake(
    "ema_applied_twice",
    "the moving average is applied more than once a step",
    "one mutable forward pass a step; evaluate other passes with mutable off",
)
mistake(
    "momentum_reversed",
    "momentum is meant the other way round",
    "Flax's momentum weights the old value (0.99), PyTorch's the new (0.01): pass 1 - m",
    "https://github.com/pytorch/examples/issues/289",
)
mistake(
    "sample_variance",
    "the running variance divides by N - 1, or by something else than N",
    "use the biased variance, divisor N, as Flax's BatchNorm does",
)
mistake(
    "statistics_over_the_wrong_axis",
    "the moments are taken over other axes than the batch's",
    "reduce over every axis but the feature axis (BatchNorm's axis=-1)",
)
mistake(
    "statistics_from_another_batch",
    "the statistics are not those of the batch that was trained on",
    "carry out the statistics of the very forward pass that was differentiated",
    "https://github.com/andreped/GradientAccumulator/issues/6",
)
mistake(
    "statistics_in_low_precision",
    "the statistics are kept in less than float32",
    "keep batch_stats in float32; dtype= sets the computation's type, param_dtype the storage",
    "https://github.com/NVIDIA/Model-Optimizer/pull/738",
)
mistake(
    "statistics_overflow",
    "the statistics leave the range of their dtype",
    "scale the input; squares overflow float32 near 1e19, float16 near 255",
)
mistake(
    "parameters_change_dtype",
    "the step changes the dtype or shape of what it carries",
    "keep params and state in the dtype they were initialised with; cast inside the model",
)

# Evaluation.
mistake(
    "eval_in_train_mode",
    "evaluation runs in train mode",
    "train=False (use_running_average=True), or model.eval() in nnx, when evaluating",
    "https://github.com/yanx27/GACNet/issues/8",
)
mistake(
    "eval_of_stale_state",
    "evaluation uses params or statistics from before the step",
    "pass the new params and the new batch_stats to evaluation",
    "https://github.com/google/flax/pull/3982",
)
mistake(
    "division_by_zero_variance",
    "a variance of zero is divided by",
    "add epsilon to the variance before the square root",
)

# Purity.
mistake(
    "hidden_state",
    "the result depends on something that is not an argument",
    "carry all state through the step; Python side effects and globals vanish under jit",
)
mistake(
    "inputs_overwritten",
    "the step changes or deletes its inputs",
    "return new arrays; do not donate or write into arrays that the caller still holds",
    "https://github.com/jax-ml/jax/issues/37830",
)
mistake(
    "seed_not_truncated",
    "a float seed is not taken as its integer part",
    "jax.random.PRNGKey(int(seed))",
)
mistake(
    "statistics_not_synchronised",
    "each device keeps the statistics of its own shard",
    "BatchNorm(axis_name=...), or jax.lax.pmean over the moments E[x] and E[x^2]",
    "https://github.com/google/flax/issues/877",
)

# Several devices.
mistake(
    "variances_averaged",
    "the devices' variances are averaged, which loses the spread between their means",
    "pmean E[x] and E[x^2] before E[x^2] - E[x]^2 is taken: BatchNorm(axis_name=...)",
    "https://github.com/tensorflow/tpu/issues/321",
)
mistake(
    "unequal_shards",
    "moments of shards with unequal numbers of rows are averaged as if they were equal",
    "psum the sums and the counts of rows, and divide once; pmean weighs every shard alike",
    "https://github.com/google/flax/issues/2417",
)
mistake(
    "mean_of_means",
    "the loss is the mean of the devices' means, whatever number of rows each has",
    "psum the sum of the errors and the count of rows, and divide once",
    "https://github.com/huggingface/transformers/pull/18458",
)
mistake(
    "gradients_not_synchronised",
    "each device updates its params by the gradient of its own shard",
    "grads = jax.lax.pmean(grads, axis_name) before tx.update",
)
mistake(
    "gradients_summed",
    "the devices' gradients are summed where their mean is meant",
    "jax.lax.pmean, not psum; under shard_map with checked replication the sum is taken already",
)

# Saving and restoring.
mistake(
    "checkpoint_drops_statistics",
    "the checkpoint does not hold the running statistics",
    "save and restore the whole state: params, batch_stats, opt_state and keys",
    "https://github.com/AI-Hypercomputer/maxtext/pull/4343",
)
mistake(
    "checkpoint_drops_optimizer_state",
    "the checkpoint does not hold the optimizer's state",
    "save opt_state beside params, and do not call tx.init after restoring",
)
mistake(
    "checkpoint_drops_key",
    "the checkpoint does not hold the random key, or what else the step carries",
    "put keys and counters into the state that is saved",
    "https://github.com/AI-Hypercomputer/maxtext/pull/4343",
)
mistake(
    "counter_reset_on_restore",
    "a step counter starts again when a run is restored",
    "restore the optimizer's count with the rest of opt_state: schedules and Adam read it",
)
mistake(
    "restored_in_other_types",
    "the restored state has other containers, shapes or dtypes than the saved one",
    "restore into a template: from_bytes(state_of_the_same_structure, data)",
    "https://github.com/google/flax/issues/1550",
)
mistake(
    "checkpoint_loses_digits",
    "the checkpoint stores values in a narrower type",
    "save float32 as float32; cast a copy for export, never the state that training resumes from",
)
mistake(
    "checkpoint_not_used",
    "the restored values are not the checkpoint's",
    "use what from_bytes or restore returns: it does not fill its template in place",
)
mistake(
    "restored_in_another_order",
    "values come back in each other's places",
    "restore by name into a template, never from a list of leaves in an order of its own",
)
mistake(
    "checkpoint_is_stale",
    "an older checkpoint is restored than the one saved last",
    "save by value, wait for an asynchronous save to end, and restore the latest step",
)

# Layers, copies and passes that are more than a single network in a single pass.
mistake(
    "frozen_statistics_move",
    "a frozen layer's statistics change: it still folds each batch in",
    "run a frozen layer with use_running_average=True, whatever train says",
    "https://github.com/Lightning-AI/pytorch-lightning/issues/15062",
    looks="evaluation drifts although the backbone's params never move",
    wrong="""
        x = nn.BatchNorm(use_running_average=not train, name="backbone_norm")(x)
        """,
    right="""
        x = nn.BatchNorm(use_running_average=True, name="backbone_norm")(x)
        """,
)
mistake(
    "frozen_params_move",
    "params that are to be frozen are moved, by a decay or by their gradient",
    'optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)',
    wrong="""
        frozen = jax.lax.stop_gradient(params["backbone"])  # its gradient is 0
        tx = optax.adamw(1e-3)  # and its decay is not
        """,
    right="""
        tx = optax.multi_transform({"train": optax.adamw(1e-3), "freeze": optax.set_to_zero()}, labels)
        """,
)
mistake(
    "frozen_gradients_scale_others",
    "gradients of frozen params scale the update of the others",
    "clip within what trains, not around it",
    wrong="""
        groups = {"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(groups, labels))
        """,
    right="""
        trained = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
        tx = optax.multi_transform({"train": trained, "freeze": optax.set_to_zero()}, labels)
        """,
)
mistake(
    "stale_statistics",
    "a copy of the params is updated, its running statistics are never written",
    "copy batch_stats beside the params, wherever the copy is updated",
    "https://github.com/DLR-RM/stable-baselines3/issues/996",
    looks="the target network is evaluated with mean 0 and variance 1 for ever",
    wrong="""
        state = state.replace(target_params=state.params)
        """,
    right="""
        state = state.replace(target_params=state.params, target_batch_stats=state.batch_stats)
        """,
)
mistake(
    "fresh_statistics",
    "the params come from a trained model and the running statistics do not: they do not belong "
    "to the params",
    "restore batch_stats from where the params come from",
    "https://github.com/google/deepvariant/issues/383",
    wrong="""
        variables = {**model.init(key, x), "params": restored["params"]}
        """,
    right="""
        variables = {"params": restored["params"], "batch_stats": restored["batch_stats"]}
        """,
)
mistake(
    "pass_dropped",
    "the statistics of one of several passes are dropped",
    "thread batch_stats through all calls: the second starts from what the first returned",
    "https://github.com/carpedm20/DCGAN-tensorflow/issues/266",
    wrong="""
        real, _ = disc.apply({"params": params, "batch_stats": stats}, images, mutable=["batch_stats"])
        fake, new = disc.apply({"params": params, "batch_stats": stats}, fakes, mutable=["batch_stats"])
        """,
    right="""
        real, new = disc.apply({"params": params, "batch_stats": stats}, images, mutable=["batch_stats"])
        fake, new = disc.apply({"params": params, **new}, fakes, mutable=["batch_stats"])
        """,
)
mistake(
    "rows_normalised_alone",
    "each row is normalised by itself: the moments are not those of the batch",
    'under jax.vmap BatchNorm sees one row: give it BatchNorm(axis_name="batch"), and map by '
    'jax.vmap(..., axis_name="batch", out_axes=(0, None))',
    "https://github.com/google/flax/issues/1247",
    looks="every hidden unit is its bias, and the running variance goes to 0",
    wrong="""
        out, new = jax.vmap(one_row)(x)  # BatchNorm() in the model
        """,
    right="""
        out, new = jax.vmap(one_row, axis_name="batch", out_axes=(0, None))(x)
        # BatchNorm(axis_name="batch") in the model
        """,
)
mistake(
    "padding_in_the_denominator",
    "padding changes the loss: it is masked out of the sum and counted in the mean",
    "divide by the number of rows that count",
    "https://github.com/tracel-ai/burn/issues/5568",
    wrong="""
        loss = jnp.mean(mask * losses)
        """,
    right="""
        loss = jnp.sum(mask * losses) / jnp.maximum(mask.sum(), 1)
        """,
)
mistake(
    "padding_enters",
    "rows that do not count reach the loss or the statistics",
    "mask them out of the loss, and of BatchNorm too",
    "https://github.com/google/flax/issues/1850",
    wrong="""
        x = nn.BatchNorm(use_running_average=not train)(x)
        """,
    right="""
        x = nn.BatchNorm(use_running_average=not train)(x, mask=mask[:, None])
        """,
)
mistake(
    "same_key_in_each_step",
    "each step draws the same random numbers, so dropout has the same mask each step",
    "split the key and carry the new one, or jax.random.fold_in(key, state.step)",
    "https://github.com/google/flax/pull/2631",
    wrong="""
        out = state.apply_fn(variables, x, train=True, rngs={"dropout": state.key})
        """,
    right="""
        key = jax.random.fold_in(state.key, state.step)
        out = state.apply_fn(variables, x, train=True, rngs={"dropout": key})
        """,
)
mistake(
    "schedule_counts_batches",
    "the learning rate's schedule is as long as there are batches, of which several make an update",
    "the schedule counts optimizer steps, not batches: divide by the steps that make an update",
    "https://github.com/AI-Hypercomputer/maxtext/pull/3452",
    looks="training ends long before the learning rate has decayed",
    wrong="""
        tx = optax.MultiSteps(optax.sgd(optax.cosine_decay_schedule(0.1, batches)), 4)
        """,
    right="""
        tx = optax.MultiSteps(optax.sgd(optax.cosine_decay_schedule(0.1, batches // 4)), 4)
        """,
)

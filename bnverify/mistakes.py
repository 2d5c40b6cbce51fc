"""The mistakes that a report names, each with its fix and its code, wrong and right.

To add one, call ``mistake`` below: the title says what was done in one clause, ``fix`` what to write
instead, ``looks`` what its author sees, ``wrong`` and ``right`` are the shortest real code that shows it.
Then name it in the ``mistakes=`` of each law that notices it, the most likely first. That is enough for a
report to name it; where the same law has several mistakes, a rule in ``bnverify/diagnose.py`` can tell
by which numbers it is recognised.
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
        looks: what its author sees of it, in a sentence; empty where the title says it.
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
    MISTAKES[name] = Mistake(name, title, fix, source, looks, *(text.rstrip() for text in code))
    return MISTAKES[name]


# How the optimizer is used.
mistake(
    "optimizer_on_all_variables",
    "the optimizer was initialised on all variables",
    "tx.init(params), not tx.init(variables): split variables before the optimizer sees them",
    looks="The optimizer's state is larger than twice the params, and holds entries for mean and var.",
    wrong="""
        variables = model.init(key, x)
        opt_state = tx.init(variables)
    """,
    right="""
        variables = model.init(key, x)
        opt_state = tx.init(variables["params"])
    """,
)
mistake(
    "gradient_of_all_variables",
    "the gradient was taken of all variables",
    "differentiate argument 0 only, and let it be params; pass batch_stats as another argument",
    looks="The gradient has entries for mean and var, which the optimizer then updates.",
    wrong="""
        grads = jax.grad(loss_fn)(variables, x, y)
    """,
    right="""
        grads = jax.grad(loss_fn)(
            params, batch_stats, x, y
        )
    """,
)
mistake(
    "statistics_trained_as_params",
    "the running statistics are trained, or stored, as params",
    "keep them in the batch_stats collection (nnx.BatchStat in nnx), differentiate params alone "
    "(wrt=nnx.Param), and overwrite the statistics with the forward pass's own",
    "https://github.com/intel/ipex-llm/issues/1599",
    looks="The running variance drifts, can turn negative, and depends on the targets.",
    wrong="""
        optimizer = nnx.Optimizer(
            model, tx, wrt=nnx.Variable
        )
    """,
    right="""
        optimizer = nnx.Optimizer(
            model, tx, wrt=nnx.Param
        )
    """,
)
mistake(
    "statistics_fed_to_the_optimizer",
    "the optimizer sees running statistics or something computed from them",
    "give tx.update the gradients, its own state and params, nothing else",
    looks="The statistics shrink with the weight decay, or move with the learning rate.",
    wrong="""
        updates, opt_state = tx.update(
            grads, opt_state, variables
        )
        variables = optax.apply_updates(
            variables, updates
        )
    """,
    right="""
        updates, opt_state = tx.update(
            grads, opt_state, params
        )
        params = optax.apply_updates(
            params, updates
        )
    """,
)
mistake(
    "wrong_sign",
    "the update has the wrong sign",
    "optax.apply_updates adds: pass it what tx.update returns, not the gradient, not its negative",
    looks="The loss rises from the first step on.",
    wrong="""
        params = optax.apply_updates(params, grads)
    """,
    right="""
        updates, opt_state = tx.update(
            grads, opt_state, params
        )
        params = optax.apply_updates(params, updates)
    """,
)
mistake(
    "update_dropped",
    "the new params are not the updated ones",
    "return optax.apply_updates(params, updates); state.replace and tx.update return, never mutate",
    "https://github.com/borisdayma/dalle-mini/pull/71",
    looks="The loss stays where it was, or some leaves never move.",
    wrong="""
        state.apply_gradients(grads=grads)
        return state
    """,
    right="""
        state = state.apply_gradients(grads=grads)
        return state
    """,
)
mistake(
    "update_applied_twice",
    "the update is applied more than once",
    "call optax.apply_updates, or apply_gradients, once a step",
    looks="Training is unstable at a learning rate that should be safe.",
    wrong="""
        state = state.apply_gradients(grads=grads)
        state = state.apply_gradients(
            grads=grads, batch_stats=batch_stats
        )
    """,
    right="""
        state = state.apply_gradients(
            grads=grads, batch_stats=batch_stats
        )
    """,
)
mistake(
    "old_optimizer_state_kept",
    "the optimizer's old state is carried on",
    "updates, opt_state = tx.update(...): return that opt_state",
    "https://github.com/google/flax/issues/2467",
    looks="Momentum never builds up, and a schedule stays at its first value.",
    wrong="""
        updates, _ = tx.update(
            grads, opt_state, params
        )
        return params, opt_state
    """,
    right="""
        updates, opt_state = tx.update(
            grads, opt_state, params
        )
        return params, opt_state
    """,
)
mistake(
    "optimizer_reinitialised",
    "the optimizer's state is made anew in each step",
    "call tx.init once, before the first step, and thread opt_state through the steps",
    looks="Adam behaves like sign descent, and the count of steps stays at 1.",
    wrong="""
        def step(state, batch):
            opt_state = tx.init(state.params)
            updates, opt_state = tx.update(
                grads, opt_state
            )
    """,
    right="""
        def step(state, batch):
            updates, opt_state = tx.update(
                grads, state.opt_state
            )
    """,
)
mistake(
    "learning_rate_ignored",
    "the learning rate does not reach the update",
    "build the optimizer with the step's learning rate, or pass it by optax.inject_hyperparams",
    looks="Another learning rate, or a schedule, changes nothing.",
    wrong="""
        tx = optax.sgd(0.01)

        def step(params, opt_state, batch, lr):
            updates, _ = tx.update(grads, opt_state)
    """,
    right="""
        def step(params, opt_state, batch, lr):
            tx = optax.sgd(lr)
            updates, _ = tx.update(grads, opt_state)
    """,
)
mistake(
    "learning_rate_applied_twice",
    "the update is multiplied by the learning rate a second time",
    "the optimizer has scaled its updates already: optax.apply_updates(params, updates)",
    looks="Training is slow, and ten times the learning rate is a hundred times the update.",
    wrong="""
        updates, _ = optax.sgd(lr).update(grads, s)
        params = jax.tree.map(
            lambda p, u: p + lr * u, params, updates
        )
    """,
    right="""
        updates, _ = optax.sgd(lr).update(grads, s)
        params = optax.apply_updates(
            params, updates
        )
    """,
)
mistake(
    "update_scaled",
    "the optimizer's update is scaled once more, averaged or clipped before it is applied, or the "
    "optimizer in use has another learning rate than the declared one",
    "apply the updates as tx.update returns them; schedules and clipping belong in the chain",
    looks="The step is a fraction of what the optimizer asked for.",
    wrong="""
        updates = jax.tree.map(
            lambda u: 0.5 * u, updates
        )
        params = optax.apply_updates(params, updates)
    """,
    right="""
        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.sgd(schedule),
        )
    """,
)
mistake(
    "optimizer_bypassed",
    "the optimizer's state is kept up, but its update is not the one that is applied",
    "optax.apply_updates(params, updates) with the updates of tx.update, not with the gradients",
    looks="Adam trains exactly like SGD.",
    wrong="""
        _, opt_state = adam.update(grads, opt_state)
        params = jax.tree.map(
            lambda p, g: p - lr * g, params, grads
        )
    """,
    right="""
        updates, opt_state = adam.update(
            grads, opt_state
        )
        params = optax.apply_updates(params, updates)
    """,
)
mistake(
    "params_of_another_state",
    "the update is added to other params than those of the state that the step is given",
    "optax.apply_updates(state.params, updates), of the state that is the step's argument",
    looks="The first step helps, and the later ones start again from the same params.",
    wrong="""
        params = model.init(key, x)["params"]

        @jax.jit
        def step(state, batch):
            new = optax.apply_updates(
                params, updates
            )
    """,
    right="""
        @jax.jit
        def step(state, batch):
            new = optax.apply_updates(
                state.params, updates
            )
    """,
)
mistake(
    "low_precision",
    "a value of the step passes through a type with fewer digits than float32",
    "cast inside the model for its computation; batch, loss, gradients, params and optimizer state "
    "stay float32",
    looks="Small updates are lost, and the loss stops falling early.",
    wrong="""
        params = jax.tree.map(
            lambda p: p.astype(jnp.bfloat16), params
        )
    """,
    right="""
        model = nn.Dense(
            64,
            dtype=jnp.bfloat16,
            param_dtype=jnp.float32,
        )
    """,
)
mistake(
    "decay_outside_the_learning_rate",
    "params shrink or grow by a factor that the learning rate does not scale",
    "use optax.adamw or add_decayed_weights inside the chain, masked to the kernels",
    "https://github.com/google-deepmind/optax/issues/25",
    looks="At a learning rate of 0 the params still move.",
    wrong="""
        params = jax.tree.map(
            lambda p: 0.99 * p, params
        )
        params = optax.apply_updates(params, updates)
    """,
    right="""
        tx = optax.adamw(lr, weight_decay=1e-2)
    """,
)
mistake(
    "decay_of_norm_parameters",
    "weight decay reaches leaves that it should spare, such as a normalisation's scale or bias",
    "mask the decay: optax.masked(add_decayed_weights(d), mask) with kernels alone",
    "https://github.com/google-deepmind/optax/issues/25",
    looks="The scales of the normalisations shrink towards 0.",
    wrong="""
        tx = optax.adamw(lr, weight_decay=1e-2)
    """,
    right="""
        mask = lambda params: jax.tree.map(
            lambda p: p.ndim > 1, params
        )
        tx = optax.adamw(
            lr, weight_decay=1e-2, mask=mask
        )
    """,
)

# How the gradient is taken.
mistake(
    "wrong_gradient",
    "the gradient is not that of the training loss",
    "take jax.value_and_grad of the very loss that is reported, and change nothing in between",
    looks="The loss falls slowly, or some leaves do not learn.",
    wrong="""
        mean = jax.lax.stop_gradient(h.mean(axis=0))
        h = h - mean
    """,
    right="""
        h = h - h.mean(axis=0)
    """,
)
mistake(
    "gradient_of_another_loss",
    "the reported loss is not the one that was differentiated",
    "report the value that jax.value_and_grad returns",
    looks="The curve of the training loss does not match what the model does.",
    wrong="""
        grads = jax.grad(loss_fn)(params, batch)
        new = optax.apply_updates(params, updates)
        return new, loss_fn(new, batch)
    """,
    right="""
        loss, grads = jax.value_and_grad(loss_fn)(
            params, batch
        )
        new = optax.apply_updates(params, updates)
        return new, loss
    """,
)
mistake(
    "has_aux_forgotten",
    "value_and_grad was not told that the loss returns a second value",
    "jax.value_and_grad(loss_fn, has_aux=True) where loss_fn returns (loss, new_batch_stats)",
    looks="JAX raises a TypeError: gradient only defined for scalar-output functions.",
    wrong="""
        grad_fn = jax.value_and_grad(loss_fn)
        (loss, stats), grads = grad_fn(params)
    """,
    right="""
        grad_fn = jax.value_and_grad(
            loss_fn, has_aux=True
        )
        (loss, stats), grads = grad_fn(params)
    """,
)
mistake(
    "mutable_forgotten",
    "batch_stats was not declared mutable",
    'model.apply(variables, x, train=True, mutable=["batch_stats"]) and keep what it returns',
    "https://github.com/google/evojax/issues/60",
    looks="Flax raises a ModifyScopeVariableError.",
    wrong="""
        out = model.apply(variables, x, train=True)
    """,
    right="""
        out, updates = model.apply(
            variables, x, train=True,
            mutable=["batch_stats"],
        )
    """,
)

# The loss.
mistake(
    "broadcast_loss",
    "predictions (N, 1) and targets (N,) broadcast to (N, N) in the loss",
    "out.reshape(-1) or out.squeeze(-1) before subtracting y",
    looks="The loss falls to the variance of the targets and stays there.",
    wrong="""
        out = model.apply(variables, x)  # (N, 1)
        loss = jnp.mean((out - y) ** 2)
    """,
    right="""
        out = model.apply(variables, x).squeeze(-1)
        loss = jnp.mean((out - y) ** 2)
    """,
)
mistake(
    "loss_not_reduced",
    "the loss does not have the shape it should",
    "reduce the training loss to a scalar with jnp.mean; the eval loss is that, reshaped to (1,)",
    looks="The loss prints as an array.",
    wrong="""
        return (out - y) ** 2
    """,
    right="""
        return jnp.mean((out - y) ** 2)
    """,
)
mistake(
    "sum_instead_of_mean",
    "the loss is a sum over the batch where a mean is meant",
    "jnp.mean over the batch, so that the step does not depend on the batch's size",
    looks="A larger batch needs a smaller learning rate.",
    wrong="""
        loss = jnp.sum((out - y) ** 2)
    """,
    right="""
        loss = jnp.mean((out - y) ** 2)
    """,
)
mistake(
    "rows_treated_unequally",
    "some rows of the batch count more than others or not at all, or rows count that it does not have",
    "use every row with the same weight in the forward pass and in the loss; mask padding in both",
    "https://github.com/google/flax/issues/1850",
    looks="Shuffling the rows of a batch, or its size, changes the step.",
    wrong="""
        x = jnp.pad(x, ((0, padding), (0, 0)))
        out, updates = model.apply(variables, x)
        loss = jnp.sum(mask * errors) / len(x)
    """,
    right="""
        x = jnp.pad(x, ((0, padding), (0, 0)))
        out, updates = model.apply(
            variables, x, mask=mask[:, None]
        )
        loss = jnp.sum(mask * errors) / mask.sum()
    """,
)
mistake(
    "loss_reads_old_statistics",
    "the training loss reads the old running statistics",
    "normalise by the batch's own moments in training: use_running_average=False",
    "https://github.com/patrick-kidger/equinox/pull/675",
    looks="Training is unstable at first, while the statistics are still far from the batch's moments.",
    wrong="""
        h = (h - running_mean) / jnp.sqrt(
            running_var + eps
        )
    """,
    right="""
        h = (h - h.mean(axis=0)) / jnp.sqrt(
            h.var(axis=0) + eps
        )
    """,
)
mistake(
    "targets_misaligned",
    "predictions are compared with the targets of other rows",
    "shuffle or reverse x and y together, in training and evaluation alike",
    looks="The model learns the mean of the targets and nothing else.",
    wrong="""
        x = jax.random.permutation(key, x)
        loss = loss_fn(params, x, y)
    """,
    right="""
        order = jax.random.permutation(key, len(x))
        loss = loss_fn(params, x[order], y[order])
    """,
)
mistake(
    "targets_ignored",
    "the targets do not reach the loss, or one target stands for all rows",
    "compare each prediction with its own target",
    looks="The loss falls, and the predictions are one constant.",
    wrong="""
        loss = jnp.mean((out - y.mean()) ** 2)
    """,
    right="""
        loss = jnp.mean((out - y) ** 2)
    """,
)
mistake(
    "inputs_ignored",
    "something else is used than the inputs that are passed in",
    "pass the batch to the jitted function: what it closes over is baked in when it is traced",
    looks="The loss is the same for every batch.",
    wrong="""
        @jax.jit
        def step(state):
            return update(state, batch)
    """,
    right="""
        @jax.jit
        def step(state, batch):
            return update(state, batch)
    """,
)

# The statistics.
mistake(
    "train_step_in_eval_mode",
    "the training step runs the model in eval mode",
    "train=True (use_running_average=False) in the training loss; model.train() in nnx",
    looks="The running statistics stay at mean 0 and variance 1.",
    wrong="""
        out = model.apply(variables, x, train=False)
    """,
    right="""
        out, updates = model.apply(
            variables, x, train=True,
            mutable=["batch_stats"],
        )
    """,
)
mistake(
    "new_statistics_dropped",
    "the new statistics are not carried on",
    'return updates["batch_stats"] as aux and put it into the next state',
    "https://github.com/HomericIntelligence/Odyssey/issues/5532",
    looks="Training looks right, and evaluation is far off: its statistics are the initial ones.",
    wrong="""
        out, updates = model.apply(
            variables, x, mutable=["batch_stats"]
        )
        state = state.apply_gradients(grads=grads)
    """,
    right="""
        out, updates = model.apply(
            variables, x, mutable=["batch_stats"]
        )
        state = state.apply_gradients(
            grads=grads,
            batch_stats=updates["batch_stats"],
        )
    """,
)
mistake(
    "statistics_reinitialised",
    "the statistics do not start from the old ones",
    "initialise them once (mean 0, variance 1) and pass the carried ones to model.apply",
    "https://github.com/google/flax/issues/2232",
    looks="The statistics are those of the last batch, or never leave 0 and 1 by more than a hundredth.",
    wrong="""
        fresh = model.init(key, x)
        out, updates = model.apply(
            {"params": params,
             "batch_stats": fresh["batch_stats"]}, x
        )
    """,
    right="""
        out, updates = model.apply(
            {"params": params,
             "batch_stats": state.batch_stats}, x
        )
    """,
)
mistake(
    "ema_applied_twice",
    "the moving average is applied more than once a step",
    "keep the statistics of one pass a step, the first; run the others with mutable off",
    looks="The statistics follow the batches faster than the momentum says: it acts as its square.",
    wrong="""
        _, updates = model.apply(v, x, mutable=bs)
        v = {**v, **updates}
        logits, updates = model.apply(
            v, x, mutable=bs
        )
    """,
    right="""
        logits, updates = model.apply(
            v, x, mutable=bs
        )
    """,
)
mistake(
    "momentum_reversed",
    "momentum is meant the other way round",
    "Flax's momentum weights the old value (0.99), PyTorch's the new (0.01): pass 1 - m",
    "https://github.com/pytorch/examples/issues/289",
    looks="Evaluation jumps about: the statistics are nearly those of the last batch.",
    wrong="""
        nn.BatchNorm(momentum=0.01)  # as in PyTorch
    """,
    right="""
        nn.BatchNorm(momentum=0.99)
    """,
)
mistake(
    "momentum_not_as_declared",
    "the layer averages with another momentum than the declared one",
    "declare the momentum that the layer is made with; Flax's default is 0.99",
    looks="The statistics lag behind, or jump, more than was meant.",
    wrong="""
        nn.BatchNorm(momentum=0.9)
        subject = bnverify.linen(model, momentum=0.99)
    """,
    right="""
        nn.BatchNorm(momentum=0.99)
        subject = bnverify.linen(model, momentum=0.99)
    """,
)
mistake(
    "average_not_steady",
    "the moving average weighs its old value differently in different steps",
    "new = m * old + (1 - m) * batch with one m for all steps, the first one too",
    looks="The statistics freeze, or forget, after some steps.",
    wrong="""
        m = jnp.where(jnp.all(mean == 0), 0.0, 0.99)
        mean = m * mean + (1 - m) * batch_mean
    """,
    right="""
        m = 0.99
        mean = m * mean + (1 - m) * batch_mean
    """,
)
mistake(
    "weights_do_not_sum_to_one",
    "the old statistics and the batch's moments enter the new ones with weights that do not sum to 1",
    "new = m * old + (1 - m) * batch, of the batch's moments as they are",
    looks="The statistics grow or shrink from step to step, on one and the same batch.",
    wrong="""
        mean = mean + (1 - m) * batch_mean
    """,
    right="""
        mean = m * mean + (1 - m) * batch_mean
    """,
)
mistake(
    "sample_variance",
    "a variance divides by N - 1",
    "use the biased variance, divisor N, as Flax's BatchNorm does",
    looks="Training and evaluation differ, the more the smaller the batch is.",
    wrong="""
        var = jnp.var(h, axis=0, ddof=1)
    """,
    right="""
        var = jnp.var(h, axis=0)
    """,
)
mistake(
    "wrong_moments",
    "what is recorded as the mean or the variance is another quantity",
    "record jnp.mean(h, axis=0) and jnp.var(h, axis=0), epsilon and root left to the normalisation",
    looks="Training looks right, and evaluation is off by a scale.",
    wrong="""
        std = jnp.std(h, axis=0) + eps
        running_var = m * running_var + (1 - m) * std
    """,
    right="""
        var = jnp.var(h, axis=0)
        running_var = m * running_var + (1 - m) * var
    """,
)
mistake(
    "variance_turns_negative",
    "E[h^2] - E[h]^2 is not kept from turning negative",
    "jnp.maximum(jnp.mean(h**2, axis=0) - mean**2, 0), or BatchNorm(use_fast_variance=False)",
    "https://github.com/google/flax/issues/1491",
    looks="NaN, now and then, where a feature is nearly constant and far from 0.",
    wrong="""
        var = jnp.mean(h**2, axis=0) - mean**2
    """,
    right="""
        var = jnp.mean(h**2, axis=0) - mean**2
        var = jnp.maximum(var, 0.0)
    """,
)
mistake(
    "statistics_over_the_wrong_axis",
    "the moments are taken over other axes than the batch's, or channels are mixed up",
    "reduce over every axis but the feature axis (BatchNorm's axis=-1)",
    looks="All channels have the same statistics, or a single row is normalised by itself.",
    wrong="""
        mean = jnp.mean(h)
        var = jnp.var(h)
    """,
    right="""
        mean = jnp.mean(h, axis=0)
        var = jnp.var(h, axis=0)
    """,
)
mistake(
    "statistics_from_another_batch",
    "the statistics are not those of the batch that was trained on",
    "carry out the statistics of the very forward pass that was differentiated",
    "https://github.com/andreped/GradientAccumulator/issues/6",
    looks="Training looks right, and evaluation is off.",
    wrong="""
        params = optax.apply_updates(params, updates)
        _, updates = model.apply(
            {"params": params, **stats}, x,
            mutable=["batch_stats"],
        )
    """,
    right="""
        (loss, stats), grads = jax.value_and_grad(
            loss_fn, has_aux=True
        )(params, stats, x, y)
        params = optax.apply_updates(params, updates)
    """,
)
mistake(
    "statistics_of_part_of_the_batch",
    "the statistics are those of a part of the batch: of one shard, or of one micro-batch",
    "fold in the moments of all rows: a mean over micro-batches, BatchNorm(axis_name=...) over shards",
    "https://github.com/andreped/GradientAccumulator/issues/6",
    looks="The order of the rows changes the statistics.",
    wrong="""
        for micro in batches:
            grads, updates = step(
                params, state.batch_stats, micro
            )
        state = state.replace(**updates)
    """,
    right="""
        stats = state.batch_stats
        for micro in batches:
            grads, stats = step(params, stats, micro)
        state = state.replace(batch_stats=stats)
    """,
)
mistake(
    "statistics_of_another_layer",
    "a layer's new statistics are those of another layer",
    "put each layer's statistics back under its own name: carry the whole tree, never a list of leaves",
    looks="Two layers have the same statistics, or each has the other's.",
    wrong="""
        stats["norm_1"] = updates["norm_0"]
    """,
    right="""
        stats = updates["batch_stats"]
    """,
)
mistake(
    "statistics_nested",
    "the new statistics are the whole of what apply returned, one level too deep",
    'updates["batch_stats"], not updates',
    looks="The second step fails, or starts from fresh statistics.",
    wrong="""
        out, updates = model.apply(
            variables, x, mutable=["batch_stats"]
        )
        state = state.replace(batch_stats=updates)
    """,
    right="""
        out, updates = model.apply(
            variables, x, mutable=["batch_stats"]
        )
        state = state.replace(
            batch_stats=updates["batch_stats"]
        )
    """,
)
mistake(
    "statistics_in_low_precision",
    "the statistics are kept, computed or read with fewer digits than float32 has",
    "keep batch_stats in float32; dtype= sets the computation's type, param_dtype the storage",
    "https://github.com/NVIDIA/Model-Optimizer/pull/738",
    looks="The statistics stop moving before they reach the batch's moments.",
    wrong="""
        stats = jax.tree.map(
            lambda s: s.astype(jnp.bfloat16),
            updates["batch_stats"],
        )
    """,
    right="""
        norm = nn.BatchNorm(dtype=jnp.bfloat16)
        ...
        stats = updates["batch_stats"]  # float32
    """,
)
mistake(
    "statistics_overflow",
    "the statistics leave the range of their dtype",
    "scale the input; squares overflow float32 near 1e19, float16 near 255",
    looks="The running variance is inf, and the eval loss NaN.",
    wrong="""
        h = h.astype(jnp.float16)
        var = jnp.mean(h**2, axis=0) - mean**2
    """,
    right="""
        h = h.astype(jnp.float32)
        var = jnp.mean(h**2, axis=0) - mean**2
    """,
)
mistake(
    "parameters_change_dtype",
    "the step changes the structure, shape or dtype of what it carries",
    "return the containers, shapes and dtypes that were initialised; cast inside the model",
    looks="The second step compiles again, or fails in lax.scan.",
    wrong="""
        params = jax.tree.map(
            lambda p, u: (p + u).astype(jnp.float16),
            params, updates,
        )
    """,
    right="""
        params = optax.apply_updates(params, updates)
    """,
)

# Evaluation.
mistake(
    "modes_differ",
    "training and evaluation do not compute the same from the same params, moments and batch",
    "call one model and one loss in both, with one epsilon; only use_running_average differs",
    looks="The eval loss differs from the training loss, even on the training batch.",
    wrong="""
        train_loss = jnp.mean((out - y) ** 2) / 2
        eval_loss = jnp.mean((out - y) ** 2)
    """,
    right="""
        def mse(out, y):
            return jnp.mean((out - y) ** 2)

        train_loss, eval_loss = mse(out, y), mse(o, y)
    """,
)
mistake(
    "eval_in_train_mode",
    "evaluation runs in train mode",
    "train=False (use_running_average=True), or model.eval() in nnx, when evaluating",
    "https://github.com/yanx27/GACNet/issues/8",
    looks="The predictions of a row depend on the batch that it is in.",
    wrong="""
        out = model.apply(variables, x, train=True)
    """,
    right="""
        out = model.apply(variables, x, train=False)
    """,
)
mistake(
    "eval_of_stale_state",
    "evaluation uses params or statistics from before the step",
    "pass the new params and the new batch_stats to evaluation",
    "https://github.com/google/flax/pull/3982",
    looks="The eval loss never changes.",
    wrong="""
        @jax.jit
        def evaluate(params, x, y):
            return loss(params, initial_stats, x, y)
    """,
    right="""
        @jax.jit
        def evaluate(state, x, y):
            return loss(
                state.params, state.batch_stats, x, y
            )
    """,
)
mistake(
    "division_by_zero_variance",
    "a variance of zero is divided by",
    "add epsilon to the variance before the square root",
    looks="NaN as soon as a feature is constant in a batch.",
    wrong="""
        h = (h - mean) / jnp.sqrt(var)
    """,
    right="""
        h = (h - mean) / jnp.sqrt(var + 1e-5)
    """,
)
mistake(
    "optimizer_departs_from_its_paper",
    "the optimizer computes another formula than its paper's",
    "use the release of Optax that follows it (`bnverify bisect` finds where it changed), or write the "
    "transformation out",
    "https://github.com/pytorch/pytorch/issues/41477",
    looks="After an upgrade the same code trains differently, most of all where gradients are small.",
    wrong="""
        update = -lr * m_hat / jnp.sqrt(v_hat + eps)
    """,
    right="""
        update = -lr * m_hat / (jnp.sqrt(v_hat) + eps)
    """,
)
mistake(
    "variance_below_zero",
    "the variance E[h^2] - E[h]^2 is not kept from rounding to less than zero",
    "jnp.maximum(var, 0.0), or the mean of the squared deviations",
    "https://github.com/google/flax/issues/1491",
    looks="NaN in a batch where a feature is constant and far from zero.",
    wrong="""
        var = jnp.mean(h**2, axis=0) - mean**2
        h = (h - mean) * jax.lax.rsqrt(var + 1e-5)
    """,
    right="""
        var = jnp.mean(h**2, axis=0) - mean**2
        var = jnp.maximum(var, 0.0)
        h = (h - mean) * jax.lax.rsqrt(var + 1e-5)
    """,
)

# Purity.
mistake(
    "drawn_outside_jax",
    "a number is drawn or counted by Python or NumPy while the step is traced, and baked in",
    "draw it by jax.random from the seed, or from a key that the state carries",
    "https://docs.jax.dev/en/latest/notebooks/Common_Gotchas_in_JAX.html",
    looks="Each process starts from other params, whatever the seed; within one, all is repeatable.",
    wrong="""
        def kernel_init(key, shape):
            return 0.1 * np.random.normal(size=shape)
    """,
    right="""
        def kernel_init(key, shape):
            return 0.1 * jax.random.normal(key, shape)
    """,
)
mistake(
    "hidden_state",
    "the result depends on something that is not an argument",
    "carry all state through the step; Python side effects and globals vanish under jit",
    looks="A compiled step and an uncompiled one, or two runs, disagree.",
    wrong="""
        @jax.jit
        def step(state, batch):
            global count
            count += 1
            lr = schedule(count)
    """,
    right="""
        @jax.jit
        def step(state, batch):
            lr = schedule(state.step)
            state = state.replace(step=state.step + 1)
    """,
)
mistake(
    "inputs_overwritten",
    "the step changes or deletes its inputs",
    "return new arrays; do not donate or write into arrays that the caller still holds",
    "https://github.com/jax-ml/jax/issues/37830",
    looks="The state from before the step is gone, or has become the new one.",
    wrong="""
        state.params["dense"]["kernel"] = kernel
        return state
    """,
    right="""
        dense = {**state.params["dense"],
                 "kernel": kernel}
        params = {**state.params, "dense": dense}
        return state.replace(params=params)
    """,
)
mistake(
    "seed_not_truncated",
    "a float seed is not taken as its integer part",
    "jax.random.PRNGKey(int(seed))",
    looks="Seed 1.7 and seed 1 give different runs.",
    wrong="""
        key = jax.random.PRNGKey(round(seed))
    """,
    right="""
        key = jax.random.PRNGKey(int(seed))
    """,
)
mistake(
    "statistics_not_synchronised",
    "each device keeps the statistics of its own shard",
    "BatchNorm(axis_name=...), or jax.lax.pmean over the moments E[x] and E[x^2]",
    "https://github.com/google/flax/issues/877",
    looks="Each device evaluates differently.",
    wrong="""
        nn.BatchNorm(momentum=0.99)
    """,
    right="""
        nn.BatchNorm(momentum=0.99, axis_name="data")
    """,
)

# Several devices.
mistake(
    "variances_averaged",
    "the variances of parts of a batch are averaged, which loses the spread between their means",
    "pmean E[x] and E[x^2] before E[x^2] - E[x]^2 is taken: BatchNorm(axis_name=...)",
    "https://github.com/tensorflow/tpu/issues/321",
    looks="The running variance is too small, the more devices there are.",
    wrong="""
        mean = jax.lax.pmean(h.mean(0), "data")
        var = jax.lax.pmean(h.var(0), "data")
    """,
    right="""
        mean = jax.lax.pmean(h.mean(0), "data")
        square = jax.lax.pmean((h**2).mean(0), "data")
        var = square - mean**2
    """,
)
mistake(
    "unequal_shards",
    "moments of shards with unequal numbers of rows are averaged as if they were equal",
    "psum the sums and the counts of rows, and divide once; pmean weighs every shard alike",
    "https://github.com/google/flax/issues/2417",
    looks="The last, padded batch moves the statistics too far.",
    wrong="""
        mean = jax.lax.pmean(
            (mask * h).sum(0) / mask.sum(), "data"
        )
    """,
    right="""
        total = jax.lax.psum((mask * h).sum(0), "data")
        mean = total / jax.lax.psum(mask.sum(), "data")
    """,
)
mistake(
    "mean_of_means",
    "the loss is the mean of the devices' means, whatever number of rows each has",
    "psum the sum of the errors and the count of rows, and divide once",
    "https://github.com/huggingface/transformers/pull/18458",
    looks="The loss of a padded batch differs from that of the same rows on one device.",
    wrong="""
        loss = jax.lax.pmean(
            errors.sum() / mask.sum(), "data"
        )
    """,
    right="""
        total = jax.lax.psum(errors.sum(), "data")
        loss = total / jax.lax.psum(mask.sum(), "data")
    """,
)
mistake(
    "gradients_not_synchronised",
    "each device updates its params by the gradient of its own shard",
    "grads = jax.lax.pmean(grads, axis_name) before tx.update",
    looks="The replicas drift apart.",
    wrong="""
        grads = jax.grad(loss_fn)(params, batch)
        updates, s = tx.update(grads, s)
    """,
    right="""
        grads = jax.grad(loss_fn)(params, batch)
        grads = jax.lax.pmean(grads, "data")
        updates, s = tx.update(grads, s)
    """,
)
mistake(
    "gradients_summed",
    "the devices' gradients are summed where their mean is meant",
    "jax.lax.pmean, not psum; under shard_map with checked replication the sum is taken already",
    looks="More devices need a smaller learning rate.",
    wrong="""
        grads = jax.lax.psum(grads, "data")
    """,
    right="""
        grads = jax.lax.pmean(grads, "data")
    """,
)

# Saving and restoring.
mistake(
    "checkpoint_drops_statistics",
    "the checkpoint does not hold the running statistics",
    "save and restore the whole state: params, batch_stats, opt_state and keys",
    "https://github.com/AI-Hypercomputer/maxtext/pull/4343",
    looks="A restored model evaluates worse than the one that was saved.",
    wrong="""
        data = to_bytes(state.params)
    """,
    right="""
        data = to_bytes(state)
    """,
)
mistake(
    "checkpoint_drops_optimizer_state",
    "the checkpoint does not hold the optimizer's state",
    "save opt_state beside params, and do not call tx.init after restoring",
    looks="The loss jumps where a run was resumed.",
    wrong="""
        params = from_bytes(params, data)
        opt_state = tx.init(params)
    """,
    right="""
        state = from_bytes(state, data)
        opt_state = state.opt_state
    """,
)
mistake(
    "checkpoint_drops_key",
    "the checkpoint does not hold the random key, or what else the step carries",
    "put keys and counters into the state that is saved",
    "https://github.com/AI-Hypercomputer/maxtext/pull/4343",
    looks="A resumed run repeats the dropout masks of the first one.",
    wrong="""
        state = from_bytes(state, data)
        key = jax.random.key(0)
    """,
    right="""
        state = from_bytes(state, data)
        key = state.key
    """,
)
mistake(
    "counter_reset_on_restore",
    "a step counter starts again when a run is restored",
    "restore the optimizer's count with the rest of opt_state: schedules and Adam read it",
    looks="The warm-up of the learning rate runs a second time.",
    wrong="""
        state = from_bytes(state, data)
        state = state.replace(step=0)
    """,
    right="""
        state = from_bytes(state, data)
    """,
)
mistake(
    "restored_in_other_types",
    "the restored state has other containers, shapes or dtypes than the saved one",
    "restore into a template: from_bytes(state_of_the_same_structure, data)",
    "https://github.com/google/flax/issues/1550",
    looks="The restored state fails where a NamedTuple or a tuple is expected.",
    wrong="""
        state = msgpack_restore(data)
    """,
    right="""
        state = from_bytes(template, data)
    """,
)
mistake(
    "checkpoint_loses_digits",
    "the checkpoint stores values in a narrower type",
    "save float32 as float32; cast a copy for export, never the state that training resumes from",
    looks="A resumed run is close to the uninterrupted one and not equal to it.",
    wrong="""
        half = jax.tree.map(
            lambda v: v.astype(jnp.float16), state
        )
        data = to_bytes(half)
    """,
    right="""
        data = to_bytes(state)
    """,
)
mistake(
    "checkpoint_not_used",
    "the restored values are not the checkpoint's",
    "use what from_bytes or restore returns: it does not fill its template in place",
    looks="A resumed run starts from the initial loss.",
    wrong="""
        from_bytes(state, data)
    """,
    right="""
        state = from_bytes(state, data)
    """,
)
mistake(
    "restored_in_another_order",
    "values come back in each other's places",
    "restore by name into a template, never from a list of leaves in an order of its own",
    looks="Every value is there, and the model predicts nonsense.",
    wrong="""
        leaves = [saved[name] for name in sorted(saved)]
        state = jax.tree.unflatten(structure, leaves)
    """,
    right="""
        state = from_bytes(template, data)
    """,
)
mistake(
    "checkpoint_is_stale",
    "an older checkpoint is restored than the one saved last",
    "save by value, wait for an asynchronous save to end, and restore the latest step",
    looks="A resumed run has lost some steps.",
    wrong="""
        manager.save(step, args=args)
        state = manager.restore(0)
    """,
    right="""
        manager.save(step, args=args)
        manager.wait_until_finished()
        state = manager.restore(manager.latest_step())
    """,
)

# Layers, copies and passes that are more than a single network in a single pass.
mistake(
    "frozen_statistics_move",
    "a frozen layer's statistics change: it still folds each batch in",
    "run a frozen layer with use_running_average=True, whatever train says",
    "https://github.com/Lightning-AI/pytorch-lightning/issues/15062",
    looks="Evaluation drifts although the backbone's params never move.",
    wrong="""
        x = nn.BatchNorm(
            use_running_average=not train,
            name="backbone_norm",
        )(x)
    """,
    right="""
        x = nn.BatchNorm(
            use_running_average=True,
            name="backbone_norm",
        )(x)
    """,
)
mistake(
    "frozen_params_move",
    "params that are to be frozen are moved, by a decay or by their gradient",
    'optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)',
    looks="The pretrained layers shrink a little with every step.",
    wrong="""
        # a gradient of 0 is decayed all the same
        frozen = jax.lax.stop_gradient(backbone)
        tx = optax.adamw(1e-3)
    """,
    right="""
        tx = optax.multi_transform(
            {
                "train": optax.adamw(1e-3),
                "freeze": optax.set_to_zero(),
            },
            labels,
        )
    """,
)
mistake(
    "decay_coupled",
    "the decay is added to the gradient, and an adaptive optimizer scales it away",
    "optax.adamw, or optax.add_decayed_weights between the preconditioner and the learning rate",
    "https://github.com/google-deepmind/optax/issues/364",
    looks="Large weights decay no more than small ones, and those with large gradients hardly at all.",
    wrong="""
        tx = optax.chain(
            optax.add_decayed_weights(1e-2),
            optax.adam(lr),
        )
    """,
    right="""
        tx = optax.adamw(lr, weight_decay=1e-2)
    """,
)
mistake(
    "clipped_before_averaged",
    "each device clips its own gradient, or uses its own statistics, before they are averaged",
    "average over the devices first, then clip",
    "https://github.com/dmlc/gluon-nlp/pull/470",
    looks="The same batch gives another update on more devices.",
    wrong="""
        grads = clip(grads)
        grads = jax.lax.pmean(grads, "batch")
    """,
    right="""
        grads = jax.lax.pmean(grads, "batch")
        grads = clip(grads)
    """,
)
mistake(
    "rate_loses_digits",
    "the learning rate is held in 16 bits",
    "optax.inject_hyperparams(..., hyperparam_dtype=jnp.float32)",
    "https://github.com/google-deepmind/optax/issues/1414",
    looks="A schedule moves in coarse steps, and a rate of 0.001 is 0.000999.",
    wrong="""
        tx = optax.inject_hyperparams(optax.adamw)(
            learning_rate=1e-3  # params[0] is bfloat16
        )
    """,
    right="""
        tx = optax.inject_hyperparams(
            optax.adamw, hyperparam_dtype=jnp.float32
        )(learning_rate=1e-3)
    """,
)
mistake(
    "frozen_gradients_scale_others",
    "gradients of frozen params scale the update of the others",
    "clip within what trains, not around it",
    looks="The layers that train move less the larger the frozen part is.",
    wrong="""
        zero = optax.set_to_zero()
        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.multi_transform(
                {"train": adam, "freeze": zero}, labels
            ),
        )
    """,
    right="""
        zero = optax.set_to_zero()
        clipped = optax.chain(
            optax.clip_by_global_norm(1.0), adam
        )
        tx = optax.multi_transform(
            {"train": clipped, "freeze": zero}, labels
        )
    """,
)
mistake(
    "stale_statistics",
    "a copy of the params is updated, its running statistics are never written",
    "copy batch_stats beside the params, wherever the copy is updated",
    "https://github.com/DLR-RM/stable-baselines3/issues/996",
    looks="The target network is evaluated with mean 0 and variance 1 for ever.",
    wrong="""
        state = state.replace(
            target_params=state.params,
        )
    """,
    right="""
        state = state.replace(
            target_params=state.params,
            target_batch_stats=state.batch_stats,
        )
    """,
)
mistake(
    "fresh_statistics",
    "the params come from a trained model and the running statistics do not: they do not belong "
    "to the params",
    "restore batch_stats from where the params come from",
    "https://github.com/google/deepvariant/issues/383",
    looks="The restored model is as bad as a new one, until it has trained for a while.",
    wrong="""
        new = model.init(key, x)
        variables = {
            "params": old["params"],
            "batch_stats": new["batch_stats"],
        }
    """,
    right="""
        variables = {
            "params": old["params"],
            "batch_stats": old["batch_stats"],
        }
    """,
)
mistake(
    "pass_dropped",
    "the statistics of one of several passes are dropped",
    "thread batch_stats through all calls: the second starts from what the first returned",
    "https://github.com/carpedm20/DCGAN-tensorflow/issues/266",
    looks="In evaluation the discriminator takes every real image for a fake one.",
    wrong="""
        real, _ = forward(params, stats, images)
        fake, new = forward(params, stats, fakes)
    """,
    right="""
        real, new = forward(params, stats, images)
        fake, new = forward(params, new, fakes)
    """,
)
mistake(
    "rows_normalised_alone",
    "each row is normalised by itself: the moments are not those of the batch",
    'under jax.vmap BatchNorm sees one row: give it BatchNorm(axis_name="batch"), and map by '
    'jax.vmap(..., axis_name="batch", out_axes=(0, None))',
    "https://github.com/google/flax/issues/1247",
    looks="Every hidden unit is its bias, and the running variance goes to 0.",
    wrong="""
        nn.BatchNorm()
        out, new = jax.vmap(one_row)(x)
    """,
    right="""
        nn.BatchNorm(axis_name="batch")
        out, new = jax.vmap(
            one_row,
            axis_name="batch",
            out_axes=(0, None),
        )(x)
    """,
)
mistake(
    "padding_in_the_denominator",
    "padding changes the loss: it is masked out of the sum and counted in the mean",
    "divide by the number of rows that count",
    "https://github.com/tracel-ai/burn/issues/5568",
    looks="The loss of a batch falls with the number of rows that pad it.",
    wrong="""
        loss = jnp.mean(mask * losses)
    """,
    right="""
        count = jnp.maximum(mask.sum(), 1)
        loss = jnp.sum(mask * losses) / count
    """,
)
mistake(
    "padding_enters",
    "rows that do not count reach the loss or the statistics",
    "mask them out of the loss, and of BatchNorm too",
    "https://github.com/google/flax/issues/1850",
    looks="The last, padded batch of each epoch pulls the running statistics towards 0.",
    wrong="""
        norm = nn.BatchNorm(
            use_running_average=not train
        )
        x = norm(x)
    """,
    right="""
        norm = nn.BatchNorm(
            use_running_average=not train
        )
        x = norm(x, mask=mask[:, None])
    """,
)
mistake(
    "same_key_in_each_step",
    "each step draws the same random numbers, so dropout has the same mask each step",
    "split the key and carry the new one, or jax.random.fold_in(key, state.step)",
    "https://github.com/google/flax/pull/2631",
    looks="Dropout leaves the same units out for ever: some of them never train.",
    wrong="""
        out = model.apply(
            variables, x, rngs={"dropout": state.key}
        )
    """,
    right="""
        key = jax.random.fold_in(
            state.key, state.step
        )
        out = model.apply(
            variables, x, rngs={"dropout": key}
        )
    """,
)
mistake(
    "schedule_counts_batches",
    "the learning rate's schedule is as long as there are batches, of which several make an update",
    "the schedule counts optimizer steps, not batches: divide by the steps that make an update",
    "https://github.com/AI-Hypercomputer/maxtext/pull/3452",
    looks="Training ends long before the learning rate has decayed.",
    wrong="""
        rate = optax.cosine_decay_schedule(
            0.1, batches
        )
        tx = optax.MultiSteps(optax.sgd(rate), 4)
    """,
    right="""
        rate = optax.cosine_decay_schedule(
            0.1, batches // 4
        )
        tx = optax.MultiSteps(optax.sgd(rate), 4)
    """,
)

"""The known mistakes that reports name as the likely cause, each with a fix and code, wrong and right.

To add one, call ``mistake`` below, then name it in the ``mistakes=`` of each law that it violates, the
most likely mistake first. If a law has several mistakes, add a rule to ``bnverify/diagnose.py`` that
recognises this one by its numbers.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One known way to get a training step wrong.

    Attributes:
        name: the name that laws, faults and reports use.
        title: what was done, in one clause.
        fix: what to write instead.
        source: the address of a public report by users who made it; empty if there is none.
        looks: the symptoms, in one sentence; empty if the title says it all.
        wrong: the shortest Flax or Optax code with the mistake; may be empty.
        right: the same code without the mistake.
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
    """Add a mistake to ``MISTAKES`` and return it; see :class:`Mistake`.

    Raises:
        ValueError: a mistake of that name exists.
    """
    if name in MISTAKES:
        raise ValueError(f"two mistakes are named {name}")
    code = (textwrap.dedent(text).strip("\n") for text in (wrong, right))
    MISTAKES[name] = Mistake(name, title, fix, source, looks, *(text.rstrip() for text in code))
    return MISTAKES[name]


# Using the optimizer.
mistake(
    "optimizer_on_all_variables",
    "the optimizer was initialised on all variables",
    "tx.init(params), not tx.init(variables): split variables before the optimizer sees them",
    looks="The optimizer state has entries for mean and var.",
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
    "differentiate with respect to params only; pass batch_stats as another argument",
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
    "keep them in the batch_stats collection (nnx.BatchStat in nnx), differentiate only params "
    "(wrt=nnx.Param), and replace batch_stats with what the forward pass returns",
    "https://github.com/intel/ipex-llm/issues/1599",
    looks="The running variance drifts, can become negative, and depends on the targets.",
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
    "running statistics, or values computed from them, are passed to the optimizer",
    "pass tx.update only the gradients, opt_state and params",
    looks="The statistics shrink with the weight decay, or change with the learning rate.",
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
    "pass optax.apply_updates what tx.update returns, not the gradient: it adds the updates",
    looks="The loss increases from the first step.",
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
    "the step does not return the updated params",
    "return optax.apply_updates(params, updates); state.replace returns a new state and mutates nothing",
    "https://github.com/borisdayma/dalle-mini/pull/71",
    looks="The loss does not change, or some params never do.",
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
    "call optax.apply_updates or apply_gradients once per step",
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
    "the step returns the old optimizer state",
    "return the opt_state from updates, opt_state = tx.update(...)",
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
    "the optimizer state is initialised again in every step",
    "call tx.init once, before the first step, and carry opt_state from step to step",
    looks="Adam behaves like sign descent, and its count stays at 1.",
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
    "the update does not depend on the learning rate",
    "create the optimizer with the step's learning rate, or use optax.inject_hyperparams",
    looks="Changing the learning rate, or adding a schedule, has no effect.",
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
    "the update is multiplied by the learning rate twice",
    "use optax.apply_updates(params, updates): the updates already include the learning rate",
    looks="Training is slow, and a 10x learning rate makes the update 100x as large.",
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
    "the optimizer's update is scaled, averaged or clipped before it is applied, or the optimizer has "
    "a different learning rate than declared",
    "apply the updates exactly as tx.update returns them; put schedules and clipping into optax.chain",
    looks="The params change by a fraction of the optimizer's update.",
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
    "the optimizer state is updated, but the optimizer's updates are not applied",
    "pass optax.apply_updates the updates from tx.update, not the gradients",
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
    "the update is added to params other than those passed to the step",
    "optax.apply_updates(state.params, updates), with the state that is the step's argument",
    looks="The first step helps; every later step starts again from the same params.",
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
    "a value in the step is cast to a dtype less precise than float32",
    "cast only inside the model; keep batch, loss, gradients, params and optimizer state in float32",
    looks="Small updates are lost, and the loss stops decreasing early.",
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
    "decay_grows_params",
    "weight decay has the wrong sign: it makes params grow",
    "put optax.add_decayed_weights before the learning rate, which has the minus sign",
    "https://github.com/google-deepmind/optax/issues/364",
    looks="Params grow even where the gradient is 0, or at a learning rate of 0.",
    wrong="""
        decay = optax.add_decayed_weights(1e-4)
        tx = optax.chain(optax.sgd(lr), decay)
    """,
    right="""
        decay = optax.add_decayed_weights(1e-4)
        tx = optax.chain(decay, optax.sgd(lr))
    """,
)
mistake(
    "decay_outside_the_learning_rate",
    "params are decayed by a factor that the learning rate does not scale",
    "use optax.adamw, or add_decayed_weights inside the chain, masked to the kernels",
    "https://github.com/google-deepmind/optax/issues/25",
    looks="With a learning rate of 0 the params still change.",
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
    "weight decay is applied to params that should not decay, such as the scale or bias of BatchNorm",
    "mask the decay: optax.adamw(..., mask=mask) with a mask of the kernels only",
    "https://github.com/google-deepmind/optax/issues/25",
    looks="The scales of the normalisation layers shrink towards 0.",
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

# Taking the gradient.
mistake(
    "gradient_at_the_slow_params",
    "with optax.lookahead, the gradient is taken at the slow params",
    "differentiate with respect to params.fast; evaluate with params.slow",
    "https://arxiv.org/abs/1907.08610",
    looks="Between two synchronisations every step repeats the same gradient.",
    wrong="""
        grads = jax.grad(loss)(params.slow)
        updates, opt_state = tx.update(
            grads, opt_state, params)
    """,
    right="""
        grads = jax.grad(loss)(params.fast)
        updates, opt_state = tx.update(
            grads, opt_state, params)
    """,
)
mistake(
    "wrong_gradient",
    "the gradient is not that of the training loss",
    "take jax.value_and_grad of the reported loss, and pass its gradient on unchanged",
    looks="The loss decreases slowly, or some params do not learn.",
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
    looks="The training-loss curve does not match the model's behaviour.",
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
    "the loss function returns a pair, but value_and_grad was not given has_aux=True",
    "jax.value_and_grad(loss_fn, has_aux=True) if loss_fn returns (loss, new_batch_stats)",
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
    'model.apply(variables, x, train=True, mutable=["batch_stats"]), and keep the updates it returns',
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
    looks="The loss decreases to the variance of the targets and stays there.",
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
    "the loss is not a scalar",
    "reduce the loss with jnp.mean; an eval loss may also have shape (1,)",
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
    "the loss is a sum over the batch instead of a mean",
    "use jnp.mean over the batch, so that the step does not depend on the batch size",
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
    "rows of the batch have different weights, or padding rows count",
    "give every row the same weight in the forward pass and in the loss, and mask padding in both",
    "https://github.com/google/flax/issues/1850",
    looks="Shuffling the rows of a batch, or changing its size, changes the result of the step.",
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
    "the training loss depends on the old running statistics",
    "normalise by the batch's own moments in training: use_running_average=False",
    "https://github.com/patrick-kidger/equinox/pull/675",
    looks="Training is unstable at first, while the statistics are far from the batch's moments.",
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
    "shuffle x and y with the same permutation, in training and in evaluation",
    looks="The model only learns the mean of the targets.",
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
    "the loss does not use the targets, or uses one target for all rows",
    "compare each prediction with its own target",
    looks="The loss decreases, but all predictions are the same constant.",
    wrong="""
        loss = jnp.mean((out - y.mean()) ** 2)
    """,
    right="""
        loss = jnp.mean((out - y) ** 2)
    """,
)
mistake(
    "inputs_ignored",
    "the step ignores the inputs that are passed to it",
    "pass the batch as an argument of the jitted function: values from a closure become constants",
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
    "train=True (use_running_average=False) in the training loss; model.train() with nnx",
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
    "the step does not return the new running statistics",
    'return updates["batch_stats"] from the loss function as aux, and put it into the new state',
    "https://github.com/HomericIntelligence/Odyssey/issues/5532",
    looks="Training looks fine, but evaluation is far off, because it uses the initial statistics.",
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
    "the new running statistics are not computed from the old ones",
    "initialise batch_stats once, and pass the state's batch_stats to model.apply in every step",
    "https://github.com/google/flax/issues/2232",
    looks="The statistics are those of the last batch, or stay within 1% of their initial values.",
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
    "the moving average is applied more than once per step",
    "keep the statistics of the first forward pass only; run the others with mutable=False",
    looks="The statistics follow the batches too fast: the effective momentum is the square.",
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
    "the momentum is 1 - m instead of m",
    "pass 1 - m: in Flax momentum is the weight of the old value (0.99), in PyTorch of the new (0.01)",
    "https://github.com/pytorch/examples/issues/289",
    looks="Evaluation fluctuates: the statistics are nearly those of the last batch.",
    wrong="""
        nn.BatchNorm(momentum=0.01)  # as in PyTorch
    """,
    right="""
        nn.BatchNorm(momentum=0.99)
    """,
)
mistake(
    "momentum_not_as_declared",
    "the layer does not use the declared momentum",
    "declare the momentum that the layer is created with; Flax's default is 0.99",
    looks="The statistics follow the batches more slowly, or faster, than intended.",
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
    "the momentum changes from step to step",
    "new = m * old + (1 - m) * batch with the same m in every step, including the first",
    looks="After some steps the statistics freeze, or jump to the last batch.",
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
    "the weights of the old statistics and of the batch's moments do not sum to 1",
    "new = m * old + (1 - m) * batch, with the batch's unscaled moments",
    looks="The statistics grow or shrink from step to step, even on the same batch.",
    wrong="""
        mean = mean + (1 - m) * batch_mean
    """,
    right="""
        mean = m * mean + (1 - m) * batch_mean
    """,
)
mistake(
    "sample_variance",
    "the variance is divided by N - 1 instead of N",
    "use the biased variance, with divisor N, as Flax's BatchNorm does",
    looks="Training and evaluation differ, more so for small batches.",
    wrong="""
        var = jnp.var(h, axis=0, ddof=1)
    """,
    right="""
        var = jnp.var(h, axis=0)
    """,
)
mistake(
    "wrong_moments",
    "the recorded mean or variance is not the batch's mean or variance",
    "record jnp.mean(h, axis=0) and jnp.var(h, axis=0), without epsilon or square root",
    looks="Training looks fine, but evaluation is off by a scale.",
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
    "E[h^2] - E[h]^2 can become negative and is not clipped",
    "jnp.maximum(jnp.mean(h**2, axis=0) - mean**2, 0), or BatchNorm(use_fast_variance=False)",
    "https://github.com/google/flax/issues/1491",
    looks="Occasional NaN when a feature is nearly constant and far from 0.",
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
    "the moments are taken over the wrong axes, or channels are mixed up",
    "reduce over every axis except the feature axis (BatchNorm's axis=-1)",
    looks="All channels have the same statistics, or each row is normalised by itself.",
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
    "the statistics come from a different forward pass than the one trained on",
    "return the statistics of the forward pass that was differentiated, as aux",
    "https://github.com/andreped/GradientAccumulator/issues/6",
    looks="Training looks fine, but evaluation is off.",
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
    "the statistics are those of part of the batch: one shard or one micro-batch",
    "carry batch_stats through all micro-batches; use BatchNorm(axis_name=...) across shards",
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
    "carry the whole batch_stats tree instead of a list of leaves",
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
    "batch_stats was replaced by all that apply returned, one level too deep",
    'use updates["batch_stats"] instead of updates',
    looks="The second step fails, or starts from new statistics.",
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
    "the statistics are stored, computed or read in a dtype less precise than float32",
    "keep batch_stats in float32: dtype= sets the dtype of the computation, param_dtype= of the params",
    "https://github.com/NVIDIA/Model-Optimizer/pull/738",
    looks="The statistics stop changing before they reach the batch's moments.",
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
    "the statistics overflow their dtype",
    "scale the input: squares overflow float32 from about 1e19 and float16 from 256",
    looks="The running variance is inf, and the eval loss is NaN.",
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
    "the step changes the structure, shape or dtype of its state",
    "return the same containers, shapes and dtypes as init; cast only inside the model",
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
mistake(
    "weak_type_in_the_state",
    "a value of the initial state has a weak type, which the step does not return",
    "give it a dtype where it is created: jnp.full(shape, value, jnp.float32)",
    looks="The second step compiles again, or fails in lax.scan.",
    wrong="""
        params = {"scale": jnp.full((), 0.1)}
    """,
    right="""
        one = jnp.full((), 0.1, jnp.float32)
        params = {"scale": one}
    """,
)

# Evaluation.
mistake(
    "modes_differ",
    "training and evaluation differ in more than the statistics they normalise by",
    "use the same layers, constants and inputs in both; only use_running_average differs",
    looks="The eval loss differs from the training loss, even on the training batch.",
    wrong="""
        if train:
            h = nn.BatchNorm(False, epsilon=1e-3)(h)
        else:
            h = nn.BatchNorm(True)(h)
    """,
    right="""
        h = nn.BatchNorm(not train, epsilon=1e-3)(h)
    """,
)
mistake(
    "losses_differ",
    "training and evaluation compute different losses of the same predictions",
    "use one loss function in both, with the same reduction and factors",
    looks="The eval loss differs from the training loss by a factor, or for large errors, even on the training "
    "batch.",
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
    "eval_ignores_variables",
    "evaluation does not use some of the params or statistics of the training step",
    "apply one model in both modes, with all of params and batch_stats",
    looks="Training changes or records values that never affect the eval loss.",
    wrong="""
        stats = batch_stats["norm"]
        h = h / jnp.sqrt(stats["var"] + eps)
    """,
    right="""
        stats = batch_stats["norm"]
        h = h - stats["mean"]
        h = h / jnp.sqrt(stats["var"] + eps)
    """,
)
mistake(
    "eval_in_train_mode",
    "evaluation runs in train mode",
    "evaluate with train=False (use_running_average=True), or model.eval() with nnx",
    "https://github.com/yanx27/GACNet/issues/8",
    looks="The prediction for a row depends on the rest of its batch.",
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
    "the normalisation divides by a variance of zero",
    "add epsilon to the variance before the square root",
    looks="NaN when a feature is constant in a batch.",
    wrong="""
        h = (h - mean) / jnp.sqrt(var)
    """,
    right="""
        h = (h - mean) / jnp.sqrt(var + 1e-5)
    """,
)
mistake(
    "exponential_overflows",
    "an exponential of a large number overflows",
    "use jax.nn.softmax, jax.nn.logsumexp, jax.nn.softplus or an Optax loss, which subtract the largest "
    "exponent first; bound an exponent that the model computes, such as a log-variance: "
    "jnp.clip(log_var, -20, 20)",
    "https://docs.jax.dev/en/latest/_autosummary/jax.nn.logsumexp.html",
    looks="NaN or an infinite loss, once the model's outputs are large.",
    wrong="""
        z = jnp.log(jnp.sum(jnp.exp(logits), axis=1))
    """,
    right="""
        z = jax.nn.logsumexp(logits, axis=1)
    """,
)
mistake(
    "log_of_zero",
    "a logarithm is taken of a number that is 0 or negative",
    "compute the log of a probability from the logits: jax.nn.log_softmax, jax.nn.log_sigmoid, "
    "jax.nn.logsumexp or an Optax loss; for other numbers take jnp.log(jnp.maximum(p, 1e-7))",
    "https://docs.jax.dev/en/latest/_autosummary/jax.nn.log_softmax.html",
    looks="An infinite loss, once the model is certain: small probabilities underflow to 0.",
    wrong="""
        p = jax.nn.softmax(logits)
        loss = -jnp.mean(jnp.log(p[rows, labels]))
    """,
    right="""
        log_p = jax.nn.log_softmax(logits)
        loss = -jnp.mean(log_p[rows, labels])
    """,
)
mistake(
    "slope_is_infinite",
    "a function is differentiated at a point where its slope is infinite",
    "add a small number under the root, or replace the argument at such points before the call, as in "
    "jnp.sqrt(jnp.where(s > 0, s, 1.0)); a jnp.where around the result alone leaves the gradient NaN",
    "https://docs.jax.dev/en/latest/faq.html#gradients-contain-nan-where-using-where",
    looks="The loss is finite, and gradients are NaN: sqrt or norm at 0, arccos at 1.",
    wrong="""
        distance = jnp.sqrt(jnp.sum(d**2, axis=1))
    """,
    right="""
        square = jnp.sum(d**2, axis=1)
        distance = jnp.sqrt(square + 1e-12)
    """,
)
mistake(
    "division_by_zero",
    "a number is divided by 0",
    "add a small number to the divisor, or replace it where it is 0: x / jnp.where(d == 0, 1.0, d); "
    "jnp.maximum(count, 1) for a number of rows",
    "https://docs.jax.dev/en/latest/faq.html#gradients-contain-nan-where-using-where",
    looks="NaN or inf for some batches: a vector of norm 0, or a mask without rows.",
    wrong="""
        loss = jnp.sum(mask * errors) / jnp.sum(mask)
    """,
    right="""
        count = jnp.maximum(jnp.sum(mask), 1.0)
        loss = jnp.sum(mask * errors) / count
    """,
)
mistake(
    "outside_the_domain",
    "a function is evaluated where it is not defined",
    "restrict the argument first: jnp.arccos(jnp.clip(c, -0.999, 0.999)), jnp.sqrt(jnp.maximum(v, 0.0))",
    looks="NaN where rounding takes a cosine beyond 1, or a sum below 0.",
    wrong="""
        angle = jnp.arccos(jnp.sum(u * v, axis=1))
    """,
    right="""
        cosine = jnp.sum(u * v, axis=1)
        cosine = jnp.clip(cosine, -0.999, 0.999)
        angle = jnp.arccos(cosine)
    """,
)
mistake(
    "number_overflows",
    "a sum or product is larger than its dtype can hold",
    "scale the factors first, sum logarithms instead of multiplying, or compute it in float32",
    looks="An infinite loss where the inputs are large; in float16, from 65504.",
    wrong="""
        loss = jnp.mean(errors.astype(jnp.float16) ** 2)
    """,
    right="""
        loss = jnp.mean(errors.astype(jnp.float32) ** 2)
    """,
)
mistake(
    "loss_not_a_mean_over_rows",
    "the loss is not a mean over rows",
    "take the mean of the rows' losses; if the root or the sum is intended, declare row_losses=False",
    looks="The eval loss depends on the batch size: over batches, its average is not that of the data set.",
    wrong="""
        loss = jnp.sqrt(jnp.mean((preds - y) ** 2))
    """,
    right="""
        loss = jnp.mean((preds - y) ** 2)
    """,
)
mistake(
    "optimizer_departs_from_its_paper",
    "the optimizer does not follow the formula of its paper",
    "use a release of Optax that does (`bnverify bisect` finds where it changed), or write the update by hand",
    "https://github.com/pytorch/pytorch/issues/41477",
    looks="After an upgrade, the same code trains differently, most of all where gradients are small.",
    wrong="""
        update = -lr * m_hat / jnp.sqrt(v_hat + eps)
    """,
    right="""
        update = -lr * m_hat / (jnp.sqrt(v_hat) + eps)
    """,
)
mistake(
    "variance_below_zero",
    "rounding can make the variance E[h^2] - E[h]^2 negative, and it is not clipped at 0",
    "jnp.maximum(var, 0.0), or the mean of the squared deviations from the mean",
    "https://github.com/google/flax/issues/1491",
    looks="NaN in a batch where a feature is constant and far from 0.",
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
    "a number that Python or NumPy draws or counts during tracing becomes a constant of the step",
    "draw it with jax.random, from the seed or from a key in the state",
    "https://docs.jax.dev/en/latest/notebooks/Common_Gotchas_in_JAX.html",
    looks="Each process starts from different params, whatever the seed; within a process, runs are repeatable.",
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
    "differs_between_processes",
    "the order of a set, the hash of a string, or a number drawn at import is part of the step",
    "iterate over sorted(names), derive seeds with zlib.crc32(name.encode()) instead of hash(name), and draw "
    "with jax.random",
    "https://docs.python.org/3/reference/datamodel.html#object.__hash__",
    looks="Runs with the same seed differ, and hosts of one cluster hold different params; within a process, "
    "everything is repeatable.",
    wrong="""
        for name in {"stem", "body", "head"}:
            key = jax.random.fold_in(seed, hash(name))
            params[name] = init(key, shapes[name])
    """,
    right="""
        for name in ("stem", "body", "head"):
            place = zlib.crc32(name.encode())
            key = jax.random.fold_in(seed, place)
            params[name] = init(key, shapes[name])
    """,
)
mistake(
    "hidden_state",
    "the result depends on something that is not an argument",
    "pass all state as arguments: under jit, Python side effects and globals only take effect in tracing",
    looks="The step differs with and without jit, or between two runs.",
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
    "the step modifies or deletes its inputs",
    "return new arrays; do not donate, or write into, arrays that the caller still uses",
    "https://github.com/jax-ml/jax/issues/37830",
    looks="The old state is deleted, or has the new values.",
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
    "a float seed is not truncated to its integer part",
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
    "the variances of parts of a batch are averaged, which ignores the spread between their means",
    "pmean E[x] and E[x^2], then compute E[x^2] - E[x]^2, as BatchNorm(axis_name=...) does",
    "https://github.com/tensorflow/tpu/issues/321",
    looks="The running variance is too small, more so with more devices.",
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
    "moments_used_before_averaged",
    "each device normalises by the moments of its own shard, although the recorded statistics are averaged",
    "average the moments inside the layer, before they are used: nn.BatchNorm(axis_name=...)",
    looks="The statistics agree on all devices, but the eval loss is worse than the training loss, more so "
    "with smaller shards.",
    wrong="""
        norm = nn.BatchNorm(not train)
        ...
        stats = jax.lax.pmean(stats, "data")
    """,
    right="""
        norm = nn.BatchNorm(not train, axis_name="data")
    """,
)
mistake(
    "unequal_shards",
    "the moments of shards with different numbers of rows are averaged with equal weights",
    "psum the sums and the row counts, and divide once; pmean gives every shard the same weight",
    "https://github.com/google/flax/issues/2417",
    looks="The padded last batch changes the statistics too much.",
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
    "the loss is the mean of the devices' means although they have different numbers of rows",
    "psum the sum of the errors and the row count, and divide once",
    "https://github.com/huggingface/transformers/pull/18458",
    looks="The loss of a padded batch differs from the loss of the same rows on one device.",
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
    "each device updates its params with the gradient of its own shard",
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
    "the devices' gradients are summed instead of averaged",
    "use jax.lax.pmean, not psum; shard_map with replication checks already inserts the psum",
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
    "the checkpoint does not contain the running statistics",
    "save and restore the whole state: params, batch_stats, opt_state and PRNG keys",
    "https://github.com/AI-Hypercomputer/maxtext/pull/4343",
    looks="The restored model evaluates worse than the saved one.",
    wrong="""
        data = to_bytes(state.params)
    """,
    right="""
        data = to_bytes(state)
    """,
)
mistake(
    "checkpoint_drops_optimizer_state",
    "the checkpoint does not contain the optimizer state",
    "save opt_state with params, and do not call tx.init after restoring",
    looks="The loss jumps when a run is resumed.",
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
    "the checkpoint does not contain the PRNG key, or other state of the step",
    "save PRNG keys and counters with the state",
    "https://github.com/AI-Hypercomputer/maxtext/pull/4343",
    looks="A resumed run repeats the dropout masks of the first run.",
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
    "a step counter starts from 0 again when a run is restored",
    "restore the optimizer's count with the rest of opt_state: schedules and Adam use it",
    looks="The learning-rate warm-up runs a second time.",
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
    "the restored state has different containers, shapes or dtypes than the saved one",
    "restore into a template: from_bytes(state_of_the_same_structure, data)",
    "https://github.com/google/flax/issues/1550",
    looks="Code that expects a NamedTuple or a tuple fails on the restored state.",
    wrong="""
        state = msgpack_restore(data)
    """,
    right="""
        state = from_bytes(template, data)
    """,
)
mistake(
    "checkpoint_loses_digits",
    "the checkpoint stores values in a less precise dtype",
    "save float32 as float32; cast a copy for export, not the state that training resumes from",
    looks="A resumed run is close, but not equal, to the uninterrupted one.",
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
    "use the return value of from_bytes or restore: the template is not modified",
    looks="A resumed run starts at the initial loss.",
    wrong="""
        from_bytes(state, data)
    """,
    right="""
        state = from_bytes(state, data)
    """,
)
mistake(
    "restored_in_another_order",
    "restored values end up in the wrong leaves",
    "restore by name into a template, not from a list of leaves",
    looks="Every value is there, but the model predicts nonsense.",
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
    "the restored checkpoint is not the latest one",
    "copy the arrays before saving, wait for asynchronous saves to finish, and restore the latest step",
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

# Frozen layers, copies of a model, several forward passes, masks, keys and schedules.
mistake(
    "frozen_statistics_move",
    "the running statistics of a frozen layer are still updated",
    "run frozen layers with use_running_average=True, also in training",
    "https://github.com/Lightning-AI/pytorch-lightning/issues/15062",
    looks="Evaluation drifts although the params of the frozen layers never change.",
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
    "frozen params change, by weight decay or by their gradient",
    'optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)',
    looks="The frozen layers shrink a little with every step.",
    wrong="""
        # weight decay applies to a gradient of 0, too
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
    "each device clips or rescales its own gradient before the gradients are averaged",
    "average over the devices first, then clip",
    "https://github.com/dmlc/gluon-nlp/pull/470",
    looks="The same batch gives a different update on more devices.",
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
    "the learning rate is stored or computed in 16 bits",
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
    "the global norm for clipping includes the gradients of frozen params",
    "clip inside the optimizer of the trained params, not around multi_transform",
    looks="The larger the frozen part, the smaller the updates of the trained layers.",
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
    "a copy of the params is updated, but its running statistics are not",
    "copy batch_stats together with the params",
    "https://github.com/DLR-RM/stable-baselines3/issues/996",
    looks="The target network is always evaluated with mean 0 and variance 1.",
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
    "the params are pretrained, but the running statistics are the initial ones",
    "restore batch_stats from the same checkpoint as the params",
    "https://github.com/google/deepvariant/issues/383",
    looks="The restored model is as bad as a new one until it has trained for a while.",
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
    "the statistics of one of several forward passes are dropped",
    "pass the batch_stats that one call returns to the next call",
    "https://github.com/carpedm20/DCGAN-tensorflow/issues/266",
    looks="In evaluation, a GAN's discriminator rejects every real image.",
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
    "teacher_in_train_mode",
    "a network that is never trained, such as a teacher, predicts in train mode",
    "call it in eval mode: its targets then do not depend on the other rows of the batch",
    "https://arxiv.org/abs/1503.02531",
    looks="Students of the same teacher differ with the batch size, and the teacher's own accuracy is lost.",
    wrong="""
        goal, _ = teacher.apply(
            variables, x, train=True,
            mutable=["batch_stats"])
    """,
    right="""
        goal = teacher.apply(
            variables, x, train=False)
    """,
)
mistake(
    "rows_normalised_alone",
    "each row is normalised by itself, not by the moments of the batch",
    'under jax.vmap BatchNorm sees a single row: use BatchNorm(axis_name="batch") and '
    'jax.vmap(..., axis_name="batch", out_axes=(0, None))',
    "https://github.com/google/flax/issues/1247",
    looks="Every normalised value equals its bias, and the running variance goes to 0.",
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
    "padding is masked out of the sum of the losses but counted in the divisor",
    "divide by the sum of the mask, not by the number of rows",
    "https://github.com/tracel-ai/burn/issues/5568",
    looks="The more padding a batch has, the smaller its loss.",
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
    "padding rows affect the loss or the statistics",
    "mask them in the loss, and pass the mask to BatchNorm, too",
    "https://github.com/google/flax/issues/1850",
    looks="The padded last batch of each epoch pulls the running statistics towards 0.",
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
    "every step draws the same random numbers, so dropout uses the same mask in every step",
    "split the key and carry the new one, or use jax.random.fold_in(key, state.step)",
    "https://github.com/google/flax/pull/2631",
    looks="Dropout always drops the same units, so some of them never train.",
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
    "with gradient accumulation, the learning-rate schedule is as long as the number of batches",
    "divide the length of the schedule by the accumulation steps: it counts updates, not batches",
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

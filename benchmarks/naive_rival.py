"""What a good engineer writes in twenty minutes: Hypothesis over the eager step, four checks.

No jit, since nothing asks for it; any shape within the sizes that bnverify uses too; tolerances that
let the step pass. It is a fair first test of a step, and the measure of what bnverify's pool of
shapes, stacks and compiled laws are worth. Run it by itself with

    python benchmarks/naive_rival.py [EXAMPLES]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import flax.linen as nn
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st


class Model(nn.Module):
    """Dense -> BatchNorm -> ReLU -> Dense(1)."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return predictions (N, 1) for x (N, D)."""
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(1)(nn.relu(x))


MODEL = Model()


@st.composite
def inputs(draw: st.DrawFn) -> tuple[int, Any, Any, float]:
    """Strategy for (seed, x, y, lr) of any shape."""
    rows, features = draw(st.integers(1, 64)), draw(st.integers(1, 16))
    numbers = st.floats(-100, 100, width=32)
    x = draw(hnp.arrays(np.float32, (rows, features), elements=numbers))
    y = draw(hnp.arrays(np.float32, (rows,), elements=numbers))
    return draw(st.integers(0, 2**31 - 1)), x, y, draw(st.floats(0, 1))


def check_step(key: int, x: Any, y: Any, lr: float) -> None:
    """Take one step and assert the four things a brief of this step names."""
    variables = MODEL.init(jax.random.PRNGKey(key), x, train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    tx = optax.sgd(lr, momentum=0.9)
    opt_state = tx.init(params)

    def loss_fn(params: Any) -> Any:
        out, updated = MODEL.apply(
            {"params": params, "batch_stats": batch_stats}, x, train=True, mutable=["batch_stats"]
        )
        return jnp.mean((out.reshape(-1) - y) ** 2), updated["batch_stats"]

    (_, new_batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    out = MODEL.apply({"params": new_params, "batch_stats": new_batch_stats}, x, train=False)
    eval_loss = jnp.mean((out.reshape(-1) - y) ** 2).reshape(1)

    # 1. The gradient has the tree of the params.
    shapes = jax.tree_util.tree_map(jnp.shape, params)
    assert jax.tree_util.tree_map(jnp.shape, grads) == shapes
    # 2. The statistics change by the moving average.
    hidden = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    old, new = batch_stats["BatchNorm_0"], new_batch_stats["BatchNorm_0"]
    for name, moment in (("mean", jnp.mean(hidden, axis=0)), ("var", jnp.var(hidden, axis=0))):
        np.testing.assert_allclose(
            new[name], 0.99 * old[name] + 0.01 * moment, rtol=1e-3, atol=1e-3
        )
    # 3. The optimizer's state has the tree of the params, so no statistic is in it.
    assert jax.tree_util.tree_map(jnp.shape, opt_state[0].trace) == shapes
    # 4. The eval loss is finite and (1,).
    assert eval_loss.shape == (1,)
    assert bool(jnp.isfinite(eval_loss).all())


def run(examples: int, *, random_seed: int = 0) -> tuple[int, float]:
    """Check ``examples`` generated inputs; return how many were run, and in how many seconds."""
    count = 0

    @seed(random_seed)
    @settings(
        max_examples=examples,
        deadline=None,  # each new shape compiles
        database=None,
        suppress_health_check=[HealthCheck.too_slow],  # for the same reason
    )
    @given(inputs())
    def check(given_inputs: tuple[int, Any, Any, float]) -> None:
        nonlocal count
        check_step(*given_inputs)
        count += 1

    started = time.perf_counter()
    check()
    return count, time.perf_counter() - started


if __name__ == "__main__":
    ran, seconds = run(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
    print(f"{ran} cases in {seconds:.1f} s: {ran / seconds:.2f} a second")

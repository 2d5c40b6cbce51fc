"""Is the claimed rounding noise sound, and is it tight? An experiment on random training steps.

Every configuration (optimizer, number of normalised layers, activation) is run on random cases:
the float32 step, jitted, against the exact float64 run of its jaxpr, with the noise claimed for
each number of loss, gradients, statistics, new parameters, optimizer state and eval loss.

    python benchmarks/rounding_soundness.py [--cases 512] [--markdown]

prints a line for each configuration:

- cases with a number whose noise is not known, in percent (for gradients and for everything);
- the worst true error over noise: at most 1, or the claim is unsound;
- how many numbers are beyond their noise: 0, or the claim is unsound;
- the median of noise over true error, where there is an error: the claim's looseness.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnverify.compat import enable_x64
from bnverify.jaxpr.rounding import Rounded, rounding
from bnverify.subject import State, StepInfo

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
    "adam": optax.adam,
}
LAYERS = (1, 2, 4)
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "tanh": nn.tanh}
SHAPES = ((8, 3), (2, 1), (32, 2))
HIDDEN = 4


class Net(nn.Module):
    """Dense -> BatchNorm -> activation, ``layers`` times, then Dense(1)."""

    layers: int
    activation: Any

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return predictions (N, 1)."""
        for _ in range(self.layers):
            x = nn.Dense(HIDDEN)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = self.activation(x)
        return nn.Dense(1)(x)


class Case(NamedTuple):
    """One stacked set of inputs of ``step``."""

    state: State
    x: Any
    y: Any
    lr: Any


def make(layers: int, activation: str, optimizer: str) -> tuple[Any, Any]:
    """Return (init, step); step also evaluates in the state after it."""
    model, make_optimizer = Net(layers, ACTIVATIONS[activation]), OPTIMIZERS[optimizer]

    def predict(params: Any, stats: Any, x: Any, train: bool) -> tuple[Any, Any]:
        variables = {"params": params, "batch_stats": stats}
        out, new = model.apply(variables, x, train=train, mutable=["batch_stats"])
        return out.reshape(-1), new["batch_stats"]

    def init(seed: Any, x: Any) -> State:
        variables = model.init(jax.random.PRNGKey(seed), x, train=False)
        params = variables["params"]
        return State(params, variables["batch_stats"], make_optimizer(0.0).init(params))

    def loss_fn(params: Any, stats: Any, x: Any, y: Any) -> tuple[Any, Any]:
        out, new = predict(params, stats, x, train=True)
        return jnp.mean((out - y) ** 2), new

    def step(case: Case) -> tuple[State, StepInfo, Any]:
        state, x, y, lr = case
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, state.batch_stats, x, y
        )
        updates, opt_state = make_optimizer(lr).update(grads, state.opt_state, state.params)
        after = State(optax.apply_updates(state.params, updates), stats, opt_state)
        out, _ = predict(state.params, state.batch_stats, x, train=False)
        return after, StepInfo(loss, grads), jnp.mean((out - y) ** 2)

    return init, step


def draw(init: Any, rng: np.random.Generator, count: int, n: int, d: int) -> Case:
    """Return cases over six decades of magnitude, features with offsets up to 1e4."""

    def decades(low: float, high: float, *shape: int) -> Any:
        return 10.0 ** rng.uniform(low, high, (count, *shape))

    scale = decades(-3, 3, 1, 1)
    offset = decades(-2, 4, 1, d) * rng.choice([-1, 0, 0, 1], (count, 1, d))
    x = (rng.normal(size=(count, n, d)) * scale + offset).astype(np.float32)
    y = (rng.normal(size=(count, n)) * decades(-3, 3, 1)).astype(np.float32)
    lr = decades(-4, 0).astype(np.float32)
    seeds = jnp.asarray(rng.integers(2**31, size=count), jnp.int32)
    state = jax.vmap(init)(seeds, x)
    # Parameters as after some training: biases away from 0, statistics away from 0 and 1.
    params = jax.tree_util.tree_map(
        lambda leaf: (leaf + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32), state.params
    )
    stats = jax.tree_util.tree_map(
        lambda leaf: (leaf * decades(-1, 1, 1) + 1e-3).astype(np.float32), state.batch_stats
    )
    return Case(state._replace(params=params, batch_stats=stats), x, y, lr)


class Verdict(NamedTuple):
    """What one configuration showed."""

    cases: int
    unknown_grads: int
    unknown: int
    worst: float
    beyond: int
    looseness: float
    seconds: float


def judge(actual: Any, claimed: Rounded) -> tuple[Any, Any, Any]:
    """Return errors and noises of all numbers, (cases, numbers) each, and the unknown cases."""
    leaves = zip(*(jax.tree_util.tree_leaves(tree) for tree in (actual, *claimed)), strict=True)
    errors, noises, unknown = [], [], []
    for got, exact, noise in leaves:
        count = got.shape[0]
        errors.append(np.abs(np.asarray(got, float) - np.asarray(exact, float)).reshape(count, -1))
        noises.append(np.asarray(noise).reshape(count, -1))
        unknown.append(~np.isfinite(noises[-1]).all(axis=1))
    return np.hstack(errors), np.hstack(noises), np.any(unknown, axis=0)


def experiment(
    layers: int, activation: str, optimizer: str, count: int, shape: tuple[int, int], seed: int
) -> Verdict:
    """Return what ``count`` random cases of one configuration show."""
    init, step = make(layers, activation, optimizer)
    cases = draw(init, np.random.default_rng(seed), count, *shape)
    start = time.perf_counter()
    actual = jax.jit(jax.vmap(step))(cases)
    reading = rounding(step, jax.tree_util.tree_map(lambda leaf: leaf[0], cases))
    with enable_x64():
        claimed = jax.jit(jax.vmap(reading.evaluate))(cases)
        errors, noises, unknown = judge(actual, claimed)
        _, _, unknown_grads = judge(actual[1], Rounded(*(tree[1] for tree in claimed)))
    known = np.isfinite(noises)
    ratio = np.divide(errors, noises, out=np.where(errors > 0, np.inf, 0.0), where=noises > 0)
    some = known & (errors > 0)
    return Verdict(
        cases=count,
        unknown_grads=int(unknown_grads.sum()),
        unknown=int(unknown.sum()),
        worst=float(ratio[known].max()),
        beyond=int((ratio[known] > 1).sum()),
        looseness=float(np.median(noises[some] / errors[some])),
        seconds=time.perf_counter() - start,
    )


def main() -> None:
    """Run every configuration and print the table."""
    parser = argparse.ArgumentParser(description="Is the claimed rounding noise sound and tight?")
    parser.add_argument("--cases", type=int, default=512, help="for each configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one configuration of each kind")
    options = parser.parse_args()
    print(
        "| optimizer | layers | activation | N, D | cases | unknown: grads | any | worst error "
        "/ noise | beyond | median noise / error | s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    combinations = list(itertools.product(OPTIMIZERS, LAYERS, ACTIVATIONS))
    if options.quick:
        combinations = combinations[::4]
    total = beyond = 0
    for number, (optimizer, layers, activation) in enumerate(combinations):
        shape = SHAPES[number % len(SHAPES)]
        seed = options.seed * 1000 + number
        got = experiment(layers, activation, optimizer, options.cases, shape, seed)
        total, beyond = total + got.cases, beyond + got.beyond
        print(
            f"| {optimizer} | {layers} | {activation} | {shape[0]}, {shape[1]} | {got.cases} "
            f"| {got.unknown_grads / got.cases:.1%} | {got.unknown / got.cases:.1%} "
            f"| {got.worst:.2f} | {got.beyond} | {got.looseness:.1f} | {got.seconds:.1f} |",
            flush=True,
        )
    print(f"\n{total} cases, {beyond} numbers beyond their noise, jax {jax.__version__}")


if __name__ == "__main__":
    main()

"""Is the claimed rounding noise sound, tight and cheap? An experiment on random training steps.

Every configuration (optimizer, number of normalised layers, activation, shape of the batch) is
run on random cases: the float32 step, jitted, against the exact float64 run of its jaxpr, with
the noise claimed for each number of loss, gradients, statistics, new parameters, optimizer state
and eval loss. Inputs span six decades of magnitude, with offsets up to 1e4; half of the states
are initial ones, half come from three steps of training.

    python benchmarks/rounding_soundness.py [--cases 1000] [--seed 0] [--hidden 4] [--quick]

prints a line for each configuration:

- unknown: cases in which the gradients have no known error, in percent; and numbers of any kind;
- worst: the largest true error over noise; at most 1, or the claim is unsound;
- beyond: how many numbers are beyond their noise; 0, or the claim is unsound;
- loose: the median of noise over true error, where there is an error;
- cost: CPU time to trace and evaluate the claim, as a check does, over that of as many float32 steps,
  compiled by ``jax.jit``, as it has rows.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnverify.jaxpr.rounding import ROWS, Rounded, rounding
from bnverify.model import State, StepInfo

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
    "adam": optax.adam,
}
LAYERS = (1, 2, 4)
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu, "tanh": nn.tanh}
SHAPES = ((8, 3), (2, 1), (32, 2))


class Net(nn.Module):
    """Dense(hidden) -> BatchNorm -> activation, ``layers`` times, then Dense(1)."""

    layers: int
    activation: Any
    hidden: int

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return predictions (N, 1)."""
        for _ in range(self.layers):
            x = nn.Dense(self.hidden)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = self.activation(x)
        return nn.Dense(1)(x)


class Case(NamedTuple):
    """One stacked set of inputs of ``step``."""

    state: State
    x: Any
    y: Any
    lr: Any


def make(layers: int, activation: str, optimizer: str, hidden: int) -> tuple[Any, Any]:
    """Return (init, step); step also evaluates in the state after it."""
    model, make_optimizer = Net(layers, ACTIVATIONS[activation], hidden), OPTIMIZERS[optimizer]

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


def draw(init: Any, step: Any, rng: np.random.Generator, count: int, n: int, d: int) -> Case:
    """Return cases over six decades of magnitude, features with offsets up to 1e4."""

    def decades(low: float, high: float, *shape: int) -> Any:
        return 10.0 ** rng.uniform(low, high, (count, *shape))

    def batch() -> tuple[Any, Any]:
        scale = decades(-3, 3, 1, 1)
        offset = decades(-2, 4, 1, d) * rng.choice([-1, 0, 0, 1], (count, 1, d))
        x = (rng.normal(size=(count, n, d)) * scale + offset).astype(np.float32)
        return x, (rng.normal(size=(count, n)) * decades(-3, 3, 1)).astype(np.float32)

    seeds = jnp.asarray(rng.integers(2**31, size=count), jnp.int32)
    state = jax.vmap(init)(seeds, batch()[0])
    # Parameters away from their initial zeros and ones.
    params = jax.tree_util.tree_map(
        lambda leaf: (leaf + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32), state.params
    )
    state = state._replace(params=params)
    trained, rate = state, np.full(count, 1e-3, np.float32)
    stepped = jax.jit(jax.vmap(step))
    for _ in range(3):
        trained = stepped(Case(trained, *batch(), rate))[0]
    finite = np.all(
        [
            np.isfinite(np.asarray(leaf)).reshape(count, -1).all(axis=1)
            for leaf in jax.tree_util.tree_leaves(trained)
        ],
        axis=0,
    )
    keep = finite & rng.choice([True, False], count)

    def either(new: Any, old: Any) -> Any:
        return np.where(keep.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    lr = decades(-4, 0).astype(np.float32)
    return Case(jax.tree_util.tree_map(either, trained, state), *batch(), lr)


class Verdict(NamedTuple):
    """What one configuration showed.

    Attributes:
        unknown_grads: share of the cases in which some gradient has no claim.
        unknown: share of the numbers without one.
        ratio: error over noise, of each number with one.
        noise: CPU seconds to trace and evaluate the noise.
        step: to compile and run the step itself on as many samples.
    """

    unknown_grads: float
    unknown: float
    ratio: Any
    noise: float
    step: float


def compare(actual: Any, claimed: Rounded) -> tuple[Any, Any]:
    """Return the errors and the noise of all numbers, each (cases, numbers)."""
    errors, noises = [], []
    for got, exact, noise in zip(
        *(jax.tree_util.tree_leaves(tree) for tree in (actual, *claimed)), strict=True
    ):
        count = got.shape[0]
        errors.append(np.abs(np.asarray(got, float) - np.asarray(exact, float)).reshape(count, -1))
        noises.append(np.asarray(noise).reshape(count, -1))
    return np.hstack(errors), np.hstack(noises)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return what ``function`` gives, and the CPU time that it takes."""
    start = time.process_time()
    result = jax.block_until_ready(function())
    return result, time.process_time() - start


def experiment(init: Any, step: Any, count: int, shape: tuple[int, int], seed: int) -> Verdict:
    """Return what ``count`` random cases of one configuration show."""
    cases = draw(init, step, np.random.default_rng(seed), count, *shape)
    actual = jax.jit(jax.vmap(step))(cases)
    rows = jax.tree_util.tree_map(lambda leaf: np.concatenate([leaf] * (1 + ROWS)), cases)
    _, plain = timed(lambda: jax.jit(jax.vmap(step))(rows))
    one = jax.tree_util.tree_map(lambda leaf: leaf[0], cases)
    reading, tracing = timed(lambda: rounding(step, one))
    claimed, running = timed(lambda: reading.evaluate(cases))
    errors, noises = compare(actual, claimed)
    _, grads = compare(actual[1], Rounded(*(tree[1] for tree in claimed)))
    known = np.isfinite(noises)
    none = np.where(errors > 0, np.inf, 0.0)  # what an error is where none is allowed
    ratio = np.divide(errors, noises, out=none, where=known & (noises > 0))
    return Verdict(
        unknown_grads=float(np.mean(~np.isfinite(grads).all(axis=1))),
        unknown=float(np.mean(~known)),
        ratio=ratio[known],
        noise=tracing + running,
        step=plain,
    )


def main() -> None:
    """Run every configuration and print the table."""
    parser = argparse.ArgumentParser(description="Is the claimed rounding noise sound and tight?")
    parser.add_argument("--cases", type=int, default=1000, help="for each configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=int, default=4, help="features of each layer")
    parser.add_argument("--quick", action="store_true", help="one configuration of each kind")
    options = parser.parse_args()
    print(
        "| optimizer | layers | activation | N, D | unknown grads | unknown numbers | worst "
        "| beyond | loose | cost |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    combinations = list(itertools.product(OPTIMIZERS, LAYERS, ACTIVATIONS))
    if options.quick:
        combinations = combinations[::4]
    found = []
    for number, (optimizer, layers, activation) in enumerate(combinations):
        n, d = SHAPES[(number + options.seed) % len(SHAPES)]
        seed = options.seed * 1000 + number
        made = make(layers, activation, optimizer, options.hidden)
        got = experiment(*made, options.cases, (n, d), seed)
        found.append(got)
        print(
            f"| {optimizer} | {layers} | {activation} | {n}, {d} | {got.unknown_grads:.1%} "
            f"| {got.unknown:.1%} | {got.ratio.max():.2f} | {(got.ratio > 1).sum()} "
            f"| {1 / np.median(got.ratio[got.ratio > 0]):.1f} | {got.noise / got.step:.1f} |",
            flush=True,
        )
    every = np.concatenate([got.ratio for got in found])
    cost = sum(got.noise for got in found) / sum(got.step for got in found)
    print(
        f"\n{len(combinations) * options.cases} cases, {len(every)} numbers with a claim, "
        f"{(every > 1).sum()} beyond it, worst {every.max():.2f}, "
        f"median noise over error {1 / np.median(every[every > 0]):.1f}, "
        f"cost of all {cost:.1f}; jax {jax.__version__}"
    )


if __name__ == "__main__":
    main()

"""A small training step whose behaviour a test can alter, as an upgrade might."""

from __future__ import annotations

import json

SOURCE = '''
"""Linear, normalised, linear; ALTERED names what behaves differently."""

import os
import jax
import jax.numpy as jnp
import numpy as np
import bnverify
from side import ALTERED

HOW = {"momentum": 0.9, "ddof": 0, "epsilon": 1e-3, "scale": 1.0, "seed": 0, **ALTERED}


def init(seed, x):
    key = jax.random.PRNGKey(seed + HOW["seed"])
    kernel = HOW["scale"] * jax.random.normal(key, (x.shape[1], 2))
    params = {"kernel": kernel, "out": jnp.ones(2)}
    if HOW.get("leaf"):
        params["new"] = jnp.ones(1)
    stats = {"mean": jnp.zeros(2), "var": jnp.ones(2, HOW.get("dtype", "float32"))}
    return bnverify.State(params, stats, ())


def predict(params, x, mean, var):
    h = (x @ params["kernel"] - mean) / jnp.sqrt(var + HOW["epsilon"])
    return jnp.tanh(h) @ params["out"]


def loss(params, x, y):
    h = x @ params["kernel"]
    mean, var = h.mean(0), h.var(0, ddof=HOW["ddof"])
    if HOW.get("last_places"):
        y = y * (1 + 2.0**-23)
    return jnp.mean((predict(params, x, mean, var) - y) ** 2), (mean, var)


def step(state, x, y, lr):
    if HOW.get("raises"):
        raise NotImplementedError("gone since")
    if HOW.get("dies"):
        os.kill(os.getpid(), 9)
    (value, moments), grads = jax.value_and_grad(loss, has_aux=True)(state.params, x, y)
    m = HOW["momentum"]
    stats = {
        name: (m * state.batch_stats[name] + (1 - m) * new).astype(state.batch_stats[name].dtype)
        for name, new in zip(("mean", "var"), moments)
    }
    params = jax.tree_util.tree_map(lambda p, g: p - lr * g, state.params, grads)
    return bnverify.State(params, stats, ()), bnverify.StepInfo(value, grads)


def evaluate(state, x, y):
    stats = state.batch_stats
    return jnp.mean((predict(state.params, x, stats["mean"], stats["var"]) - y) ** 2).reshape(1)


def make():
    return bnverify.Subject("small", init, step, evaluate)
'''


def write(directory, name="steps.py"):
    """Write the step to a file in the directory, and return its target."""
    path = directory / name
    path.write_text(SOURCE, encoding="utf-8")
    return f"{path}:make"


def alter(directory, **altered):
    """Change the behaviour of the step in the directory."""
    directory.mkdir(exist_ok=True)
    text = f"import json\nALTERED = json.loads({json.dumps(altered)!r})\n"
    (directory / "side.py").write_text(text, encoding="utf-8")

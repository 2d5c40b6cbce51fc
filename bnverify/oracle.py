"""The reference step in float64 NumPy, derived by hand: what the float32 step should give.

It shares nothing with the step it judges: no jax, no automatic differentiation, the variance in
two passes where Flax takes the difference of two means. The model, with H = ``HIDDEN``:

    h = x W1 + b1                          Dense_0       (N, H)
    mu = mean(h), v = mean((h - mu)^2)     over rows     (H,), the divisor is N
    z = (h - mu) / sqrt(v + eps)                         (N, H)
    a = gamma z + beta                     BatchNorm_0   (N, H)
    r = max(a, 0)                          ReLU          (N, H)
    p = r W2 + b2                          Dense_1       (N,)
    L = mean((p - y)^2)                                  scalar

Every function takes ``xp``, the array namespace. With NumPy all input is widened to float64. With
another one (``jax.numpy``, inside a compiled law) the computation keeps the dtype it is given: widen
before. Nothing is written in place.

Source: Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167), algorithm 1 and the gradients
that follow it in section 3. Algorithm 2 there divides the variance by N - 1 for inference; Flax
does not, nor does this module.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

HIDDEN = 8
MOMENTUM = 0.99  # weighs the old value: Flax's convention
EPSILON = 1e-5

Array = Any  # of whichever namespace was asked for
Tree = dict[str, dict[str, Array]]


class Forward(NamedTuple):
    """What one pass through the model computes, in the letters of the module's docstring.

    Attributes:
        mean: mu, (H,); the batch's in train mode, the running one in eval mode.
        var: v, (H,), likewise.
        normalized: z, (N, H).
        affine: a, (N, H).
        hidden: r, (N, H).
        predictions: p, (N,).
    """

    mean: Array
    var: Array
    normalized: Array
    affine: Array
    hidden: Array
    predictions: Array


class Expected(NamedTuple):
    """What one training step and the evaluation after it should give.

    Attributes:
        loss: training loss, scalar; whatever the optimizer.
        grads: its gradient, a tree like params; whatever the optimizer.
        batch_stats: the statistics after the step, a tree; whatever the optimizer.
        params: the parameters after plain SGD.
        eval_loss: (1,), the loss in eval mode after plain SGD.
    """

    loss: Array
    grads: Tree
    batch_stats: Tree
    params: Tree
    eval_loss: Array


def batch_moments(h: Array, xp: Any = np) -> tuple[Array, Array]:
    """Return mean and biased variance of each column: mean(h), mean((h - mean(h))^2).

    Args:
        h: (N, C).
        xp: the array namespace.

    Returns:
        Two arrays (C,), in units of h and of h squared.
    """
    h = _widen(h, xp)
    mean = xp.mean(h, axis=0)
    return mean, xp.mean((h - mean) ** 2, axis=0)


def train_forward(params: Any, x: Array, xp: Any = np) -> Forward:
    """Return the pass in train mode: the batch's own moments normalise.

    Args:
        params: the tree of the reference model, kernels (D, H) and (H, 1), the rest (H,), (1,).
        x: (N, D).
        xp: the array namespace.
    """
    h = _affine(params["Dense_0"], x, xp)
    mean, var = batch_moments(h, xp)
    return _after_moments(params, h, mean, var, xp)


def eval_forward(params: Any, batch_stats: Any, x: Array, xp: Any = np) -> Forward:
    """Return the pass in eval mode: the running statistics normalise, and nothing is written.

    Args:
        params: the tree of the reference model.
        batch_stats: {"BatchNorm_0": {"mean": (H,), "var": (H,)}}.
        x: (N, D).
        xp: the array namespace.
    """
    running = batch_stats["BatchNorm_0"]
    mean, var = _widen(running["mean"], xp), _widen(running["var"], xp)
    return _after_moments(params, _affine(params["Dense_0"], x, xp), mean, var, xp)


def mean_squared_error(predictions: Array, y: Array, xp: Any = np) -> Array:
    """Return mean((p - y)^2), a scalar, for predictions (N,) and targets (N,)."""
    return xp.mean((_widen(predictions, xp) - _widen(y, xp)) ** 2)


def gradients(params: Any, x: Array, y: Array, xp: Any = np) -> Tree:
    """Return dL/dparams of the training loss, a tree like ``params``, by hand.

    Backwards through the model, with d for "derivative of L with respect to":

        dp = 2 (p - y) / N
        dW2 = r^T dp, db2 = sum dp, dr = dp W2^T
        da = dr where a > 0, else 0: at a = 0 the derivative of ReLU is 0, as in JAX
        dgamma = sum(da z), dbeta = sum(da), dz = gamma da
        dh = (dz - mean(dz) - z mean(dz z)) / sqrt(v + eps): mu and v depend on every row
        dW1 = x^T dh, db1 = sum(dh) = 0: what b1 adds, mu takes away

    Args:
        params: the tree of the reference model.
        x: (N, D).
        y: (N,).
        xp: the array namespace.
    """
    fwd = train_forward(params, x, xp)
    x, y = _widen(x, xp), _widen(y, xp)
    gamma = _widen(params["BatchNorm_0"]["scale"], xp)
    w2 = _widen(params["Dense_1"]["kernel"], xp)

    dp = (2 * (fwd.predictions - y) / y.shape[0])[:, None]
    da = xp.where(fwd.affine > 0, dp @ w2.T, 0.0)
    dz = gamma * da
    centred = dz - xp.mean(dz, axis=0) - fwd.normalized * xp.mean(dz * fwd.normalized, axis=0)
    dh = centred / xp.sqrt(fwd.var + EPSILON)
    return {
        "Dense_0": {"kernel": x.T @ dh, "bias": xp.sum(dh, axis=0)},
        "BatchNorm_0": {
            "scale": xp.sum(da * fwd.normalized, axis=0),
            "bias": xp.sum(da, axis=0),
        },
        "Dense_1": {"kernel": fwd.hidden.T @ dp, "bias": xp.sum(dp, axis=0)},
    }


def moving_average(old: Array, batch: Array, xp: Any = np) -> Array:
    """Return momentum * old + (1 - momentum) * batch, elementwise."""
    return MOMENTUM * _widen(old, xp) + (1 - MOMENTUM) * _widen(batch, xp)


def sgd_update(params: Any, grads: Any, lr: Array, xp: Any = np) -> Tree:
    """Return params - lr * grads, leaf by leaf; ``lr`` is a scalar."""
    rate = _widen(lr, xp)
    return {
        layer: {
            name: _widen(value, xp) - rate * _widen(grads[layer][name], xp)
            for name, value in leaves.items()
        }
        for layer, leaves in params.items()
    }


def evaluate(params: Any, batch_stats: Any, x: Array, y: Array, xp: Any = np) -> Array:
    """Return the loss in eval mode, shape (1,).

    Args:
        params: the tree of the reference model.
        batch_stats: {"BatchNorm_0": {"mean": (H,), "var": (H,)}}.
        x: (N, D).
        y: (N,).
        xp: the array namespace.
    """
    predictions = eval_forward(params, batch_stats, x, xp).predictions
    return xp.reshape(mean_squared_error(predictions, y, xp), (1,))


def expected(state: Any, x: Array, y: Array, lr: Array, xp: Any = np) -> Expected:
    """Return what one step of plain SGD from ``state`` should give, and the evaluation after it.

    Args:
        state: has ``params`` and ``batch_stats``, the trees of the reference model.
        x: (N, D).
        y: (N,).
        lr: scalar.
        xp: the array namespace.
    """
    fwd = train_forward(state.params, x, xp)
    grads = gradients(state.params, x, y, xp)
    params = sgd_update(state.params, grads, lr, xp)
    old = state.batch_stats["BatchNorm_0"]
    batch_stats = {
        "BatchNorm_0": {
            "mean": moving_average(old["mean"], fwd.mean, xp),
            "var": moving_average(old["var"], fwd.var, xp),
        }
    }
    return Expected(
        loss=mean_squared_error(fwd.predictions, y, xp),
        grads=grads,
        batch_stats=batch_stats,
        params=params,
        eval_loss=evaluate(params, batch_stats, x, y, xp),
    )


def _widen(value: Array, xp: Any) -> Array:
    # Only NumPy can always do float64; jax.numpy warns and stays at float32 unless told otherwise.
    return xp.asarray(value, dtype=np.float64 if xp is np else None)


def _affine(layer: Any, x: Array, xp: Any) -> Array:
    return _widen(x, xp) @ _widen(layer["kernel"], xp) + _widen(layer["bias"], xp)


def _after_moments(params: Any, h: Array, mean: Array, var: Array, xp: Any) -> Forward:
    norm = params["BatchNorm_0"]
    normalized = (h - mean) / xp.sqrt(var + EPSILON)
    affine = _widen(norm["scale"], xp) * normalized + _widen(norm["bias"], xp)
    hidden = xp.maximum(affine, 0.0)
    predictions = xp.reshape(_affine(params["Dense_1"], hidden, xp), (-1,))
    return Forward(mean, var, normalized, affine, hidden, predictions)

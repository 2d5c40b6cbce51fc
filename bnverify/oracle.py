"""The reference step in float64 NumPy, derived by hand: the expected results of the float32 step.

It shares nothing with the step that it judges: no jax, no automatic differentiation, and a two-pass
variance instead of Flax's difference of two means. The model, with H = ``HIDDEN``:

    h = x W1 + b1                          Dense_0       (N, H)
    mu = mean(h), v = mean((h - mu)^2)     over rows     (H,), the divisor is N
    z = (h - mu) / sqrt(v + eps)                         (N, H)
    a = gamma z + beta                     BatchNorm_0   (N, H)
    r = max(a, 0)                          ReLU          (N, H)
    p = r W2 + b2                          Dense_1       (N,)
    L = mean((p - y)^2)                                  scalar

All arrays may have the same leading batch axes: x (..., N, D), y (..., N), W1 (..., D, H), b1
(..., H), lr (...). Shapes below leave them out. All inputs are converted to float64. ``xp`` is the
array library: NumPy, or one with NumPy's functions (``jax.numpy`` with ``jax_enable_x64``). Nothing
is written in place.

Source: Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167), algorithm 1 and the gradients in
section 3. Their algorithm 2 uses the unbiased variance, divisor N - 1, for inference; Flax does not,
and neither does this module.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

HIDDEN = 8
MOMENTUM = 0.99  # as in Flax: the weight of the old value
EPSILON = 1e-5

Array = Any  # of the library ``xp``
Tree = dict[str, dict[str, Array]]


class Forward(NamedTuple):
    """The intermediate values of a forward pass, named as in the module's docstring.

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
    """The expected results of one training step and the evaluation after it.

    Attributes:
        loss: the training loss, a scalar.
        grads: its gradient, a tree like params.
        batch_stats: the new running statistics, a tree.
        params: the new params, with plain SGD.
        eval_loss: (1,), the loss in eval mode after the step, with plain SGD.
    """

    loss: Array
    grads: Tree
    batch_stats: Tree
    params: Tree
    eval_loss: Array


def batch_moments(h: Array, xp: Any = np) -> tuple[Array, Array]:
    """Return the mean and the biased variance of each column: mean(h), mean((h - mean(h))^2).

    Args:
        h: (N, C).
        xp: the array library.

    Returns:
        Two arrays (C,), in units of h and of h squared.
    """
    h = _widen(h, xp)
    mean = xp.mean(h, axis=-2)
    return mean, xp.mean((h - _per_row(mean)) ** 2, axis=-2)


def train_forward(params: Any, x: Array, xp: Any = np) -> Forward:
    """Return the forward pass in train mode, which normalises by the batch's own moments.

    Args:
        params: the tree of the reference model: kernels (D, H) and (H, 1), the rest (H,) and (1,).
        x: (N, D).
        xp: the array library.
    """
    h = _affine(params["Dense_0"], x, xp)
    mean, var = batch_moments(h, xp)
    return _after_moments(params, h, mean, var, xp)


def eval_forward(params: Any, batch_stats: Any, x: Array, xp: Any = np) -> Forward:
    """Return the forward pass in eval mode, which normalises by the running statistics.

    Args:
        params: the tree of the reference model.
        batch_stats: {"BatchNorm_0": {"mean": (H,), "var": (H,)}}.
        x: (N, D).
        xp: the array library.
    """
    running = batch_stats["BatchNorm_0"]
    mean, var = _widen(running["mean"], xp), _widen(running["var"], xp)
    return _after_moments(params, _affine(params["Dense_0"], x, xp), mean, var, xp)


def mean_squared_error(predictions: Array, y: Array, xp: Any = np) -> Array:
    """Return mean((p - y)^2), a scalar, for predictions (N,) and targets (N,)."""
    return xp.mean((_widen(predictions, xp) - _widen(y, xp)) ** 2, axis=-1)


def gradients(params: Any, x: Array, y: Array, xp: Any = np) -> Tree:
    """Return dL/dparams of the training loss, a tree like ``params``, derived by hand.

    Backwards through the model, where dp stands for dL/dp:

        dp = 2 (p - y) / N
        dW2 = r^T dp, db2 = sum dp, dr = dp W2^T
        da = dr where a > 0, else 0 (the derivative of ReLU at 0 is 0, as in JAX)
        dgamma = sum(da z), dbeta = sum(da), dz = gamma da
        dh = (dz - mean(dz) - z mean(dz z)) / sqrt(v + eps), since mu and v depend on every row
        dW1 = x^T dh, db1 = sum(dh) = 0, since subtracting mu cancels b1

    Args:
        params: the tree of the reference model.
        x: (N, D).
        y: (N,).
        xp: the array library.
    """
    fwd = train_forward(params, x, xp)
    x, y = _widen(x, xp), _widen(y, xp)
    gamma = _widen(params["BatchNorm_0"]["scale"], xp)
    w2 = _widen(params["Dense_1"]["kernel"], xp)

    dp = (2 * (fwd.predictions - y) / y.shape[-1])[..., None]
    da = xp.where(fwd.affine > 0, dp @ _transposed(w2, xp), 0.0)
    dz = _per_row(gamma) * da
    mean_dz, mean_dz_z = xp.mean(dz, axis=-2), xp.mean(dz * fwd.normalized, axis=-2)
    centred = dz - _per_row(mean_dz) - fwd.normalized * _per_row(mean_dz_z)
    dh = centred / _per_row(xp.sqrt(fwd.var + EPSILON))
    return {
        "Dense_0": {"kernel": _transposed(x, xp) @ dh, "bias": xp.sum(dh, axis=-2)},
        "BatchNorm_0": {
            "scale": xp.sum(da * fwd.normalized, axis=-2),
            "bias": xp.sum(da, axis=-2),
        },
        "Dense_1": {"kernel": _transposed(fwd.hidden, xp) @ dp, "bias": xp.sum(dp, axis=-2)},
    }


def moving_average(old: Array, batch: Array, xp: Any = np) -> Array:
    """Return momentum * old + (1 - momentum) * batch, elementwise."""
    return MOMENTUM * _widen(old, xp) + (1 - MOMENTUM) * _widen(batch, xp)


def sgd_update(params: Any, grads: Any, lr: Array, xp: Any = np) -> Tree:
    """Return params - lr * grads, leaf by leaf; ``lr`` is a scalar."""
    rate = _widen(lr, xp)

    def moved(value: Array, grad: Array) -> Array:
        value, grad = _widen(value, xp), _widen(grad, xp)
        each = xp.reshape(rate, rate.shape + (1,) * (value.ndim - rate.ndim))
        return value - each * grad

    return {
        layer: {name: moved(value, grads[layer][name]) for name, value in leaves.items()}
        for layer, leaves in params.items()
    }


def evaluate(params: Any, batch_stats: Any, x: Array, y: Array, xp: Any = np) -> Array:
    """Return the loss in eval mode, shape (1,).

    Args:
        params: the tree of the reference model.
        batch_stats: {"BatchNorm_0": {"mean": (H,), "var": (H,)}}.
        x: (N, D).
        y: (N,).
        xp: the array library.
    """
    predictions = eval_forward(params, batch_stats, x, xp).predictions
    return mean_squared_error(predictions, y, xp)[..., None]


def expected(state: Any, x: Array, y: Array, lr: Array, xp: Any = np) -> Expected:
    """Return the expected results of one step of plain SGD, and of the evaluation after it.

    Args:
        state: has ``params`` and ``batch_stats``, the trees of the reference model.
        x: (N, D).
        y: (N,).
        lr: scalar.
        xp: the array library.
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
    return xp.asarray(value, dtype=np.float64)


def _per_row(features: Array) -> Array:
    """Return (..., C) as (..., 1, C), which broadcasts against the rows of (..., N, C)."""
    return features[..., None, :]


def _transposed(matrix: Array, xp: Any) -> Array:
    return xp.swapaxes(matrix, -1, -2)


def _affine(layer: Any, x: Array, xp: Any) -> Array:
    return _widen(x, xp) @ _widen(layer["kernel"], xp) + _per_row(_widen(layer["bias"], xp))


def _after_moments(params: Any, h: Array, mean: Array, var: Array, xp: Any) -> Forward:
    norm = params["BatchNorm_0"]
    normalized = (h - _per_row(mean)) / _per_row(xp.sqrt(var + EPSILON))
    scale, bias = _widen(norm["scale"], xp), _widen(norm["bias"], xp)
    affine = _per_row(scale) * normalized + _per_row(bias)
    hidden = xp.maximum(affine, 0.0)
    predictions = _affine(params["Dense_1"], hidden, xp)[..., 0]
    return Forward(mean, var, normalized, affine, hidden, predictions)

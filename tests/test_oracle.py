"""The derivation by hand: right against JAX's, against differences, and against a sum on paper."""

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnverify import compat, oracle, reference

# Both sides compute in float64, whose rounding is 1e-16; a wrong formula is off by far more. What
# lies between is lost where JAX's variance, a difference of two means, cancels: 4 digits at worst here.
CLOSE = 1e-10

SHAPES = [(1, 1), (2, 1), (1, 3), (3, 2), (7, 5), (32, 16)]


class Variables(NamedTuple):
    params: Any
    batch_stats: Any


def draw(
    seed: int, rows: int, features: int, dtype: Any = np.float64
) -> tuple[Variables, Any, Any, Any]:
    """Return variables as they are after some training, and a batch off its centre."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(dtype)

    hidden = oracle.HIDDEN
    params = {
        "Dense_0": {"kernel": normal(features, hidden), "bias": normal(hidden)},
        "BatchNorm_0": {"scale": 1 + normal(hidden) / 2, "bias": normal(hidden)},
        "Dense_1": {"kernel": normal(hidden, 1), "bias": normal(1)},
    }
    batch_stats = {"BatchNorm_0": {"mean": normal(hidden), "var": normal(hidden) ** 2}}
    x = (3 * normal(rows, features) + 10).astype(dtype)
    return Variables(params, batch_stats), x, normal(rows), dtype(0.1)


def assert_close(actual: Any, expected: Any, tolerance: float = CLOSE) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(expected)[0]
    assert jax.tree_util.tree_structure(actual) == jax.tree_util.tree_structure(expected)
    for (path, want), got in zip(leaves, jax.tree_util.tree_leaves(actual), strict=True):
        assert np.shape(got) == np.shape(want), path
        scale = max(1.0, float(np.max(np.abs(want))))
        error = float(np.max(np.abs(np.asarray(got) - np.asarray(want)))) / scale
        assert error <= tolerance, f"{jax.tree_util.keystr(path)} is off by {error:.2g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_loss_gradients_and_statistics_are_those_of_flax(shape: tuple[int, int], seed: int) -> None:
    """Automatic differentiation of the reference, in float64, gives the same numbers."""
    state, x, y, lr = draw(seed, *shape)
    expected = oracle.expected(state, x, y, lr)
    with compat.enable_x64():
        grad_fn = jax.value_and_grad(reference.loss_fn, has_aux=True)
        (loss, batch_stats), grads = grad_fn(state.params, state.batch_stats, x, y)
        assert grads["Dense_0"]["kernel"].dtype == np.float64
    assert_close(expected.loss, loss)
    assert_close(expected.grads, grads)
    assert_close(expected.batch_stats, batch_stats)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_evaluation_is_that_of_flax(shape: tuple[int, int]) -> None:
    """The eval loss is that of the module with the running statistics, after plain SGD."""
    state, x, y, lr = draw(0, *shape)
    expected = oracle.expected(state, x, y, lr)
    with compat.enable_x64():
        after = reference.State(expected.params, expected.batch_stats, ())
        assert_close(expected.eval_loss, np.asarray(reference.evaluate(after, x, y)))
    assert expected.eval_loss.shape == (1,)


@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (7, 5)], ids=str)
def test_gradients_are_the_slopes_of_the_loss(shape: tuple[int, int]) -> None:
    """Central differences along each parameter agree; they know no calculus."""
    state, x, y, _ = draw(1, *shape)
    grads = oracle.gradients(state.params, x, y)
    step = 1e-6

    def loss(layer: str, name: str, entry: tuple[int, ...], change: float) -> float:
        leaf = state.params[layer][name].copy()
        leaf[entry] += change
        params = state.params | {layer: state.params[layer] | {name: leaf}}
        predictions = oracle.train_forward(params, x).predictions
        return float(oracle.mean_squared_error(predictions, y))

    assert np.min(np.abs(oracle.train_forward(state.params, x).affine)) > 1e-3  # no kink is near
    for layer, leaves in grads.items():
        for name, grad in leaves.items():
            for entry in np.ndindex(grad.shape):
                rise = loss(layer, name, entry, step) - loss(layer, name, entry, -step)
                slope = rise / (2 * step)
                # A difference of losses near L keeps eps * L / step of them: some 1e-9 here.
                assert abs(grad[entry] - slope) <= 1e-6 * max(1.0, abs(slope)), (layer, name, entry)


def by_hand() -> tuple[Variables, Any, Any]:
    """Return N = 2, D = 1, x = -1 and 1, every hidden unit h = x: mean 0, variance 1."""
    hidden = oracle.HIDDEN
    params = {
        "Dense_0": {"kernel": np.ones((1, hidden)), "bias": np.zeros(hidden)},
        "BatchNorm_0": {"scale": np.ones(hidden), "bias": np.zeros(hidden)},
        "Dense_1": {"kernel": np.full((hidden, 1), 1 / hidden), "bias": np.zeros(1)},
    }
    batch_stats = {"BatchNorm_0": {"mean": np.zeros(hidden), "var": np.ones(hidden)}}
    return Variables(params, batch_stats), np.array([[-1.0], [1.0]]), np.array([0.0, 0.0])


def test_a_step_agrees_with_one_done_on_paper() -> None:
    """The second row's z is 1/sqrt(1 + eps), its prediction the same; the first row is cut off."""
    state, x, y = by_hand()
    z = 1 / np.sqrt(1 + 1e-5)
    expected = oracle.expected(state, x, y, 0.5)
    assert expected.loss == pytest.approx(z**2 / 2, rel=1e-15)
    np.testing.assert_allclose(expected.grads["Dense_1"]["bias"], [z], rtol=1e-15)
    np.testing.assert_allclose(expected.grads["Dense_1"]["kernel"], np.full((8, 1), z * z))
    np.testing.assert_allclose(expected.params["Dense_1"]["bias"], [-z / 2], rtol=1e-15)
    # mean: 0.99 * 0 + 0.01 * 0; variance: 0.99 * 1 + 0.01 * 1, divided by N, not N - 1
    np.testing.assert_array_equal(expected.batch_stats["BatchNorm_0"]["mean"], np.zeros(8))
    np.testing.assert_allclose(expected.batch_stats["BatchNorm_0"]["var"], np.ones(8), rtol=1e-15)


def test_the_old_value_weighs_momentum() -> None:
    """From 1 towards 0 a statistic goes to 0.99, not to 0.01."""
    assert oracle.moving_average(1.0, 0.0) == pytest.approx(0.99, rel=1e-15)


def test_the_slope_of_relu_at_zero_is_zero() -> None:
    """Where every activation is exactly 0 nothing before ReLU has a gradient, as in JAX."""
    state, x, y = by_hand()
    dead = state.params["BatchNorm_0"] | {"scale": np.zeros(oracle.HIDDEN)}
    params = state.params | {"BatchNorm_0": dead}
    grads = oracle.gradients(params, x, y + 1)
    for layer in ("Dense_0", "BatchNorm_0"):
        for grad in grads[layer].values():
            assert not np.any(grad)
    with compat.enable_x64():
        by_jax = jax.grad(reference.loss_fn, has_aux=True)(params, state.batch_stats, x, y + 1)[0]
    assert_close(grads, by_jax)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_constant_batch_has_no_variance_and_finite_gradients(rows: int) -> None:
    """Equal rows, a single one among them, give variance 0, and epsilon keeps all finite."""
    state, x, y, lr = draw(2, rows, 3)
    expected = oracle.expected(state, np.broadcast_to(x[:1], x.shape), y, lr)
    # The mean of equal float64 values can be a last place away from them; its square is nothing.
    assert np.all(oracle.train_forward(state.params, x[:1]).var == 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree_util.tree_leaves(expected))


def test_the_bias_before_the_normalisation_has_no_gradient() -> None:
    """What it adds to every row, the batch mean takes away."""
    state, x, y, _ = draw(3, 7, 5)
    assert np.max(np.abs(oracle.gradients(state.params, x, y)["Dense_0"]["bias"])) < 1e-13


def test_input_in_float32_is_widened() -> None:
    """The step's own float32 numbers are judged in float64."""
    state, x, y, lr = draw(4, 3, 2, np.float32)
    for leaf in jax.tree_util.tree_leaves(oracle.expected(state, x, y, lr)):
        assert leaf.dtype == np.float64


def stacked(*lead: int) -> tuple[list[Any], Any]:
    """Return the arguments of several steps, and the same with these leading axes."""
    steps = [draw(seed, 7, 5) for seed in range(int(np.prod(lead)))]

    def stack(*leaves: Any) -> Any:
        return np.stack(leaves).reshape(*lead, *np.shape(leaves[0]))

    return steps, jax.tree_util.tree_map(stack, *steps)


@pytest.mark.parametrize("lead", [(1,), (3,), (2, 2)], ids=str)
def test_leading_axes_are_steps_of_their_own(lead: tuple[int, ...]) -> None:
    """Each of some stacked steps gives what it gives alone, to the last places of float64."""
    steps, args = stacked(*lead)
    together = oracle.expected(*args)
    for place, step in zip(np.ndindex(*lead), steps, strict=True):
        one = jax.tree_util.tree_map(lambda leaf, place=place: leaf[place], together)
        assert_close(one, oracle.expected(*step), 1e-14)


def test_the_same_derivation_runs_compiled() -> None:
    """With jax.numpy it runs under jit, stacked, and gives NumPy's numbers in float64."""
    _, args = stacked(3)
    with compat.enable_x64():
        compiled = jax.jit(lambda *args: oracle.expected(*args, xp=jnp))(*args)
    assert_close(compiled, oracle.expected(*args))


def test_the_oracle_shares_nothing_with_what_it_judges() -> None:
    """Importing it loads no jax, so no bug of JAX can be on both sides."""
    code = "import sys, bnverify.oracle; sys.exit('jax' in sys.modules)"
    root = Path(oracle.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0

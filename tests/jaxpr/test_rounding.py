"""The noise covers the true error, handles kinks and poles, and is infinite where it is unknown."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnverify import compat, reference
from bnverify.jaxpr import draws
from bnverify.jaxpr.arithmetic import pole
from bnverify.jaxpr.rounding import cases_per_chunk, rounding
from bnverify.observe import QUICK

CASES = 256
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _the_same_numbers_in_every_order(monkeypatch):
    """Draw each test's numbers anew, whichever tests run before it."""
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))


def normal(*shape, scale=1.0, offset=0.0):
    """Return normal float32 numbers."""
    return (RNG.normal(size=shape) * scale + offset).astype(np.float32)


def claim(function, *stacked, seed=0):
    """Return ``function``'s results in its own dtypes, and its ``Rounded``, on stacked inputs."""
    reading = rounding(function, *jax.tree_util.tree_map(lambda leaf: leaf[0], stacked), seed=seed)
    actual = jax.jit(jax.vmap(function))(*stacked)
    exact, noise = reading.evaluate(*stacked)
    wide = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf).astype(np.float64), actual)
    return wide, exact, noise, reading.unknown


def equal_but_for_sums(one, other):
    """Assert equality up to the order in which NumPy sums in float64."""
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-30)


def worst(actual, exact, noise):
    """Return the largest ratio of error to noise over a pytree."""
    ratios = [0.0]
    for a, e, n in zip(*map(jax.tree_util.tree_leaves, (actual, exact, noise)), strict=True):
        some = (a != e) & np.isfinite(n)
        if some.any():
            assert (n[some] > 0).all(), "an error where none was claimed"
            ratios.append(float(np.max(np.abs(a - e)[some] / n[some])))
    return max(ratios)


def steps(subject):
    """Return a function that evaluates and then takes a step."""

    def run(state, x, y, lr):
        return *subject.step(state, x, y, lr), subject.evaluate(state, x, y)

    return run


def batches(subject, n, d, scale, offset):
    """Return stacked arguments for ``steps(subject)``."""
    x = normal(CASES, n, d) * scale + offset
    state = jax.jit(jax.vmap(subject.init))(np.arange(CASES, dtype=np.int32), x)
    return state, x.astype(np.float32), normal(CASES, n), np.full(CASES, 0.1, np.float32)


@pytest.mark.parametrize("make", [reference.sgd, reference.adamw], ids=["sgd", "adamw"])
def test_noise_covers_the_error_of_the_step(make):
    """For scales over six decades and offsets to 1e4, every error of a step is within the noise."""
    scale = 10.0 ** RNG.uniform(-3, 3, (CASES, 1, 1))
    offset = 10.0 ** RNG.uniform(-2, 4, (CASES, 1, 2)) * RNG.choice([-1, 0, 1], (CASES, 1, 2))
    arguments = batches(make(), 4, 2, scale, offset)
    actual, exact, noise, unknown = claim(steps(make()), *arguments)
    assert unknown == frozenset()
    assert worst(actual, exact, noise) <= 1
    known = np.isfinite(noise[1].loss)
    assert 0.5 < known.mean() < 1


def test_relative_faults_of_a_ten_thousandth_exceed_the_noise():
    """A fault of 1e-4 in a statistic, gradient or eval loss exceeds twice the noise in every case.

    A fault of 1e-5 does in most cases; the limit is near 3e-6.
    """
    arguments = batches(reference.sgd(), 8, 3, 1.0, 0.5)
    _, exact, noise, _ = claim(steps(reference.sgd()), *arguments)
    leaves = {
        "mean": lambda out: out[0].batch_stats["BatchNorm_0"]["mean"],
        "var": lambda out: out[0].batch_stats["BatchNorm_0"]["var"],
        "kernel": lambda out: out[1].grads["Dense_0"]["kernel"],
        "scale": lambda out: out[1].grads["BatchNorm_0"]["scale"],
        "last": lambda out: out[1].grads["Dense_1"]["kernel"],
        "eval": lambda out: out[2],
    }
    for fault, caught in ((1e-4, 0.99), (1e-5, 0.75), (3e-6, 0.35)):
        for name, leaf in leaves.items():
            size = (np.abs(leaf(exact)) / (2 * leaf(noise))).reshape(CASES, -1).max(axis=1)
            assert (size * fault > 1).mean() >= caught, (name, fault)


def test_moving_data_makes_no_noise():
    """Inputs, selections, negation and multiplication by 2 are exact."""

    def function(x, y):
        parts = jnp.concatenate([x[::-1], -y]), jnp.where(x > y, x, y), jnp.sort(2 * x)
        return *parts, jnp.max(x), x.reshape(2, 2).T, jnp.argmax(x), x > y, x + 0.0

    actual, exact, noise, _ = claim(function, normal(CASES, 4), normal(CASES, 4))
    for a, e, n in zip(actual, exact, noise, strict=True):
        np.testing.assert_array_equal(a, e)
        np.testing.assert_array_equal(n, 0)


OPERATIONS = {
    "softmax": lambda x, y: jax.nn.softmax(x * y),
    "counts": lambda x, y: x / (1 + jnp.ones((4, 4), jnp.int32) @ jnp.arange(4)) + y,
    "masked": lambda x, y: jax.nn.softmax(jnp.where(jnp.arange(4) < 3, x, -jnp.inf) * 2 + y[0]),
    "logsumexp": lambda x, y: jax.nn.logsumexp(100 * x + y),
    "gelu": lambda x, y: jax.nn.gelu(x) + jnp.tanh(y),
    "gradient of tanh": lambda x, y: jax.grad(lambda z: jnp.sum(jnp.tanh(3 * z) * y))(x),
    "log2": lambda x, y: jnp.log2(jnp.abs(x)) + y,
    # (1 + x/10 - 1)**3, expanded: the terms cancel
    "polynomial": lambda x, y: jnp.polyval(jnp.array([1.0, -3, 3, -1]), 1 + x / 10) + 1e-3 * y,
    "norm": lambda x, y: jnp.linalg.norm(x) / jnp.abs(y).sum(),
    "scan": lambda x, y: jax.lax.scan(
        lambda c, t: (jnp.tanh(c * t + x), c.sum()), y, jnp.arange(5.0), reverse=True
    ),
    "while": lambda x, y: jax.lax.while_loop(
        lambda s: s[0] < 4, lambda s: (s[0] + 1, s[1] * 1.1 + y), (0, x)
    )[1],
    "cond": lambda x, y: jax.lax.cond(x[0] > 0, lambda z: z * 1.1, lambda z: z / 3, y),
    "scatter": lambda x, y: x.at[jnp.array([0, 0, 1])].add(y[:3] * 1.1).at[3].mul(1.1),
    "clip": lambda x, y: jnp.clip(x * 3, -1, 1) + jax.lax.clamp(-1.0, y * 1.1, 1.0),
    "cumsum": lambda x, y: jnp.cumsum(x * 1.1) + jnp.cumsum(y)[::-1],
    "conv": lambda x, y: jnp.convolve(x, y, mode="same"),
    "dropout": lambda x, y: jnp.where(
        jax.random.bernoulli(jax.random.PRNGKey(1), 0.5, (4,)), x / 0.7, y * 0
    ),
    "random": lambda x, y: x * jax.random.normal(jax.random.PRNGKey(0), (4,)) + y,
    "steps": lambda x, y: jnp.floor(x * 1.1) + jnp.round(y * 3) + (x * 9).astype(jnp.int32),
    "signs": lambda x, y: jnp.sign(x * 1.1 - y) * jnp.abs(x - y * 1.1),
    "logic": lambda x, y: jnp.where(~((x * 1.1 > y) & (x * 1.3 < 1)) | (y * 1.1 > 1), x, y) * 3,
    "power": lambda x, y: jnp.abs(x) ** 0.3 + y**3 + (jnp.abs(y) + 1) ** -2,
    "lookup": lambda x, y: x[jnp.argmax(y * 1.1)] * y,
    "bfloat16": lambda x, y: (x.astype(jnp.bfloat16) * y.astype(jnp.bfloat16)).sum(),
    "float16": lambda x, y: x.astype(jnp.float16) * y.astype(jnp.float16) * jnp.float16(1e-4),
    "remat": lambda x, y: jax.grad(lambda z: jnp.sum(jax.checkpoint(jnp.sin)(z * y)))(x),
    "custom": lambda x, y: jax.grad(lambda z: jax.nn.relu(z * y + x).sum())(x),
    "fft": lambda x, y: jnp.fft.fft(x).real + y,
}


def test_noise_covers_the_error_of_every_operation():
    """The error of each operation that models use is within the noise."""

    def function(x, y):
        return {name: operation(x, y) for name, operation in OPERATIONS.items()}

    actual, exact, noise, unknown = claim(function, normal(CASES, 4), normal(CASES, 4))
    assert "fft" in unknown  # complex numbers are not supported
    for name in OPERATIONS:
        assert worst(actual[name], exact[name], noise[name]) <= 1, name
        finite = np.mean([np.isfinite(n).mean() for n in jax.tree_util.tree_leaves(noise[name])])
        assert finite == 0 if name == "fft" else finite > 0.95, name


def test_equations_that_no_result_depends_on_are_not_read():
    """What the program computes and drops is neither run nor unknown."""
    reading = rounding(lambda x: (jnp.fft.fft(x), x + 1)[1], normal(CASES, 4)[0])
    exact, _ = reading.evaluate(normal(CASES, 4))
    assert reading.unknown == frozenset()
    assert exact.shape == (CASES, 4)


@pytest.mark.parametrize(
    ("dtype", "unit"), [(jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)]
)
def test_the_noise_is_a_few_ulps_of_the_dtype(dtype, unit):
    """A product has a tolerance of a few ulps of its dtype."""
    x = jnp.asarray(normal(CASES, offset=10), dtype)
    _, exact, noise, _ = claim(lambda x: x * x, x)
    assert 1 < np.median(noise / exact) / unit < 6


def test_equal_terms_need_not_cancel():
    """E[h^2] - E[h]^2 of one row is 0 in exact arithmetic; with an FMA it is the rounding of h^2."""

    def variance(x):
        h = x * 1.1
        return jnp.mean(h * h, 0) - jnp.mean(h, 0) ** 2

    actual, exact, noise, _ = claim(variance, normal(CASES, 1, 3, offset=100))
    assert np.abs(exact).max() < 1e-9
    assert (noise > 1e-4).all()
    assert worst(actual, exact, noise) <= 1


def test_the_uses_of_a_sum_that_cancels_a_product_need_not_cancel():
    """A use may or may not fuse the product, so two uses differ by the product's rounding.

    The gradients through two successive normalisations of two rows consist of such differences.
    """

    def function(a, b, c):
        total = a * b + c
        return total * 3.0 - jnp.reshape(total, (4, 1)).sum(1) * 3.0

    a, b = normal(CASES, 4, scale=0.1, offset=1.0), normal(CASES, 4, scale=0.1, offset=1.0)
    unit = 3.0 * np.finfo(np.float32).eps
    _, exact, cancelled, _ = claim(function, a, b, -(a * b) * np.float32(1 + 1e-5))
    assert np.all(exact == 0)
    assert np.all(cancelled > unit / 8)
    _, _, ordinary, _ = claim(function, a, b, np.ones_like(a))
    assert np.all(ordinary < 10 * unit)


def test_a_division_by_a_constant_counts_as_a_product():
    """XLA multiplies by the reciprocal, which each use of a centred batch may fuse or not.

    A layer of a single input is a product, too: the statistics and the normalised values behind it
    come from centred values that differ by the rounding of the mean.
    """

    def normalised(h):
        mean = jnp.mean(h, axis=0)
        return (h - mean) * jax.lax.rsqrt(jnp.mean(h**2, axis=0) - mean**2 + 1e-5)

    def function(x, kernel):
        centred = x - jnp.sum(jnp.concatenate([x, x, x]), axis=0) / 6.0
        return jax.value_and_grad(
            lambda one, other: jnp.mean(normalised(centred @ one) * other @ one.T), (0, 1)
        )(kernel, kernel)

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(100, 200, (CASES, 1, 1)) + np.array([[0.0], [1.0]]), jnp.float32)
    actual, exact, noise, _ = claim(function, x, rng.normal(size=(CASES, 1, 8)).astype(np.float32))
    assert worst(actual, exact, noise) <= 1


def test_whether_an_overflow_is_skipped_may_be_unknown():
    """If rounding decides whether a gradient overflows, both the old and the new value are allowed."""

    def function(x):
        scaled = (x * x).astype(jnp.float16)
        finite = jnp.all(jnp.isfinite(scaled)) & jnp.all(jnp.array([jnp.isfinite(x).all()]))
        return jnp.where(finite, x - 1.0, x)

    largest = float(jnp.finfo(jnp.float16).max)
    for size in (largest**0.5 * 1.0001, 1e4):  # exact arithmetic does not overflow at all
        _, _, noise, _ = claim(function, np.full((CASES, 2), size, np.float32))
        np.testing.assert_array_equal(noise, np.inf)
    actual, exact, noise, _ = claim(function, np.full((CASES, 2), 10.0, np.float32))
    assert worst(actual, exact, noise) <= 1
    assert (noise < 1e-2).all()


def test_both_sides_of_a_kink_within_rounding_are_allowed():
    """If relu's input is within rounding of 0, its gradient may be 0 or 1."""
    x = normal(CASES)
    near = (x * np.float32(1.1)).astype(np.float32)

    def slope(x, y):
        return jax.grad(lambda z: jax.nn.relu(z * 1.1 - y))(x)

    actual, exact, noise, _ = claim(slope, x, near)
    assert 0 < exact.mean() < 1.1
    assert (noise >= 1.1).all()
    assert worst(actual, exact, noise) <= 1
    _, _, noise, _ = claim(slope, x, near + np.float32(1e-2))
    assert (noise < 1e-5).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "kinked",
    [
        lambda xp, x: xp.maximum(x, 0),
        lambda xp, x: xp.minimum(x, 0),
        lambda xp, x: xp.where(x > 0, x, 0),
        lambda xp, x: xp.sign(x),
        lambda xp, x: xp.clip(x, -0.25, 0.25),
    ],
    ids=["max", "min", "where", "sign", "clip"],
)
def test_at_a_kink_the_exact_run_stays_exact(kinked, dtype):
    """Row 0 has no noise, however close a value is to a kink."""
    x = normal(CASES, 1) * np.float32(10.0) ** RNG.integers(-9, 1, (CASES, 1)).astype(np.float32)

    def function(x):
        return kinked(jnp, x.astype(dtype) * jnp.asarray(1.5, dtype))

    _, exact, _, _ = claim(function, x)
    np.testing.assert_array_equal(exact, kinked(np, x.astype(np.float64) * 1.5))


@pytest.mark.parametrize("step", [jnp.sign, jnp.floor], ids=["sign", "floor"])
def test_noise_at_a_step_is_at_least_its_height(step):
    """Of values closer to a step than their noise, nearly all get a tolerance of at least the step.

    Independent rows all round to the same side of it once in 240,000 of these values.
    """
    x = normal(20_000, 16)
    x = np.concatenate([x, -x], axis=1)

    def function(x):
        return step(jnp.sum(1.1 * x) + 1e-9)

    _, _, noise, _ = claim(function, x)
    assert np.sum(noise < 1) <= 1


def test_an_exact_zero_is_not_in_doubt():
    """A relu unit that is off because its input is exactly 0 stays off in all rows."""
    _, exact, noise, _ = claim(
        lambda x, y: jax.grad(lambda z: jax.nn.relu(z * y) * 3.0)(x),
        normal(CASES),
        0 * normal(CASES),
    )
    np.testing.assert_array_equal(exact, 0)
    np.testing.assert_array_equal(noise < 1e-30, True)


def test_clipping_at_zero_keeps_the_noise():
    """A variance within rounding of 0 has a tolerance, even if no rounded row is positive."""
    x = normal(CASES, 16, scale=1e-3, offset=1000)
    actual, exact, noise, _ = claim(
        lambda x: jnp.maximum(jnp.mean(x * x) - jnp.mean(x) ** 2, 0.0), x
    )
    assert (noise > 1e-3).all()
    assert worst(actual, exact, noise) <= 1


def test_a_denominator_without_digits_has_infinite_noise():
    """A quotient whose denominator is a rounding error has no known error."""
    x = normal(CASES, offset=3)
    near = (x * np.float32(1.1)).astype(np.float32)
    _, _, noise, unknown = claim(lambda x, y: (1 / (x * 1.1 - y), x + y), x, near)
    assert np.isinf(noise[0]).mean() > 0.99
    assert np.isfinite(noise[1]).all()
    assert unknown == frozenset()


def test_overflow_has_infinite_noise():
    """An overflowing intermediate result makes the noise infinite where it is used, and only there."""
    x = normal(CASES, scale=0.1, offset=1) * np.float32(1e25)
    _, _, noise, _ = claim(lambda x: (jnp.sqrt(x * x), x * 1.1), x)
    assert np.isinf(noise[0]).all()
    assert np.isfinite(noise[1]).all()


def test_underflow_to_zero_is_within_the_noise():
    """A product below the dtype's range may be 0, and so may its multiples."""
    x = normal(CASES, scale=0.1, offset=1) * np.float32(1e-25)
    actual, exact, noise, _ = claim(lambda x: (x * x) * 1e30, x)
    assert (exact > 0).all()
    np.testing.assert_array_equal(actual, 0)
    assert worst(actual, exact, noise) <= 1


def test_scaling_by_a_literal_out_of_range_is_detected():
    """Half of a number just in range may become 0, as in BatchNorm's var**-1.5; three times overflows."""
    x = np.abs(normal(CASES, scale=0.05)) + np.float32(1)
    small = claim(lambda x, y: (x * x) * 0.5 * y, x * np.float32(1.2e-19), x * np.float32(1e37))
    assert (small[1] > 0).all()
    np.testing.assert_array_equal(small[0], 0)
    assert worst(*small[:3]) <= 1
    _, _, noise, _ = claim(lambda x: (x * x) * 3.0 - 1.0, x * np.float32(1.2e19))
    assert np.isinf(noise).all()


def test_an_underflow_that_cancels_keeps_its_noise():
    """If a number near underflow were flushed in all rows, its multiples would cancel without noise."""
    x = np.abs(normal(CASES, scale=0.05)) + np.float32(1)
    y = np.abs(normal(CASES, scale=0.05)) + np.float32(1)

    def function(x, y):
        near = x * x
        return near * (y + 1e37) - near * y - near * 1e37

    actual, exact, noise, _ = claim(function, x * np.float32(1.5e-19), y * np.float32(1e37))
    assert worst(actual, exact, noise) <= 1


def test_a_loop_length_that_depends_on_rounding_has_infinite_noise():
    """If rows disagree on the number of iterations, the error is unknown."""

    def function(x, y):
        return jax.lax.while_loop(lambda s: s * 1.1 < y, lambda s: s * 1.1, x)

    x = np.abs(normal(CASES)) + np.float32(1)
    steady = claim(function, x, x * np.float32(1.5))
    assert np.isfinite(steady[2]).mean() > 0.99
    near = np.float32(1.1) * (np.float32(1.1) * x)
    assert np.isinf(claim(function, x, near)[2]).mean() > 0.9


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_errors_of_two_iterations_do_not_cancel(loop):
    """A sum over iterations whose values nearly cancel has the rounding errors of both."""

    def function(x):
        values = jnp.stack([x * 1.1, x * -1.1001])

        def turn(total, value):
            return total + jnp.sin(value), None

        if loop == "scan":
            return jax.lax.scan(turn, jnp.zeros_like(x), values)[0]
        body = lambda state: (state[0] + 1, turn(state[1], values[state[0]])[0])  # noqa: E731
        start = jnp.int32(0), jnp.zeros_like(x)
        return jax.lax.while_loop(lambda state: state[0] < 2, body, start)[1]

    x = normal(CASES, 4, scale=0.1, offset=1.0)
    actual, exact, noise, _ = claim(function, x)
    assert worst(actual, exact, noise) <= 1
    # The sine is off by four ulps, the sum by one.
    assert np.median(noise) > 5 * np.finfo(np.float32).eps


def test_equations_after_a_loop_have_their_own_draws():
    """A quotient by a value from the loop: if both had the same error, it would cancel."""

    def function(x):
        _, made = jax.lax.while_loop(
            lambda s: s[0] < 1, lambda s: (s[0] + 1, s[1] * 1.1), (jnp.int32(0), x)
        )
        return 1 / made

    actual, exact, noise, _ = claim(function, np.abs(normal(CASES, 4)) + np.float32(1))
    assert worst(actual, exact, noise) <= 1


def test_a_branch_that_depends_on_rounding_has_infinite_noise():
    """If rows disagree on the branch, the error is unknown."""

    def function(x, y):
        return jax.lax.cond(x * 1.1 > y, lambda: x * 3, lambda: x - 1)

    x = normal(CASES, offset=3)
    near = (x * np.float32(1.1)).astype(np.float32)
    assert np.isinf(claim(jax.jit(function), x, near)[2]).mean() > 0.99
    assert np.isfinite(claim(jax.jit(function), x, near + np.float32(1))[2]).all()


def test_foreign_code_has_infinite_noise_and_is_listed():
    """The rounding of a Python callback is unknown."""

    def function(x):
        out = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(np.sin, out, x) * 2, x * 1.1

    reading = rounding(function, np.float32(1))
    _, noise = reading.evaluate(np.ones(1, np.float32))
    assert reading.unknown == {"pure_callback"}
    assert [bool(np.isfinite(each).all()) for each in noise] == [False, True]


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_chunking_does_not_change_the_results(monkeypatch, chunk):
    """Each case has the same results whatever the chunk size."""
    subject = reference.adam()
    arguments = batches(subject, 4, 2, 1.0, 0.0)
    some = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf)[:7], arguments)
    reading = rounding(steps(subject), *jax.tree_util.tree_map(lambda leaf: leaf[0], some))
    whole = reading.evaluate(*some)
    module = sys.modules[rounding.__module__]
    size = module.BYTES / cases_per_chunk(reading.program.jaxpr)
    monkeypatch.setattr(module, "BYTES", (chunk + 0.5) * size)
    assert cases_per_chunk(reading.program.jaxpr) == chunk
    jax.tree_util.tree_map(equal_but_for_sums, reading.evaluate(*some), whole)


def test_of_two_values_symmetric_about_a_kink_one_is_beyond_it():
    """Two rows minus their mean are a and -a: relu keeps one of them, so their difference counts."""

    def function(x):
        rows = jnp.square(jnp.sqrt(x)) / x - 1  # nothing but rounding error
        return jnp.diff(jax.nn.relu(rows - jnp.mean(rows)))[0]

    actual, exact, noise, _ = claim(function, np.abs(normal(CASES, 2)))
    assert np.isfinite(noise).all()
    assert worst(actual, exact, noise) <= 1


def test_arguments_of_another_structure_raise():
    """Arguments must have the tree structure that was traced."""
    reading = rounding(lambda x: x["a"], {"a": np.float32(1)})
    with pytest.raises(TypeError, match="traced on"):
        reading.evaluate({"b": np.ones(1, np.float32)})


def test_draws_of_large_arrays_are_pairwise_independent():
    """Random signs for each index of each axis give uncorrelated errors."""
    draw = draws.Draws(401).independent(0, (40, 30))[:, 0]
    assert draw.shape == (401, 40, 30)
    np.testing.assert_array_equal(draw[0], 0)
    np.testing.assert_allclose(np.sqrt(np.mean(draw[1:] ** 2)), 1, rtol=0.05)
    correlation = np.mean(draw[1:, 3, 4] * draw[1:, 5, 4])
    assert abs(correlation) < 0.2


def test_poles():
    """Denominators, arguments of logarithms, and bases of negative powers."""

    def poles(function, *args):
        return [pole(eqn) for eqn in jax.make_jaxpr(function)(*args).jaxpr.eqns]

    one = np.float32(1)
    assert poles(lambda x, y: x / y, one, one) == [1]
    assert poles(jax.lax.rsqrt, one) == [0]
    assert poles(jax.lax.log, one) == [0]
    assert poles(lambda x: jax.lax.integer_pow(x, -2), one) == [0]
    assert poles(lambda x: jax.lax.integer_pow(x, 2), one) == [None]
    assert poles(lambda x: jax.lax.pow(x, np.float32(-0.5)), one) == [0]
    assert poles(lambda x: jax.lax.pow(x, np.float32(0.5)), one) == [None]
    assert poles(jax.lax.pow, one, one) == [None]


def test_adam_has_infinite_noise_only_where_the_gradient_is_noise():
    """The bias before a normalisation has gradient 0: Adam turns its rounding into lr or -lr."""
    subject = reference.make_subject(optax.adam)
    actual, exact, noise, _ = claim(steps(subject), *batches(subject, 8, 3, 1.0, 0.0))
    params = noise[0].params
    assert np.isinf(params["Dense_0"]["bias"]).any(axis=1).mean() > 0.9
    assert np.isfinite(params["Dense_1"]["kernel"]).all(axis=1).mean() > 0.8
    assert worst(actual, exact, noise) <= 1


def test_equal_rows_in_16_bits_have_equal_errors():
    """In bfloat16 equal values have equal errors, which add up in a sum instead of averaging out."""

    def function(x):
        rows = jnp.broadcast_to(x, (64,))
        far, near = (rows * 1.1).astype(jnp.bfloat16), (rows * 1.08).astype(jnp.bfloat16)
        return jnp.sum((far - near).astype(jnp.float32))

    actual, exact, noise, _ = claim(function, normal(CASES))
    assert worst(actual, exact, noise) <= 2  # the laws' limit; 8 times this with independent errors


def test_errors_of_partial_sums_do_not_cancel():
    """Rows and columns that add up to 0 cancel the errors of the factors, but not those of the sums."""

    def factor(part, rest):
        return np.stack([*(both := np.concatenate([part, rest], -1)), both.sum(0)]).astype(
            np.float32
        )

    def function(a, b):
        signs = jnp.array([1.0, 1.0, -1.0])
        return signs @ (a @ b.T) @ signs

    a, b = (RNG.integers(-2048, 2048, (CASES, 2, 64)) for _ in range(2))
    small = RNG.integers(-4, 4, b.shape)  # the two halves of a sum cancel but for this
    left = np.stack([factor(each, each) for each in a])
    right = np.stack([factor(*each) for each in zip(b, small - b, strict=True)])
    actual, exact, noise, _ = claim(function, left, right)
    assert (exact == 0).all()
    assert (actual != 0).any()
    assert worst(actual, exact, noise) <= 1


def test_many_equal_rows_in_32_bits_have_equal_errors():
    """In a long sum equal errors are visible in float32 too, above all where terms cancel."""

    def function(x):
        root = jnp.sqrt(x)
        return jnp.sum(root * root - x)

    actual, exact, noise, _ = claim(function, np.repeat(np.abs(normal(CASES, 1)) + 0.1, 1024, 1))
    assert worst(actual, exact, noise) <= 1  # 9 with independent errors


@pytest.mark.parametrize("images", [(8, 4, 4), (41, 4, 4), (64, 8, 8)], ids=str)
def test_equal_numbers_may_be_added_one_after_another(images):
    """The error of such a sum grows with the number of its terms, and that of a fast variance too."""

    def function(x):
        mean, squares = (jnp.mean(each, axis=(0, 1, 2)) for each in (x, x * x))
        return mean, squares, squares - mean * mean

    x = np.broadcast_to(RNG.uniform(1, 2, (32, 1, 1, 1, 6)).astype(np.float32), (32, *images, 6))
    x = x * np.where(np.arange(images[0]) == 0, np.float32(0.5), 1).reshape(-1, 1, 1, 1)
    _, exact, noise, _ = claim(function, x)
    program = compat.compiled(jax.jit(jax.vmap(function)).lower(x), QUICK)
    actual = [np.asarray(leaf).astype(np.float64) for leaf in program(x)]
    assert worst(actual, list(exact), list(noise)) <= 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "values", [(1.129, -1.129, 2.258, -2.258), (1.0121, 1.0126, 1.0131, 1.0135)]
)
def test_equal_digits_in_16_bits_have_equal_errors(values, seed):
    """Numbers that differ by sign or a power of two, or round to one number, have one relative error."""
    x = np.float32(np.tile(values, (1, 16)))

    def function(x):
        return jnp.sum(jnp.square(x.astype(jnp.bfloat16).astype(jnp.float32)))

    actual, exact, noise, _ = claim(function, x, seed=seed)
    assert worst(actual, exact, noise) <= 2  # the laws' limit


def test_float16_subnormals_keep_their_errors():
    """float16 is computed in float32: differences of subnormal numbers keep the terms' errors."""

    def function(x):
        half = x.astype(jnp.float16)
        return half * 3 - (half + half + half)

    actual, exact, noise, _ = claim(function, normal(CASES, 3, scale=1e-6))
    assert worst(actual, exact, noise) <= 1
    assert (noise > 1e-10).all()


def test_conversion_to_a_narrower_dtype_may_overflow():
    """A value beyond float16's range becomes infinite, so the noise is infinite, too."""
    x = normal(CASES, 3, scale=1e3, offset=1e6)
    _, _, noise, _ = claim(lambda x: (x.astype(jnp.float16), x.astype(jnp.bfloat16)), x)
    assert np.isinf(noise[0]).all()
    assert np.isfinite(noise[1]).all()


def test_scaling_by_a_power_of_two_may_overflow():
    """It does not round, but the noise is infinite beyond the range of float16."""
    x = normal(CASES, 3, scale=10, offset=500)

    def scaled(x):
        half = x.astype(jnp.float16)
        return half * jnp.float16(64), half * jnp.float16(256)

    _, _, noise, _ = claim(scaled, x)
    assert np.isfinite(noise[0]).all()
    assert np.isinf(noise[1]).all()


LOWER_RANK = {
    # x has 4 elements, y is a scalar.
    "a power": lambda x, y: (jnp.abs(x) + 0.5) ** (y * 1.1),
    "a power of a scalar": lambda x, y: jax.lax.pow(jnp.abs(y) * 1.1 + 0.5, x * 1.1),
    "an exponent of 1": lambda x, y: jax.lax.pow(jnp.abs(x) + 0.5, y * 0 + 1),
    "a whole exponent": lambda x, y: jax.lax.pow(x * 1.1, jnp.round(y).astype(jnp.int32)),
    "clamp": lambda x, y: jax.lax.clamp(-jnp.abs(y) * 1.1, x * 1.3, jnp.abs(y) * 1.2),
    "a predicate": lambda x, y: jax.lax.select(y * 1.1 > 0.3, x * 1.1, -x),
    "one of three": lambda x, y: jax.lax.select_n(
        jnp.clip(jnp.floor(y * 1.1), 0, 2).astype(jnp.int32), x * 1.1, x * x, -x
    ),
    "comparison": lambda x, y: jnp.where(jax.lax.gt(x * 1.1, y * 1.3), x * 2, y),
    "comparison, scalar first": lambda x, y: jnp.where(jax.lax.le(y * 1.3, x * 1.1), x * 2, y),
    "logic": lambda x, y: jnp.where((x * 1.1 > 0) & jnp.full(4, y * 1.1 > 0), x * 2, 1.0),
    "max": lambda x, y: jax.lax.max(x * 1.1, y * 1.1),
    "min": lambda x, y: jax.lax.min(y * 1.1, x * 1.1),
    "sum": lambda x, y: jax.lax.add(x * 1.1, y * 1.1),
    "difference": lambda x, y: jax.lax.sub(y * 1.1, x * 1.1),
    "product": lambda x, y: jax.lax.mul(x * 1.1, y * 1.1),
    "quotient": lambda x, y: jax.lax.div(x * 1.1, y * 1.1),
    "remainder": lambda x, y: jax.lax.rem(x * 1.1, jnp.abs(y) + 0.5),
    "angle": lambda x, y: jax.lax.atan2(x * 1.1, y * 1.1),
    "neighbour": jax.lax.nextafter,
}


def test_scalar_operands_beside_arrays():
    """Scalar bounds, exponents and predicates that lax accepts beside arrays, with noise of their own."""

    def allowed(operation):
        """Return whether this JAX release accepts the operands."""
        try:
            jax.eval_shape(operation, jnp.zeros(4), jnp.float32(1))
        except TypeError:
            return False
        return True

    some = {name: operation for name, operation in LOWER_RANK.items() if allowed(operation)}
    assert {"a power", "clamp", "a predicate", "comparison"} <= set(some)

    def function(x, y):
        return {name: operation(x, y) for name, operation in some.items()}

    actual, exact, noise, unknown = claim(function, normal(CASES, 4), normal(CASES))
    assert unknown == frozenset()
    for name in some:
        assert exact[name].shape == noise[name].shape == (CASES, 4)
        assert worst(actual[name], exact[name], noise[name]) <= 1, name
        assert np.isfinite(noise[name]).mean() > 0.9, name


def test_a_scalar_predicate_within_rounding_has_infinite_noise():
    """If rounding decides a scalar predicate, the error of the selected array is unknown."""

    def picked(x, y):
        return jax.lax.select(y * 1.1 > jax.lax.stop_gradient(y * 1.1), x, 2 * x)

    y = normal(CASES)
    near = (y * np.float32(1.1)).astype(np.float32)
    _, _, noise, _ = claim(
        lambda x, y, near: jax.lax.select(y * 1.1 > near, x, 2 * x), normal(CASES, 4), y, near
    )
    assert np.isinf(noise).all(axis=1).mean() > 0.99
    _, exact, noise, _ = claim(picked, normal(CASES, 4), y)
    assert np.isinf(noise).all()
    assert np.isfinite(exact).all()


def test_focal_loss_with_gamma_as_an_argument():
    """-(1 - p)^gamma log p with scalar gamma and batched p; its gradient has p^(gamma - 1)."""

    def focal(logits, y, gamma):
        p = jax.nn.sigmoid(logits * jnp.sign(y))
        return -jnp.mean((1 - p) ** gamma * jnp.log(p))

    def function(logits, y, gamma):
        return jax.value_and_grad(focal)(logits, y, gamma)

    gammas = RNG.uniform(0.5, 5, CASES).astype(np.float32)
    actual, exact, noise, unknown = claim(function, normal(CASES, 6), normal(CASES, 6), gammas)
    assert unknown == frozenset()
    assert worst(actual, exact, noise) <= 1
    assert all(np.isfinite(each).all() for each in noise)


LOOPS = {
    "cond": lambda x, y: jax.lax.cond(
        y > 0, lambda z: (jnp.sin(z), z.sum()), lambda z: (z * 1.1, z[0] / 3), x
    ),
    "switch": lambda x, y: jax.lax.switch(
        jnp.clip(jnp.floor(2 * y), 0, 2).astype(jnp.int32),
        [lambda z: z * 1.1, jnp.exp, lambda z: jnp.cumsum(z / 3)],
        x,
    ),
    "while": lambda x, y: jax.lax.while_loop(
        lambda s: s[0] < 10 * jnp.abs(y),
        lambda s: (s[0] + 1, s[1] * 1.1 + x, s[2] + s[0]),
        (0.0, x, 0.0),
    ),
    "while in a cond": lambda x, y: jax.lax.cond(
        y > 0,
        lambda z: jax.lax.fori_loop(0, jnp.floor(3 * y).astype(jnp.int32), lambda _, c: c / 3, z),
        lambda z: z,
        x * 1.1,
    ),
    "cond in a scan": lambda x, y: jax.lax.scan(
        lambda c, t: (jax.lax.cond(t > y, lambda: c * 1.1, lambda: c - t), c * t), jnp.sum(x), x
    ),
    "a loop not entered": lambda x, y: jax.lax.while_loop(lambda s: y > 1e6, lambda s: s * 1.1, x),
}


@pytest.mark.parametrize("name", LOOPS)
def test_each_case_takes_its_own_branch(name):
    """Stacked cases that branch or iterate differently give the same results as each case alone."""
    x, y = normal(CASES, 4), normal(CASES)
    actual, exact, noise, unknown = claim(LOOPS[name], x, y)
    assert unknown == frozenset()
    assert worst(actual, exact, noise) <= 1
    assert all(np.isfinite(n).mean() > 0.95 for n in jax.tree_util.tree_leaves(noise))
    reading = rounding(LOOPS[name], x[0], y[0])
    for case in range(3):
        alone = reading.evaluate(x[case : case + 1], y[case : case + 1])
        whole = jax.tree_util.tree_map(lambda leaf: leaf[case : case + 1], (exact, noise))  # noqa: B023 - called immediately
        jax.tree_util.tree_map(equal_but_for_sums, tuple(alone), whole)


def test_errors_of_embeddings_of_equal_rows_do_not_cancel():
    """The gradient of similarities between rows normalised to length 1, most of them equal.

    The errors of the factors cancel over the batch, those of the products do not.
    """
    rows = np.repeat(normal(CASES, 2, 3), 3, axis=1)
    kernel = normal(CASES, 3, 4)

    def gradient(x, kernel):
        def loss(kernel):
            z = jnp.tanh(x @ kernel)
            z = z / jnp.sqrt((z * z).sum(-1, keepdims=True) + 1e-6)
            alike = z @ z.T / 0.1 - 1e9 * jnp.eye(6)
            return (jax.nn.logsumexp(alike, -1) - alike[jnp.arange(6), jnp.arange(6) - 3]).mean()

        return jax.grad(loss)(kernel)

    actual, exact, noise, _ = claim(gradient, rows, kernel)
    assert worst(actual, exact, noise) <= 1


def test_a_subnormal_input_is_zero():
    """XLA on CPU flushes -1e-40 to zero before a step function, but not float16 subnormals."""
    x = np.full((2, 1), -1e-40, np.float32)
    _, exact, _, _ = claim(jnp.floor, x)
    np.testing.assert_array_equal(exact, 0)
    _, exact, _, _ = claim(jnp.floor, np.full((2, 1), -1e-7, np.float16))
    np.testing.assert_array_equal(exact, -1)


@pytest.mark.parametrize("scale", [1, 3, 10, 20])
def test_a_value_computed_twice_may_differ(scale):
    """Saturated tanh after normalising two rows: the gradient cancels between two consumers.

    XLA computes the cotangent, c + c * tanh(z), once for each consumer, in one of them with an FMA.
    Near tanh(z) = -1 the two results have no digit in common.
    """
    params = {
        "kernel": normal(CASES, 3, 3),
        "scale": scale * np.sign(normal(CASES, 3)) * normal(CASES, 3, scale=0.1, offset=1),
        "bias": np.zeros((CASES, 3), np.float32),
        "head": normal(CASES, 3, scale=200),
    }

    def loss(p, x, y):
        z = x @ p["kernel"]
        mean = z.mean(0)
        var = jnp.maximum(0, (z * z).mean(0) - mean * mean)
        z = (z - mean) * (jax.lax.rsqrt(var + 1e-5) * p["scale"]) + p["bias"]
        return jnp.mean((jnp.tanh(z) @ p["head"] - y) ** 2)

    arguments = params, np.tanh(normal(CASES, 2, 3)), normal(CASES, 2, scale=150)
    _, exact, noise, _ = claim(jax.grad(loss), *arguments)
    lowered = jax.jit(jax.vmap(jax.grad(loss))).lower(*arguments)
    actual = jax.tree_util.tree_map(np.float64, compat.compiled(lowered, QUICK)(*arguments))
    assert worst(actual, exact, noise) <= 1  # 2e5 for the kernel at scale 10 without per-use errors

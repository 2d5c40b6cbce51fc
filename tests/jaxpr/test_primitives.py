"""The NumPy implementation of each primitive agrees with JAX in float64."""

from __future__ import annotations

import functools
import itertools
import re
from typing import NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax

from bnverify.compat import enable_x64
from bnverify.jaxpr import numeric
from bnverify.jaxpr.interpreter import called_jaxpr, inner_jaxprs, open_jaxpr
from bnverify.jaxpr.numeric import apply, from_jax, through_jax

ROWS, CASES = 2, 3
SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.5, np.nan, np.inf, -np.inf])
FLOATS = ("float32", "bfloat16")
INTS = ("int32", "uint8", "uint32", "int8")

LEADS = st.tuples(st.sampled_from([1, ROWS]), st.sampled_from([1, CASES]))
SEEDS = st.integers(0, 2**32 - 1)

# JAX compiles its own result for each example, and each test is run for several dtypes.
SOME = max(1, settings().max_examples // 5)
TWICE = 2 * SOME  # where much is drawn


class Operand(NamedTuple):
    """The values that one operand of a primitive may take.

    Attributes:
        dtype: its dtype in the program.
        shape: its shape in the program.
        low: the smallest value; None: any value, including NaN and infinities.
        high: the largest value.
    """

    dtype: str
    shape: tuple[int, ...]
    low: float | None = None
    high: float = 1.0


def values(operand, lead, seed):
    """Return an array in ``numeric``'s representation."""
    rng = np.random.default_rng(seed)
    shape, dtype = (*lead, *operand.shape), numeric.stored_dtype(jnp.dtype(operand.dtype))
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    if dtype.kind == "f":
        if operand.low is not None:
            return rng.uniform(operand.low, operand.high, shape)
        ordinary = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, shape)
        return np.where(rng.random(shape) < 0.3, rng.choice(SPECIAL, shape), ordinary)
    info = np.iinfo(dtype)
    if operand.low is not None:
        return rng.integers(int(operand.low), int(operand.high), shape, dtype, endpoint=True)
    anything = rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    ends = np.array([info.min, info.max, 0, 1, 2, info.max - 1], dtype)
    small = rng.choice(ends, shape)
    return np.where(rng.random(shape) < 0.5, small, anything)


def evaluate(jaxpr, inputs):
    """Run a jaxpr of plain equations and calls with the NumPy implementations."""
    inner, consts = open_jaxpr(jaxpr)
    env = dict(zip(inner.invars, inputs, strict=True))
    env |= dict(zip(inner.constvars, map(from_jax, consts), strict=True))

    def value(atom):
        return (
            from_jax(np.asarray(atom.val, atom.aval.dtype)) if hasattr(atom, "val") else env[atom]
        )

    for eqn in inner.eqns:
        given_values = [value(atom) for atom in eqn.invars]
        called = called_jaxpr(eqn)
        outputs = apply(eqn, given_values) if called is None else evaluate(called, given_values)
        env |= dict(zip(eqn.outvars, outputs, strict=True))
    return [value(atom) for atom in inner.outvars]


def names_in(jaxpr):
    """Return the names of all primitives of a jaxpr, including nested ones.

    JAX has renamed some, such as ``scatter_max`` to ``scatter-max``.
    """
    inner, _ = open_jaxpr(jaxpr)
    found = {re.sub("^scatter_", "scatter-", eqn.primitive.name) for eqn in inner.eqns}
    return found.union(*(names_in(each) for eqn in inner.eqns for each in inner_jaxprs(eqn)))


def by_jax(function, inputs, lead):
    """Return JAX's results in float64, case by case."""
    results = []
    with enable_x64():
        for row, case in itertools.product(*map(range, lead)):
            picked = [
                array[row if array.shape[0] > 1 else 0, case if array.shape[1] > 1 else 0]
                for array in inputs
            ]
            out = jax.tree.leaves(function(*map(jnp.asarray, picked)))
            results.append([np.asarray(each) for each in out])
    return [np.stack(each).reshape(*lead, *each[0].shape) for each in zip(*results, strict=True)]


def check(
    data, name, function, operands, *, reference=None, rtol=1e-12, atol=0.0, signed_zeros=False
):
    """Assert that a primitive's NumPy implementation agrees with JAX.

    Args:
        data: Hypothesis's data object.
        name: the primitive, which ``function`` must contain.
        function: a function of arrays in the program's dtypes.
        operands: an Operand for each argument.
        reference: the function in float64, if it is a different one.
        rtol: relative tolerance of floats.
        atol: absolute tolerance of floats.
        signed_zeros: whether a zero must have the same sign as JAX's.
    """
    inputs = []
    for operand in operands:
        array = values(operand, data.draw(LEADS), data.draw(SEEDS))
        array.flags.writeable = False  # modifying an input raises
        inputs.append(array)
    structs = [jax.ShapeDtypeStruct(each.shape, jnp.dtype(each.dtype)) for each in operands]
    jaxpr = jax.make_jaxpr(function)(*structs)
    assert name in names_in(jaxpr), f"the program has no {name}: {jaxpr}"
    with np.errstate(all="ignore"):
        outputs = evaluate(jaxpr, inputs)
    lead = np.broadcast_shapes((1, 1), *(array.shape[:2] for array in inputs))
    wanted = by_jax(reference or function, inputs, lead)
    for got, want, var in zip(outputs, wanted, jaxpr.jaxpr.outvars, strict=True):
        assert got.dtype == numeric.stored_dtype(var.aval.dtype)
        assert got.shape[2:] == var.aval.shape
        # A leading axis that no input has must have size 1.
        assert_equal(np.broadcast_to(got, want.shape), want, rtol, atol, signed_zeros)


def assert_equal(got, want, rtol, atol, signed_zeros):
    """Assert that two results agree: floats within tolerance, others exactly."""
    if got.dtype.kind != "f":
        np.testing.assert_array_equal(got, want)
        return
    # XLA's CPU backend flushes subnormals to zero, in float64 as in float32; NumPy keeps them.
    subnormal = np.finfo(want.dtype).tiny
    np.testing.assert_allclose(got, want, rtol=rtol, atol=max(atol, subnormal))
    if signed_zeros:
        zero = want == 0
        np.testing.assert_array_equal(np.signbit(got)[zero], np.signbit(want)[zero])


SQUARE = "square" if hasattr(lax, "square_p") else "integer_pow"  # the latter in jax 0.4.30

# Unary operations: name -> function, and the range of its operand (None: any value).
UNARY = {
    "abs": (lax.abs, None),
    "acos": (lax.acos, None),
    "acosh": (lax.acosh, (1, 50)),
    "asin": (lax.asin, None),
    "asinh": (lax.asinh, None),
    "atan": (lax.atan, None),
    "atanh": (lax.atanh, (-0.99, 0.99)),
    "bessel_i0e": (lax.bessel_i0e, (-20, 20)),
    "bessel_i1e": (lax.bessel_i1e, (-20, 20)),
    "cbrt": (lax.cbrt, None),
    "ceil": (lax.ceil, None),
    "cos": (lax.cos, None),
    "cosh": (lax.cosh, None),
    "digamma": (lax.digamma, (-5, 30)),
    "erf": (lax.erf, None),
    "erf_inv": (lax.erf_inv, None),
    "erfc": (lax.erfc, (-5, 20)),
    "exp": (lax.exp, None),
    "exp2": (lax.exp2, None),
    "expm1": (lax.expm1, None),
    "floor": (lax.floor, None),
    "is_finite": (lax.is_finite, None),
    "lgamma": (lax.lgamma, None),
    "log": (lax.log, None),
    "log1p": (lax.log1p, None),
    "logistic": (lax.logistic, None),
    "neg": (lax.neg, None),
    "rsqrt": (lax.rsqrt, None),
    "sign": (lax.sign, None),
    "sin": (lax.sin, None),
    "sinh": (lax.sinh, None),
    "sqrt": (lax.sqrt, None),
    SQUARE: (lax.square, None),
    "tan": (lax.tan, None),
    "tanh": (lax.tanh, None),
}
if hasattr(lax, "one_minus_square"):  # from jax 0.12 on
    UNARY |= {"log2": (jnp.log2, None), "one_minus_square": (lax.one_minus_square, None)}


@pytest.mark.parametrize("name", UNARY)
@settings(max_examples=SOME)
@given(st.data())
def test_a_function_of_one_number(name, data):
    """It agrees with JAX in float64, including NaN, infinities and signed zeros."""
    function, domain = UNARY[name]
    low, high = domain or (None, 1.0)
    operand = Operand(data.draw(st.sampled_from(FLOATS)), (2, 5), low, high)
    check(data, name, function, [operand], rtol=2e-11, signed_zeros=True)


ON_INTS = {
    "abs": (lax.abs, ("int32", "int8")),
    "clz": (lax.clz, INTS),
    "neg": (lax.neg, INTS),
    "not": (lax.bitwise_not, (*INTS, "bool")),
    "population_count": (lax.population_count, INTS),
    "sign": (lax.sign, INTS),
    SQUARE: (lax.square, INTS),
}
if hasattr(lax, "one_minus_square"):
    ON_INTS["one_minus_square"] = (lax.one_minus_square, INTS)


@pytest.mark.parametrize("name", ON_INTS)
@settings(max_examples=SOME)
@given(st.data())
def test_a_function_of_one_integer(name, data):
    """It wraps around as in XLA."""
    function, dtypes = ON_INTS[name]
    check(data, name, function, [Operand(data.draw(st.sampled_from(dtypes)), (7,))])


# Binary operations: name -> function, and the ranges of its operands.
BINARY = {
    "add": (lax.add, None),
    "atan2": (lax.atan2, None),
    "div": (lax.div, None),
    "eq": (lax.eq, None),
    "ge": (lax.ge, None),
    "gt": (lax.gt, None),
    "igamma": (lax.igamma, (0.1, 20)),
    "igammac": (lax.igammac, (0.1, 20)),
    "le": (lax.le, None),
    "lt": (lax.lt, None),
    "max": (lax.max, None),
    "min": (lax.min, None),
    "mul": (lax.mul, None),
    "ne": (lax.ne, None),
    "pow": (lax.pow, None),
    "rem": (lax.rem, None),
    "sub": (lax.sub, None),
    "zeta": (lax.zeta, (1.5, 20)),
}
SHAPES = st.sampled_from([((2, 3), (2, 3)), ((), (2, 3)), ((2, 3), ()), ((), ())])


@pytest.mark.parametrize("name", BINARY)
@settings(max_examples=SOME)
@given(st.data())
def test_a_function_of_two_numbers(name, data):
    """It agrees with JAX in float64; either operand may be a scalar or a literal."""
    function, domain = BINARY[name]
    low, high = domain or (None, 1.0)
    dtype, (left, right) = data.draw(st.sampled_from(FLOATS)), data.draw(SHAPES)
    operands = [Operand(dtype, left, low, high), Operand(dtype, right, low, high)]
    if right == () and data.draw(st.booleans()):
        number = data.draw(st.sampled_from([0.0, 1.5, 3.0]))
        if domain is None:
            kind = jnp.dtype(dtype).type
            check(
                data,
                name,
                lambda x: function(x, kind(number)),
                operands[:1],
                reference=lambda x: function(x, np.float64(number)),
            )
            return
    signed_zeros = name not in {"max", "min"}  # XLA may return either of 0 and -0
    check(data, name, function, operands, rtol=1e-11, signed_zeros=signed_zeros)


ON_TWO_INTS = {
    "add": (lax.add, INTS),
    "and": (lax.bitwise_and, (*INTS, "bool")),
    "div": (lax.div, INTS),
    "eq": (lax.eq, (*INTS, "bool")),
    "lt": (lax.lt, (*INTS, "bool")),
    "max": (lax.max, (*INTS, "bool")),
    "min": (lax.min, (*INTS, "bool")),
    "mul": (lax.mul, INTS),
    "or": (lax.bitwise_or, (*INTS, "bool")),
    "rem": (lax.rem, INTS),
    "shift_left": (lax.shift_left, INTS),
    "shift_right_arithmetic": (lax.shift_right_arithmetic, INTS),
    "shift_right_logical": (lax.shift_right_logical, INTS),
    "sub": (lax.sub, INTS),
    "xor": (lax.bitwise_xor, (*INTS, "bool")),
}


@pytest.mark.parametrize("name", ON_TWO_INTS)
@settings(max_examples=SOME)
@given(st.data())
def test_a_function_of_two_integers(name, data):
    """It wraps around, shifts and divides (also by zero) as in XLA."""
    function, dtypes = ON_TWO_INTS[name]
    dtype, (left, right) = data.draw(st.sampled_from(dtypes)), data.draw(SHAPES)
    small = (0, 10) if name.startswith("shift") and data.draw(st.booleans()) else (None, 1.0)
    check(data, name, function, [Operand(dtype, left), Operand(dtype, right, *small)])


@pytest.mark.skipif(not hasattr(lax, "mulhi"), reason="lax.mulhi is of jax 0.10")
@settings(max_examples=TWICE)
@given(st.data())
def test_the_high_half_of_a_product(data):
    """``mulhi`` returns the high half of the exact product."""
    dtype = data.draw(st.sampled_from(INTS))
    check(data, "mulhi", lax.mulhi, [Operand(dtype, (5,))] * 2)


@settings(max_examples=SOME)
@given(st.data(), st.sampled_from([-3, -1, 0, 1, 2, 3, 7, 10]))
def test_integer_power(data, exponent):
    """Powers agree with JAX, including negative exponents and integer bases."""
    dtype = data.draw(st.sampled_from((*FLOATS, *(INTS if exponent >= 0 else ()))))

    def power(x):
        return lax.integer_pow(x, exponent)

    if exponent not in {0, 1}:  # lax simplifies these
        check(data, "integer_pow", power, [Operand(dtype, (4,))], rtol=1e-14)


@pytest.mark.skipif(not hasattr(lax, "polynomial"), reason="lax.polynomial is of jax 0.12")
@settings(max_examples=SOME)
@given(st.data(), st.integers(2, 10))
def test_polynomials(data, count):
    """Coefficients are scalars or arrays, the constant one first."""
    shapes = data.draw(st.lists(st.sampled_from([(), (4,), (1,)]), min_size=count, max_size=count))
    x, *coefficients = [Operand("float32", shape, -2, 2) for shape in [(4,), *shapes]]

    def function(x, *coefficients):
        return lax.polynomial(x, coefficients)

    check(data, "polynomial", function, [x, *coefficients], atol=1e-10)


@settings(max_examples=TWICE)
@given(st.data())
def test_a_power_with_an_integer_exponent(data):
    """The exponent may be an integer array or a scalar."""
    exponent = Operand("int32", data.draw(st.sampled_from([(4,), ()])), -4, 4)
    check(data, "pow", lax.pow, [Operand("float32", (4,)), exponent])


@settings(max_examples=TWICE)
@given(st.data(), st.sampled_from(list(lax.RoundingMethod)))
def test_rounding_to_whole_numbers(data, method):
    """Halves round away from zero or to even, as requested."""
    halves = Operand("float32", (6,), data.draw(st.sampled_from([None, -4])), 4)
    check(data, "round", lambda x: lax.round(x * 1, method), [halves])
    check(data, "round", lambda x: lax.round(lax.floor(x) + 0.5, method), [halves])


@settings(max_examples=TWICE)
@given(st.data(), st.sampled_from((*FLOATS, *INTS, "bool")), st.sampled_from((*INTS, "bool")))
def test_conversion_to_integers(data, old, new):
    """Floats saturate and NaN becomes 0; integers wrap around; nonzero is True."""
    convert = functools.partial(lax.convert_element_type, new_dtype=jnp.dtype(new))
    if old != new:
        huge = [] if old not in FLOATS else [(-1e12, 1e12), (-300, 300)]
        ends = data.draw(st.sampled_from([(None, 1.0), *huge]))
        check(data, "convert_element_type", convert, [Operand(old, (6,), *ends)])


@settings(max_examples=TWICE)
@given(st.data(), st.sampled_from((*FLOATS, *INTS, "bool")), st.sampled_from(FLOATS))
def test_conversion_to_floats(data, old, new):
    """Integers convert to floats exactly."""
    if old != new:
        check(
            data,
            "convert_element_type",
            lambda x: lax.convert_element_type(x, jnp.dtype(new)),
            [Operand(old, (6,))],
            reference=lambda x: lax.convert_element_type(x, np.float64),
        )


@settings(max_examples=SOME)
@given(st.data(), st.sampled_from([(3, 2), ()]), st.sampled_from([(3, 2), ()]))
def test_clamp(data, low, high):
    """Bounds may be scalars."""
    dtype = data.draw(st.sampled_from((*FLOATS, *INTS)))
    if (low == ()) == (high == ()):
        operands = [Operand(dtype, low), Operand(dtype, (3, 2)), Operand(dtype, high)]
        check(data, "clamp", lax.clamp, operands)


@settings(max_examples=SOME)
@given(st.data(), st.sampled_from([(3, 2), ()]), st.sampled_from(["bool", "int32"]))
def test_select_n(data, shape, kind):
    """The predicate may be a scalar, and an integer for more than two cases."""
    dtype = data.draw(st.sampled_from((*FLOATS, *INTS, "bool")))
    cases = 2 if kind == "bool" else 3
    which = Operand(kind, shape, *(() if kind == "bool" else (0, 2)))
    check(data, "select_n", lax.select_n, [which, *[Operand(dtype, (3, 2))] * cases])


# Bitwise, in the program's own dtype.


def own(array, dtype):
    """Return a float64 array in ``dtype``, and widened again."""
    with np.errstate(all="ignore"):  # overflow to infinity
        narrow = np.asarray(array).astype(jnp.dtype(dtype))
    return narrow, narrow.astype(np.float64)


@settings(max_examples=TWICE)
@given(SEEDS, st.sampled_from(["float16", *FLOATS]))
def test_the_next_number_is_that_of_the_dtype(seed, dtype):
    """``nextafter`` moves by one ulp of the program's dtype, not of float64."""
    (x, held_x), (y, held_y) = (
        own(values(Operand(dtype, (6,)), (1, 1), seed + i), dtype) for i in range(2)
    )
    (out,) = run_one(lax.nextafter, [(held_x, dtype), (held_y, dtype)])
    np.testing.assert_array_equal(out, np.asarray(lax.nextafter(x, y)).astype(np.float64))


def run_one(function, stored):
    """Run a function on arrays in their stored dtypes."""
    structs = [jax.ShapeDtypeStruct(x.shape[2:], jnp.dtype(dtype)) for x, dtype in stored]
    with np.errstate(all="ignore"):
        return evaluate(jax.make_jaxpr(function)(*structs), [x for x, _ in stored])


CASTS = [
    ("uint32", "float32"),
    ("float32", "uint32"),
    ("bfloat16", "uint16"),
    ("float16", "int16"),
    ("float32", "uint8"),
    ("uint8", "float32"),
]


@settings(max_examples=TWICE)
@given(SEEDS, st.sampled_from(CASTS))
def test_bits_are_those_of_the_dtype(seed, cast):
    """A bitcast reads the bits of the program's dtype, also into more or fewer elements."""
    old, new = cast
    stored = values(Operand(old, (5, 4)), (1, 1), seed)
    narrow, stored = (stored, stored) if old.startswith("u") else own(stored, old)

    def function(x):
        return lax.bitcast_convert_type(x, jnp.dtype(new))

    (out,) = run_one(function, [(stored, old)])
    with np.errstate(invalid="ignore"):  # some bit patterns are signalling NaNs
        want = np.asarray(function(narrow[0, 0])).astype(out.dtype)
    np.testing.assert_array_equal(out[0, 0], want)


@settings(max_examples=SOME)
@given(
    SEEDS,
    st.sampled_from([(8, 7), (5, 10), (4, 3), (11, 52)]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_reduced_precision(seed, bits, dtype):
    """It rounds to even, overflows and underflows as in XLA."""
    powers = 10.0 ** np.random.default_rng(seed).integers(-6, 6, (1, 1, 50))
    narrow, stored = own(values(Operand(dtype, (50,)), (1, 1), seed) * powers, dtype)

    def function(x):
        return lax.reduce_precision(x, *bits)

    (out,) = run_one(function, [(stored, dtype)])
    np.testing.assert_array_equal(out, np.asarray(function(narrow)).astype(np.float64))


# Shapes.

MOVES = {
    "broadcast_in_dim": lambda x: lax.broadcast_in_dim(x, (3, 2, 5, 4), (1, 3)),
    "concatenate": lambda x: lax.concatenate([x, x, lax.rev(x, (0,))], 1),
    "expand_dims": lambda x: lax.expand_dims(x, (0, 2)),
    "pad": lambda x: lax.pad(x, lax.squeeze(x[:1, :1], (0, 1)), [(1, -1, 2), (-2, 3, 0)]),
    "reshape": lambda x: lax.reshape(x, (4, 2)),
    "rev": lambda x: lax.rev(x, (0, 1)),
    "slice": lambda x: lax.slice(x, (0, 1), (2, 4), (1, 2)),
    "split": lambda x: lax.split(x, (1, 3), axis=1),
    "squeeze": lambda x: lax.squeeze(x[:1], (0,)),
    "stack": lambda x: lax.stack([x, x], 1),
    "tile": lambda x: lax.tile(x, (2, 3)),
    "transpose": lambda x: lax.transpose(x, (1, 0)),
    "unstack": lambda x: lax.unstack(x, 1),
}
NEWER = {"expand_dims": "broadcast_in_dim"} | {
    # Primitives of newer JAX releases; older ones lack the functions.
    name: name
    for name in ("split", "stack", "tile", "unstack")
    if hasattr(lax, name)
}


@pytest.mark.parametrize("name", MOVES)
@settings(max_examples=SOME)
@given(st.data())
def test_elements_only_move(name, data):
    """Each element ends up where JAX puts it."""
    if name in {"split", "stack", "tile", "unstack"} and not hasattr(lax, name):
        pytest.skip(f"this release of jax has no lax.{name}")
    dtype = data.draw(st.sampled_from((*FLOATS, "int32", "uint8", "bool")))
    check(data, NEWER.get(name, name), MOVES[name], [Operand(dtype, (2, 4))])


@settings(max_examples=SOME)
@given(
    st.data(),
    st.lists(
        st.tuples(st.integers(-4, 4), st.integers(-4, 4), st.integers(0, 2)), min_size=2, max_size=2
    ),
)
def test_pad(data, config):
    """Padding may be negative and interior."""
    sizes = [low + high + (3 - 1) * (between + 1) + 1 for low, high, between in config]
    if min(sizes) >= 0:
        dtype = data.draw(st.sampled_from(["float32", "int32"]))
        function = functools.partial(lax.pad, padding_config=config)
        check(data, "pad", function, [Operand(dtype, (3, 3)), Operand(dtype, ())])


@settings(max_examples=TWICE)
@given(st.sampled_from(["float32", "bfloat16", "int32", "uint8"]), st.integers(0, 2))
def test_iota(dtype, dimension):
    """It has one row and one case."""

    def function():
        return lax.broadcasted_iota(jnp.dtype(dtype), (2, 3, 4), dimension)

    (out,) = run_one(function, [])
    assert out.shape == (1, 1, 2, 3, 4)
    np.testing.assert_array_equal(out[0, 0], np.asarray(function()).astype(out.dtype))


@settings(max_examples=SOME)
@given(st.data())
def test_dynamic_slices(data):
    """Starts out of bounds are clamped."""
    dtype = data.draw(st.sampled_from(["float32", "int32", "bool"]))
    starts = [Operand("int32", (), -9, 6), Operand("int32", (), -9, 6)]
    whole = Operand(dtype, (4, 3))

    def picked(x, i, j):
        return lax.dynamic_slice(x, (i, j), (2, 3))

    def written(x, update, i, j):
        return lax.dynamic_update_slice(x, update, (i, j))

    check(data, "dynamic_slice", picked, [whole, *starts])
    check(data, "dynamic_update_slice", written, [whole, Operand(dtype, (2, 1)), *starts])


# Reductions.


def reduced(combine, start, axes):
    """Return a reduction that starts from its identity, given for each kind of dtype."""

    def function(x):
        identity = np.asarray(start(x.dtype), x.dtype)
        return lax.reduce(x, identity, combine, axes)

    return function


def lowest(dtype):
    return -np.inf if kind_of(dtype) == "f" else jnp.iinfo(dtype).min


def highest(dtype):
    return np.inf if kind_of(dtype) == "f" else jnp.iinfo(dtype).max


def kind_of(dtype):
    return numeric.stored_dtype(jnp.dtype(dtype)).kind


def all_set(dtype):
    return True if kind_of(dtype) == "b" else np.array(-1).astype(dtype)


REDUCTIONS = {
    "argmax": (lambda x: lax.argmax(x, 1, np.int32), "float32 bfloat16 int32 uint8 bool"),
    "argmin": (lambda x: lax.argmin(x, 0, np.int32), "float32 bfloat16 int32 uint8 bool"),
    "reduce_and": (reduced(lax.bitwise_and, all_set, (0,)), "bool int32 uint8"),
    "reduce_max": (reduced(lax.max, lowest, (1,)), "float32 bfloat16 int32"),
    "reduce_min": (reduced(lax.min, highest, (0, 2)), "float32 int32 uint8"),
    "reduce_or": (reduced(lax.bitwise_or, lambda _: 0, (1, 2)), "bool int32 uint8"),
    "reduce_prod": (reduced(lax.mul, lambda _: 1, (0, 1)), "float32 int32 uint8"),
    "reduce_sum": (reduced(lax.add, lambda _: 0, (1, 2)), "float32 bfloat16 int32 uint8"),
    "reduce_xor": (reduced(lax.bitwise_xor, lambda _: 0, (0, 1, 2)), "int32 uint8"),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), "float32"),
    "cummax": (lambda x: lax.cummax(x, 2, reverse=True), "float32 int32"),
    "cummin": (lambda x: lax.cummin(x, 0), "float32 uint8"),
    "cumprod": (lambda x: lax.cumprod(x, 1, reverse=True), "float32 int32 uint8"),
    "cumsum": (lambda x: lax.cumsum(x, 2), "float32 bfloat16 int32 uint8"),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@settings(max_examples=SOME)
@given(st.data(), st.sampled_from([(2, 4, 3), (3, 1, 9)]))
def test_reductions(name, data, shape):
    """They agree with JAX, also for NaN and infinities."""
    function, dtypes = REDUCTIONS[name]
    operand = Operand(data.draw(st.sampled_from(dtypes.split())), shape)
    check(data, name, function, [operand], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", ["reduce_max", "reduce_min", "reduce_prod", "reduce_sum"])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
@settings(max_examples=1)  # there is nothing to draw
@given(st.data())
def test_reductions_of_nothing(name, dtype, data):
    """An empty reduction gives the identity."""
    check(data, name, REDUCTIONS[name][0], [Operand(dtype, (0, 0, 0))])


@settings(max_examples=SOME)
@given(st.data(), st.sampled_from([lax.add, lax.max, lax.mul]))
def test_the_general_reduction(data, function):
    """``lax.reduce`` starts from its initial value."""
    operands = [Operand("float32", (3, 4), -2, 2), Operand("float32", (), -2, 2)]
    # With another initial value JAX does not turn it into a special reduction.
    check(data, "reduce", lambda x, start: lax.reduce(x, start, function, (0,)), operands)


def test_a_reduction_with_a_longer_jaxpr_is_not_implemented():
    """A combining function of more than one operation raises, naming the primitive."""

    def function(x):
        return lax.reduce(x, np.float32(0), lambda a, b: a + b * b, (0,))

    with pytest.raises(NotImplementedError, match="reduce"):
        run_one(function, [(np.ones((1, 1, 3)), "float32")])


@settings(max_examples=SOME)
@given(st.data(), st.sampled_from([("psum", lax.psum), ("pmax", lax.pmax)]))
def test_a_collective_under_vmap(data, collective):
    """Under ``vmap`` the named axis becomes a positional axis."""
    name, function = collective
    mapped = jax.vmap(lambda x: function(x, "i"), axis_name="i")
    operand = Operand("float32", (4, 2), -2, 2)
    inputs = values(operand, data.draw(LEADS), data.draw(SEEDS))
    (out,) = run_one(mapped, [(inputs, "float32")])
    want = getattr(inputs, {"psum": "sum", "pmax": "max"}[name])(2, keepdims=True)
    np.testing.assert_allclose(out, np.broadcast_to(want, inputs.shape), rtol=1e-14)


# Order.


@settings(max_examples=SOME)
@given(st.data(), st.sampled_from([0, 1]), st.integers(1, 3), st.booleans())
def test_sort(data, axis, keys, stable):
    """All operands follow the keys; NaN sorts last, and equal elements keep their order."""
    kinds = [data.draw(st.sampled_from(["float32", "int32", "bool"])) for _ in range(keys)]
    operands = [Operand(kind, (3, 4)) for kind in kinds]
    if keys == 1 and data.draw(st.booleans()):
        check(data, "sort", lambda x: lax.sort(x, axis), operands)
        return
    rest = Operand("int32", (3, 4))

    def function(*arrays):
        return lax.sort(arrays, axis, is_stable=True, num_keys=keys)

    check(data, "sort", function, [*operands, rest])


@settings(max_examples=SOME)
@given(st.data(), st.integers(1, 5))
def test_top_k(data, k):
    """Of equal elements the one with the lower index comes first."""
    dtype = data.draw(st.sampled_from(["float32", "int32", "uint8"]))
    check(data, "top_k", lambda x: lax.top_k(x, k), [Operand(dtype, (2, 5))])


# Products.

CONTRACTIONS = [
    ((2, 3), (3, 4), (((1,), (0,)), ((), ()))),
    ((3, 2), (4, 3), (((0,), (1,)), ((), ()))),
    ((5, 1), (1, 4), (((1,), (0,)), ((), ()))),
    ((4, 3), (3,), (((1,), (0,)), ((), ()))),
    ((3,), (3,), (((0,), (0,)), ((), ()))),
    ((3,), (2,), (((), ()), ((), ()))),
    ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,)))),
    ((3, 4, 2), (5, 2, 4), (((1,), (2,)), ((2,), (1,)))),
    ((2, 3, 4, 2), (4, 3, 5), (((1, 2), (1, 0)), ((), ()))),
    ((2, 3, 4, 3), (3, 2, 4, 5), (((2,), (2,)), ((0, 1), (1, 0)))),
    ((0, 3), (3, 2), (((1,), (0,)), ((), ()))),
    ((2, 0), (0, 2), (((1,), (0,)), ((), ()))),
]


@settings(max_examples=TWICE)
@given(st.data(), st.sampled_from(CONTRACTIONS))
def test_dot_general(data, contraction):
    """Any axes may be contracted or batched, whichever operand has rows and cases."""
    left, right, numbers = contraction
    dtype = data.draw(st.sampled_from([*FLOATS, "int32", "uint8"]))
    some = (-2, 2) if dtype in FLOATS else ()

    def function(x, y):
        return lax.dot_general(x, y, numbers)

    operands = [Operand(dtype, left, *some), Operand(dtype, right, *some)]
    check(data, "dot_general", function, operands, rtol=1e-12, atol=1e-13)


@settings(max_examples=TWICE)
@given(st.data())
def test_the_accumulation_dtype_of_products(data):
    """Products of small integers do not wrap around if the sum has a wider dtype."""

    def function(x, y):
        return lax.dot(x, y, preferred_element_type=np.int32)

    check(data, "dot_general", function, [Operand("int8", (2, 3)), Operand("int8", (3, 2))])


def test_products_without_rows_or_cases_have_none():
    """If both factors have leading axes of size 1, so has the product."""
    stored = [(np.ones((1, 1, 2, 3)), "float32"), (np.ones((1, 3, 3, 2)), "float32")]
    (out,) = run_one(lax.dot, stored)
    assert out.shape == (1, 3, 2, 2)


LAYOUTS = {
    1: [("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW"), ("CWN", "IWO", "WNC")],
    2: [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("CHWN", "IHWO", "HWNC")],
}


@st.composite
def convolutions(draw):
    """Generate the shapes and parameters of a convolution."""
    rank = draw(st.sampled_from([1, 2]))
    layout = draw(st.sampled_from(LAYOUTS[rank]))
    features, batches = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]))
    inputs, outputs = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    sizes = {"N": 2 * batches, "C": inputs * features, "I": inputs}
    sizes["O"] = outputs * features * batches

    def each(strategy):
        return tuple(draw(strategy) for _ in range(rank))

    small = st.sampled_from([1, 1, 2, 3])
    lhs = sizes | dict(zip("HW"[-rank:], each(st.sampled_from([1, 4, 5])), strict=True))
    rhs = sizes | dict(zip("HW"[-rank:], each(small), strict=True))
    params = {
        "window_strides": each(small),
        "padding": each(st.sampled_from([(0, 0), (1, 1), (2, 0), (-1, 2), (0, -1)])),
        "lhs_dilation": each(st.sampled_from([1, 1, 2])),
        "rhs_dilation": each(st.sampled_from([1, 1, 2])),
        "dimension_numbers": layout,
        "feature_group_count": features,
        "batch_group_count": batches,
    }
    return [
        tuple(of[axis] for axis in spec) for of, spec in ((lhs, layout[0]), (rhs, layout[1]))
    ], params


@settings(max_examples=SOME)
@given(st.data(), convolutions())
def test_convolutions(data, convolution):
    """Strides, padding, dilation, groups and layouts agree with JAX."""
    shapes, params = convolution

    def function(x, kernel):
        return lax.conv_general_dilated(x, kernel, **params)

    operands = [Operand("float32", shape, -2, 2) for shape in shapes]
    check(data, "conv_general_dilated", function, operands, atol=1e-13)


@pytest.mark.parametrize("leads", [((2, 3), (1, 3)), ((1, 3), (2, 1)), ((2, 1), (2, 3))])
def test_large_convolutions_are_split(monkeypatch, leads):
    """Patches that exceed the memory limit are processed in parts, with the same result."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(*leads[0], 2, 5, 3)), rng.normal(size=(*leads[1], 3, 3, 4))

    def function(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=LAYOUTS[1][0])

    stored = [(x, "float32"), (kernel, "float32")]
    (whole,) = run_one(function, stored)
    for size in (1, 1000, 2000):
        monkeypatch.setattr("bnverify.jaxpr.windows.PATCHES", size)
        (parts,) = run_one(function, stored)
        np.testing.assert_allclose(parts, whole, rtol=1e-13, atol=1e-13)


# Windows.


@st.composite
def window_parameters(draw, *, dilations=True):
    """Generate window parameters for an array with two axes."""

    def each(*choices):
        return tuple(draw(st.sampled_from(choices)) for _ in range(2))

    params = {
        "window_dimensions": each(1, 2, 3),
        "window_strides": each(1, 2),
        "padding": each((0, 0), (1, 0), (1, 2)),
    }
    if dilations:
        params |= {"base_dilation": each(1, 1, 2), "window_dilation": each(1, 1, 2)}
    return params


WINDOW_REDUCTIONS = {
    "reduce_window_max": (lax.max, -np.inf),
    "reduce_window_min": (lax.min, np.inf),
    "reduce_window_sum": (lax.add, 0.0),
}


@pytest.mark.parametrize("name", WINDOW_REDUCTIONS)
@settings(max_examples=SOME)
@given(st.data(), window_parameters(), st.sampled_from([(4, 5), (3, 9)]))
def test_reductions_over_windows(name, data, params, shape):
    """Each window is reduced, with any padding."""
    combine, start = WINDOW_REDUCTIONS[name]

    def function(x):
        return lax.reduce_window(x, np.asarray(start, x.dtype), combine, **params)

    # Every digit of a window sum agrees only if no partial sum is infinite.
    ends = (-2, 2) if combine is lax.add else (None,)
    check(data, name, function, [Operand("float32", shape, *ends)], atol=1e-13)


def test_a_window_as_wide_as_the_array():
    """Global pooling is a reduction over one window."""
    x = np.random.default_rng(0).normal(size=(2, 3, 1, 7))

    def function(x):
        return lax.reduce_window(x, np.float32(0), lax.add, (1, 7), (1, 1), "VALID")

    (out,) = run_one(function, [(x, "float32")])
    np.testing.assert_allclose(out, x.sum(-1, keepdims=True), rtol=1e-14)


@settings(max_examples=SOME)
@given(st.data(), window_parameters())
def test_the_general_reduction_over_windows(data, params):
    """``lax.reduce_window`` starts from its initial value and pads with it."""

    def function(x, start):
        return lax.reduce_window(x, start, lax.mul, **params)

    operands = [Operand("float32", (4, 5), -2, 2), Operand("float32", (), -2, 2)]
    check(data, "reduce_window", function, operands)


@settings(max_examples=SOME)
@given(st.data(), window_parameters(dilations=False), st.sampled_from([lax.ge_p, lax.le_p]))
def test_the_gradient_of_pooling(data, params, select):
    """It goes to the first of the largest (or smallest) elements of a window."""
    bind = functools.partial(lax.select_and_scatter_add_p.bind, select_prim=select, **params)
    x = Operand("float32", (4, 5), -2, 2)
    count = jax.eval_shape(
        lambda x: lax.reduce_window(x, -np.inf, lax.max, **params),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
    )

    def function(source, x):
        return bind(source, lax.floor(x))  # rounded down, so that ties occur

    operands = [Operand("float32", count.shape, -2, 2), x]
    check(data, "select_and_scatter_add", function, operands, atol=1e-13)


@settings(max_examples=SOME)
@given(st.data(), window_parameters(), st.sampled_from([lax.ge_p, lax.le_p]))
def test_the_derivative_of_pooling(data, params, select):
    """It is the tangent of the largest (or smallest) element of a window."""
    bind = functools.partial(lax.select_and_gather_add_p.bind, select_prim=select, **params)
    check(data, "select_and_gather_add", bind, [Operand("float32", (4, 5), -2, 2)] * 2)


# Gathers and scatters.

MODES = st.sampled_from(["clip", "fill", "promise_in_bounds"])
# (operand, indices, window sizes, dimension numbers of the gather)
PLACES = {
    "one element": ((5,), (2, 1), (1,), ((), (0,), (0,), (), ())),
    "a row": ((5, 3), (2, 1), (1, 3), ((1,), (0,), (0,), (), ())),
    "the window first": ((5, 3), (2, 1), (1, 3), ((0,), (0,), (0,), (), ())),
    "a part of a row": ((5, 3), (4, 2), (1, 2), ((1,), (0,), (0, 1), (), ())),
    "a box": ((4, 5, 3), (2, 2, 2), (2, 1, 2), ((1, 3), (1,), (2, 0), (), ())),
    "no batch": ((5, 3), (1,), (5, 1), ((0,), (1,), (1,), (), ())),
    "labels": ((4, 3), (4, 1, 1), (1, 1), ((), (1,), (1,), (0,), (0,))),
    "batched, inner": ((3, 4, 2), (2, 4, 1), (1, 1, 2), ((2,), (0,), (0,), (1,), (1,))),
}
NUMBERS = [
    place for place in PLACES.values() if not place[3][3] or hasattr(lax, "split")
]  # operand_batching_dims needs jax 0.4.31


def gather_numbers(numbers):
    """Return ``GatherDimensionNumbers``."""
    offset, collapsed, start, batching, of_indices = numbers
    names = {"operand_batching_dims": batching, "start_indices_batching_dims": of_indices}
    return lax.GatherDimensionNumbers(offset, collapsed, start, **(names if batching else {}))


def scatter_numbers(numbers):
    """Return the dimension numbers of the scatter that mirrors a gather."""
    offset, collapsed, start, batching, of_indices = numbers
    names = {"operand_batching_dims": batching, "scatter_indices_batching_dims": of_indices}
    return lax.ScatterDimensionNumbers(offset, collapsed, start, **(names if batching else {}))


@settings(max_examples=SOME)
@given(st.data(), st.sampled_from(NUMBERS), MODES)
def test_gathers(data, place, mode):
    """Slices out of bounds are clamped or filled, as the mode says."""
    shape, of_indices, sizes, numbers = place
    dtype = data.draw(st.sampled_from([*FLOATS, "int32", "uint8", "bool"]))
    ends = (0, 1) if mode == "promise_in_bounds" else (-3, 6)
    filled = mode == "fill" and dtype != "bool" and data.draw(st.booleans())

    def function(x, indices):
        fill = {"fill_value": 7} if filled else {}
        return lax.gather(x, indices, gather_numbers(numbers), sizes, mode=mode, **fill)

    check(data, "gather", function, [Operand(dtype, shape), Operand("int32", of_indices, *ends)])


SCATTERS = {
    "scatter": lax.scatter,
    "scatter-add": lax.scatter_add,
    "scatter-max": lax.scatter_max,
    "scatter-min": lax.scatter_min,
    "scatter-mul": lax.scatter_mul,
    "scatter-sub": getattr(lax, "scatter_sub", None),
}


@pytest.mark.parametrize("name", SCATTERS)
@settings(max_examples=SOME)
@given(st.data(), st.sampled_from(NUMBERS), MODES)
def test_scatters(name, data, place, mode):
    """Repeated updates of an element all count; out of bounds they follow the mode."""
    shape, of_indices, sizes, numbers = place
    scatter = SCATTERS[name]
    if scatter is None:
        pytest.skip("this release of jax has no such function")
    dtype = data.draw(st.sampled_from(["float32", "int32"]))
    ends = (0, 1) if mode == "promise_in_bounds" else (-3, 6)
    updates = jax.eval_shape(
        lambda x, i: lax.gather(x, i, gather_numbers(numbers), sizes, mode="clip"),
        jax.ShapeDtypeStruct(shape, np.float32),
        jax.ShapeDtypeStruct(of_indices, np.int32),
    )

    def function(x, indices, updates):
        return scatter(x, indices, updates, scatter_numbers(numbers), mode=mode)

    some = (-2, 2) if dtype == "float32" else ()
    operands = [
        Operand(dtype, shape, *some),
        Operand("int32", of_indices, *ends),
        Operand(dtype, updates.shape, *some),
    ]
    check(data, name, function, operands, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mode", ["clip", "fill", "drop"])
@settings(max_examples=SOME)
@given(st.data())
def test_numpy_style_indexing(mode, data):
    """``x[...]`` and ``x.at[...]`` agree with JAX."""
    operands = [Operand("float32", (4, 3), -2, 2), Operand("int32", (5,), -6, 6)]
    if mode != "drop":
        check(data, "gather", lambda x, i: x.at[i].get(mode=mode), operands)
    check(data, "scatter-add", lambda x, i: x.at[i].add(2, mode=mode), operands, atol=1e-14)
    check(data, "scatter-mul", lambda x, i: x.at[i, 1].multiply(2, mode=mode), operands)
    check(data, "gather", lambda x, i: jnp.take_along_axis(x, i[:4, None] % 3, 1), operands)


def test_scatter_with_a_custom_function_goes_through_jax():
    """``x.at[].apply`` is not implemented in NumPy."""

    def function(x):
        return x.at[1].apply(jnp.sin)

    with pytest.raises(NotImplementedError, match="scatter"):
        run_one(function, [(np.ones((1, 1, 3)), "float32")])


# Random bits.


@pytest.fixture(params=[True, False], ids=["partitionable", "original"])
def partitionable(request):
    """Run a test with ``jax_threefry_partitionable`` on and off."""
    with jax.threefry_partitionable(request.param):
        yield


DRAWS = {
    "bits": lambda key: [jax.random.bits(key, (3, 2), f"uint{width}") for width in (8, 16, 32)],
    "odd bits": lambda key: [jax.random.bits(key, (5,), f"uint{width}") for width in (8, 16, 32)],
    "no bits": lambda key: jax.random.bits(key, (0, 2)),
    "split": lambda key: jax.random.key_data(jax.random.split(key, (3, 2))),
    "fold in": lambda key: jax.random.key_data(jax.random.fold_in(key, 7)),
    "uniform": lambda key: jax.random.uniform(key, (4,)),
    "bernoulli": lambda key: jax.random.bernoulli(key, 0.3, (7,)),
    "one of several keys": lambda key: jax.random.bits(jax.random.split(key, 3)[2], (4,)),
    "a key for each": lambda key: jax.vmap(lambda k: jax.random.bits(k, (3,)))(
        jax.random.split(key)
    ),
    "chosen key": lambda key: jax.random.key_data(
        lax.select_n(np.array(True), key, jax.random.fold_in(key, 1))
    ),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("wrapped", [True, False], ids=["key", "key data"])
@pytest.mark.usefixtures("partitionable")
def test_random_bits(name, wrapped):
    """They are bit-identical with JAX's for each row and case."""
    keys = jax.random.split(jax.random.key(5), (2, 1))

    def function(key):
        return jax.tree.leaves(DRAWS[name](key if wrapped else jax.random.wrap_key_data(key)))

    stored = np.asarray(jax.random.key_data(keys))
    given_keys = keys if wrapped else stored
    outputs = evaluate(jax.make_jaxpr(function)(given_keys[0, 0]), [stored])
    for row in range(len(stored)):
        for got, want in zip(outputs, function(given_keys[row, 0]), strict=True):
            np.testing.assert_array_equal(got[row, 0], np.asarray(want).astype(got.dtype))


@pytest.mark.parametrize("dtype", ["int32", "uint32"])
@settings(max_examples=TWICE)
@given(st.data())
def test_seeds(dtype, data):
    """A seed gives the same key as in JAX."""

    def function(seed):
        return jax.random.key_data(jax.random.key(seed))

    seed = values(Operand(dtype, ()), (ROWS, CASES), data.draw(SEEDS))
    (got,) = run_one(function, [(seed, dtype)])
    np.testing.assert_array_equal(got, jax.vmap(jax.vmap(function))(seed))


def test_other_generators_go_through_jax():
    """Their bits are not implemented in NumPy; the error names the key type."""
    key = jax.random.key(3, impl="rbg")
    jaxpr = jax.make_jaxpr(lambda key: jax.random.bits(key, (3,)))(key)
    with pytest.raises(NotImplementedError, match="rbg"):
        evaluate(jaxpr, [from_jax(key)])
    (eqn,) = [eqn for eqn in flat(jaxpr) if eqn.primitive.name == "random_bits"]
    (got,) = through_jax(eqn, [from_jax(key)])
    np.testing.assert_array_equal(got[0, 0], jax.random.bits(key, (3,)))


def flat(jaxpr):
    """Return the equations of a jaxpr, including those of calls."""
    inner, _ = open_jaxpr(jaxpr)
    for eqn in inner.eqns:
        called = called_jaxpr(eqn)
        yield from [eqn] if called is None else flat(called)


# Primitives without a NumPy implementation.


@settings(max_examples=SOME)
@given(LEADS, LEADS, SEEDS)
def test_through_jax(left, right, seed):
    """``through_jax`` is vectorised over rows and cases, in the program's dtypes."""
    x = values(Operand("float32", (3,), 0.5, 4), left, seed)
    y = values(Operand("float32", (3,), 0.5, 4), right, seed + 1)
    (eqn,) = jax.make_jaxpr(lax.atan2)(*[np.ones(3, np.float32)] * 2).jaxpr.eqns
    (got,) = through_jax(eqn, [x, y])
    (exact,) = apply(eqn, [x, y])
    assert got.shape == exact.shape
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, exact, rtol=1e-6)
    np.testing.assert_array_equal(got, got.astype(np.float32))


def test_a_missing_primitive_is_named():
    """The error names the primitive."""
    (eqn,) = jax.make_jaxpr(jnp.fft.fft)(np.ones(4, np.complex64)).jaxpr.eqns[-1:]
    with pytest.raises(NotImplementedError, match=eqn.primitive.name):
        apply(eqn, [np.ones((1, 1, 4))])

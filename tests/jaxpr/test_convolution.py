"""A convolution as a matrix product is the convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnverify.compat import enable_x64
from bnverify.jaxpr.convolution import convolve
from bnverify.jaxpr.rounding import rounding

RNG = np.random.default_rng(0)

# name -> shapes of batch and kernel, the layout, and what else the convolution is told
FORMS = {
    "plain": ((2, 3, 5, 4), (6, 3, 3, 2), ("NCHW", "OIHW", "NCHW"), {}),
    "channels last": ((2, 5, 4, 3), (3, 2, 3, 6), ("NHWC", "HWIO", "NHWC"), {"padding": "SAME"}),
    "odd layout": ((5, 2, 3, 4), (6, 3, 3, 2), ("HNCW", "OIHW", "WCHN"), {}),
    "strided": ((2, 3, 7, 6), (6, 3, 3, 2), ("NCHW", "OIHW", "NCHW"), {"window_strides": (2, 3)}),
    "dilated": (
        (2, 3, 5, 4),
        (6, 3, 3, 2),
        ("NCHW", "OIHW", "NCHW"),
        {"lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "padding": [(1, 2), (0, 3)]},
    ),
    "cropped": (
        (2, 3, 8, 4),
        (6, 3, 3, 2),
        ("NCHW", "OIHW", "NCHW"),
        {"padding": [(-1, 2), (0, -1)]},
    ),
    "feature groups": (
        (2, 6, 5, 4),
        (4, 3, 3, 2),
        ("NCHW", "OIHW", "NCHW"),
        {"feature_group_count": 2},
    ),
    "depthwise": (
        (2, 6, 5, 4),
        (6, 1, 3, 2),
        ("NCHW", "OIHW", "NCHW"),
        {"feature_group_count": 6},
    ),
    "batch groups": (
        (4, 3, 5, 4),
        (6, 3, 3, 2),
        ("NCHW", "OIHW", "NCHW"),
        {"batch_group_count": 2},
    ),
    "a large window": ((2, 3, 9, 9), (6, 3, 8, 8), ("NCHW", "OIHW", "NCHW"), {}),
    "one axis": ((2, 3, 9), (6, 3, 4), ("NCH", "OIH", "NCH"), {"padding": "SAME"}),
    "three axes": ((2, 3, 4, 5, 3), (6, 3, 2, 2, 2), ("NCHWD", "OIHWD", "NCHWD"), {}),
    "no axis": ((2, 3), (6, 3), ("NC", "OI", "NC"), {}),
}


def form(name):
    """Return a convolution of two arrays, and two arrays."""
    batch, kernel, layout, options = FORMS[name]
    options = {"window_strides": (1,) * (len(batch) - 2), "padding": "VALID", **options}

    def convolution(lhs, rhs):
        return jax.lax.conv_general_dilated(lhs, rhs, dimension_numbers=layout, **options)

    return convolution, RNG.normal(size=batch), RNG.normal(size=kernel)


def as_product(convolution, *args):
    """Return what ``convolution``, the one equation that it is, gives as a product."""
    jaxpr = jax.make_jaxpr(convolution)(*args)
    (eqn,) = jaxpr.eqns
    return convolve(*args, **eqn.params)


@pytest.mark.parametrize("name", FORMS)
def test_a_product_of_patches_is_the_convolution(name):
    """In every layout, with strides, dilations, padding and groups of both kinds."""
    convolution, lhs, rhs = form(name)
    with enable_x64():
        expected = convolution(lhs, rhs)
        np.testing.assert_allclose(
            as_product(convolution, lhs, rhs), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("name", ["channels last", "strided", "dilated", "feature groups"])
@pytest.mark.parametrize("argument", [0, 1], ids=["batch", "kernel"])
def test_so_are_those_of_its_gradients(name, argument):
    """They are convolutions too, of other layouts and dilations, with the space as a window."""
    convolution, *args = form(name)

    def gradient(lhs, rhs):
        return jax.grad(lambda *both: jnp.sum(convolution(*both) ** 2), argument)(lhs, rhs)

    args = [array.astype(np.float32) for array in args]
    reading = rounding(gradient, *args)
    with enable_x64():
        expected = np.asarray(gradient(*(array.astype(np.float64) for array in args)))
        exact, noise = map(np.asarray, reading.evaluate(*args))
        np.testing.assert_allclose(exact, expected, rtol=1e-11, atol=1e-11)
    assert np.max(np.abs(np.asarray(gradient(*args)) - expected) / noise) <= 1


def test_what_takes_too_many_slices_is_left_alone():
    """A window of 400 places over a space of 400 is no small program."""
    convolution, lhs, rhs = (
        lambda a, b: jax.lax.conv(a, b, (1, 1), "VALID"),
        np.zeros((1, 1, 39, 39), np.float32),
        np.zeros((1, 1, 20, 20), np.float32),
    )
    assert as_product(convolution, lhs, rhs) is None

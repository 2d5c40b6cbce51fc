"""The primitives of a training step as NumPy functions on stacked arrays.

:func:`apply` runs one equation of a jaxpr on arrays with two extra leading axes, (rows, cases),
each of full size or of size 1, which broadcast between the inputs. Nothing is compiled.

Floats are stored and computed in float64, whatever the program's dtype. Integers and booleans keep
the program's dtype, with XLA's semantics (wrap-around, division by zero, out-of-bounds indices). A
PRNG key is stored as its uint32 key data, with one more axis at the end.

A function in the table takes the equation and its inputs and returns its one output, or a list of
outputs. It expands a leading axis of size 1 only where necessary. It may return a view of an input,
so callers must not write into the result.

Sources: https://openxla.org/xla/operation_semantics and the docstrings of ``jax.lax``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnverify.jaxpr import indexing, threefry, windows
from bnverify.jaxpr.elementwise import (
    FUNCTIONS,
    convert,
    integer_power,
    reduce_precision,
    round_away,
)
from bnverify.jaxpr.interpreter import open_jaxpr
from bnverify.jaxpr.products import dot_general
from bnverify.jaxpr.values import Array, is_float, is_key, widen

Inputs = Sequence[Array]
Form = Callable[[Any, Inputs], Array | list[Array]]

FORMS: dict[str, Form] = {}
"""Primitive name -> its NumPy implementation."""

LEAD = 2
"""The number of leading axes of every array: rows and cases."""


def apply(eqn: Any, inputs: Inputs) -> list[Array]:
    """Run one equation without an inner jaxpr.

    Args:
        eqn: the equation.
        inputs: an array for each input, (rows or 1, cases or 1, *aval.shape).

    Returns:
        An array for each output, (rows or 1, cases or 1, *aval.shape): a leading axis has size 1
        if it has size 1 in all inputs of this output.

    Raises:
        NotImplementedError: the primitive is not implemented, or not for these dtypes or
            parameters.
    """
    form = FORMS.get(eqn.primitive.name)
    if form is None:
        raise NotImplementedError(f"primitive {eqn.primitive.name!r} has no NumPy implementation")
    for array, atom in zip(inputs, eqn.invars, strict=True):
        if array.ndim != LEAD + len(atom.aval.shape) and not eqn.primitive.name.startswith(
            "random_"
        ):
            return _move_keys(form, eqn, inputs)
    outputs = form(eqn, inputs)
    return outputs if isinstance(outputs, list) else [outputs]


def through_jax(eqn: Any, inputs: Inputs) -> list[Array]:
    """Run one equation with JAX, in the program's own dtypes.

    For primitives without a NumPy implementation. 64-bit types stay disabled, so the result is
    rounded as in the program.

    Raises:
        NotImplementedError: the primitive has no batching rule.
        TypeError: the primitive rejects its inputs.
    """

    def bind(*arrays: Any) -> list[Any]:
        out = eqn.primitive.bind(*arrays, **eqn.params)
        return list(out) if eqn.primitive.multiple_results else [out]

    run: Callable[..., list[Any]] = bind
    missing = []
    arrays = list(inputs)
    for axis in (1, 0):
        stacked = [array.shape[axis] > 1 for array in inputs]
        if any(stacked):
            run = jax.vmap(run, in_axes=[0 if each else None for each in stacked])
        else:
            missing.append(axis)
        arrays = [
            array if each else array.squeeze(axis)
            for array, each in zip(arrays, stacked, strict=True)
        ]
    given = [to_jax(array, atom.aval) for array, atom in zip(arrays, eqn.invars, strict=True)]
    return [np.expand_dims(from_jax(output)[0, 0], missing) for output in run(*given)]


def from_jax(value: Any) -> Array:
    """Return a JAX or NumPy array in this module's representation, (1, 1, *shape).

    Raises:
        NotImplementedError: its dtype is complex, or an integer of less than 8 bits.
    """
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    stored_dtype(dtype)  # raises if there is none
    return widen(value, dtype)[None, None]


def to_jax(array: Array, aval: Any) -> Any:
    """Return an array as a JAX array of dtype ``aval.dtype``; the inverse of ``from_jax``."""
    if is_key(aval.dtype):
        tag = str(aval.dtype).removeprefix("key<").removesuffix(">")
        return jax.random.wrap_key_data(jnp.asarray(array), impl=_KEY_TYPES[tag])
    return jnp.asarray(array.astype(aval.dtype))


_KEY_TYPES = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}


@functools.cache
def stored_dtype(dtype: Any) -> np.dtype[Any]:
    """Return the dtype that stores values of a program's ``dtype``.

    Raises:
        NotImplementedError: the dtype is complex, or an integer of less than 8 bits.
    """
    if is_key(dtype):
        return np.dtype(np.uint32)
    if is_float(dtype):
        return np.dtype(np.float64)
    numpy_dtype: np.dtype[Any] = np.dtype(dtype)
    if numpy_dtype.kind in "biu":
        return numpy_dtype
    raise NotImplementedError(f"values of dtype {dtype} have no NumPy representation")


def form(*names: str) -> Callable[[Form], Form]:
    """Register the decorated function as the implementation of these primitives."""

    def register(function: Form) -> Form:
        for name in names:
            if name in FORMS:
                raise ValueError(f"primitive {name!r} already has a NumPy implementation")
            FORMS[name] = function
        return function

    return register


def _level(inputs: Inputs) -> Inputs:
    """Return the inputs with equal rank: a scalar operand gets axes of size 1."""
    rank = max([array.ndim for array in inputs])
    return [
        array
        if array.ndim == rank
        else array.reshape(array.shape[:LEAD] + (1,) * (rank - array.ndim) + array.shape[LEAD:])
        for array in inputs
    ]


def _lead(inputs: Inputs) -> tuple[int, int]:
    """Return the leading shape that the inputs broadcast to."""
    return max([a.shape[0] for a in inputs]), max([a.shape[1] for a in inputs])


def _onto(array: Array, lead: tuple[int, ...]) -> Array:
    """Return ``array`` broadcast to the leading shape ``lead``, as a view."""
    if array.shape[:LEAD] == lead:
        return array
    return np.broadcast_to(array, lead + array.shape[LEAD:])


def _axes(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple([LEAD + axis for axis in axes])


def _move_keys(form: Form, eqn: Any, inputs: Inputs) -> list[Array]:
    """Run an equation that only moves PRNG keys: each key is one element of opaque bytes."""
    is_key = [
        array.ndim > LEAD + len(atom.aval.shape)
        for array, atom in zip(inputs, eqn.invars, strict=True)
    ]
    sizes = {array.shape[-1] for array, key in zip(inputs, is_key, strict=True) if key}
    opaque = np.dtype((np.void, 4 * sizes.pop()))
    packed = [
        np.ascontiguousarray(array).view(opaque)[..., 0] if key else array
        for array, key in zip(inputs, is_key, strict=True)
    ]
    outputs = form(eqn, packed)
    return [
        np.ascontiguousarray(output)[..., None].view(np.uint32)
        if output.dtype == opaque
        else output
        for output in (outputs if isinstance(outputs, list) else [outputs])
    ]


# ---- Elementwise.


def _by_element(function: Callable[..., Array]) -> Form:
    def run(eqn: Any, inputs: Inputs) -> Array:
        return function(*(_level(inputs) if len(inputs) > 1 else inputs))

    return run


for _name, _function in FUNCTIONS.items():
    form(_name)(_by_element(_function))


@form("integer_pow")
def _integer_pow(eqn: Any, inputs: Inputs) -> Array:
    return integer_power(inputs[0], eqn.params["y"])


@form("round")
def _round(eqn: Any, inputs: Inputs) -> Array:
    to_even = int(eqn.params["rounding_method"]) == int(jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return np.rint(inputs[0]) if to_even else round_away(inputs[0])


@form("convert_element_type")
def _convert_element_type(eqn: Any, inputs: Inputs) -> Array:
    return convert(inputs[0], stored_dtype(eqn.params["new_dtype"]))


@form("select_n")
def _select_n(eqn: Any, inputs: Inputs) -> Array:
    which, *cases = _level(inputs)
    if which.dtype == np.bool_:
        return np.where(which, cases[-1], cases[0])
    out = cases[-1]
    for index in reversed(range(len(cases) - 1)):
        out = np.where(which <= index, cases[index], out)
    return out


@form(
    "copy",
    "copy_p",
    "device_put",
    "layout_constraint",
    "mesh_cast",
    "name",
    "optimization_barrier",
    "pvary",
    "random_clone",
    "random_unwrap",
    "random_wrap",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
)
def _identity(eqn: Any, inputs: Inputs) -> list[Array]:
    return list(inputs)


# ---- Bitwise, in the program's own dtype.


def _narrow(array: Array, atom: Any) -> Array:
    """Return an input in the program's dtype."""
    return array.astype(atom.aval.dtype, copy=False)


def _widen(array: Array, atom: Any) -> Array:
    """Return an output in the dtype that stores it."""
    return array.astype(stored_dtype(atom.aval.dtype), copy=False)


@form("nextafter")
def _nextafter(eqn: Any, inputs: Inputs) -> Array:
    x, y = _level([_narrow(*pair) for pair in zip(inputs, eqn.invars, strict=True)])
    return _widen(np.nextafter(x, y), eqn.outvars[0])


@form("bitcast_convert_type")
def _bitcast_convert_type(eqn: Any, inputs: Inputs) -> Array:
    x, new = np.ascontiguousarray(_narrow(inputs[0], eqn.invars[0])), eqn.outvars[0].aval.dtype
    if new.itemsize < x.dtype.itemsize:  # one more axis: the parts of an element
        x = x[..., None]
    bits = x.view(new)
    if new.itemsize > x.dtype.itemsize:
        bits = bits[..., 0]
    return _widen(bits, eqn.outvars[0])


@form("reduce_precision")
def _reduce_precision(eqn: Any, inputs: Inputs) -> Array:
    x = _narrow(inputs[0], eqn.invars[0])
    bits = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    return _widen(reduce_precision(x, *bits), eqn.outvars[0])


# ---- Shape changes; most results are views.


@form("broadcast_in_dim")
def _broadcast_in_dim(eqn: Any, inputs: Inputs) -> Array:
    x, shape = inputs[0], eqn.outvars[0].aval.shape
    sizes = [1] * len(shape)
    for axis, to in enumerate(eqn.params["broadcast_dimensions"]):
        sizes[to] = x.shape[LEAD + axis]
    lead = x.shape[:LEAD]
    return np.broadcast_to(x.reshape(lead + tuple(sizes)), lead + shape)


@form("reshape")
def _reshape(eqn: Any, inputs: Inputs) -> Array:
    x, dimensions = inputs[0], eqn.params.get("dimensions")
    if dimensions is not None:
        x = x.transpose(0, 1, *_axes(dimensions))
    return x.reshape(x.shape[:LEAD] + eqn.outvars[0].aval.shape)


@form("expand_dims", "squeeze")
def _same_elements(eqn: Any, inputs: Inputs) -> Array:
    return inputs[0].reshape(inputs[0].shape[:LEAD] + eqn.outvars[0].aval.shape)


@form("transpose")
def _transpose(eqn: Any, inputs: Inputs) -> Array:
    return inputs[0].transpose(0, 1, *_axes(eqn.params["permutation"]))


@form("rev")
def _rev(eqn: Any, inputs: Inputs) -> Array:
    return np.flip(inputs[0], _axes(eqn.params["dimensions"]))


@form("tile")
def _tile(eqn: Any, inputs: Inputs) -> Array:
    return np.tile(inputs[0], (1, 1, *eqn.params["reps"]))


@form("pad")
def _pad(eqn: Any, inputs: Inputs) -> Array:
    x, value = inputs
    return windows.pad(x, value, eqn.params["padding_config"])


@form("concatenate")
def _concatenate(eqn: Any, inputs: Inputs) -> Array:
    lead = _lead(inputs)
    return np.concatenate([_onto(x, lead) for x in inputs], axis=LEAD + eqn.params["dimension"])


@form("stack")
def _stack(eqn: Any, inputs: Inputs) -> Array:
    lead = _lead(inputs)
    return np.stack([_onto(x, lead) for x in inputs], axis=LEAD + eqn.params["axis"])


@form("split")
def _split(eqn: Any, inputs: Inputs) -> list[Array]:
    ends = np.cumsum(eqn.params["sizes"])[:-1]
    return list(np.split(inputs[0], ends, axis=LEAD + eqn.params["axis"]))


@form("unstack")
def _unstack(eqn: Any, inputs: Inputs) -> list[Array]:
    return list(np.moveaxis(inputs[0], LEAD + eqn.params["axis"], 0))


@form("iota")
def _iota(eqn: Any, inputs: Inputs) -> Array:
    shape, dimension = eqn.outvars[0].aval.shape, eqn.params["dimension"]
    sizes = [1] * len(shape)
    sizes[dimension] = shape[dimension]
    numbers = np.arange(shape[dimension]).astype(stored_dtype(eqn.params["dtype"]))
    return np.broadcast_to(numbers.reshape(1, 1, *sizes), (1, 1, *shape))


@form("empty", "empty2")
def _empty(eqn: Any, inputs: Inputs) -> Array:
    aval = eqn.outvars[0].aval
    return np.zeros((1, 1, *aval.shape), stored_dtype(aval.dtype))


@form("platform_index")
def _platform_index(eqn: Any, inputs: Inputs) -> Array:
    """Return the index of the branch for the CPU, or of the default branch if there is none."""
    platforms = eqn.params["platforms"]
    ours = [i for i, names in enumerate(platforms) if names is not None and "cpu" in names]
    index = (ours or [i for i, names in enumerate(platforms) if names is None])[0]
    return np.full((1, 1), index, eqn.outvars[0].aval.dtype)


# ---- Reductions.


def _reduction(ufunc: np.ufunc) -> Form:
    def run(eqn: Any, inputs: Inputs) -> Array:
        x = inputs[0]
        axes = _axes(eqn.params["axes"])
        return _reduce(ufunc, x, axes)

    return run


def _reduce(ufunc: np.ufunc, x: Array, axes: tuple[int, ...]) -> Array:
    """Reduce in the dtype of ``x``; an empty reduction gives the identity."""
    if x.size == 0:
        empty: Array = ufunc.reduce(
            x, axis=axes, dtype=x.dtype, initial=_identity_of(ufunc, x.dtype)
        )
        return empty
    if ufunc is np.add and x.dtype.kind == "f":  # einsum is four times as fast
        every = range(x.ndim)
        total: Array = np.einsum(x, [*every], [axis for axis in every if axis not in axes])
        return total
    out: Array = ufunc.reduce(x, axis=axes, dtype=x.dtype)
    return out


def _identity_of(ufunc: np.ufunc, dtype: np.dtype[Any]) -> Any:
    """Return the identity element of ``ufunc`` for ``dtype``."""
    if ufunc in {np.maximum, np.minimum}:
        low, high = _range(dtype)
        return low if ufunc is np.maximum else high
    return dtype.type(ufunc.identity) if dtype.kind != "b" else bool(ufunc.identity)


def _range(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    if dtype.kind == "f":
        return -np.inf, np.inf
    if dtype.kind == "b":
        return False, True
    return np.iinfo(dtype).min, np.iinfo(dtype).max


_REDUCTIONS: dict[str, np.ufunc] = {
    "reduce_and": np.bitwise_and,
    "reduce_max": np.maximum,
    "reduce_min": np.minimum,
    "reduce_or": np.bitwise_or,
    "reduce_prod": np.multiply,
    "reduce_sum": np.add,
    "reduce_xor": np.bitwise_xor,
}
for _name, _ufunc in _REDUCTIONS.items():
    form(_name)(_reduction(_ufunc))


def _over_axes(ufunc: np.ufunc) -> Form:
    """Implement a collective over positional axes, as ``jax.vmap`` produces them."""

    def run(eqn: Any, inputs: Inputs) -> list[Array]:
        axes, groups = eqn.params["axes"], eqn.params["axis_index_groups"]
        if groups is not None or not all(isinstance(axis, int) for axis in axes):
            name = eqn.primitive.name
            raise NotImplementedError(f"{name} over named axes {axes} is not implemented")
        return [_reduce(ufunc, x, _axes(axes)) for x in inputs]

    return run


for _name, _ufunc in {"pmax": np.maximum, "pmin": np.minimum, "psum": np.add}.items():
    form(_name)(_over_axes(_ufunc))


@form("argmax", "argmin")
def _arg_reduction(eqn: Any, inputs: Inputs) -> Array:
    pick = np.argmax if eqn.primitive.name == "argmax" else np.argmin
    (axis,) = eqn.params["axes"]
    index: Array = pick(inputs[0], axis=LEAD + axis)
    return index.astype(eqn.outvars[0].aval.dtype)


def _scan(ufunc: np.ufunc) -> Form:
    def run(eqn: Any, inputs: Inputs) -> Array:
        x, axis = inputs[0], LEAD + eqn.params["axis"]
        if eqn.params["reverse"]:
            return np.flip(ufunc.accumulate(np.flip(x, axis), axis=axis, dtype=x.dtype), axis)
        return ufunc.accumulate(x, axis=axis, dtype=x.dtype)

    return run


_SCANS: dict[str, np.ufunc] = {
    "cumlogsumexp": np.logaddexp,
    "cummax": np.maximum,
    "cummin": np.minimum,
    "cumprod": np.multiply,
    "cumsum": np.add,
}
for _name, _ufunc in _SCANS.items():
    form(_name)(_scan(_ufunc))


# ---- Products.


@form("dot_general")
def _dot_general(eqn: Any, inputs: Inputs) -> Array:
    contracting, batch = eqn.params["dimension_numbers"]
    dtype = stored_dtype(eqn.outvars[0].aval.dtype)
    a, b = (convert(x, dtype) for x in inputs)
    return dot_general(a, b, contracting, batch)


@form("conv_general_dilated")
def _conv_general_dilated(eqn: Any, inputs: Inputs) -> Array:
    params = eqn.params
    dtype = stored_dtype(eqn.outvars[0].aval.dtype)
    numbers = params["dimension_numbers"]
    lhs, rhs = (convert(x, dtype) for x in inputs)
    return windows.convolve(
        lhs,
        rhs,
        strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        specs=(numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec),
        feature_groups=params["feature_group_count"],
        batch_groups=params["batch_group_count"],
    )


# ---- Windows.


def _window(params: Any, *, dilations: bool = True) -> dict[str, Any]:
    """Return the window parameters of an equation as keyword arguments."""
    names = ("base_dilation", "window_dilation") if dilations else ()
    return {
        "window": params["window_dimensions"],
        "strides": params["window_strides"],
        "padding": params["padding"],
        **{name: params[name] for name in names},
    }


def _window_reduction(ufunc: np.ufunc) -> Form:
    def run(eqn: Any, inputs: Inputs) -> Array:
        x = inputs[0]
        identity = _identity_of(ufunc, x.dtype)
        return windows.reduce_window(ufunc, x, identity, **_window(eqn.params))

    return run


for _name, _ufunc in {
    "reduce_window_max": np.maximum,
    "reduce_window_min": np.minimum,
    "reduce_window_sum": np.add,
}.items():
    form(_name)(_window_reduction(_ufunc))

_COMBINES = {
    "add": np.add,
    "and": np.bitwise_and,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _combination(eqn: Any) -> np.ufunc:
    """Return the ufunc that a general reduction of one operand applies.

    Raises:
        NotImplementedError: its jaxpr is not one of the usual binary operations.
    """
    jaxpr, _ = open_jaxpr(eqn.params["jaxpr"])
    if len(jaxpr.invars) == 2 and len(jaxpr.eqns) == 1:
        (only,) = jaxpr.eqns
        both = {*only.invars} == {*jaxpr.invars} if not _literal(only) else False
        name = only.primitive.name
        if both and only.outvars == jaxpr.outvars and name in _COMBINES:
            return _COMBINES[name]
    raise NotImplementedError(f"{eqn.primitive.name} with {jaxpr} is not implemented")


def _literal(eqn: Any) -> bool:
    return any(hasattr(atom, "val") for atom in eqn.invars)


@form("reduce")
def _general_reduce(eqn: Any, inputs: Inputs) -> list[Array]:
    ufunc, (x, initial) = _combination(eqn), inputs
    reduced = _reduce(ufunc, x, _axes(eqn.params["dimensions"]))
    return [ufunc(*_level([initial, reduced]))]


@form("reduce_window")
def _reduce_window(eqn: Any, inputs: Inputs) -> list[Array]:
    ufunc, (x, initial) = _combination(eqn), inputs
    # Pad with the identity: each window starts from the initial value anyway.
    identity = _identity_of(ufunc, x.dtype)
    reduced = windows.reduce_window(ufunc, x, identity, **_window(eqn.params))
    return [ufunc(*_level([initial, reduced]))]


_SELECTS = {"ge": np.greater_equal, "gt": np.greater, "le": np.less_equal, "lt": np.less}


@form("select_and_scatter_add")
def _select_and_scatter_add(eqn: Any, inputs: Inputs) -> Array:
    selects, (source, operand) = _SELECTS[eqn.params["select_prim"].name], inputs
    window = _window(eqn.params, dilations=False)
    return windows.select_and_scatter_add(selects, source, operand, **window)


@form("select_and_gather_add")
def _select_and_gather_add(eqn: Any, inputs: Inputs) -> Array:
    selects, (tangents, operand) = _SELECTS[eqn.params["select_prim"].name], inputs
    return windows.select_and_gather_add(selects, tangents, operand, **_window(eqn.params))


# ---- Slices.


@form("slice")
def _slice(eqn: Any, inputs: Inputs) -> Array:
    params = eqn.params
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(starts)
    return inputs[0][(slice(None), slice(None), *map(slice, starts, limits, strides))]


@form("dynamic_slice")
def _dynamic_slice(eqn: Any, inputs: Inputs) -> Array:
    return indexing.dynamic_slice(inputs[0], inputs[1:], eqn.outvars[0].aval.shape)


@form("dynamic_update_slice")
def _dynamic_update_slice(eqn: Any, inputs: Inputs) -> Array:
    return indexing.dynamic_update_slice(inputs[0], inputs[1], inputs[2:])


def _fill_value(dtype: np.dtype[Any]) -> Any:
    """Return the out-of-bounds value of a gather that does not specify one."""
    if dtype.kind == "f":
        return np.nan
    low, high = _range(dtype)
    return low if dtype.kind == "i" else high


@form("gather")
def _gather(eqn: Any, inputs: Inputs) -> Array:
    operand, indices = inputs
    params = eqn.params
    # XLA also clamps with PROMISE_IN_BOUNDS if the promise is broken.
    clip = params["mode"] != jax.lax.GatherScatterMode.FILL_OR_DROP
    fill = params["fill_value"]
    if fill is None and not clip:
        fill = _fill_value(operand.dtype)
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    return indexing.gather(operand, indices, numbers, sizes, clip=clip, fill=fill)


def _scatter_with(ufunc: np.ufunc | None) -> Form:
    def run(eqn: Any, inputs: Inputs) -> Array:
        params, (operand, indices, updates) = eqn.params, inputs
        if ufunc is None and params.get("update_jaxpr") is not None:
            jaxpr, _ = open_jaxpr(params["update_jaxpr"])
            if jaxpr.outvars[0] is not jaxpr.invars[1]:
                raise NotImplementedError("scatter with a custom function is not implemented")
        return indexing.scatter(
            ufunc,
            operand,
            indices,
            updates,
            params["dimension_numbers"],
            clip=params["mode"] == jax.lax.GatherScatterMode.CLIP,
            unique=params["unique_indices"],
        )

    return run


for _name, _scattered in {
    "scatter": None,
    "scatter-add": np.add,
    "scatter-max": np.maximum,
    "scatter-min": np.minimum,
    "scatter-mul": np.multiply,
    "scatter-sub": np.subtract,
    "scatter_max": np.maximum,
    "scatter_min": np.minimum,
    "scatter_mul": np.multiply,
    "scatter_sub": np.subtract,
}.items():
    form(_name)(_scatter_with(_scattered))


# ---- Order.


@form("sort")
def _sort(eqn: Any, inputs: Inputs) -> list[Array]:
    """Sort all operands by the first ``num_keys``: NaN last, -0 equal to 0, always stable."""
    axis, keys = LEAD + eqn.params["dimension"], inputs[: eqn.params["num_keys"]]
    if len(inputs) == 1:
        return [np.sort(inputs[0], axis=axis, kind="stable")]
    if len(keys) == 1:
        order = np.argsort(keys[0], axis=axis, kind="stable")
    else:
        lead = _lead(keys)
        order = np.lexsort([_onto(key, lead) for key in reversed(keys)], axis=axis)
    return [np.take_along_axis(x, order, axis) for x in inputs]


@form("top_k")
def _top_k(eqn: Any, inputs: Inputs) -> list[Array]:
    """Return the k largest, equal ones in order of index; floats in the total order of IEEE 754.

    In that order -0 is below 0, and NaN is at the end given by its sign bit.
    """
    x, k, axis = (
        inputs[0],
        eqn.params["k"],
        LEAD + eqn.params.get("axis", inputs[0].ndim - LEAD - 1),
    )
    key = x
    if x.dtype.kind == "f":
        bits = np.ascontiguousarray(x).view(np.int64)
        key = np.where(bits < 0, bits ^ np.iinfo(np.int64).max, bits)
    # A stable descending sort: reverse, sort ascending, reverse again.
    order = np.flip(np.argsort(np.flip(key, axis), axis=axis, kind="stable"), axis)
    best = x.shape[axis] - 1 - np.take(order, np.arange(k), axis=axis)
    return [np.take_along_axis(x, best, axis), best.astype(eqn.outvars[1].aval.dtype)]


# ---- Random bits.


def _threefry_only(dtype: Any) -> None:
    if str(dtype) != "key<fry>":
        raise NotImplementedError(
            f"PRNG keys of type {dtype} are not implemented, only threefry2x32"
        )


@form("random_bits")
def _random_bits(eqn: Any, inputs: Inputs) -> Array:
    _threefry_only(eqn.invars[0].aval.dtype)
    return threefry.random_bits(inputs[0], eqn.params["bit_width"], tuple(eqn.params["shape"]))


@form("random_split")
def _random_split(eqn: Any, inputs: Inputs) -> Array:
    _threefry_only(eqn.invars[0].aval.dtype)
    return threefry.split(inputs[0], tuple(eqn.params["shape"]))


@form("random_fold_in")
def _random_fold_in(eqn: Any, inputs: Inputs) -> Array:
    _threefry_only(eqn.invars[0].aval.dtype)
    keys, data = inputs
    key1, key2, data = _level([keys[..., 0], keys[..., 1], data])
    return threefry.fold_in(key1, key2, data)


@form("random_seed")
def _random_seed(eqn: Any, inputs: Inputs) -> Array:
    _threefry_only(eqn.outvars[0].aval.dtype)
    return threefry.seed(inputs[0])


@form("threefry2x32")
def _threefry2x32(eqn: Any, inputs: Inputs) -> list[Array]:
    return list(threefry.threefry2x32(*_level(inputs)))

"""Standalone scripts that reproduce a difference without bnverify.

A script contains the state before the step and the batch, runs one function of the target in the
environment it is started in, prints the recorded and the current value, and exits with status 1 if
they differ by more than rounding explains.
"""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from bnverify.upgrade.recording import Recording
    from bnverify.upgrade.values import Place

_LITERAL = 64  # elements; longer arrays are compressed

_LOAD = '''\
import base64, importlib, importlib.util, inspect, os, pathlib, sys, zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
import numpy as np

TARGET = {target!r}


def load(target):
    """Return the functions that the target names: its init, step and evaluate."""
    source, _, name = target.rpartition(":")
    if source.endswith(".py"):
        sys.path.insert(0, str(pathlib.Path(source).resolve().parent))
        spec = importlib.util.spec_from_file_location("the_target", source)
        module = sys.modules["the_target"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        module = importlib.import_module(source)
    found = module
    for part in name.split("."):
        found = getattr(found, part)
    if hasattr(found, "step"):
        return found
    if inspect.signature(found).parameters:  # a function of (seed, x_batch, y_batch, lr)
        import bnverify

        return bnverify.load(target)
    return found()


subject = load(TARGET)
'''

_ARRAYS = '''

def unpack(text, dtype, shape):
    """Return an array from its bytes, compressed."""
    data = zlib.decompress(base64.b85decode(text))
    return np.frombuffer(data, dtype).reshape(shape)


x = {x}
y = {y}
lr = np.float32({lr!r})
# The state before the step, leaf by leaf.
leaves = {{
{leaves}
}}
structure = jax.tree_util.tree_structure(subject.init(np.int32(0), x))
state = jax.tree_util.tree_unflatten(structure, list(leaves.values()))
'''

_VALUE = """
{run}
paths, _ = jax.tree_util.tree_flatten_with_path({tree})
new = float(np.asarray(paths[{index}][1], np.float64)[{element}])
old = {old}
allowed = {allowed!r}
print({leaf!r})
print("recorded:", old, "with", {then!r})
print("now:     ", new, "with jax", jax.__version__)
print("allowed by rounding:", allowed)
same = abs(new - old) <= allowed or new == old or (new != new and old != old)
sys.exit(0 if same else 1)
"""

_ERROR = """
x = np.arange(24 * {features}, dtype=np.float32).reshape(24, {features}) / 8
y = np.arange(24, dtype=np.float32) / 8
state = jax.jit(subject.init)(np.int32(0), x)
state, info = jax.jit(subject.step)(state, x, y, np.float32(0.5))
print("eval loss", jax.jit(subject.evaluate)(state, x, y))
"""

_DRAWS = """
x = np.zeros({shape}, np.float32)
init = jax.jit(subject.init)
values = []
for seed in range({seeds}):
    paths, _ = jax.tree_util.tree_flatten_with_path(init(np.int32(seed), x))
    values.append(np.mean(np.asarray(paths[{index}][1], np.float64) ** {power}))
old, new = {old!r}, float(np.mean(values))
allowed = {sigmas} * ((({variance!r} + np.var(values, ddof=1)) / {seeds}) ** 0.5) + 2e-6 * abs(old)
print({leaf!r}, "to the power {power}, mean over {seeds} seeds")
print("recorded:", old, "with", {then!r})
print("now:     ", new, "with jax", jax.__version__)
print("allowed by chance:", allowed)
sys.exit(0 if abs(new - old) <= allowed else 1)
"""


def of_error(target: str, features: int = 3) -> str:
    """Return a script that runs the target's three functions and so reproduces an exception."""
    return _LOAD.format(target=target) + _ERROR.format(features=features)


def of_value(old: Recording, new: Recording, place: Place) -> str | None:
    """Return a script that reproduces one value; None if the state cannot be rebuilt.

    Args:
        old: the recording; the script contains its state before the step.
        new: the replay, which gives the order of the leaves.
        place: the value.
    """
    home = f"shape{place.shape}"
    evaluating = place.leaf == "eval_loss"
    order = list(new.leaves(place.shape, "state"))
    try:
        if evaluating:
            values = old.under(f"{home}/step{place.step}/value")
            state = {leaf: values[leaf] for leaf in order}
        else:
            before = old.before(place.shape, place.step)
            state = {leaf: before[leaf] for leaf in order}
        tree, index = _find(new, place)
    except (KeyError, ValueError):  # leaves that were renamed
        return None
    case = old.under(f"{home}/case")
    lines = (f"    {leaf!r}: {_array(values[place.case])}," for leaf, values in state.items())
    run = (
        "result = jax.jit(subject.evaluate)(state, x, y)"
        if evaluating
        else "after, info = jax.jit(subject.step)(state, x, y, lr)"
    )
    at = f"{place.leaf}{list(place.element) if place.element else ''}"
    return (
        # Written as a literal, because the leaf's name may come from an untrusted recording.
        repr(f"{at} differs from what was recorded.")
        + "\n\n"
        + _LOAD.format(target=new.manifest["target"])
        + _ARRAYS.format(
            x=_array(case["x"][place.case]),
            y=_array(case["y"][place.case]),
            lr=float(case["lr"][place.case]),
            leaves="\n".join(lines),
        )
        + _VALUE.format(
            run=run,
            tree=tree,
            index=index,
            element=place.element,
            old=_number(place.old),
            allowed=place.allowed,
            leaf=at,
            then=_versions(old),
        )
    )


def of_draws(
    old: Recording, new: Recording, leaf: str, moment: int, seeds: int, sigmas: float
) -> str | None:
    """Return a script that reproduces the changed distribution of a leaf's initial values.

    Args:
        old: the recording, whose averages the script contains.
        new: the replay.
        leaf: the leaf's path.
        moment: the index of the average that differs; the powers are 1, 2 and 4.
        seeds: the number of seeds averaged over.
        sigmas: the number of standard errors attributed to chance.
    """
    shapes = new.manifest["shapes"]
    paths = list(new.leaves(min(1, len(shapes) - 1), "state"))
    if leaf not in paths:
        return None
    mean, variance = (float(row[moment]) for row in old.arrays[f"draws/{leaf}"])
    return (
        repr(f"The distribution of the initial values of {leaf} differs from the recorded one.")
        + "\n\n"
        + _LOAD.format(target=new.manifest["target"])
        + _DRAWS.format(
            shape=tuple(shapes[min(1, len(shapes) - 1)]),
            seeds=seeds,
            index=paths.index(leaf),
            power=(1, 2, 4)[moment],
            old=mean,
            variance=variance,
            sigmas=sigmas,
            leaf=leaf,
            then=_versions(old),
        )
    )


def _versions(recording: Recording) -> str:
    return ", ".join(
        f"{name} {version}" for name, version in recording.manifest["versions"].items()
    )


def _find(new: Recording, place: Place) -> tuple[str, int]:
    """Return the expression for the result tree that contains the leaf, and the leaf's index."""
    for tree, expression in (
        ("after", "after"),
        ("loss", "info.loss"),
        ("grads", "info.grads"),
        ("eval_loss", "result"),
    ):
        paths = list(new.leaves(place.shape, tree))
        if place.leaf in paths:
            return expression, paths.index(place.leaf)
    raise KeyError(place.leaf)


def _number(value: float) -> str:
    return repr(value) if np.isfinite(value) else f'float("{value}")'


def _array(array: Any) -> str:
    """Return an expression for an array: a literal, or compressed bytes if it is long."""
    if array.size <= _LITERAL and array.dtype.kind in "fiub" and np.isfinite(array).all():
        return f"np.array({array.tolist()!r}, np.{array.dtype.name})"
    packed = base64.b85encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()
    dtype = f"np.dtype({array.dtype.name!r})"
    if array.dtype.kind == "V":
        dtype = f"jax.numpy.dtype({array.dtype.name!r})"
    return f"unpack({packed!r}, {dtype}, {array.shape})"

"""Laws of structure: tree structures, shapes and dtypes, read from shapes alone."""

from __future__ import annotations

from typing import Any

from bnverify.laws.law import law
from bnverify.lazy import jax, jnp
from bnverify.model import Transition, Tree
from bnverify.pytree import path_name
from bnverify.statistic_names import has_both, moment_of

FLAX_GUIDE = (
    "Flax, Applying batch normalization: "
    "https://flax.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html"
)


def differences(name: str, actual: Tree, expected: Tree, *, weak_types: bool = False) -> list[str]:
    """Return the differences in structure, shape and dtype between two trees, one line each.

    Args:
        name: the name of ``actual`` in the lines.
        actual: a tree of arrays or ShapeDtypeStructs.
        expected: a tree of arrays or ShapeDtypeStructs.
        weak_types: whether to compare weak types, too.
    """
    found, wanted = _leaves(actual), _leaves(expected)
    lines = [f"{name} has no {path}" for path in wanted if path not in found]
    lines += [f"{name} has an unexpected leaf {path}" for path in found if path not in wanted]
    for path in found:
        if path not in wanted:
            continue
        for what, read in _READINGS.items():
            if what == "weak type" and not weak_types:
                continue
            if read(found[path]) != read(wanted[path]):
                lines.append(
                    f"{name}/{path} has {what} {read(found[path])}, expected {read(wanted[path])}"
                )
    structure = jax.tree_util.tree_structure
    if not lines and structure(actual) != structure(expected):
        lines.append(f"{name} is {structure(actual)}, expected {structure(expected)}")
    return lines


_READINGS: dict[str, Any] = {
    "shape": lambda leaf: tuple(leaf.shape),
    "dtype": lambda leaf: jnp.dtype(leaf.dtype).name,
    "weak type": lambda leaf: bool(getattr(leaf, "weak_type", False)),
}


def _leaves(tree: Tree) -> dict[str, Any]:
    with_paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in with_paths}


@law(
    "structure",
    kind="structure",
    capabilities=("grads",),
    mistakes=("gradient_of_all_variables", "statistics_trained_as_params", "wrong_gradient"),
    source="JAX, jax.value_and_grad: https://docs.jax.dev/en/latest/_autosummary/jax.value_and_grad.html",
)
def gradients_match_params(t: Transition) -> list[str]:
    """The gradients have the tree structure, shapes and dtypes of params."""
    return differences("grads", t.info.grads, t.before.params)


@law(
    "structure",
    kind="structure",
    mistakes=("statistics_trained_as_params", "parameters_change_dtype"),
    source=FLAX_GUIDE,
)
def params_keep_their_tree(t: Transition) -> list[str]:
    """The step keeps the tree structure, shapes and dtypes of params."""
    return differences("params", t.after.params, t.before.params)


@law(
    "structure",
    kind="structure",
    mistakes=(
        "new_statistics_dropped",
        "statistics_in_low_precision",
        "broadcast_loss",
        "parameters_change_dtype",
        "statistics_nested",
    ),
    source=FLAX_GUIDE,
)
def batch_stats_keep_their_tree(t: Transition) -> list[str]:
    """The step keeps the tree structure, shapes and dtypes of batch_stats."""
    return differences("batch_stats", t.after.batch_stats, t.before.batch_stats)


@law(
    "structure",
    kind="structure",
    mistakes=("statistics_trained_as_params",),
    source=FLAX_GUIDE,
)
def params_hold_no_statistics(t: Transition) -> list[str]:
    """No leaf of params is a running statistic.

    Checked by path: no path of batch_stats occurs in params, and no module in params has a ``mean``
    and a ``var``, or other usual names of a running mean and variance, next to ``scale`` or ``bias``;
    that would be a BatchNorm whose statistics are params.
    """
    stats = {path.lower() for path in _leaves(t.before.batch_stats)}
    paths = list(_leaves(t.before.params))
    modules: dict[str, set[str]] = {}
    for path in paths:
        modules.setdefault(_module(path), set()).add(_last(path))
    astray = {
        module for module, names in modules.items() if has_both(names) and names & {"scale", "bias"}
    }
    shared = [
        path
        for path in paths
        if _ends_with_one_of(path.lower(), stats) or (_module(path) in astray and moment_of(path))
    ]
    return [f"params contains {path}, a running statistic" for path in shared]


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in {"", "value"}]  # nnx: mean/value


def _module(path: str) -> str:
    return "/".join(_parts(path)[:-1])


def _last(path: str) -> str:
    return _parts(path)[-1] if _parts(path) else ""


@law(
    "structure",
    kind="structure",
    observes=("expected_opt_state",),
    capabilities=("optimizer", "opt_state"),
    mistakes=(
        "optimizer_on_all_variables",
        "parameters_change_dtype",
        "statistics_fed_to_the_optimizer",
    ),
    source="Optax, GradientTransformation.init: https://optax.readthedocs.io/en/latest/api/transformations.html",
)
def optimizer_state_is_that_of_params(t: Transition) -> list[str]:
    """Before and after the step, the optimizer state has the structure of tx.init(params)."""
    expected = t.facts["expected_opt_state"]
    return differences("opt_state", t.before.opt_state, expected) + differences(
        "new opt_state", t.after.opt_state, expected
    )


@law(
    "structure",
    kind="structure",
    capabilities=("opt_state", "batch_stats"),
    mistakes=(
        "optimizer_on_all_variables",
        "statistics_trained_as_params",
        "statistics_fed_to_the_optimizer",
    ),
    source=FLAX_GUIDE,
)
def optimizer_state_excludes_batch_stats(t: Transition) -> list[str]:
    """The optimizer state has no leaf for a running statistic."""
    stats = {path.lower() for path in _leaves(t.before.batch_stats)}
    states = (("opt_state", t.before.opt_state), ("new opt_state", t.after.opt_state))
    return [
        f"{name} contains {path}, a running statistic"
        for name, state in states
        for path in _leaves(state)
        if "batch_stats" in path.lower() or _ends_with_one_of(path.lower(), stats)
    ]


def _ends_with_one_of(path: str, endings: set[str]) -> bool:
    return any(path == ending or path.endswith("/" + ending) for ending in endings)


@law(
    "structure",
    kind="structure",
    capabilities=("loss",),
    mistakes=("loss_not_reduced",),
    source="JAX, jax.grad: https://docs.jax.dev/en/latest/_autosummary/jax.grad.html",
)
def training_loss_is_a_scalar(t: Transition) -> list[str]:
    """The training loss has shape ()."""
    shape = tuple(t.info.loss.shape)
    return [] if shape == () else [f"loss has shape {shape}, expected ()"]


@law("structure", kind="structure", mistakes=("loss_not_reduced",), source="bnverify.reference")
def eval_loss_has_shape_one(t: Transition) -> list[str]:
    """The eval loss is a single number, of shape () or (1,)."""
    shape = tuple(t.eval_loss.shape)
    return [] if shape in {(), (1,)} else [f"eval loss has shape {shape}, expected () or (1,)"]


@law(
    "structure",
    kind="structure",
    capabilities=("batch_stats",),
    mistakes=("statistics_in_low_precision",),
    source="Flax, linen/normalization.py: statistics are kept in float32 whatever the dtype",
)
def batch_stats_are_float32(t: Transition) -> list[str]:
    """Floating-point running statistics are float32, whatever dtype the model computes in."""
    lines = []
    for name, tree in (
        ("batch_stats", t.before.batch_stats),
        ("new batch_stats", t.after.batch_stats),
    ):
        for path, leaf in _leaves(tree).items():
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:
                lines.append(f"{name}/{path} is {jnp.dtype(leaf.dtype).name}, expected float32")
    return lines


@law(
    "structure",
    kind="structure",
    mistakes=(
        "optimizer_on_all_variables",
        "parameters_change_dtype",
        "weak_type_in_the_state",
        "statistics_in_low_precision",
        "statistics_nested",
        "new_statistics_dropped",
    ),
    source="JAX, jit recompiles when a signature changes: https://docs.jax.dev/en/latest/jit-compilation.html",
)
def state_signature_is_a_fixed_point(t: Transition) -> list[str]:
    """The step returns a state of the same structure, shapes, dtypes and weak types as its input."""
    return [
        line
        for name in ("params", "batch_stats", "opt_state")
        for line in differences(
            name, getattr(t.after, name), getattr(t.before, name), weak_types=True
        )
    ]

"""Differences between jax releases, handled in one place.

Each entry says which releases need it; delete it together with support for the last of them.
"""

from __future__ import annotations

import os
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from bnverify.lazy import jax

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def enable_x64() -> AbstractContextManager[Any]:
    """Return a context with 64-bit JAX types, only for tests that compare NumPy with JAX.

    It is ``jax.enable_x64(True)`` from jax 0.8.3 on, and before that
    ``jax.experimental.enable_x64()``, which jax 0.9.2 removed.
    """
    switch: Any = getattr(jax, "enable_x64", None)
    if switch is None:
        switch = import_module("jax.experimental").enable_x64
    context: AbstractContextManager[Any] = switch(True)
    return context


def scan_split(eqn: Any) -> tuple[int, int] | None:
    """Return (number of constants, number of carried values) among the inputs of a scan equation.

    Up to jax 0.10 they are the parameters ``num_consts`` and ``num_carry``; later releases have
    groups of inputs, "ft_in". None if neither is present, or the numbers do not add up.
    """
    params = eqn.params
    if "num_consts" in params and "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    try:
        consts, carry, xs = (len(list(group)) for group in params["ft_in"].unpack())
        carried = len(list(params["ft_out"].unpack()[0]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    adds_up = consts + carry + xs == len(eqn.invars) and carried == carry
    return (consts, carry) if adds_up else None


def literal(atom: Any) -> Any:
    """Return the value of a literal among an equation's inputs, as a NumPy array; None for a variable.

    jax 0.7 stores literals as LiteralArray, which ``float`` and ``abs`` do not accept.
    """
    return np.asarray(atom.val) if hasattr(atom, "val") else None


def transformations(eqn: Any) -> list[str]:
    """Return the names of the transformations that an equation was made under: ["transpose", "jvp"].

    They are not public API, so the list is empty if they are not where they are today. Up to jax
    0.4.30 they are left out of the string form for functions without a name.
    """
    stack = getattr(getattr(eqn.source_info, "name_stack", None), "stack", ())
    return [entry.name for entry in stack if type(entry).__name__ == "Transform"]


def held(variable: Any) -> Any:
    """Return the array that an nnx.Variable holds.

    Its attribute ``value`` is deprecated from flax 0.12 on. Up to flax 0.8.5, that of jax 0.4.30, a
    Variable is no pytree.
    """
    (leaf,) = jax.tree_util.tree_leaves(variable)
    return variable.value if leaf is variable else leaf


_QUICK_FLAGS = (
    ("", "--xla_backend_optimization_level=0"),
    (">=0.5.3,<0.11", "--xla_cpu_use_fusion_emitters=false"),
    (">=0.12,<0.13", "--xla_cpu_opt_preset=FAST_COMPILE"),
)
"""(releases of jaxlib, an XLA flag that makes them compile faster). XLA aborts the process on an
unknown flag, so only releases that were tried are listed."""


def compile_quickly() -> None:
    """Set XLA_FLAGS so that this process compiles faster, at the cost of slower programs.

    Operations outside of jit are compiled one by one, which takes half as long with these flags. Call
    it before JAX is imported. A flag that XLA_FLAGS already contains is not changed.
    """
    from packaging.specifiers import SpecifierSet  # may be missing where recordings are made

    version = metadata.version("jaxlib")
    given = os.environ.get("XLA_FLAGS", "").split()
    named = {flag.partition("=")[0] for flag in given}
    for releases, flag in _QUICK_FLAGS:
        if version in SpecifierSet(releases) and flag.partition("=")[0] not in named:
            given.append(flag)
    os.environ["XLA_FLAGS"] = " ".join(given)
    if version in SpecifierSet(">=0.9,<0.10"):
        # It reports each program from its cache as an error, in two kilobytes, on processors where
        # XLA prefers not to gather; what really fails is raised, too.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


_UNKNOWN_OPTIONS: set[str] = set()
"""Compiler options that this release of XLA has refused."""


def compiled(lowered: Any, options: dict[str, Any]) -> Any:
    """Return a lowered program compiled with those XLA ``options`` that this release has.

    For example, jax 0.5.3 to 0.10.2 have ``xla_cpu_use_fusion_emitters``; 0.4.38 and 0.12.0.1 do not.
    """
    while True:
        wanted = {name: value for name, value in options.items() if name not in _UNKNOWN_OPTIONS}
        try:
            return lowered.compile(compiler_options=wanted)
        except Exception as error:  # its type differs between releases, and is mostly not public
            refused = {name for name in wanted if name in str(error)}
            if not refused:
                raise
            _UNKNOWN_OPTIONS.update(refused)

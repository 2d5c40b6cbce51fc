"""Differences between jax releases, absorbed in one place.

Each entry says which releases need it; delete it with the last of them.
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
    """Return a context in which JAX has float64: for tests that compare NumPy with it, and nothing else.

    ``jax.enable_x64(True)`` from jax 0.8.3; before it ``jax.experimental.enable_x64()``, which
    0.9.2 removed.
    """
    switch: Any = getattr(jax, "enable_x64", None)
    if switch is None:
        switch = import_module("jax.experimental").enable_x64
    context: AbstractContextManager[Any] = switch(True)
    return context


def scan_split(eqn: Any) -> tuple[int, int] | None:
    """Return how many inputs of a scan's equation are constants, and how many its carry.

    The parameters ``num_consts`` and ``num_carry`` to jax 0.10; groups of inputs, "ft_in", after
    it. None where neither is there, or they do not add up.
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
    """Return the number that an equation's input is, as a NumPy array; None where it is a variable.

    jax 0.7 keeps it in a LiteralArray, which is no number: neither ``float`` nor ``abs`` takes one.
    """
    return np.asarray(atom.val) if hasattr(atom, "val") else None


_QUICK_FLAGS = (
    ("", "--xla_backend_optimization_level=0"),
    (">=0.5.3,<0.11", "--xla_cpu_use_fusion_emitters=false"),
    (">=0.12,<0.13", "--xla_cpu_opt_preset=FAST_COMPILE"),
)
"""Releases of jaxlib -> a flag of XLA's that makes them compile faster. XLA ends the process over a
flag that it does not know, so only releases that were tried are listed."""


def compile_quickly() -> None:
    """Let XLA compile fast rather than well whatever this process compiles from now on.

    Operations that run uncompiled are compiled one by one, and take half as long. To be called before
    the first of them; a flag that XLA_FLAGS names already stays as it is.
    """
    from packaging.specifiers import SpecifierSet  # recordings are made where it may be missing

    version = metadata.version("jaxlib")
    given = os.environ.get("XLA_FLAGS", "").split()
    named = {flag.partition("=")[0] for flag in given}
    for releases, flag in _QUICK_FLAGS:
        if version in SpecifierSet(releases) and flag.partition("=")[0] not in named:
            given.append(flag)
    os.environ["XLA_FLAGS"] = " ".join(given)


_UNKNOWN_OPTIONS: set[str] = set()
"""Options that this release's XLA was found not to have."""


def compiled(lowered: Any, options: dict[str, Any]) -> Any:
    """Return a lowered program, compiled with those of XLA's ``options`` that this release has.

    ``xla_cpu_use_fusion_emitters`` is known to jax 0.5.3 to 0.10.2, not to 0.4.38 nor 0.12.0.1.
    """
    while True:
        wanted = {name: value for name, value in options.items() if name not in _UNKNOWN_OPTIONS}
        try:
            return lowered.compile(compiler_options=wanted)
        except Exception as error:  # what is raised differs between releases, and is seldom public
            refused = {name for name in wanted if name in str(error)}
            if not refused:
                raise
            _UNKNOWN_OPTIONS.update(refused)

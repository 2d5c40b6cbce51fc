"""How a user's function is called: what each of its parameters is, told by the name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_WORDS = {
    "key": "rng key prng rng_key prng_key init_rng init_key params_rng dropout_rng dropout_key "
    "rngs random_key train_rng",
    "seed": "seed",
    "state": "state train_state ts",
    "batch": "batch data minibatch train_batch",
    "inputs": "x inputs input images image x_batch batch_x xs sample sample_input example "
    "dummy_input",
    "targets": "y labels label targets target y_batch batch_y ys",
    "lr": "lr learning_rate base_lr base_learning_rate step_size",
    "tx": "tx optimizer opt",
}
ROLES = {role: tuple(words.split()) for role, words in _WORDS.items()}
"""What a parameter can be -> the names that say so."""

ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
OPTIONAL = ("lr", "tx")  # asked for even where there is a default: laws need to set them


@dataclass(frozen=True)
class Caller:
    """A user's function and what it is called with.

    Attributes:
        function: not compiled: see ``plain``.
        positional: the roles of its required parameters, in order.
        named: parameter -> role, of those passed by keyword.
    """

    function: Callable[..., Any]
    positional: tuple[str, ...]
    named: Mapping[str, str]

    def takes(self, role: str) -> bool:
        """Return whether any parameter has that role."""
        return role in self.positional or role in self.named.values()

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Call the function with role -> value, of which only those it takes are used."""
        named = {name: values[role] for name, role in self.named.items()}
        return self.function(*(values[role] for role in self.positional), **named)


def caller(
    function: Callable[..., Any], what: str, *, order: tuple[str, ...], allowed: tuple[str, ...]
) -> Caller:
    """Return how to call ``function``, from the names of its parameters.

    Args:
        function: a user's.
        what: how messages call it: "create".
        order: the roles of required parameters whose names say nothing, first to last.
        allowed: the roles there are values for.

    Raises:
        ValueError: a required parameter's role cannot be told.
    """
    raw = plain(function)
    parameters = inspect.signature(raw).parameters.values()
    positional: list[str] = []
    named: dict[str, str] = {}
    for parameter in parameters:
        role = ROLE_OF.get(parameter.name)
        role = role if role in allowed else None
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and role is None:
            rest = [each for each in order if each not in positional]
            role = rest[0] if rest else None
        if required and role is None:
            raise ValueError(
                f"{what}{inspect.signature(raw)}: what to pass as {parameter.name!r} cannot be "
                f"told; wrap it, as in lambda {', '.join(order)}: {what}({', '.join(order)}, ...)"
            )
        if required and parameter.kind is not parameter.KEYWORD_ONLY:
            positional.append(str(role))
        elif required or role in OPTIONAL:
            named[parameter.name] = str(role)
    return Caller(raw, tuple(positional), named)


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what ``jax.jit`` or ``jax.pmap`` was given, with its arguments still bound.

    A compiled function is not traced again, so its layers could not be looked at; one that
    donates its arguments would take a state that is still needed.
    """
    if isinstance(function, functools.partial):
        inner = plain(function.func)
        return functools.partial(inner, *function.args, **function.keywords)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and hasattr(function, "lower"):
        return plain(wrapped)
    return function

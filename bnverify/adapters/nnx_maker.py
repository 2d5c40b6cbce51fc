"""How a user's maker of nnx objects is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from flax import nnx as flax_nnx

from bnverify.adapters.calls import ROLES

SETTABLE = ("lr", "tx")


class Maker:
    """Calls a user's function, or class, with what its parameters ask for.

    Args:
        make: takes ``rngs`` by that name, or as its last required parameter; perhaps the
            learning rate and the optimizer, by names in ``calls.ROLES``; perhaps one more
            required parameter: the number of features.
        what: how messages call it.

    Raises:
        ValueError: it has other required parameters.
    """

    def __init__(self, make: Callable[..., Any], what: str) -> None:
        self._make = make
        # The metaclass of nnx modules hides the parameters of their own __init__.
        made: Any = make
        function = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]
        parameters = list(inspect.signature(function).parameters.values())
        parameters = parameters[1:] if isinstance(made, type) else parameters
        roles = {name: role for role in SETTABLE for name in ROLES[role]}
        self._roles = {p.name: roles[p.name] for p in parameters if p.name in roles}
        required = [
            p.name
            for p in parameters
            if p.default is p.empty
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            and p.name not in self._roles
        ]
        named = "rngs" in (p.name for p in parameters)
        others = [name for name in required if name != "rngs"] if named else required[:-1]
        if len(others) > 1:
            raise ValueError(
                f"{what} has the required parameters {', '.join(required)}; it is called "
                "with rngs and at most one more, the number of features: wrap it in a lambda"
            )
        self._rngs = "rngs" if named else required[-1] if required else None
        self._features = others[0] if others else None

    @property
    def takes_features(self) -> bool:
        """Whether it makes something for any D."""
        return self._features is not None

    @property
    def takes_rate(self) -> bool:
        """Whether it takes the learning rate, or the optimizer made with it."""
        return bool(self._roles)

    def takes(self, role: str) -> bool:
        """Return whether a parameter has that role, "lr" or "tx"."""
        return role in self._roles.values()

    def __call__(self, key: Any, features: Any, **settable: Any) -> Any:
        """Return what the user's function makes.

        Args:
            key: of the random streams.
            features: D.
            **settable: "lr" and "tx", where there are values for them.
        """
        given = {self._features: features, self._rngs: flax_nnx.Rngs(key)}
        given |= {name: settable[role] for name, role in self._roles.items() if role in settable}
        return self._make(**{name: value for name, value in given.items() if name is not None})

"""The one list of the zoo's subjects, and how a model is entered into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bnverify

SUBJECTS: dict[str, Callable[[], bnverify.Subject]] = {}
"""Name -> a function that makes the subject; its docstring says in a sentence what it is."""


def enter(name: str, sentence: str, make: Callable[..., bnverify.Subject]) -> None:
    """Enter what ``make(name=...)`` makes."""

    def made() -> bnverify.Subject:
        return make(name=f"zoo:{name}")

    made.__name__, made.__doc__ = name, sentence
    SUBJECTS[name] = made


def linen(name: str, sentence: str, module: Any, **options: Any) -> None:
    """Enter a linen module; for the options see ``bnverify.linen``."""
    enter(name, sentence, partial(bnverify.linen, module, **options))


def nnx(name: str, sentence: str, make: Any, **options: Any) -> None:
    """Enter an nnx module, as ``name_nnx``; for the options see ``bnverify.nnx``."""
    enter(f"{name}_nnx", sentence, partial(bnverify.nnx, make, **options))

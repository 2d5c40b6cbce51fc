"""The zoo's subjects, and the functions that add to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bnverify

SUBJECTS: dict[str, Callable[[], bnverify.Subject]] = {}
"""Name -> a function that returns the subject; its docstring describes it in a sentence."""


def enter(name: str, sentence: str, make: Callable[..., bnverify.Subject]) -> None:
    """Add the subject that ``make(name=...)`` returns."""

    def made() -> bnverify.Subject:
        return make(name=f"zoo:{name}")

    made.__name__, made.__doc__ = name, sentence
    SUBJECTS[name] = made


def linen(name: str, sentence: str, module: Any, **options: Any) -> None:
    """Add a linen module; for the options see ``bnverify.linen``."""
    enter(name, sentence, partial(bnverify.linen, module, **options))


def nnx(name: str, sentence: str, make: Any, **options: Any) -> None:
    """Add an nnx module as ``name_nnx``; for the options see ``bnverify.nnx``."""
    enter(f"{name}_nnx", sentence, partial(bnverify.nnx, make, **options))

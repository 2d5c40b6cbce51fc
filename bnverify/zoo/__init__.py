"""The zoo: model families as subjects, which are also examples of the adapters.

Each name is a function without arguments that returns a Subject, and so a target:
``bnverify check bnverify.zoo:resnet``.
"""

from __future__ import annotations

from typing import Any

from bnverify.zoo import images, layers, perceptrons  # noqa: F401 - importing them adds their subjects
from bnverify.zoo.subjects import SUBJECTS

__all__ = sorted(SUBJECTS)  # noqa: PLE0605 - added by the modules above


def __getattr__(name: str) -> Any:
    if name not in SUBJECTS:
        raise AttributeError(f"module 'bnverify.zoo' has no attribute {name!r}")
    return SUBJECTS[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *SUBJECTS])

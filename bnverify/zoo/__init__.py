"""The zoo: model families as subjects, and as living examples of what the adapters take.

Each name is a function without arguments that makes a Subject, so each can be checked as it
stands: ``bnverify check bnverify.zoo:resnet``.
"""

from __future__ import annotations

from typing import Any

from bnverify.zoo import images, layers, perceptrons  # noqa: F401 - they enter their subjects
from bnverify.zoo.subjects import SUBJECTS

__all__ = sorted(SUBJECTS)  # noqa: PLE0605 - they are entered by the modules above


def __getattr__(name: str) -> Any:
    if name not in SUBJECTS:
        raise AttributeError(f"module 'bnverify.zoo' has no attribute {name!r}")
    return SUBJECTS[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *SUBJECTS])

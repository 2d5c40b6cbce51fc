"""bnverify: is this training step right, and did the upgrade change it?

Nothing heavy is imported until one of these names is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from bnverify.adapters.analysis import declare as declare
    from bnverify.adapters.batches import classes as classes
    from bnverify.adapters.canonical import linen as linen
    from bnverify.adapters.canonical import nnx as nnx
    from bnverify.adapters.loop import loop as loop
    from bnverify.adapters.loop import nnx_loop as nnx_loop
    from bnverify.adapters.loop import train_state as train_state
    from bnverify.adapters.solution import solution as solution
    from bnverify.check import replay as replay
    from bnverify.check import verify as verify
    from bnverify.evidence import Evidence as Evidence
    from bnverify.evidence import Report as Report
    from bnverify.evidence import Violation as Violation
    from bnverify.lifetime.life import Life as Life
    from bnverify.lifetime.lives import check_life as check_life
    from bnverify.lifetime.lives import life as life
    from bnverify.model import Case as Case
    from bnverify.model import CheckpointedSubject as CheckpointedSubject
    from bnverify.model import Domain as Domain
    from bnverify.model import InvalidCase as InvalidCase
    from bnverify.model import LayerInput as LayerInput
    from bnverify.model import Parallel as Parallel
    from bnverify.model import State as State
    from bnverify.model import StepInfo as StepInfo
    from bnverify.model import Subject as Subject
    from bnverify.parallel.devices import check_parallel as check_parallel
    from bnverify.profile import Profile as Profile
    from bnverify.reference import train_step as train_step
    from bnverify.target import TargetError as TargetError
    from bnverify.target import load as load
    from bnverify.testing.suite import suite as suite

_HOME = {
    "Case": "model",
    "Domain": "model",
    "Evidence": "evidence",
    "InvalidCase": "model",
    "LayerInput": "model",
    "Life": "lifetime.life",
    "CheckpointedSubject": "model",
    "Parallel": "model",
    "Profile": "profile",
    "Report": "evidence",
    "State": "model",
    "StepInfo": "model",
    "Subject": "model",
    "TargetError": "target",
    "Violation": "evidence",
    "check_life": "lifetime.lives",
    "check_parallel": "parallel.devices",
    "classes": "adapters.batches",
    "declare": "adapters.analysis",
    "life": "lifetime.lives",
    "linen": "adapters.canonical",
    "load": "target",
    "loop": "adapters.loop",
    "nnx": "adapters.canonical",
    "nnx_loop": "adapters.loop",
    "replay": "check",
    "solution": "adapters.solution",
    "suite": "testing.suite",
    "train_state": "adapters.loop",
    "train_step": "reference",
    "verify": "check",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 - the table above is the one list of public names


_MODULES = ("oracle", "reference", "strategies", "zoo")
"""Submodules that are imported on first use: ``bnverify.zoo``."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _MODULES:
        return import_module(f"bnverify.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'bnverify' has no attribute {name!r}")
    value = getattr(import_module(f"bnverify.{_HOME[name]}"), name)
    globals()[name] = value  # later look-ups find it there
    return value


def _version() -> str:
    from importlib import metadata  # slow to import

    try:
        return metadata.version("bnverify")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES, "__version__"})

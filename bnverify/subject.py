"""The former place of ``bnverify.State`` and ``bnverify.StepInfo``, for code that imports them from here."""

from bnverify.model import State, StepInfo, Subject

__all__ = ["State", "StepInfo", "Subject"]

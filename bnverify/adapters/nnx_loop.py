"""A loop that changes nnx objects as a Subject; told in ``bnverify.adapters.loop``."""

from bnverify.adapters.loop import nnx_loop

__all__ = ["nnx_loop"]

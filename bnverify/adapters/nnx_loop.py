"""A loop that changes nnx objects in place as a Subject; see ``bnverify.adapters.loop``."""

from bnverify.adapters.loop import nnx_loop

__all__ = ["nnx_loop"]

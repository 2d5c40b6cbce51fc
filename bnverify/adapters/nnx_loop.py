"""The former place of ``bnverify.nnx_loop``, for code that imports it from here."""

from bnverify.adapters.loop import nnx_loop

__all__ = ["nnx_loop"]

"""Adapters: Subjects from users' own code, such as linen or nnx modules and training loops.

This package imports nothing itself, because each adapter imports its part of Flax:
``from bnverify.adapters.canonical import linen``, or ``bnverify.linen``.
"""

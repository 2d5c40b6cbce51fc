"""Subjects from users' own code: a linen or nnx module, a TrainState step, a black box.

Each adapter is a module of its own and imports the part of Flax it is about, so this package
imports nothing: ``from bnverify.adapters.linen import linen``, or ``bnverify.linen``.
"""

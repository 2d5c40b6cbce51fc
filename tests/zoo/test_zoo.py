"""The zoo: every family is a subject that no law objects to, and says what it is exempt from."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnverify
from bnverify import zoo
from bnverify.jaxpr import numeric
from bnverify.jaxpr.interpreter import called_jaxpr, inner_jaxprs, open_jaxpr
from bnverify.profile import Profile

FEW = Profile("few", tiny=1, shapes=0, block=32, examples=1)
"""Enough to reach every law; `benchmarks/false_alarms.py` runs the real profiles, with many seeds."""

DEFAULT = {
    "mlp": "linen",
    "mlp_nnx": "nnx",
    "resnet": "convolutional",
    "vit": "transformer",
    "float16": "16 bits",
}
"""What the default tier checks: one of each kind. The nightly checks all."""

NAMES = [
    pytest.param(name, marks=() if name in DEFAULT else pytest.mark.nightly)
    for name in zoo.SUBJECTS
]


# What each must be exempt from, besides what it simply has not got.
EXEMPT = {
    "shared": "batch_stats_change_only_by_ema",
    "shared_nnx": "batch_stats_change_only_by_ema",
    "while_loop": "batch_stats_change_only_by_ema",
    "online_norm": "training_is_free_of_old_statistics",
    "spectral": "equal_steps_converge_geometrically",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_makes_a_subject_of_that_name(name: str) -> None:
    """Each can be checked as ``bnverify.zoo:NAME``, and says what it is in a sentence.

    Only models that fold in several moments, or normalise by the running ones, lose laws.
    """
    make = getattr(zoo, name)
    subject = make()
    assert subject.name == f"zoo:{name}"
    assert (inspect.getdoc(make) or "").endswith(".")
    exempt = subject.exempt
    assert (EXEMPT[name] in exempt) if name in EXEMPT else not exempt


def found(name: str) -> set[str]:
    """Return the laws that a subject breaks by a fault of the installed Flax: docs/findings.md."""
    if name != "float16_nnx":
        return set()
    norm = nnx.BatchNorm(1, dtype=jnp.float16, rngs=nnx.Rngs(0))
    norm.var = nnx.BatchStat(jnp.array([1e5]))
    out = norm(jnp.array([[300.0]], jnp.float16), use_running_average=True)
    return set() if np.any(out) else {"eval_at_the_batchs_own_moments_is_the_training_loss"}


@pytest.mark.parametrize("name", NAMES)
def test_no_law_objects(name: str) -> None:
    """A correct step violates nothing; what Flax itself does wrong is found, and nothing else."""
    report = bnverify.verify(getattr(zoo, name)(), FEW)
    violated = {
        e.law: (e.reason, e.counterexample) for e in report.results if e.status == "violated"
    }
    assert set(violated) == found(name), violated


@pytest.mark.parametrize("name", NAMES)
def test_every_primitive_is_implemented(name: str) -> None:
    """No step or evaluation needs ``bnverify.jaxpr.numeric.through_jax``."""
    subject = bnverify.load(f"bnverify.zoo:{name}")
    width = subject.width(4)
    x, y = np.zeros((8, width), np.float32), np.zeros(8, np.float32)
    state = jax.eval_shape(subject.init, np.int32(0), x)
    programs = [
        jax.make_jaxpr(subject.step)(state, x, y, np.float32(0.1)),
        jax.make_jaxpr(subject.evaluate)(state, x, y),
    ]
    used: set[str] = set().union(*map(plain_names, programs))
    assert used - numeric.FORMS.keys() == set()


def plain_names(jaxpr: Any) -> set[str]:
    """Return the names of primitives that are not calls, loops or branches."""
    names: set[str] = set()
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        enters = called_jaxpr(eqn) is not None or eqn.primitive.name in {"cond", "scan", "while"}
        if enters:
            names = names.union(*map(plain_names, inner_jaxprs(eqn)))
        else:
            names.add(eqn.primitive.name)
    return names

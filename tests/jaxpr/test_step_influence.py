"""The data flow of the reference step and of faulty steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import faults
import flax.linen as nn
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from bnverify import proof, reference, verify
from bnverify.adapters.canonical import linen
from bnverify.jaxpr import influence, trace_subject
from bnverify.jaxpr.graph import source_line
from bnverify.laws import STEP_LAWS
from tests.tiers import first_of

COMPILED = "/jax/core/compile/backend_compile_duration"
BATCH = {"params", "x", "y"}


def read(subject):
    """Return the influence of ``subject``."""
    return influence(trace_subject(subject))


@pytest.fixture
def compilations():
    """Yield the list of programs that XLA compiles during the test."""
    seen = []

    def listen(event, _duration, **_):
        if event == COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.clear_caches()
    return seen


@pytest.mark.parametrize("make", reference.VARIANTS, ids=lambda make: make.__name__)
def test_the_flows_of_the_reference_step(make):
    """Statistics depend on params, x and themselves; only evaluation depends on the statistics."""
    stateful = set() if make is reference.sgd else {"opt_state"}
    flows = read(make())
    assert flows.proved
    assert flows.unknown == ()
    assert flows.matrix == {
        "params": BATCH | {"lr"} | stateful,
        "batch_stats": {"params", "batch_stats", "x"},
        "opt_state": BATCH | stateful if stateful else frozenset(),
        "loss": BATCH,
        "grads": BATCH,
        "eval_loss": {"params", "batch_stats", "x", "y"},
        "eval_params": {"params"},
        "eval_batch_stats": {"batch_stats"},
        "eval_opt_state": stateful,
    }


def test_flows_are_known_for_each_leaf():
    """Each statistic depends on its own old value and on the layers before it."""
    leaves = read(reference.momentum()).leaves
    assert leaves["batch_stats/BatchNorm_0/mean"] == {
        "batch_stats/BatchNorm_0/mean",
        "params/Dense_0/bias",
        "params/Dense_0/kernel",
        "x",
    }
    assert "opt_state/0/trace/Dense_0/bias" not in leaves["params/Dense_0/kernel"]
    assert leaves["loss"] >= {"params/Dense_1/kernel", "x", "y"}


def test_evaluation_returns_its_state_unchanged():
    """Each leaf of the state after evaluation is the input leaf."""
    unchanged = read(reference.sgd()).unchanged
    assert unchanged["eval_batch_stats/BatchNorm_0/var"] == "batch_stats/BatchNorm_0/var"
    assert "batch_stats/BatchNorm_0/var" not in unchanged


@pytest.mark.parametrize(
    "make", first_of([reference.adam, reference.sgd]), ids=lambda make: make.__name__
)
def test_proofs_compile_nothing_and_trace_few_steps(make, compilations):
    """All proofs about the reference step take six traces, and one that jax 0.12 refuses."""
    subject, traced = make(), []

    def step(*args):
        traced.append(args)
        return subject.step(*args)

    jnp.zeros(3)  # make sure that the listener records compilations
    assert len(compilations) >= 1
    compilations.clear()
    report = verify(dataclasses.replace(subject, step=step), "quick", proofs_only=True)
    assert 1 <= len(traced) <= 6 + (jax.__version_info__ >= (0, 11))
    assert compilations == []
    proved = {evidence.law for evidence in report.results if evidence.status == "proved"}
    read = {
        law.name
        for law in STEP_LAWS.values()
        if law.must_not_reach
        or (law.kind == "structure" and not {"look", "retraced"}.intersection(law.observes))
    }
    assert proved == read | {"eval_writes_nothing"}  # evaluation returns the leaves unchanged


def here(text: str) -> str:
    """Return ``path:line`` of the only line of faults.py containing ``text``."""
    path = Path(faults.__file__)
    (number,) = [n for n, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return f"{path}:{number}"


def test_a_step_in_eval_mode_is_explained():
    """With train=False the statistics stay unchanged, and the old ones reach params."""
    flows = read(faults.eval_mode_in_training())
    assert flows.matrix["batch_stats"] == {"batch_stats"}
    assert flows.unchanged["batch_stats/BatchNorm_0/mean"] == "batch_stats/BatchNorm_0/mean"
    assert "batch_stats" in flows.matrix["params"]
    first, *between, last = flows.steps("batch_stats", "params")
    assert (first, last) == ("batch_stats", "params")
    assert any("reference.py" in step for step in between)


def test_a_loss_that_reads_old_statistics_is_explained():
    """The path from the old statistics to the params names the line that reads them."""
    flows = read(faults.loss_reads_old_statistics())
    assert "batch_stats" in flows.matrix["params"] & flows.matrix["loss"] & flows.matrix["grads"]
    assert here("jnp.sum(old * params") in " ".join(flows.steps("batch_stats", "loss"))
    assert here("jnp.sum(old * params") in " ".join(flows.steps("batch_stats", "params"))


def test_the_path_of_a_violation_has_one_step_per_line():
    """It leads from the input to the output; a law that holds has no path."""
    reading = proof.read(faults.loss_reads_old_statistics())
    law = STEP_LAWS["training_is_free_of_old_statistics"]
    path = proof.offending_path(law, reading)
    source, *steps, output = path
    assert source == "batch_stats"
    assert (output, source) in law.must_not_reach
    assert any(here("jnp.sum(old * params") in step for step in steps)
    assert proof.offending_path(law, proof.read(reference.sgd())) == ()
    assert read(reference.sgd()).steps("batch_stats", "eval_batch_stats") == (
        "batch_stats",
        "eval_batch_stats",
    )


def test_statistics_in_the_optimizer_are_explained():
    """Statistics that the optimizer updates depend on lr, on its state and, through it, on y."""
    flows = read(faults.statistics_in_the_optimizer())
    assert flows.matrix["batch_stats"] >= {"lr", "opt_state"}
    assert here("optimizer(lr).update") in " ".join(flows.steps("lr", "batch_stats"))
    assert "opt_state/0/trace/batch_stats/BatchNorm_0/mean" in flows.leaves


def test_evaluation_that_writes_is_explained():
    """Evaluation in train mode ignores the statistics and overwrites them from x."""
    flows = read(faults.evaluation_writes())
    assert "batch_stats" not in flows.matrix["eval_loss"]
    assert "x" in flows.matrix["eval_batch_stats"]
    assert here("_, stats = apply(") in " ".join(flows.steps("x", "eval_batch_stats")) or (
        "reference.py" in " ".join(flows.steps("x", "eval_batch_stats"))
    )
    assert flows.steps("batch_stats", "eval_loss") == ()


def test_paths_are_shortest_and_in_the_order_of_computation():
    """The learning rate reaches params through a product and a sum."""
    flows = read(reference.sgd())
    assert [link.primitive for link in flows.path("lr", "params")] == ["mul", "mul", "add"]
    assert flows.path("batch_stats", "eval_batch_stats") == ()
    assert flows.steps("batch_stats", "eval_batch_stats") == ("batch_stats", "eval_batch_stats")
    assert flows.path("y", "batch_stats") is None


def test_a_cached_function_is_located_at_its_caller():
    """jax.jit traces relu once; the path of its second caller names that caller's line."""

    def first(x):
        return jax.nn.relu(x)

    def second(x):
        return jax.nn.relu(x)

    lines = []
    for function in (first, second):
        jaxpr = jax.make_jaxpr(function)(np.float32(1)).jaxpr
        chain = [jaxpr.eqns[0]]
        while any(hasattr(value, "jaxpr") for value in chain[-1].params.values()):
            inner = next(v for v in chain[-1].params.values() if hasattr(v, "jaxpr"))
            chain.append(inner.jaxpr.eqns[0])
        lines.append(source_line(chain))
    assert "(first)" in lines[0]
    assert "(second)" in lines[1]


def test_an_equation_without_source_info_is_named():
    """JAX does not promise source lines; without them a link is the primitive's name."""

    class Bare:
        source_info = None

    assert source_line([Bare()]) is None


def test_extra_state_has_named_leaves():
    """A key in State.extra reaches the next key and the training loss, but not evaluation."""

    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(x)
            return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(x))

    flows = read(linen(Dropping()))
    assert flows.matrix["extra"] == {"extra"}
    assert "extra" in flows.matrix["loss"]
    assert "extra" not in flows.matrix["eval_loss"]
    assert flows.matrix["eval_extra"] == {"extra"}


def test_a_trace_at_one_shape_proves_no_absence():
    """Where Python code asks for the number of rows, another number may take another branch."""
    sgd = reference.sgd()

    def step(state, x, y, lr):
        return sgd.step(state, x, y, lr * (int(x.shape[0]) > 0))

    law = STEP_LAWS["batch_stats_are_free_of_targets"]
    everywhere, once = (proof.read(each) for each in (sgd, dataclasses.replace(sgd, step=step)))
    assert proof.prove_influence(law, everywhere) is not None
    assert proof.prove_influence(law, once) is None
    assert proof.forbidden(law, once.influence) == []  # it is absent, but that is no proof

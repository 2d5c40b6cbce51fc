"""The nnx adapter: the canonical step around an nnx module, on every release of the matrix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_steps import CASE, NnxModel, one_step
from flax import nnx as flax_nnx

from bnverify.adapters.batches import classes
from bnverify.adapters.canonical import linen, nnx
from bnverify.adapters.explain import SubjectError
from bnverify.model import Case, State
from bnverify.reference import Model as LinenModel


class Counter(flax_nnx.Variable):
    """A variable of the user's own."""


class Noisy(NnxModel):
    """The same with dropout, a counter and an intermediate value."""

    def __init__(self, din: int, rngs: Any) -> None:
        super().__init__(din, rngs)
        self.dropout = flax_nnx.Dropout(0.5, rngs=rngs)
        self.steps = Counter(jnp.zeros((), jnp.int32))

    def __call__(self, x: Any) -> Any:
        h = self.dropout(self.norm(self.first(x)))
        # Written as a whole: what a Variable allows besides changes from release to release.
        self.steps = Counter(jax.tree_util.tree_leaves(flax_nnx.state(self, Counter))[0] + 1)
        self.seen = flax_nnx.Intermediate(h)  # what sow does, which newer releases deprecate
        return self.last(h)


class Images(flax_nnx.Module):
    """For images (N, 2, 2, 1), told that it trains by an argument."""

    def __init__(self, rngs: Any) -> None:
        self.conv = flax_nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = flax_nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.last = flax_nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Any, train: bool) -> Any:
        h = self.norm(self.conv(x), use_running_average=not train)
        return self.last(h.mean((1, 2)))


IMAGES: dict[str, Any] = {
    "batch": lambda x, y: (x.reshape(-1, 2, 2, 1), classes(y, 3)),
    "loss": lambda o, t: optax.softmax_cross_entropy_with_integer_labels(o, t).mean(),
    "features": 4,
}


def test_the_parts_are_plain_trees() -> None:
    """Params and statistics are nested dicts with the module's attribute names."""
    before, after, _ = one_step(nnx(NnxModel))
    shapes = jax.tree_util.tree_map(jnp.shape, after)
    assert shapes.params == {
        "first": {"bias": (8,), "kernel": (3, 8)},
        "last": {"bias": (1,), "kernel": (8, 1)},
        "norm": {"bias": (8,), "scale": (8,)},
    }
    assert shapes.batch_stats == {"norm": {"mean": (8,), "var": (8,)}}
    assert shapes.extra == ()
    assert jax.tree_util.tree_structure(before) == jax.tree_util.tree_structure(after)


def test_the_step_is_linens_from_the_same_numbers() -> None:
    """From the same initial params, an nnx step agrees with the linen step."""
    names = {"Dense_0": "first", "BatchNorm_0": "norm", "Dense_1": "last"}

    def renamed(tree: Any) -> Any:
        return {names[name]: leaves for name, leaves in tree.items()}

    theirs, ours = linen(LinenModel()), nnx(NnxModel)
    before, after, info = one_step(theirs)
    start = State(renamed(before.params), renamed(before.batch_stats), before.opt_state)
    got, got_info = jax.jit(ours.step)(start, CASE.x, CASE.y, CASE.lr)
    np.testing.assert_allclose(got_info.loss, info.loss, rtol=1e-5)
    for actual, expected in (
        (got.params, renamed(after.params)),
        (got.batch_stats, renamed(after.batch_stats)),
    ):
        jax.tree_util.tree_map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5), actual, expected
        )


def test_layers_are_found() -> None:
    """Momentum, bias before the normalisation and layer input are found."""
    subject = nnx(NnxModel)
    assert subject.momentum == 0.99
    assert subject.biases_before_norm == ("first/bias",)
    before, after, _ = one_step(subject)
    assert subject.layer_inputs is not None
    (given,) = subject.layer_inputs(before, CASE.x, CASE.y).values()
    np.testing.assert_allclose(
        after.batch_stats["norm"]["mean"], 0.01 * given.value.mean(0), rtol=1e-4
    )


def test_the_library_is_left_as_it_was() -> None:
    """Classes of nnx are only patched temporarily, also if a call raises."""
    before = [flax_nnx.BatchNorm.__call__, flax_nnx.Linear.__call__]
    nnx(NnxModel)
    with pytest.raises(SubjectError, match="contracting"):
        nnx(lambda rngs: NnxModel(5, rngs=rngs), features=3)
    assert [flax_nnx.BatchNorm.__call__, flax_nnx.Linear.__call__] == before


def test_random_streams_and_variables_go_on_in_extra() -> None:
    """A step changes the counter and the PRNG stream; sown values are dropped."""
    subject = nnx(Noisy)
    before, after, info = one_step(subject)
    assert set(after.extra) == {"others", "streams"}
    assert after.extra["others"] == {"steps": 1}
    step = jax.jit(subject.step)
    assert step(before, CASE.x, CASE.y, 0.0)[1].loss == info.loss
    assert step(after, CASE.x, CASE.y, 0.0)[1].loss != info.loss
    assert "row_order_changes_nothing" in subject.exempt
    assert nnx(NnxModel).exempt == {}


def test_a_train_argument_is_found() -> None:
    """A module that takes the mode as an argument gets it; ``batch`` makes images."""
    subject = nnx(Images, **IMAGES)
    case = Case.of(1, np.arange(12.0).reshape(3, 4) / 12, [0.0, 1.0, 2.0], 0.1)
    before, after, _ = one_step(subject, case)
    assert np.any(before.batch_stats["norm"]["mean"] != after.batch_stats["norm"]["mean"])
    assert subject.momentum == 0.9
    assert subject.evaluate(after, case.x, case.y).shape == (1,)


def test_evaluation_leaves_the_statistics() -> None:
    """In eval mode the running statistics are read, not written."""
    subject = nnx(NnxModel)
    _, after, _ = one_step(subject)
    assert subject.after_eval is not None
    left = subject.after_eval(after, CASE.x, CASE.y)
    np.testing.assert_array_equal(left.batch_stats["norm"]["var"], after.batch_stats["norm"]["var"])


@pytest.mark.parametrize(
    "make",
    [
        NnxModel,
        lambda features, rngs: NnxModel(din=features, rngs=rngs),
        lambda size, streams: NnxModel(rngs=streams, din=size),
    ],
)
def test_the_number_of_features_is_passed_whatever_it_is_called(make: Callable[..., Any]) -> None:
    """A required parameter besides rngs gets D."""
    before, _, _ = one_step(nnx(make))
    assert before.params["first"]["kernel"].shape == (3, 8)


def test_a_maker_of_one_size_needs_that_size() -> None:
    """If make_module has no parameter for D, ``features`` is required."""
    with pytest.raises(ValueError, match="pass features=D"):
        nnx(lambda rngs: NnxModel(3, rngs))
    assert nnx(lambda rngs: NnxModel(3, rngs), features=3).features == (3,)


def test_a_maker_with_other_parameters_is_refused() -> None:
    """Two required parameters besides rngs are refused."""
    with pytest.raises(ValueError, match=r"din, hidden, rngs.*wrap it in a lambda"):
        nnx(lambda din, hidden, rngs: NnxModel(din + hidden, rngs))


def test_statistics_are_carried_by_pattern() -> None:
    """BatchStats named in ``carried`` are not checked as moving averages but still used."""
    _, after, info = one_step(nnx(NnxModel, carried=["norm/var"]))
    assert list(after.batch_stats["norm"]) == ["mean"]
    assert info.loss == one_step(nnx(NnxModel))[2].loss

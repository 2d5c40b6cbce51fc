"""Running statistics of user-written layers: checked, or named in a note of the report."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
import users_code as code
from flax import nnx
from flax.training import train_state

import bnverify
from bnverify import compat
from bnverify.model import Subject
from bnverify.statistic_names import moment_of

M = 0.9
WIDTH = 4
MOMENTS = "batch_moments_are_the_layers_own"
EMA = "batch_stats_change_only_by_ema"


class Norm(nn.Module):
    """A user's own BatchNorm, right or wrong.

    Attributes:
        names: the names of its two statistics.
        kept: (x, var, old mean) -> what is averaged as the second statistic.
        var_of: (mean, second statistic) -> the variance that evaluation uses.
        old: the weight of the old value.
        collection: where the statistics are kept.
        leading: the number of axes of size 1 before the channels.
        dense: whether it has a kernel of its own, before the normalisation.
    """

    names: tuple[str, str] = ("running_mean", "running_var")
    kept: Any = staticmethod(lambda x, var, old: var)
    var_of: Any = staticmethod(lambda mean, second: second)
    old: float = M
    collection: str = "batch_stats"
    leading: int = 0
    dense: bool = False

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return ``x`` (N, C) normalised over rows."""
        x = nn.Dense(WIDTH, use_bias=False)(x) if self.dense else x
        if self.dense:
            x = x @ self.param("mix", nn.initializers.orthogonal(), (WIDTH, WIDTH))
        shape = (1,) * self.leading + x.shape[-1:]
        first = self.variable(self.collection, self.names[0], jnp.zeros, shape)
        second = self.variable(self.collection, self.names[1], jnp.ones, shape)
        mean, var = jnp.mean(x, 0), jnp.var(x, 0)
        if not train:
            mean, var = first.value, self.var_of(first.value, second.value)
        elif not self.is_initializing():
            kept = self.kept(x, var, first.value)
            first.value = self.old * first.value + (1 - self.old) * mean.reshape(shape)
            second.value = self.old * second.value + (1 - self.old) * kept.reshape(shape)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5)


class Codebook(nn.Module):
    """Vector quantisation with a codebook that is updated by moving averages."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the nearest codes of ``x`` (N, C)."""
        start = jax.random.normal(jax.random.PRNGKey(1), (3, x.shape[-1]))
        code = self.variable("batch_stats", "embedding", lambda: start)
        size = self.variable("batch_stats", "cluster_size", jnp.ones, (3,))
        total = self.variable("batch_stats", "ema_w", lambda: start)
        nearest = jnp.argmin(jnp.sum((x[:, None] - code.value) ** 2, -1), 1)
        one = jax.nn.one_hot(nearest, 3)
        chosen = one @ code.value
        if train and not self.is_initializing():
            size.value = M * size.value + (1 - M) * one.sum(0)
            total.value = M * total.value + (1 - M) * one.T @ jax.lax.stop_gradient(x)
            code.value = total.value / (size.value[:, None] + 1e-5)
        return x + jax.lax.stop_gradient(chosen - x)


class Spectral(nn.Module):
    """A layer divided by its spectral norm, found by power iteration."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return ``x`` (N, C) times the kernel over its largest singular value."""
        w = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], WIDTH))
        start = jax.random.normal(jax.random.PRNGKey(2), (WIDTH,))
        u = self.variable("batch_stats", "u", lambda: start)
        sigma = self.variable("batch_stats", "sigma", jnp.ones, ())
        v = w @ u.value
        new = (v / jnp.linalg.norm(v)) @ w
        size = jnp.linalg.norm(jax.lax.stop_gradient(new))
        if train and not self.is_initializing():
            u.value, sigma.value = jax.lax.stop_gradient(new) / size, size
        return x @ w / size


class SetByTheFirstBatch(nn.Module):
    """Shifts by the mean of the first batch, which a flag in the state lets in."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return ``x`` (N, C), shifted."""
        done = self.variable("batch_stats", "initialized", jnp.zeros, (), jnp.int32)
        shift = self.variable("batch_stats", "loc", jnp.zeros, x.shape[-1:])
        if train and not self.is_initializing():
            shift.value = jnp.where(done.value == 0, jnp.mean(x, 0), shift.value)
            done.value = jnp.ones((), jnp.int32)
        return x - jax.lax.stop_gradient(shift.value)


class Model(nn.Module):
    """Dense -> a layer -> tanh -> Dense."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return (N, 1)."""
        return nn.Dense(1)(jnp.tanh(self.layer(nn.Dense(WIDTH)(x), train)))


def around(layer: nn.Module, **options: Any) -> Subject:
    """Return a published loop around a model with this layer."""
    create = partial(code.create, model=Model(layer))
    return bnverify.train_state(
        create, code.train_step, code.eval_step, features=3, same_loss=True, **options
    )


class StatsState(train_state.TrainState):
    """A train state with a collection of another name."""

    stats: Any


def in_its_own_collection(**options: Any) -> Subject:
    """Return a loop whose layer keeps its statistics in a collection ``stats``."""
    model = Model(Norm(collection="stats"))

    def create(rng: Any, lr: float) -> StatsState:
        made = model.init(rng, jnp.ones((1, 3)), train=False)
        return StatsState.create(apply_fn=model.apply, tx=optax.sgd(lr), **made)

    def train_step(state: StatsState, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            given = {"params": params, "stats": state.stats}
            out, new = state.apply_fn(given, batch["image"], train=True, mutable=["stats"])
            return code.mse(out, batch["label"]), new["stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, stats=stats), {"loss": value}

    return bnverify.train_state(create, train_step, features=3, **options)


def observations(*, declared: bool) -> Subject:
    """Return a loop of reinforcement learning that normalises observations by all it has seen."""
    net = nn.Dense(1)

    def create(rng: Any, lr: float) -> Any:
        rms = {"mean": jnp.zeros(3), "var": jnp.ones(3), "count": jnp.asarray(1e-4)}
        params = net.init(rng, jnp.ones((1, 3)))["params"]
        return {"params": params, "opt": optax.sgd(lr).init(params), "obs_rms": rms}

    def train_step(state: Any, x: Any, y: Any, lr: Any) -> Any:
        old = state["obs_rms"]
        count = old["count"] + x.shape[0]
        off = x.mean(0) - old["mean"]
        mean = old["mean"] + off * x.shape[0] / count
        squares = old["var"] * old["count"] + x.var(0) * x.shape[0]
        var = (squares + off**2 * old["count"] * x.shape[0] / count) / count
        state = {**state, "obs_rms": {"mean": mean, "var": var, "count": count}}

        def loss(params: Any) -> Any:
            return code.mse(net.apply({"params": params}, (x - mean) / jnp.sqrt(var + 1e-5)), y)

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = optax.sgd(lr).update(grads, state["opt"])
        return {**state, "params": optax.apply_updates(state["params"], updates), "opt": opt}, value

    def eval_step(state: Any, x: Any, y: Any) -> Any:
        rms = state["obs_rms"]
        x = (x - rms["mean"]) / jnp.sqrt(rms["var"] + 1e-5)
        return code.mse(net.apply({"params": state["params"]}, x), y)

    return bnverify.loop(
        create, train_step, eval_step, features=3, statistics="obs_rms" if declared else None
    )


class Statistic(nnx.Variable[Any]):
    """A type of variable that the user has made for statistics."""


class NnxNorm(nnx.Module):
    """A user's own BatchNorm in nnx."""

    def __init__(self, old: float, kept: Any) -> None:
        self.moving_mean = Statistic(jnp.zeros(WIDTH))
        self.moving_variance = Statistic(jnp.ones(WIDTH))
        self.old, self.kept, self.use_running_average = old, kept, False

    def __call__(self, x: Any) -> Any:
        """Return ``x`` (N, C) normalised over rows."""
        mean, var = jnp.mean(x, 0), jnp.var(x, 0)
        old_mean, old_var = compat.held(self.moving_mean), compat.held(self.moving_variance)
        if self.use_running_average:
            mean, var = old_mean, old_var
        else:
            # New Variables, because writing to one in place differs between releases.
            self.moving_mean = Statistic(self.old * old_mean + (1 - self.old) * mean)
            kept = self.kept(x, var, old_mean)
            self.moving_variance = Statistic(self.old * old_var + (1 - self.old) * kept)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5)


class NnxNet(nnx.Module):
    """Linear -> the layer -> tanh -> Linear."""

    def __init__(self, din: int, rngs: nnx.Rngs, norm: NnxNorm) -> None:
        self.first, self.norm = nnx.Linear(din, WIDTH, rngs=rngs), norm
        self.last = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        """Return (N, 1)."""
        return self.last(jnp.tanh(self.norm(self.first(x))))


def of_nnx(old: float = M, kept: Any = lambda x, var, mean: var, **options: Any) -> Subject:
    """Return an nnx model with this layer, in the canonical step."""
    return bnverify.nnx(
        lambda din, rngs: NnxNet(din, rngs, NnxNorm(old, kept)), features=3, **options
    )


def second_moment(x: Any, var: Any, old: Any) -> Any:
    """Return the mean of squares, as a step that keeps E[x] and E[x^2] averages it."""
    return jnp.mean(x**2, 0)


def about_the_old_mean(x: Any, var: Any, old: Any) -> Any:
    """Return the mean square distance from the old running mean instead of the variance."""
    return jnp.mean((x - old) ** 2, 0)


def of_a_sample(x: Any, var: Any, old: Any) -> Any:
    """Return the variance with the divisor N - 1."""
    return var * x.shape[0] / (x.shape[0] - 1)


SQUARES = Norm(
    names=("mean", "sq_mean"),
    kept=second_moment,
    var_of=lambda mean, second: jnp.maximum(second - mean**2, 0.0),
)


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("mean", "mean"),
        ("running_mean", "mean"),
        ("moving_variance", "var"),
        ("ra_var", "var"),
        ("mean_ema", "mean"),
        ("mean_sq", None),
        ("log_var", None),
        ("running", None),
        ("embedding", None),
    ],
)
def test_a_moment_is_recognised_by_its_name(name: str, moment: str | None) -> None:
    """The words for "running" may stand around it; other words make it something else."""
    assert moment_of(name) == moment


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: around(Norm()), "layer"),
        (lambda: around(Norm(("moving_mean", "moving_variance"), leading=1)), "layer"),
        (in_its_own_collection, "layer"),
        (of_nnx, "norm"),
    ],
    ids=["running", "moving, (1, C)", "own collection", "nnx, own type"],
)
def test_a_layer_with_usual_names_is_checked_as_flax_own(make: Any, path: str) -> None:
    """Its input is known, no law of the average is exempt, and there is nothing to note."""
    subject = make()
    assert subject.layer_inputs is not None
    state = jax.eval_shape(subject.init, 0, jnp.ones((4, 3)))
    given = jax.eval_shape(subject.layer_inputs, state, jnp.ones((4, 3)), jnp.ones(4))
    assert set(given) == {path}
    assert not {MOMENTS, EMA, "variance_is_never_negative"} & set(subject.exempt)
    assert not [note for note in subject.notes if "statistics" in note or "averages" in note]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: around(Codebook()), "cluster_size and 2 more: they depend on each other"),
        (lambda: around(Spectral()), "sigma and 1 more: they follow the params"),
        (lambda: around(SetByTheFirstBatch()), "layer/loc: a flag in the state"),
        (lambda: observations(declared=True), "count and 2 more: they count"),
    ],
    ids=["codebook", "spectral", "first batch", "observations"],
)
def test_what_is_no_moving_average_is_left_out_and_named(make: Any, reason: str) -> None:
    """The laws of the average do not judge it, and the report says so."""
    subject = make()
    (note,) = (note for note in subject.notes if "do not apply to" in note)
    assert reason in note
    assert not jax.tree_util.tree_leaves(
        jax.eval_shape(subject.init, 0, jnp.ones((4, 3))).batch_stats
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: around(SQUARES), "their names are not those of a layer's mean and variance"),
        (lambda: around(Norm(dense=True)), "no layer is known whose input has these moments"),
        (lambda: observations(declared=False), 'declare them: statistics="obs_rms"'),
        (lambda: around(Norm(old=1 - M)), "momentum_reversed: batch_stats/layer/running_mean"),
    ],
    ids=["names", "a kernel between", "not found", "weights"],
)
def test_what_is_checked_in_part_is_named(make: Any, said: str) -> None:
    """A report on statistics that some laws cannot judge is never a bare "all hold"."""
    assert [note for note in make().notes if said in note]


def test_laws_of_a_variance_need_one() -> None:
    """They are exempt with the reason, not untriggered."""
    exempt = around(SQUARES).exempt
    assert exempt["variance_is_never_negative"] == "no running statistic has the name of a variance"
    assert "unlike_rows_have_a_variance" in exempt


def test_a_declared_momentum_is_checked() -> None:
    """A layer whose weights are swapped breaks it."""
    report = bnverify.verify(
        around(Norm(old=1 - M), momentum=M), "quick", select=["momentum_is_as_declared"]
    )
    (found,) = report.results
    assert found.cause is not None
    assert (found.status, found.cause.mistake) == ("violated", "momentum_reversed")


# Nightly: each is a whole quick check of several seconds.


@pytest.mark.nightly
@pytest.mark.parametrize(
    "make",
    [
        lambda: around(Norm(), momentum=M),
        lambda: around(Norm(("moving_mean", "moving_variance"), leading=1)),
        lambda: around(Norm(dense=True)),
        lambda: around(SQUARES),
        lambda: around(Codebook()),
        lambda: around(Spectral()),
        lambda: around(SetByTheFirstBatch()),
        lambda: observations(declared=True),
        lambda: observations(declared=False),
        in_its_own_collection,
        lambda: of_nnx(momentum=M),
    ],
)
def test_a_correct_step_violates_nothing(make: Any) -> None:
    """Whatever its statistics are."""
    report = bnverify.verify(make(), "quick")
    assert [each.law for each in report.results if each.status == "violated"] == []


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("make", "law", "mistake"),
    [
        (lambda: around(Norm(kept=about_the_old_mean)), EMA, "wrong_moments"),
        (lambda: of_nnx(kept=about_the_old_mean), EMA, "wrong_moments"),
        (lambda: around(Norm(kept=of_a_sample)), MOMENTS, "sample_variance"),
        (lambda: around(Norm(kept=second_moment)), MOMENTS, "wrong_moments"),
        (lambda: around(Norm(old=1.0)), "step_moves_the_statistics", "new_statistics_dropped"),
        (lambda: of_nnx(1 - M, momentum=M), "momentum_is_as_declared", "momentum_reversed"),
    ],
)
def test_a_wrong_twin_is_named(make: Any, law: str, mistake: str) -> None:
    """The mistake that is named first is the right one."""
    report = bnverify.verify(make(), "quick")
    violated = [each for each in report.results if each.status == "violated"]
    assert law in [each.law for each in violated]
    assert violated[0].cause is not None
    assert violated[0].cause.mistake == mistake

"""What a step does by design makes laws exempt, with the reason; similar mistakes do not."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest
import users_code as code
from flax import nnx
from flax.training import dynamic_scale

import bnverify
from bnverify.model import Subject
from bnverify.profile import Profile
from tests.tiers import first_of

loop = partial(bnverify.train_state, features=3)
GRADIENT = "gradients_are_gradients_of_the_loss"
ROWS = "eval_rows_are_independent"
TARGETS = "batch_stats_are_free_of_targets"
MOMENTUM = 0.9
FEW = Profile("few", tiny=1, shapes=0, block=64, examples=4)


def found(step: Any, create: Any = code.create, **options: Any) -> Subject:
    """Return the subject of a step without an eval step."""
    return loop(create, step, **options)


def with_loss(loss_of: Any) -> Any:
    """Return a step that minimises ``loss_of(outputs, batch)``."""

    def step(state: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            out, stats = code.run(state, params, state.batch_stats, batch["image"])
            return loss_of(out, batch), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": value}

    return step


def test_a_canonical_loop_is_exempt_from_nothing() -> None:
    """A plain step has no exemptions by design."""
    subject = found(code.train_step)
    assert subject.exempt == {}
    assert subject.biases_before_norm == ("Dense_0/bias",)


class TestStoppedGradients:
    def test_in_the_loss(self) -> None:
        """With stop_gradient the gradient is not the slope of the loss; the reason names the line."""
        subject = found(
            with_loss(
                lambda out, b: jnp.mean(
                    (out[:, 0] - jax.lax.stop_gradient(out[:, 0]) - b["label"]) ** 2
                )
            )
        )
        assert "stop_gradient" in subject.exempt[GRADIENT]
        assert "test_by_design.py" in subject.exempt[GRADIENT]

    def test_in_a_library_is_none(self) -> None:
        """``softmax`` and ``logsumexp`` stop gradients without an effect on the gradient."""

        def loss(out: Any, batch: Any) -> Any:
            both = jnp.concatenate([out, -out], -1)
            label = (batch["label"] > 0).astype(int)
            return optax.softmax_cross_entropy_with_integer_labels(both, label).mean()

        assert found(with_loss(loss)).exempt == {}

    def test_in_batch_renormalisation(self) -> None:
        """A layer like batch renormalisation uses its running statistics in training by design."""

        class Renorm(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
                var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
                steps = self.variable("batch_stats", "steps", lambda: jnp.zeros((), jnp.int32))
                if not train:
                    return (x - mean.value) / jnp.sqrt(var.value + 1e-3)
                m, v = x.mean(0), x.var(0)
                r = jax.lax.stop_gradient(jnp.sqrt(v + 1e-3) / jnp.sqrt(var.value + 1e-3))
                out = (x - m) / jnp.sqrt(v + 1e-3) * r
                mean.value, var.value = 0.9 * mean.value + 0.1 * m, 0.9 * var.value + 0.1 * v
                steps.value += 1
                return out

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                return nn.Dense(1)(Renorm()(nn.Dense(3)(x), train))

        subject = found(code.train_step, partial(code.create, model=Net()))
        reason = subject.exempt["training_is_free_of_old_statistics"]
        assert "like batch renormalisation" in reason
        assert "declared" not in reason
        state = jax.eval_shape(subject.init, 0, jnp.ones((4, 3)))
        assert set(state.extra["carried"]) == {"Renorm_0/steps"}  # a counter is no average


class TestRowsWithRows:
    """Losses that combine rows of the batch with other rows."""

    BY_DESIGN: ClassVar[dict[str, Any]] = {
        "indices": lambda out, y: out[:, 0][:, None] - y[None, :],
        "expanded": lambda out, y: jnp.expand_dims(out[:, 0], 1) * jnp.expand_dims(y, 0),
        "transposed": lambda out, y: out - out.T + y[None, :],
    }

    @pytest.mark.parametrize("how", BY_DESIGN)
    def test_pairs_that_the_code_spells_out_are_by_design(self, how: str) -> None:
        """Such a loss is no mean over independent rows."""
        make = self.BY_DESIGN[how]
        subject = found(with_loss(lambda out, b: jnp.mean(make(out, b["label"]) ** 2)))
        assert "compares rows with each other" in subject.exempt[ROWS]
        assert subject.look is not None
        assert subject.look.pairings
        assert all(pair.by_design for pair in subject.look.pairings)

    NOT_TOLD: ClassVar[dict[str, Any]] = {
        "half an index": lambda out, y: out[:, 0][:, None] - y,
        "kept axis": lambda out, y: jnp.mean(out, 1, keepdims=True) - y,
        "mapped": lambda out, y: jax.vmap(lambda a: jax.vmap(lambda b: a[0] - b)(y))(out),
    }

    @pytest.mark.parametrize("how", NOT_TOLD)
    def test_pairs_that_may_be_meant_are_not_judged(self, how: str) -> None:
        """One side was spread on purpose, or ``jax.vmap`` spread both."""
        make = self.NOT_TOLD[how]
        subject = found(with_loss(lambda out, b: jnp.mean(make(out, b["label"]) ** 2)))
        assert subject.look is not None
        assert all(pair.by_design for pair in subject.look.pairings)

    BY_BROADCASTING: ClassVar[dict[str, Any]] = {
        "subtracted": lambda out, y: out - y,
        "the other way": lambda out, y: jnp.subtract(y, 2 * out),
        "its own target": lambda out, y: out - jax.lax.stop_gradient(y + 0.9 * out[:, 0]),
        "clipped": lambda out, y: y + jnp.clip(out - y, -0.2, 0.2),
        "larger": jnp.maximum,
    }

    @pytest.mark.parametrize("how", BY_BROADCASTING)
    def test_pairs_by_broadcasting_are_a_mistake(self, how: str) -> None:
        """Nothing in the code says that (N, 1) and (N,) should make (N, N)."""
        make = self.BY_BROADCASTING[how]
        step = with_loss(lambda out, b: jnp.mean(make(out, b["label"]) ** 2))
        law = "predictions_meet_their_own_targets"
        evidence = bnverify.verify(found(step), FEW, select=[law], proofs_only=True)[law]
        assert evidence.status == "violated"
        assert "(N, 1)" in evidence.reason
        assert "test_by_design.py" in evidence.reason
        assert evidence.diagnosis is not None
        assert evidence.diagnosis.startswith("broadcast_loss")
        told = found(step, row_losses=False)
        assert "row_losses=False" in told.exempt[law]

    def test_targets_scaled_by_their_batch_are_by_design(self) -> None:
        """An advantage is often scaled by the deviation of its batch; inputs and outputs are not."""

        def loss(out: Any, b: Any) -> Any:
            label = b["label"]
            scaled = (label - label.mean()) / (label.std() + 1e-8)
            return jnp.mean(out[:, 0] * scaled)

        assert "statistic of their batch" in found(with_loss(loss)).exempt[ROWS]

        def centred(out: Any, b: Any) -> Any:
            return jnp.mean((out[:, 0] - out[:, 0].mean() - b["label"]) ** 2)

        assert ROWS not in found(with_loss(centred)).exempt


def standardised(x: Any) -> Any:
    """Return inputs with the mean 0 and the deviation 1 of their batch."""
    return (x - x.mean(0)) / (x.std(0) + 1e-3)


class TestInputsOfTheModel:
    """What a loop does with x before the model sees it."""

    def notes(self, train: Any, evaluate: Any) -> list[str]:
        """Return the notes on inputs, for a loop that changes them by these functions."""

        def step(state: Any, batch: Any, z_rng: Any) -> Any:
            def loss(params: Any) -> Any:
                x = train(batch["image"], z_rng)
                out, stats = code.run(state, params, state.batch_stats, x)
                return code.mse(out, batch["label"]), stats

            grads, stats = jax.grad(loss, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads, batch_stats=stats)

        def eval_step(state: Any, batch: Any) -> Any:
            return code.eval_step(state, {**batch, "image": evaluate(batch["image"])})

        notes = loop(code.create, step, eval_step).notes
        return [note for note in notes if "evaluated on the inputs" in note]

    def test_standardised_in_training_alone_is_noted(self) -> None:
        """The note names the line."""
        (note,) = self.notes(lambda x, key: standardised(x), lambda x: x)
        assert "training computes them from x at" in note
        assert "test_by_design.py" in note
        assert "evaluation takes x as it is" in note

    def test_in_evaluation_alone_too(self) -> None:
        """Or another scale."""
        (note,) = self.notes(lambda x, key: x, lambda x: x / 255)
        assert "training takes x as it is, evaluation computes them" in note

    def test_a_part_of_the_rows_is_not_noted(self) -> None:
        """As when gradients are accumulated over parts of the batch."""

        def step(state: Any, batch: Any) -> Any:
            def loss(params: Any) -> Any:
                half, stats, total = len(batch["label"]) // 2, state.batch_stats, 0.0
                for part in (slice(None, half), slice(half, None)):
                    out, stats = code.run(state, params, stats, batch["image"][part])
                    total += code.mse(out, batch["label"][part]) / 2
                return total, stats

            grads, stats = jax.grad(loss, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads, batch_stats=stats)

        notes = loop(code.create, step, code.eval_step).notes
        assert not [note for note in notes if "evaluated on the inputs" in note]

    def test_a_part_of_the_rows_in_a_scan_is_not_noted(self) -> None:
        """The same, with ``lax.scan``."""

        def step(state: Any, batch: Any) -> Any:
            def one(stats: Any, part: Any) -> Any:
                def loss(params: Any) -> Any:
                    out, new = code.run(state, params, stats, part["image"])
                    return code.mse(out, part["label"]), new

                grads, new = jax.grad(loss, has_aux=True)(state.params)
                return new, grads

            parts = jax.tree_util.tree_map(lambda a: a.reshape(2, -1, *a.shape[1:]), batch)
            stats, grads = jax.lax.scan(one, state.batch_stats, parts)
            grads = jax.tree_util.tree_map(lambda g: g.mean(0), grads)
            return state.apply_gradients(grads=grads, batch_stats=stats)

        notes = loop(code.create, step, code.eval_step).notes
        assert not [note for note in notes if "evaluated on the inputs" in note]

    def test_the_same_in_both_or_by_chance_is_not(self) -> None:
        """Augmentation is by design."""
        assert not self.notes(lambda x, key: standardised(x), standardised)
        assert not self.notes(lambda x, key: x + jax.random.normal(key, x.shape), lambda x: x)


class TestReportedLoss:
    """A loop that computes its metrics from the outputs once more, as Flax's examples do."""

    def subject(self, smoothing: float, reported: Any) -> Subject:
        """Return a loop that differentiates a smoothed loss and reports one of its outputs."""

        def cross_entropy(out: Any, label: Any, smoothing: float) -> Any:
            share = (label > 0) * (1 - smoothing) + smoothing / 2
            return optax.sigmoid_binary_cross_entropy(out[:, 0], share).mean()

        def step(state: Any, batch: Any) -> Any:
            def loss(params: Any) -> Any:
                out, stats = code.run(state, params, state.batch_stats, batch["image"])
                return cross_entropy(out, batch["label"], smoothing), (out, stats)

            (value, (out, stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            state = state.apply_gradients(grads=grads, batch_stats=stats)
            again = cross_entropy(out, batch["label"], 0.0)
            return state, {"loss": reported(value, again)}

        return found(step)

    def test_without_the_smoothing_it_is_another_loss(self) -> None:
        """Its slope is not the gradient, by design; the reason names the line."""
        subject = self.subject(0.1, lambda value, again: again)
        assert "not the differentiated one" in subject.exempt[GRADIENT]
        assert "test_by_design.py" in subject.exempt[GRADIENT]

    @pytest.mark.parametrize(
        ("smoothing", "reported"),
        [(0.1, lambda value, again: value), (0.0, lambda value, again: again)],
        ids=["the differentiated one", "computed again"],
    )
    def test_the_same_loss_is_judged(self, smoothing: float, reported: Any) -> None:
        """However it is computed."""
        assert GRADIENT not in self.subject(smoothing, reported).exempt


def over(change: Any) -> Any:
    """Return a function that changes each leaf of a tree."""
    return lambda grads, key: jax.tree_util.tree_map(lambda g: change(g, key), grads)


class TestGradientsChangedByHand:
    """What a loop does with gradients before the optimizer."""

    def subject(self, by_hand: Any, **declared: Any) -> Subject:
        """Return a loop that changes gradients by a function of them and a key."""

        def step(state: Any, batch: Any, z_rng: Any) -> Any:
            def loss(params: Any) -> Any:
                out, stats = code.run(state, params, state.batch_stats, batch["image"])
                return code.mse(out, batch["label"]), stats

            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            grads = by_hand(grads, z_rng)
            return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": value}

        return loop(code.create, step, code.eval_step, **declared)

    CHANGED: ClassVar[dict[str, tuple[Any, str]]] = {
        "clipped": (over(lambda g, _: jnp.clip(g, -0.01, 0.01)), "cut off entry by entry"),
        "signs": (over(lambda g, _: jnp.sign(g)), "cut off entry by entry"),
        "noisy": (over(lambda g, k: g + 0.1 * jax.random.normal(k, g.shape)), "noise is added"),
        "centred": (over(lambda g, _: g - g.mean(0, keepdims=True)), "a part of the gradients"),
        "scaled": (over(lambda g, _: g / (1 + jnp.linalg.norm(g))), "scaled by a number"),
    }

    @pytest.mark.parametrize("how", first_of(CHANGED))
    def test_they_are_not_the_slope_by_design(self, how: str) -> None:
        """The reason says what was done; the update is still judged."""
        by_hand, said = self.CHANGED[how]
        subject = self.subject(by_hand)
        assert said in subject.exempt[GRADIENT]
        laws = ["params_follow_the_optimizer", "bias_before_norm_has_no_gradient"]
        report = bnverify.verify(subject, FEW, select=laws)
        assert report["params_follow_the_optimizer"].status == "held"
        assert report.ok, str(report)

    UNCHANGED: ClassVar[dict[str, Any]] = {
        "zeros for NaN": over(lambda g, _: jnp.where(jnp.isnan(g), 0.0, g)),
        "finite": over(lambda g, _: jnp.nan_to_num(g)),
        "scaled back": over(lambda g, _: g * 0.5 / 0.5),
    }

    @pytest.mark.parametrize("how", first_of(UNCHANGED))
    def test_what_changes_no_finite_gradient_is_judged(self, how: str) -> None:
        """And held."""
        subject = self.subject(self.UNCHANGED[how])
        assert bnverify.verify(subject, FEW, select=[GRADIENT])[GRADIENT].status == "held"

    def test_half_a_gradient_is_none(self) -> None:
        """A constant factor before the optimizer may be a mistake."""
        subject = self.subject(over(lambda g, _: g * 0.5))
        assert bnverify.verify(subject, FEW, select=[GRADIENT])[GRADIENT].status == "violated"

    def test_zeroed_gradients_are_declared(self) -> None:
        """As ``frozen``; without it a lost gradient looks the same."""

        def zeroed(grads: Any, _key: Any) -> Any:
            return {**grads, "Dense_0": jax.tree_util.tree_map(jnp.zeros_like, grads["Dense_0"])}

        assert GRADIENT not in self.subject(zeroed).exempt
        declared = self.subject(zeroed, frozen=["Dense_0/*"])
        assert "replaced by constants" in declared.exempt[GRADIENT]


def test_random_numbers_behind_the_statistics_of_a_step_that_reports_nothing() -> None:
    """As in Flax's own VAE: neither a loss nor the statistics depend on them, but the update does."""

    def step(state: Any, batch: Any, z_rng: Any) -> Any:
        def loss(params: Any) -> Any:
            out, stats = code.run(state, params, state.batch_stats, batch["image"])
            out += jax.random.normal(z_rng, out.shape)
            return code.mse(out, batch["label"]), stats

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats)

    exempt = loop(code.create, step, code.eval_step).exempt
    assert "random numbers" in exempt["doubling_the_batch_changes_nothing"]
    assert "random numbers" in exempt["row_order_changes_nothing"]


class TestPasses:
    """A model that is called several times in a step."""

    @pytest.mark.parametrize("both", [True, False], ids=["wrong", "right"])
    def test_one_batch_twice_is_one(self, both: bool) -> None:
        """Sharpness-aware minimisation processes a batch twice but must update the statistics once."""

        def step(state: Any, batch: Any) -> Any:
            def loss(params: Any, stats: Any) -> Any:
                out, new = code.run(state, params, stats, batch["image"])
                return code.mse(out, batch["label"]), new

            gradient = jax.value_and_grad(loss, has_aux=True)
            (value, first), grads = gradient(state.params, state.batch_stats)
            there = jax.tree_util.tree_map(lambda p, g: p + 0.1 * g, state.params, grads)
            (_, second), grads = gradient(there, first)
            stats = second if both else first
            return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": value}

        subject = found(step)
        assert subject.momentum == MOMENTUM
        assert "at perturbed params" in subject.exempt[GRADIENT]
        assert TARGETS not in subject.exempt  # by which the wrong twin is caught

    @pytest.mark.parametrize("attack", [True, False])
    def test_inputs_made_in_eval_mode_are_by_design(self, attack: bool) -> None:
        """An adversarial attack on the model in eval mode, outside the loss and without stop_gradient."""

        def step(state: Any, batch: Any) -> Any:
            def attacked(x: Any) -> Any:
                given = {"params": state.params, "batch_stats": state.batch_stats}
                return code.mse(state.apply_fn(given, x, train=False), batch["label"])

            def loss(params: Any) -> Any:
                out, new = code.run(state, params, state.batch_stats, x)
                return code.mse(out, batch["label"]), new

            x = batch["image"]
            x = x + 0.1 * jnp.sign(jax.grad(attacked)(x)) if attack else x
            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": value}

        subject = found(step)
        assert ("training_is_free_of_old_statistics" in subject.exempt) == attack
        assert subject.momentum == MOMENTUM

    def test_params_adapted_on_other_rows_are_by_design(self) -> None:
        """Meta-learning: the statistics of the second batch depend on the targets of the first."""

        def step(state: Any, batch: Any) -> Any:
            def loss(params: Any, stats: Any, x: Any) -> Any:
                out, new = code.run(state, params, stats, x)
                return code.mse(out, batch["label"]), new

            def outer(params: Any) -> Any:
                grads, new = jax.grad(loss, has_aux=True)(params, state.batch_stats, batch["image"])
                fast = jax.tree_util.tree_map(lambda p, g: p - 0.1 * g, params, grads)
                return loss(fast, new, batch["image"][:, ::-1])

            (value, stats), grads = jax.value_and_grad(outer, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": value}

        assert "another batch" in found(step).exempt[TARGETS]

    @pytest.mark.parametrize("threaded", [False, True], ids=["wrong", "right"])
    def test_two_views_are_two_batches(self, threaded: bool) -> None:
        """Each batch must update the statistics; if one is dropped, the momentum is not as declared."""

        def step(state: Any, batch: Any) -> Any:
            def loss(params: Any) -> Any:
                one, first = code.run(state, params, state.batch_stats, batch["image"])
                stats = first if threaded else state.batch_stats
                two, second = code.run(state, params, stats, batch["image"][:, ::-1])
                return code.mse(one, batch["label"]) + jnp.mean((one - two) ** 2), second

            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": value}

        subject = found(step)
        assert subject.momentum == MOMENTUM**2
        assert "several times in a step" in subject.exempt["batch_stats_change_only_by_ema"]
        assert "momentum_is_as_declared" not in subject.exempt
        assert found(step, passes=1).momentum == MOMENTUM

    def test_several_updates_in_a_loop_are_known(self) -> None:
        """With several epochs in a scan, activations of updated params depend on y."""

        def step(state: Any, batch: Any) -> Any:
            def epoch(state: Any, _: Any) -> Any:
                state, report = code.train_step(state, batch)
                return state, report["loss"]

            state, losses = jax.lax.scan(epoch, state, None, 2)
            return state, {"loss": losses.mean()}

        exempt = found(step).exempt
        assert "updates params several times" in exempt[TARGETS]
        assert "called in a loop" in exempt["batch_stats_change_only_by_ema"]
        assert TARGETS not in found(code.train_step).exempt

    @pytest.mark.parametrize(
        "how", ["scanned", "unrolled", pytest.param("mapped", marks=pytest.mark.nightly)]
    )
    def test_a_batch_that_is_split(self, how: str) -> None:
        """Each part is normalised by itself; only batches that can be split are run."""

        def step(state: Any, batch: Any) -> Any:
            parts = jax.tree_util.tree_map(lambda a: a.reshape(2, -1, *a.shape[1:]), batch)

            def slope(stats: Any, part: Any) -> Any:
                def loss(params: Any) -> Any:
                    out, new = code.run(state, params, stats, part["image"])
                    return code.mse(out, part["label"]), new

                (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
                return stats, (value, grads)

            if how == "scanned":
                stats, found = jax.lax.scan(slope, state.batch_stats, parts)
            elif how == "unrolled":
                stats, one = slope(state.batch_stats, jax.tree_util.tree_map(lambda a: a[0], parts))
                stats, two = slope(stats, jax.tree_util.tree_map(lambda a: a[1], parts))
                found = jax.tree_util.tree_map(lambda *each: jnp.stack(each), one, two)
            else:
                stats, found = jax.vmap(slope, (None, 0))(state.batch_stats, parts)
                stats = jax.tree_util.tree_map(lambda s: s.mean(0), stats)
            value, grads = jax.tree_util.tree_map(lambda a: a.mean(0), found)
            return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": value}

        subject = found(step)
        assert "in parts, 12 of 24 rows" in subject.exempt["row_order_changes_nothing"]
        assert "batch_stats_change_only_by_ema" in subject.exempt
        assert "one_momentum_for_the_whole_model" not in subject.exempt
        momenta = {"scanned": None, "unrolled": MOMENTUM**2, "mapped": MOMENTUM}
        assert subject.momentum == momenta[how]
        report = bnverify.verify(subject, FEW, select=["statistics", "metamorphic"])
        assert report.ok, report
        assert any("multiples of 2 rows" in note for note in report.notes)

    def test_a_target_network_is_another_one(self) -> None:
        """Its layers write statistics of its own; those of the model are counted without them."""

        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                return nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))

        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(3)(x))
                return nn.Dense(1)(Inner(name="inner")(x, train))

        class Both(code.TrainState):
            target_params: Any = None
            target_stats: Any = None

        def create(rng: Any, lr: Any) -> Any:
            made = code.variables(rng, model=Outer())
            kept = {"target_params": made["params"], "target_stats": made["batch_stats"]}
            return Both.create(apply_fn=Outer().apply, tx=optax.sgd(lr), **made, **kept)

        def step(state: Any, batch: Any) -> Any:
            x = batch["image"]
            goal, target_stats = code.run(state, state.target_params, state.target_stats, x)

            def loss(params: Any) -> Any:
                out, stats = code.run(state, params, state.batch_stats, x)
                return code.mse(out, batch["label"] + goal[:, 0]), stats

            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            state = state.apply_gradients(grads=grads, batch_stats=stats, target_stats=target_stats)
            return state.replace(target_params=state.params), {"loss": value}

        subject = found(step, create)
        assert subject.momentum == MOMENTUM
        assert "one_momentum_for_the_whole_model" not in subject.exempt

    def test_half_of_a_batch_is_no_split(self) -> None:
        """A step that leaves the other half out stays under the law of the rows' order."""

        def step(state: Any, batch: Any) -> Any:
            half = {name: a[: a.shape[0] // 2 + 1] for name, a in batch.items()}
            return code.train_step(state, half)

        assert "row_order_changes_nothing" not in found(step).exempt

    def test_a_model_that_is_given_the_targets(self) -> None:
        """The statistics of a conditional model depend on the targets."""

        def step(state: Any, batch: Any) -> Any:
            x = batch["image"] + batch["label"][:, None]
            return code.train_step(state, {**batch, "image": x})

        assert "targets are an input" in found(step).exempt[TARGETS]


class TestEvaluatedAverages:
    @pytest.mark.parametrize("statistics_too", [True, False])
    def test_an_average_of_params_and_statistics(self, statistics_too: bool) -> None:
        """Evaluation may be that of the average alone; one whose statistics stay is no such design."""

        class Averaged(code.TrainState):
            ema_params: Any = None
            ema_batch_stats: Any = None

        def create(rng: Any, lr: Any) -> Any:
            made = code.variables(rng)
            return Averaged.create(
                apply_fn=code.Model().apply,
                tx=optax.sgd(lr),
                **made,
                ema_params=made["params"],
                ema_batch_stats=made["batch_stats"],
            )

        def averaged(old: Any, new: Any) -> Any:
            return jax.tree_util.tree_map(lambda o, n: 0.99 * o + 0.01 * n, old, new)

        def step(state: Any, batch: Any) -> Any:
            state, metrics = code.train_step(state, batch)
            state = state.replace(ema_params=averaged(state.ema_params, state.params))
            if statistics_too:
                stats = averaged(state.ema_batch_stats, state.batch_stats)
                state = state.replace(ema_batch_stats=stats)
            return state, metrics

        def evaluation(state: Any, batch: Any) -> Any:
            state = state.replace(params=state.ema_params, batch_stats=state.ema_batch_stats)
            return code.eval_step(state, batch)

        subject = loop(create, step, evaluation)
        reason = subject.exempt.get("eval_uses_the_running_statistics", "")
        assert ("ema_params and ema_batch_stats, which follow" in reason) == statistics_too


class TestRows:
    def test_a_mask_in_the_denominator(self) -> None:
        """A loss divided by the number of unmasked rows is not a mean over rows."""

        def loss(out: Any, batch: Any) -> Any:
            mask = batch["label"] > 0
            return jnp.sum(mask * out[:, 0] ** 2) / jnp.maximum(mask.sum(), 1)

        assert (
            "divides by a number that depends on the batch" in found(with_loss(loss)).exempt[ROWS]
        )
        said = found(with_loss(loss), weights=lambda x, y: y > 0)
        assert ROWS not in said.exempt
        assert said.row_weights is not None

    def test_rows_that_are_compared(self) -> None:
        """A contrastive loss multiplies rows with rows; attention within a row does not."""

        def loss(out: Any, batch: Any) -> Any:
            z = out / jnp.linalg.norm(out, axis=-1, keepdims=True)
            return jax.nn.logsumexp(z @ z.T, -1).mean()

        exempt = found(with_loss(loss), batch=lambda x, y: {"image": x}).exempt
        assert "compares rows" in exempt["doubling_the_batch_changes_nothing"]
        assert exempt["targets_reach_the_params"] == "the batch does not contain y"

        def within(out: Any, batch: Any) -> Any:
            h = batch["image"][:, :, None] * out[:, None]
            return jnp.mean(jnp.einsum("nij,nkj->nik", h, h))

        assert ROWS not in found(with_loss(within)).exempt


class TestUpdates:
    def test_a_penalty_that_is_not_reported(self) -> None:
        """A penalty in the differentiated loss makes the law exempt, unless the reported loss has it."""

        def penalised(reported: bool) -> Any:
            def step(state: Any, batch: Any) -> Any:
                def loss(params: Any) -> Any:
                    value, stats = code.loss_fn(state, batch)(params)
                    decay = 0.01 * sum(jnp.sum(p**2) for p in jax.tree_util.tree_leaves(params))
                    return value + decay, (value, stats)

                grads = jax.value_and_grad(loss, has_aux=True)
                (whole, (value, stats)), grads = grads(state.params)
                new = state.apply_gradients(grads=grads, batch_stats=stats)
                return new, {"loss": whole if reported else value}

            return step

        assert "penalty" in found(penalised(False)).exempt[GRADIENT]
        assert GRADIENT not in found(penalised(True)).exempt

    def test_a_penalty_under_dynamic_loss_scaling_is_seen(self) -> None:
        """The loss scale multiplies the loss and divides the gradient; it is not a penalty."""

        class Scaled(code.TrainState):
            scale: Any

        def create(rng: Any, lr: float) -> Any:
            made = code.create(rng, lr)
            return Scaled(**vars(made), scale=dynamic_scale.DynamicScale())

        def scaled(penalty: float) -> Any:
            def step(state: Any, batch: Any) -> Any:
                def loss(params: Any) -> Any:
                    value, stats = code.loss_fn(state, batch)(params)
                    decay = sum(jnp.sum(p**2) for p in jax.tree_util.tree_leaves(params))
                    return value + penalty * decay if penalty else value, (value, stats)

                grads = state.scale.value_and_grad(loss, has_aux=True)
                scale, _, (_, (value, stats)), grads = grads(state.params)
                new = state.apply_gradients(grads=grads, batch_stats=stats)
                return new.replace(scale=scale), {"loss": value}

            return found(step, create)

        assert "penalty" in scaled(0.01).exempt[GRADIENT]
        assert GRADIENT not in scaled(0.0).exempt

    @pytest.mark.parametrize("every", first_of([4, 2]))
    def test_accumulated_updates_are_counted(self, every: int) -> None:
        """With ``optax.MultiSteps``, the steps before an update are part of the warm-up."""

        def create(rng: Any, lr: float) -> Any:
            tx: Any = optax.MultiSteps(optax.sgd(lr), every)
            return code.TrainState.create(apply_fn=code.Model().apply, tx=tx, **code.variables(rng))

        subject = found(code.train_step, create)
        assert subject.updates_every == every
        report = bnverify.verify(subject, FEW, select=["step_moves_the_params"])
        assert report["step_moves_the_params"].status == "held"

    @pytest.mark.parametrize("moves", [True, False], ids=["wrong", "right"])
    def test_a_frozen_backbone(self, moves: bool) -> None:
        """A layer with frozen params and statistics is in ``extra``; one whose statistics change is not."""

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                for name, trains in (("backbone", moves), ("head", True)):
                    average = not (train and trains)
                    x = nn.BatchNorm(use_running_average=average, name=name)(x)
                return nn.Dense(1)(x)

        def create(rng: Any, lr: float) -> Any:
            def label(params: Any) -> Any:
                return {k: "rest" if k == "backbone" else "train" for k in params}

            tx = optax.multi_transform({"train": optax.sgd(lr), "rest": optax.set_to_zero()}, label)
            made = code.variables(rng, model=Net())
            return code.TrainState.create(apply_fn=Net().apply, tx=tx, **made)

        subject = found(code.train_step, create)
        state = jax.eval_shape(subject.init, 0, jnp.ones((4, 3)))
        assert set(state.batch_stats) == ({"backbone", "head"} if moves else {"head"})
        told = found(code.train_step, create, frozen=["backbone/*"]).look
        assert told is not None
        assert set(told.frozen_statistics) == {
            f"extra/carried/backbone/{n}" for n in ("mean", "var")
        }
        free = found(code.train_step, create, frozen=False).look
        assert free is not None
        assert not free.frozen_statistics


class TestStart:
    @pytest.mark.parametrize("whole", [False, True], ids=["wrong", "right"])
    def test_a_trained_model(self, whole: bool) -> None:
        """Pretrained statistics need not be 0 and 1."""
        trained = code.variables(jax.random.PRNGKey(7))

        def create(rng: Any, lr: float) -> Any:
            fresh = code.variables(rng)
            stats = trained["batch_stats"] if whole else fresh["batch_stats"]
            return code.TrainState.create(
                apply_fn=code.Model().apply,
                params=trained["params"],
                batch_stats=stats,
                tx=optax.sgd(lr),
            )

        subject = found(code.train_step, create)
        assert ("initial_statistics_are_zero_and_one" in subject.exempt) == whole
        assert subject.look is not None
        assert subject.look.pretrained == (("BatchNorm_0", whole),)


def test_a_module_that_looks_whether_it_may_write() -> None:
    """A module without a train argument is evaluated with immutable collections."""

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            train = self.is_mutable_collection("batch_stats") and not self.is_initializing()
            return nn.BatchNorm(use_running_average=not train)(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(1)(Norm()(nn.Dense(3)(x)))

    subject = bnverify.linen(Net())
    x, y = jnp.arange(12.0).reshape(4, 3), jnp.ones(4)
    state = subject.init(0, x)
    assert subject.after_eval is not None
    left = subject.after_eval(state, x, y)
    after, _ = subject.step(state, x, y, 0.1)
    assert jnp.array_equal(left.batch_stats["Norm_0"]["BatchNorm_0"]["mean"], jnp.zeros(3))
    assert jnp.any(after.batch_stats["Norm_0"]["BatchNorm_0"]["mean"] != 0)


def test_a_statistic_that_becomes_an_array_is_told() -> None:
    """Replacing an nnx.BatchStat by an array raises an error that explains how to assign its value."""

    class Norm(nnx.Module):
        def __init__(self, din: int, rngs: Any) -> None:
            self.mean, self.var = nnx.BatchStat(jnp.zeros(din)), nnx.BatchStat(jnp.ones(din))
            self.scale = nnx.Param(jnp.ones(din))

        def __call__(self, x: Any) -> Any:
            self.mean: Any = jnp.mean(x, 0)
            return (x * self.scale).mean(-1)

    with pytest.raises(
        ValueError, match=r"mean is no longer an nnx.Variable.*self\.mean\[\.\.\.\] ="
    ):
        bnverify.nnx(Norm)


@pytest.mark.parametrize("free", [True, False])
def test_an_optimizer_that_computes_params_from_a_copy_rounds(*, free: bool) -> None:
    """Schedule-free optimizers interpolate, so a learning rate of 0 moves params by their rounding."""

    def create(rng: Any) -> Any:
        made = code.variables(rng)
        tx = optax.contrib.schedule_free_adamw(0.1) if free else optax.adamw(0.1)
        return code.TrainState.create(apply_fn=code.Model().apply, tx=tx, **made)

    exempt = loop(create, code.train_step, code.eval_step).exempt
    assert ("zero_learning_rate_moves_nothing" in exempt) == free


def test_numbers_drawn_by_rejection_are_draws() -> None:
    """Mixup weighs rows with the next ones by a number from a beta distribution."""

    def step(state: Any, batch: Any, z_rng: Any) -> Any:
        weight = jax.random.beta(z_rng, 0.2, 0.2)

        def loss(params: Any) -> Any:
            x = weight * batch["image"] + (1 - weight) * jnp.roll(batch["image"], 1, 0)
            out, stats = code.run(state, params, state.batch_stats, x)
            return code.mse(out, batch["label"]), stats

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats)

    exempt = loop(code.create, step, code.eval_step).exempt
    assert "random numbers" in exempt["row_order_changes_nothing"]
    assert "cannot be held equal" in exempt["doubling_changes_nothing_if_draws_are_equal"]


def test_statistics_under_another_name_are_found_if_no_layer_trains() -> None:
    """A step in eval mode by mistake must not pass for one without statistics."""
    tx = optax.sgd(0.1)

    def create(rng: Any) -> Any:
        made = code.variables(rng)
        return {
            "params": made["params"],
            "norms": made["batch_stats"],
            "opt": tx.init(made["params"]),
        }

    def step(state: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            given = {"params": params, "batch_stats": state["norms"]}
            out = code.Model().apply(given, batch["image"], train=False)
            return code.mse(out, batch["label"])

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = tx.update(grads, state["opt"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "norms": state["norms"], "opt": opt}, value

    subject = loop(create, step)
    state = jax.eval_shape(subject.init, 0, jnp.ones((4, 3)))
    assert jax.tree_util.tree_leaves(state.batch_stats)


class Teacher(nn.Module):
    """Dense, BatchNorm and dropout: x (N, 3) -> (N, 3)."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        """Return the features."""
        x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(nn.Dense(3)(x))
        return nn.Dropout(self.dropout, deterministic=not train)(nn.tanh(x))


def in_train_mode(variables: Any, x: Any, **options: Any) -> Any:
    """Return the outputs of a teacher in train mode; its new statistics are dropped."""
    teacher = Teacher(options.pop("dropout", 0.0))
    return teacher.apply(variables, x, train=True, mutable=["batch_stats"], **options)[0]


VARIABLES = Teacher().init(jax.random.PRNGKey(3), jnp.ones((1, 3)), train=False)


def mse(out: Any, goal: Any) -> Any:
    """Return the mean squared error."""
    return jnp.mean((out - goal) ** 2)


def by_a_noisy_teacher(out: Any, batch: Any) -> Any:
    """Train mode is for the teacher's dropout."""
    key = {"dropout": jax.random.PRNGKey(0)}
    goal = in_train_mode(VARIABLES, batch["image"], dropout=0.5, rngs=key)
    return mse(out, batch["label"]) + mse(out, goal[:, 0])


def by_a_fixed_critic(out: Any, batch: Any) -> Any:
    """The features of a fixed discriminator match, through which the gradient flows."""
    real = in_train_mode(VARIABLES, batch["image"])
    fake = in_train_mode(VARIABLES, batch["image"] + out[:, None])
    return mse(out, batch["label"]) + mse(real.mean(0), fake.mean(0))


class TestTeachers:
    @pytest.mark.parametrize("loss", [by_a_noisy_teacher, by_a_fixed_critic])
    def test_train_mode_may_be_intended(self, loss: Any) -> None:
        """Dropout, and a network through which a gradient flows, need train mode."""
        look = found(with_loss(loss)).look
        assert look is not None
        assert not any(each.training for each in look.teachers)

    def test_a_backbone_is_no_teacher(self) -> None:
        """A trained layer takes the outputs of a fixed network."""

        def step(state: Any, batch: Any) -> Any:
            inputs = in_train_mode(VARIABLES, batch["image"])
            return code.train_step(state, {**batch, "image": inputs})

        look = found(step).look
        assert look is not None
        assert look.teachers == ()

    @pytest.mark.parametrize("moves", [True, False])
    def test_a_copy_of_the_params_is_no_teacher(self, *, moves: bool) -> None:
        """A momentum teacher follows the params; a target network may be copied by other code."""

        def create(rng: Any) -> Any:
            state = code.create(rng, 0.1)
            other = code.create(jax.random.fold_in(rng, 1), 0.1)
            return state, {"params": other.params, "batch_stats": other.batch_stats}

        def step(state: Any, target: Any, batch: Any) -> Any:
            goal, _ = state.apply_fn(target, batch["image"], train=True, mutable=["batch_stats"])
            goal = 0.5 * goal[:, 0] + 0.5 * batch["label"]
            after, report = code.train_step(state, {**batch, "label": goal})
            if moves:
                new = jax.tree_util.tree_map(
                    lambda old, now: 0.9 * old + 0.1 * now, target["params"], after.params
                )
                target = {**target, "params": new}
            return after, target, report

        look = bnverify.loop(
            create, step, batch=lambda x, y: {"image": x, "label": y}, features=3
        ).look
        assert look is not None
        assert look.teachers == ()


class TestParts:
    @pytest.mark.parametrize("kept", [True, False])
    def test_rows_that_do_not_train_may_be_left_out(self, *, kept: bool) -> None:
        """Rows that a loop only measures reach neither params nor statistics."""

        def step(state: Any, batch: Any) -> Any:
            half = batch["image"].shape[0] // 2

            def body(carry: Any, rows: Any) -> Any:
                image, label, trains = rows

                def loss(params: Any) -> Any:
                    out, stats = code.run(state, params, carry[0], image)
                    return mse(out, label) * trains, stats

                (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
                stats = jax.tree_util.tree_map(
                    lambda new, old: jnp.where((trains > 0) | kept, new, old), stats, carry[0]
                )
                return (stats, jax.tree_util.tree_map(jnp.add, carry[1], grads)), value

            zeros = jax.tree_util.tree_map(jnp.zeros_like, state.params)
            split = [leaf.reshape(2, half, *leaf.shape[1:]) for leaf in batch.values()]
            (stats, grads), values = jax.lax.scan(
                body, (state.batch_stats, zeros), (*split, jnp.array([1.0, 0.0]))
            )
            return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": values.sum()}

        look = found(step, rows=2).look
        assert look is not None
        assert look.parts != ()
        assert all(each.reaches for each in look.parts)


@pytest.mark.parametrize("neighbours", [jnp.roll, lambda x, *_: x[::-1], lambda x, *_: x])
def test_a_batch_may_be_made_of_other_rows(neighbours: Any) -> None:
    """As observations with those that follow: the step is not to blame."""

    def batch(x: Any, y: Any) -> Any:
        return {"image": x, "label": neighbours(y, 1, 0)}

    exempt = loop(code.create, code.train_step, code.eval_step, batch=batch).exempt
    itself = neighbours(jnp.arange(3.0), 1, 0)[0] == 0
    reason = exempt.get("row_order_changes_nothing", "")
    assert ("rows from other rows" in reason) == (not itself)


def test_a_generators_statistics_are_those_of_random_numbers() -> None:
    """They do not depend on x, which trains the generator all the same."""

    def step(state: Any, batch: Any, z_rng: Any) -> Any:
        def loss(params: Any) -> Any:
            noise = jax.random.normal(z_rng, batch["image"].shape)
            out, stats = code.run(state, params, state.batch_stats, noise)
            return jnp.mean((out.mean() - batch["image"].mean()) ** 2), stats

        grads, stats = jax.grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, batch_stats=stats)

    exempt = loop(code.create, step, code.eval_step).exempt
    assert "normalise random numbers" in exempt["inputs_reach_the_statistics"]
    assert "inputs_reach_the_statistics" not in loop(code.create, code.train_step).exempt


def test_statistics_of_a_target_network_follow_the_running_ones() -> None:
    """They are in the state and evaluation uses them, but they are no averages of the batch."""

    class WithTarget(code.TrainState):
        target_params: Any
        target_stats: Any

    def create(rng: Any, lr: Any) -> Any:
        made = code.create(rng, lr)
        kept = {"params": made.params, "batch_stats": made.batch_stats}
        target = {"target_params": made.params, "target_stats": made.batch_stats}
        return WithTarget.create(apply_fn=made.apply_fn, tx=made.tx, **kept, **target)

    def train_step(state: Any, batch: Any) -> Any:
        new, info = code.train_step(state, batch)
        params = optax.incremental_update(new.params, state.target_params, 0.1)
        stats = optax.incremental_update(new.batch_stats, state.target_stats, 0.1)
        return new.replace(target_params=params, target_stats=stats), info

    def eval_step(state: Any, batch: Any) -> Any:
        own = {"params": state.target_params, "batch_stats": state.target_stats}
        return code.eval_step(state.replace(**own), batch)

    notes = loop(create, train_step, eval_step).notes
    assert not [note for note in notes if "not found as running statistics" in note]

"""The linen adapter: what it finds out about a module, and the step that it makes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapted_steps import CASE, one_step

from bnverify import reference
from bnverify.adapters.batches import classes
from bnverify.adapters.canonical import linen
from bnverify.adapters.explain import SubjectError
from bnverify.model import Case


def net_called_with(argument: str, *, inverted: bool) -> nn.Module:
    """Return a module whose ``__call__`` has the argument of that name."""

    def call(self: Any, x: Any, flag: bool) -> Any:
        train = not flag if inverted else flag
        h = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(1)(h)

    source = f"lambda self, x, *, {argument}: call(self, x, {argument})"
    wrapped = eval(source, {"call": call})  # noqa: S307 - the argument's name is what is tested
    wrapped.__name__ = "__call__"
    module: nn.Module = type("Named", (nn.Module,), {"__call__": nn.compact(wrapped)})()
    return module


class TestReference:
    def test_the_reference_model_gives_the_reference_step(self) -> None:
        """The adapter's step for the reference model is bit-identical to the reference step."""
        ours, theirs = one_step(linen(reference.Model())), one_step(reference.sgd())
        for a, b in zip(
            jax.tree_util.tree_leaves(ours), jax.tree_util.tree_leaves(theirs), strict=True
        ):
            np.testing.assert_array_equal(a, b)

    def test_its_evaluation_is_the_references(self) -> None:
        """The eval loss is bit-identical to that of the reference."""
        _, after, _ = one_step(reference.sgd())
        np.testing.assert_array_equal(
            linen(reference.Model()).evaluate(after, CASE.x, CASE.y),
            reference.evaluate(after, CASE.x, CASE.y),
        )

    def test_what_the_reference_declares_is_found(self) -> None:
        """Momentum, bias before the normalisation and layer input are found."""
        found, declared = linen(reference.Model()), reference.sgd()
        before, _, _ = one_step(found)
        assert found.momentum == declared.momentum
        assert found.biases_before_norm == declared.biases_before_norm
        assert found.layer_inputs is not None
        (ours,) = found.layer_inputs(before, CASE.x, CASE.y).values()
        (theirs,) = reference.layer_inputs(before, CASE.x, CASE.y).values()
        np.testing.assert_allclose(ours.value, theirs.value, rtol=1e-6)


class TestMode:
    @pytest.mark.parametrize(
        ("argument", "inverted"),
        [
            ("train", False),
            ("training", False),
            ("is_training", False),
            ("use_running_average", True),
            ("deterministic", True),
        ],
    )
    def test_the_training_argument_is_found_by_its_name(
        self, argument: str, inverted: bool
    ) -> None:
        """Training changes the statistics and evaluation does not, for every argument name."""
        subject = linen(net_called_with(argument, inverted=inverted))
        before, after, _ = one_step(subject)
        moved = (
            before.batch_stats["BatchNorm_0"]["mean"] != after.batch_stats["BatchNorm_0"]["mean"]
        )
        assert np.all(moved)
        assert subject.after_eval is not None
        left = subject.after_eval(after, CASE.x, CASE.y)
        assert jax.tree_util.tree_all(
            jax.tree_util.tree_map(np.array_equal, left.batch_stats, after.batch_stats)
        )

    def test_a_field_of_the_module_is_found_too(self) -> None:
        """A module with the mode as a field is cloned for each mode."""

        class Fielded(nn.Module):
            train: bool = False

            @nn.compact
            def __call__(self, x: Any) -> Any:
                return nn.Dense(1)(nn.BatchNorm(use_running_average=not self.train)(x))

        before, after, _ = one_step(linen(Fielded()))
        assert np.any(
            before.batch_stats["BatchNorm_0"]["mean"] != after.batch_stats["BatchNorm_0"]["mean"]
        )

    def test_an_argument_that_says_neither_is_refused(self) -> None:
        """A name of unknown meaning is refused, with the function to pass instead."""
        with pytest.raises(ValueError, match="unknown whether True means training"):
            linen(reference.Model(), train_argument="mode")

    def test_a_function_says_what_a_name_cannot(self) -> None:
        """An argument that is not a bool is set by a function of the mode."""

        class Moded(nn.Module):
            @nn.compact
            def __call__(self, x: Any, mode: str) -> Any:
                return nn.Dense(1)(nn.BatchNorm(use_running_average=mode == "eval")(x))

        subject = linen(Moded(), train_argument=lambda train: {"mode": "fit" if train else "eval"})
        before, after, _ = one_step(subject)
        assert np.any(
            before.batch_stats["BatchNorm_0"]["mean"] != after.batch_stats["BatchNorm_0"]["mean"]
        )


class Everything(nn.Module):
    """A model with dropout, a counter, spectral norm and a sown value."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        h = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
        h = nn.BatchNorm(use_running_average=not train)(h)
        h = nn.Dropout(0.5, deterministic=not train)(h)
        steps = self.variable("counters", "steps", lambda: jnp.zeros((), jnp.int32))
        if train:
            steps.value = steps.value + 1
        self.sow("intermediates", "h", h)
        self.sow("losses", "size", jnp.sum(h**2))
        return nn.Dense(1)(h)


class TestCarried:
    def test_other_collections_and_keys_go_on_in_extra(self) -> None:
        """A step changes the counter, the power iteration and the key; sown values are dropped."""
        before, after, _ = one_step(linen(Everything()))
        assert jax.tree_util.tree_structure(before) == jax.tree_util.tree_structure(after)
        assert set(after.extra) == {"collections", "carried", "key"}
        assert after.extra["collections"] == {"counters": {"steps": 1}}
        for name in ("key", "carried"):
            leaves = [jax.tree_util.tree_leaves(s.extra[name]) for s in (before, after)]
            assert any(np.any(a != b) for a, b in zip(*leaves, strict=True))

    def test_vectors_of_a_power_iteration_are_no_averages(self) -> None:
        """The vectors that nn.SpectralNorm stores in batch_stats are not checked as moving averages."""
        before, _, _ = one_step(linen(Everything()))
        assert set(before.batch_stats) == {"BatchNorm_0"}

    def test_a_step_is_a_function_of_its_arguments(self) -> None:
        """The same state gives the same dropout mask, the next state a different one."""
        subject = linen(Everything())
        before, after, info = one_step(subject)
        step = jax.jit(subject.step)
        again, twice = (step(s, CASE.x, CASE.y, 0.0)[1].loss for s in (before, after))
        assert info.loss == again
        assert again != twice

    def test_laws_that_randomness_breaks_are_exempt(self) -> None:
        """The law about the order of rows is exempt for a model with dropout."""
        exempt = linen(Everything()).exempt
        assert "row_order_changes_nothing" in exempt
        assert "equal_steps_converge_geometrically" in exempt
        assert linen(reference.Model()).exempt == {}

    @pytest.mark.parametrize("mutable", [True, ["batch_stats", "counters", "intermediates"]])
    def test_every_form_of_mutable_gives_one_step(self, mutable: Any) -> None:
        """mutable=True and a list of collections keep the same variables."""
        usual, other = linen(Everything()), linen(Everything(), mutable=mutable)
        for a, b in zip(
            *(jax.tree_util.tree_leaves(one_step(s)) for s in (usual, other)), strict=True
        ):
            np.testing.assert_array_equal(a, b)

    def test_a_pattern_carries_what_is_no_average(self) -> None:
        """Statistics named in ``carried`` are not in batch_stats but still used."""
        whole, parted = linen(reference.Model()), linen(reference.Model(), carried=["*/var"])
        _, after, info = one_step(parted)
        assert list(after.batch_stats["BatchNorm_0"]) == ["mean"]
        assert info.loss == one_step(whole)[2].loss


class Block(nn.Module):
    """Conv -> BatchNorm -> ReLU beside a shortcut."""

    train: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(nn.Conv(3, (3, 3))(x))
        return nn.relu(y) + x


class Images(nn.Module):
    """Blocks plain, under remat and under jit, for images (N, 2, 2, 3) and three classes."""

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        for block in (Block, nn.remat(Block), nn.jit(Block)):
            x = block(train)(x)
        return nn.Dense(3)(x.mean((1, 2)))


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


IMAGES: dict[str, Any] = {
    "batch": lambda x, y: (x.reshape(-1, 2, 2, 3), classes(y, 3)),
    "loss": cross_entropy,
    "features": 12,
}


class TestLayers:
    @pytest.mark.parametrize("transformed", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_inputs_are_seen_through_remat_and_jit(self, transformed: Callable[..., Any]) -> None:
        """Each layer's input has shape (N H W, C), and its mean enters the moving average."""
        subject = linen(Images(), **IMAGES)
        case = Case.of(1, np.arange(36.0).reshape(3, 12) / 36, [0.0, 1.0, 2.0], 0.1)
        before, after, _ = one_step(subject, case)
        found = transformed(subject.layer_inputs)(before, case.x, case.y)
        assert {path: given.value.shape for path, given in found.items()} == {
            f"{kind}Block_0/BatchNorm_0": (12, 3) for kind in ("", "Checkpoint", "Jit")
        }
        for path, given in found.items():
            mean = after.batch_stats[path.split("/")[0]]["BatchNorm_0"]["mean"]
            np.testing.assert_allclose(mean, 0.1 * given.value.mean(0), rtol=1e-3, atol=1e-6)

    def test_inputs_are_seen_under_vmap(self) -> None:
        """Stacked batches give stacked inputs."""
        subject = linen(reference.Model())
        before, _, _ = one_step(subject)
        many = np.stack([CASE.x, CASE.x + 1])
        found = jax.vmap(subject.layer_inputs, in_axes=(None, 0, None))(before, many, CASE.y)
        assert found["BatchNorm_0"].value.shape == (2, 5, reference.HIDDEN)

    def test_a_bias_counts_only_where_it_goes_nowhere_else(self) -> None:
        """A bias that also reaches a shortcut is not found; one before the normalisation alone is."""

        class Around(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                h = nn.Dense(4)(x)
                return nn.Dense(1)(nn.BatchNorm(use_running_average=not train)(h) + h)

        assert linen(Images(), **IMAGES).biases_before_norm == (
            "Block_0/Conv_0/bias",
            "CheckpointBlock_0/Conv_0/bias",
            "JitBlock_0/Conv_0/bias",
        )
        assert linen(Around()).biases_before_norm == ()

    def test_a_bias_along_a_reduced_axis_does_not_count(self) -> None:
        """Normalising along the first axis does not cancel a bias along the last."""

        class Across(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                h = nn.Dense(4)(x[:, None, :].repeat(2, 1))
                h = nn.BatchNorm(use_running_average=not train, axis=1)(h)
                return nn.Dense(1)(h.reshape(x.shape[0], 8))

        subject = linen(Across())
        assert subject.biases_before_norm == ()
        before, _, _ = one_step(subject)
        assert subject.layer_inputs is not None
        assert subject.layer_inputs(before, CASE.x, CASE.y)["BatchNorm_0"].value.shape == (20, 2)

    def test_a_mask_becomes_weights(self) -> None:
        """Masked rows have weight 0 in the layer input."""

        class Masked(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                mask = (jnp.arange(x.shape[0]) < 3)[:, None]
                h = nn.BatchNorm(use_running_average=not train, axis_name="batch")(x, mask=mask)
                return nn.Dense(1)(h)

        subject = linen(Masked(), axis_name="batch")
        before, after, _ = one_step(subject)
        assert subject.layer_inputs is not None
        given = subject.layer_inputs(before, CASE.x, CASE.y)["BatchNorm_0"]
        np.testing.assert_array_equal(given.weights, [[1] * 3] * 3 + [[0] * 3] * 2)
        mean = (given.value * given.weights).sum(0) / given.weights.sum(0)
        np.testing.assert_allclose(after.batch_stats["BatchNorm_0"]["mean"], 0.01 * mean, rtol=1e-4)

    def test_a_layer_called_twice_weighs_the_old_value_twice(self) -> None:
        """A layer that is called twice has its momentum squared, and no known input."""

        class Shared(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                norm = nn.BatchNorm(use_running_average=not train, momentum=0.5)
                return nn.Dense(1)(norm(nn.Dense(4)(norm(nn.Dense(4)(x)))))

        subject = linen(Shared())
        assert subject.momentum == 0.25
        assert subject.layer_inputs is None

    def test_layers_in_a_scan_have_a_momentum_and_no_shown_input(self) -> None:
        """Each iteration of nn.scan writes its own slice once; one mark stands for all."""

        class Turn(nn.Module):
            train: bool

            @nn.compact
            def __call__(self, x: Any, _: Any) -> Any:
                h = nn.Dense(4)(x)
                return nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(h), None

        class Scanned(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                turns = nn.scan(
                    Turn,
                    variable_axes={"params": 0, "batch_stats": 0},
                    split_rngs={"params": True},
                    length=3,
                )
                return nn.Dense(1)(turns(train)(nn.Dense(4)(x), None)[0])

        subject = linen(Scanned())
        assert subject.momentum == 0.9
        assert subject.layer_inputs is None

    def test_layers_of_different_momenta_are_not_held_to_one(self) -> None:
        """The law about a single momentum is exempt, and the reason lists the momenta."""

        class Two(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                for momentum in (0.9, 0.5):
                    x = nn.BatchNorm(use_running_average=not train, momentum=momentum)(x)
                return nn.Dense(1)(x)

        subject = linen(Two())
        assert subject.momentum is None
        assert "0.5, 0.9" in subject.exempt["one_momentum_for_the_whole_model"]

    def test_a_module_of_ones_own_shows_its_input_and_no_momentum(self) -> None:
        """A user's own normalisation layer is found, but its momentum attribute is not trusted."""

        class Own(nn.Module):
            momentum: float = 0.1

            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                shape = x.shape[-1:]
                mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
                var = self.variable("batch_stats", "var", jnp.ones, shape)
                if not train:
                    return (x - mean.value) / jnp.sqrt(var.value + 1e-5)
                m, v = x.mean(0), x.var(0)
                mean.value = (1 - self.momentum) * mean.value + self.momentum * m
                var.value = (1 - self.momentum) * var.value + self.momentum * v
                return (x - m) / jnp.sqrt(v + 1e-5)

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: Any, train: bool) -> Any:
                return nn.Dense(1)(Own()(nn.Dense(4)(x), train))

        subject = linen(Model())
        assert subject.momentum is None
        assert subject.layer_inputs is not None
        before, _, _ = one_step(subject)
        assert set(subject.layer_inputs(before, CASE.x, CASE.y)) == {"Own_0"}

    def test_a_model_without_statistics_is_a_subject_too(self) -> None:
        """A model with only LayerNorm has no statistics and an empty ``extra``."""

        class Layered(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                return nn.Dense(1)(nn.LayerNorm()(nn.Dense(4)(x)))

        before, after, _ = one_step(linen(Layered()))
        assert after.batch_stats == {}
        assert np.any(before.params["Dense_1"]["kernel"] != after.params["Dense_1"]["kernel"])


class TestRefused:
    def test_a_forgotten_mutable_is_named(self) -> None:
        """An error from Flax is explained by its mistake and fix."""
        with pytest.raises(SubjectError, match="mutable=") as caught:
            linen(reference.Model(), mutable=[])
        assert caught.value.mistake.name == "mutable_forgotten"

    def test_the_wrong_number_of_outputs_is_refused(self) -> None:
        """The default loss refuses to broadcast (N, 2) against (N,)."""
        with pytest.raises(ValueError, match="one output for each target"):
            linen(nn.Dense(2))

    def test_the_subjects_name_is_the_modules_class(self) -> None:
        """The default name is that of the module's class."""
        assert linen(reference.Model()).name == "linen:Model"
        assert linen(reference.Model(), name="mine").name == "mine"

    def test_another_optimizer_goes_around_the_same_step(self) -> None:
        """``with_optimizer`` gives the other optimizer's state and the same statistics."""
        subject = linen(reference.Model())
        assert subject.with_optimizer is not None
        probed = subject.with_optimizer(lambda lr: optax.sgd(lr, momentum=0.9))
        before, after, _ = one_step(probed)
        assert jax.tree_util.tree_leaves(before.opt_state)
        for a, b in zip(
            jax.tree_util.tree_leaves(after.batch_stats),
            jax.tree_util.tree_leaves(one_step(subject)[1].batch_stats),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)

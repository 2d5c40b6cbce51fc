"""Training loops: the parts of their state are found, and their arguments are matched."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import users_code as code
from adapted_steps import CASE, one_step
from flax import nnx

import bnverify
from bnverify.adapters.explain import SubjectError
from bnverify.errors import UsageError
from bnverify.model import State, StepInfo, Subject

BATCH = {"image": CASE.x, "label": CASE.y}
loop = partial(bnverify.train_state, features=3)


def _without(tree: Any, name: str) -> Any:
    return {key: value for key, value in tree.items() if key != name}


def paths(tree: Any) -> list[str]:
    """Return the paths of a tree's leaves."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [
        "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        for path, _ in leaves
    ]


def moved(subject: Subject) -> State:
    """Return the state after a step whose params, statistics and loss equal the user's."""
    before, after, info = one_step(subject)
    assert jax.tree_util.tree_structure(before) == jax.tree_util.tree_structure(after)
    assert info.loss is not None
    for part in ("params", "batch_stats"):
        pairs = zip(
            *(jax.tree_util.tree_leaves(getattr(s, part)) for s in (before, after)), strict=True
        )
        assert any(np.any(a != b) for a, b in pairs)
    return after


class TestLayout:
    def test_params_and_statistics_in_one_field_are_found(self) -> None:
        """Params and batch_stats are found in a field ``variables``, which Flax does not define."""
        subject = loop(code.create_own, code.own_step, code.own_eval)
        after = moved(subject)
        assert set(after.params) == {"Dense_0", "BatchNorm_0", "Dense_1"}
        assert paths(after.batch_stats) == ["BatchNorm_0/mean", "BatchNorm_0/var"]
        assert paths(after.extra) == ["fields/step"]
        assert subject.momentum == 0.9
        assert subject.optimizer is not None
        assert subject.optimizer(0.5) is code.TX

    @pytest.mark.parametrize("told", [None, "model_state", "model_state/batch_stats"])
    def test_collections_in_a_field_are_found_or_told(self, told: str | None) -> None:
        """``model_state={"batch_stats": ...}`` is found by name, by the field or by the path."""

        class Scenic(NamedTuple):
            params: Any
            model_state: Any
            opt_state: Any

        def create(rng: Any) -> Scenic:
            made = code.variables(rng)
            state = {"batch_stats": made["batch_stats"]}
            return Scenic(made["params"], state, code.TX.init(made["params"]))

        def step(state: Scenic, batch: Any) -> Any:
            own = code.Own(0, {"params": state.params, **state.model_state}, state.opt_state)
            after, metrics = code.own_step(own, batch)
            new = {"batch_stats": after.variables["batch_stats"]}
            loss = (metrics["loss"] * len(batch["label"]), len(batch["label"]))  # a sum and a count
            return Scenic(after.variables["params"], new, after.opt_state), {"loss": loss}

        subject = loop(create, step, statistics=told)
        assert paths(moved(subject).batch_stats) == ["BatchNorm_0/mean", "BatchNorm_0/var"]
        _, _, info = one_step(subject)
        _, _, expected = one_step(loop(code.create_own, code.own_step))
        np.testing.assert_allclose(info.loss, expected.loss, rtol=1e-6)

    def test_statistics_by_another_name_are_found_by_what_the_layers_write(self) -> None:
        """Statistics in a field of any name are found by the variables of the layers."""

        def create(rng: Any) -> Any:
            made = code.variables(rng)
            params = made["params"]
            return {"params": params, "ema": made["batch_stats"], "opt_state": code.TX.init(params)}

        def step(state: Any, batch: Any) -> Any:
            both = {"params": state["params"], "batch_stats": state["ema"]}
            after, metrics = code.own_step(code.Own(0, both, state["opt_state"]), batch)
            new = {"params": after.variables["params"], "ema": after.variables["batch_stats"]}
            return {**new, "opt_state": after.opt_state}, metrics

        assert paths(moved(loop(create, step)).batch_stats) == [
            "BatchNorm_0/mean",
            "BatchNorm_0/var",
        ]

    @pytest.mark.parametrize("declared", [False, True])
    @pytest.mark.parametrize("shape", ["nested", "copied", "haiku", "train state"])
    def test_a_dict_with_an_entry_named_like_the_parameter(
        self, shape: str, declared: bool
    ) -> None:
        """``state`` is the whole dict if the step fails with ``dict["state"]`` alone."""
        pack, unpack = {
            "nested": (lambda s: {"state": s, "step": 0}, lambda d: d["state"]),
            "copied": (lambda s: {"state": s, "ema": s["params"]}, lambda d: d["state"]),
            "haiku": (
                lambda s: {**_without(s, "batch_stats"), "state": s["batch_stats"]},
                lambda d: {**_without(d, "state"), "batch_stats": d["state"]},
            ),
            "train state": (
                lambda s: {"state": code.Own(0, _without(s, "opt_state"), s["opt_state"]), "n": 0},
                lambda d: {**d["state"].variables, "opt_state": d["state"].opt_state},
            ),
        }[shape]

        def create(rng: Any) -> Any:
            made = code.variables(rng)
            return pack({**made, "opt_state": code.TX.init(made["params"])})

        def evaluation(state: Any, batch: Any) -> Any:
            made = _without(unpack(state), "opt_state")
            out = code.Model().apply(made, batch["image"], train=False)
            return {"loss": code.mse(out, batch["label"])}

        def step(state: Any, batch: Any) -> Any:
            own = unpack(state)
            own = code.Own(0, _without(own, "opt_state"), own["opt_state"])
            after, metrics = code.own_step(own, batch)
            return pack({**after.variables, "opt_state": after.opt_state}), metrics

        roles = {"state": "things"} if declared else {}
        subject = loop(create, step, evaluation, roles=roles)
        assert paths(moved(subject).batch_stats) == ["BatchNorm_0/mean", "BatchNorm_0/var"]
        assert subject.optimizer is not None
        _, after, _ = one_step(subject)
        _, expected, _ = one_step(loop(code.create_own, code.own_step))
        jax.tree_util.tree_map(np.testing.assert_array_equal, after.params, expected.params)

    def test_an_entry_named_like_the_parameter_is_taken_alone_if_that_works(self) -> None:
        """The other entries of the dict then stay as they are."""

        def create(rng: Any) -> Any:
            return {"state": code.create_own(rng), "other": jnp.zeros(2)}

        assert paths(moved(loop(create, code.own_step)).extra) == [
            "fields/other",
            "fields/state/step",
        ]

    def test_a_step_that_fails_with_the_entry_and_with_the_dict_says_both(self) -> None:
        """The message has both errors, and how to declare which one is meant."""

        def create(rng: Any) -> Any:
            return {"state": code.create_own(rng), "step": 0}

        def step(state: Any, batch: Any) -> Any:
            return code.own_step(state["stat"], batch)

        message = r"whether 'state' .*not subscriptable.* all of it: KeyError: 'stat'.*roles="
        with pytest.raises(UsageError, match=message):
            loop(create, step)
        with pytest.raises(KeyError, match="stat"):
            loop(create, step, roles={"state": "things"})

    def test_a_thing_that_is_the_statistics_is_found_whatever_its_name(self) -> None:
        """``step(params, moving, opt_state, batch)``, as methods of a trainer often are."""

        def create(rng: Any, lr: Any) -> Any:
            state = code.create(rng, lr)
            return state.params, state.batch_stats, state.opt_state

        def step(params: Any, moving: Any, opt_state: Any, batch: Any) -> Any:
            state = code.create(jax.random.PRNGKey(0), 0.1)
            state = state.replace(params=params, batch_stats=moving, opt_state=opt_state)
            state, info = code.train_step(state, batch)
            return state.params, state.batch_stats, state.opt_state, info

        before, after, _ = one_step(loop(create, step))
        assert paths(before.batch_stats) == paths(after.batch_stats) != []

    def test_statistics_that_are_nowhere_are_refused(self) -> None:
        """A step without running statistics in its state is refused if its layers are trained."""
        made = code.variables(jax.random.PRNGKey(0))

        def create(rng: Any) -> Any:
            params = code.variables(rng)["params"]
            return {"params": params, "opt_state": code.TX.init(params)}

        def step(state: Any, batch: Any) -> Any:
            both = {"params": state["params"], "batch_stats": made["batch_stats"]}
            after, metrics = code.own_step(code.Own(0, both, state["opt_state"]), batch)
            return {"params": after.variables["params"], "opt_state": after.opt_state}, metrics

        with pytest.raises(UsageError, match=r"\(BatchNorm_0\), but no running statistics"):
            loop(create, step)

    def test_a_state_without_params_says_what_there_is(self) -> None:
        """The message also says how to give their path."""

        def create(rng: Any) -> Any:
            return {"weights": code.variables(rng)["params"], "count": 0}

        with pytest.raises(
            UsageError, match=r"there are count, weights\. Give their path.*params="
        ):
            loop(create, lambda state, batch: state)

    def test_loose_trees_go_in_and_out_in_any_order(self) -> None:
        """A pure function gets its trees by name; its gradients are observed in the optimizer."""

        def create(rng: Any) -> Any:
            made = code.variables(rng)
            return made["params"], made["batch_stats"], code.TX.init(made["params"])

        def step(batch: Any, opt_state: Any, batch_stats: Any, params: Any) -> Any:
            both = {"params": params, "batch_stats": batch_stats}
            after, metrics = code.own_step(code.Own(0, both, opt_state), batch)
            new = after.variables
            return metrics["loss"], new["batch_stats"], after.opt_state, new["params"]

        def evaluation(params: Any, batch_stats: Any, batch: Any) -> Any:
            both = {"params": params, "batch_stats": batch_stats}
            return code.own_eval(code.Own(0, both, ()), batch)["loss"]

        subject = loop(create, step, evaluation)
        before, after, info = one_step(subject)
        _, expected, expected_info = one_step(loop(code.create_own, code.own_step, code.own_eval))
        for ours, theirs in ((after.params, expected.params), (info.grads, expected_info.grads)):
            jax.tree_util.tree_map(np.testing.assert_array_equal, ours, theirs)
        assert subject.evaluate(before, CASE.x, CASE.y).shape == (1,)


def gan(rng: Any) -> Any:
    """Return a generator and a discriminator."""
    a, b = jax.random.split(rng)
    make = partial(code.create, lr=0.1)
    return make(a, model=code.Model(3), width=2), make(b, model=code.Model(1), width=3)


def gan_step(states: Any, batch: Any, key: Any, *, drops: bool = False) -> Any:
    """Train both networks on one batch, the discriminator first."""
    g, d = states
    z = jax.random.normal(key, (batch["image"].shape[0], 2))

    def d_loss(params: Any) -> Any:
        fake, _ = code.run(g, g.params, g.batch_stats, z)
        real, stats = code.run(d, params, d.batch_stats, batch["image"])
        bad, stats = code.run(d, params, d.batch_stats if drops else stats, fake)
        return jnp.mean(nn.softplus(-real) + nn.softplus(bad)), stats

    (loss, stats), grads = jax.value_and_grad(d_loss, has_aux=True)(d.params)
    d = d.apply_gradients(grads=grads, batch_stats=stats)

    def g_loss(params: Any) -> Any:
        fake, stats = code.run(g, params, g.batch_stats, z)
        return jnp.mean(nn.softplus(-code.run(d, d.params, d.batch_stats, fake)[0])), stats

    (_, stats), grads = jax.value_and_grad(g_loss, has_aux=True)(g.params)
    return (g.apply_gradients(grads=grads, batch_stats=stats), d), {"loss": loss}


def gan_eval(states: Any, batch: Any) -> Any:
    """Return the discriminator's loss on real rows."""
    return {"loss": jnp.mean(nn.softplus(-code.predicted(states[1], batch["image"])))}


class TestSeveralNetworks:
    def test_trees_are_keyed_by_network(self) -> None:
        """With two train states, each has its params, statistics, gradients and optimizer."""
        subject = loop(gan, gan_step, gan_eval)
        after = moved(subject)
        assert set(after.params) == set(after.batch_stats) == {"0", "1"}
        before, after, info = one_step(subject)
        assert subject.optimizer is not None
        tx = subject.optimizer(0.1)
        updates, _ = tx.update(info.grads, before.opt_state, before.params)
        expected = optax.apply_updates(before.params, updates)
        jax.tree_util.tree_map(
            partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), after.params, expected
        )

    def test_states_of_their_own_have_their_parameters_names(self) -> None:
        """Networks in the State are named after the step's parameters."""

        def step(gen_state: Any, disc_state: Any, batch: Any, key: Any) -> Any:
            (g, d), metrics = gan_step((gen_state, disc_state), batch, key)
            return g, d, metrics

        def evaluation(disc_state: Any, batch: Any) -> Any:
            return gan_eval((None, disc_state), batch)

        assert set(moved(loop(gan, step, evaluation)).params) == {"gen", "disc"}

    @pytest.mark.parametrize("reverse", [False, True])
    def test_loose_trees_go_by_network_too(self, reverse: bool) -> None:
        """``variables_g`` and ``opt_state_g``; and optimizer states whose names say nothing."""

        def create(rng: Any) -> Any:
            g, d = (code.variables(rng, model=code.Model(out=n)) for n in (3, 1))
            states = [code.TX.init(each["params"]) for each in (g, d)]
            return g, d, *(reversed(states) if reverse else states)

        def moved_by_itself(tree: Any, state: Any, x: Any) -> Any:
            def loss(params: Any) -> Any:
                given = {**tree, "params": params}
                out, new = code.Model(out=len(params["Dense_1"]["bias"])).apply(
                    given, x, train=True, mutable=["batch_stats"]
                )
                return jnp.mean(out**2), new

            (value, new), grads = jax.value_and_grad(loss, has_aux=True)(tree["params"])
            updates, state = code.TX.update(grads, state, tree["params"])
            return {"params": optax.apply_updates(tree["params"], updates), **new}, state, value

        def named(
            variables_g: Any, variables_d: Any, opt_state_g: Any, opt_state_d: Any, x: Any
        ) -> Any:
            variables_g, opt_state_g, _ = moved_by_itself(variables_g, opt_state_g, x)
            variables_d, opt_state_d, loss = moved_by_itself(variables_d, opt_state_d, x)
            return variables_g, variables_d, opt_state_g, opt_state_d, loss

        def unnamed(variables_g: Any, variables_d: Any, first: Any, second: Any, x: Any) -> Any:
            g, d, second, first, loss = named(variables_g, variables_d, second, first, x)
            return g, d, first, second, loss

        subject = bnverify.loop(create, unnamed if reverse else named, features=3)
        state = moved(subject)
        assert set(state.params) == set(state.batch_stats) == set(state.opt_state) == {"g", "d"}
        assert subject.optimizer is not None
        expected = jax.eval_shape(subject.optimizer(0.1).init, state.params)
        shapes = partial(jax.tree_util.tree_map, jnp.shape)
        assert shapes(state.opt_state) == shapes(expected)

    def test_batches_that_a_network_trains_on_are_counted(self) -> None:
        """Real and generated rows count as two batches; the generator's pass does not count."""
        exempt = loop(gan, gan_step, gan_eval).exempt
        assert "0.81, 0.9" in exempt["one_momentum_for_the_whole_model"]
        assert "targets" not in exempt["targets_reach_the_params"]  # y is used nowhere
        assert "gradient of a different loss" in exempt["gradients_are_gradients_of_the_loss"]


class TestEvaluation:
    def test_without_an_eval_step_the_training_loss_is_evaluated(self) -> None:
        """Without an eval step, every model is in eval mode, and the loss equals an eval step's."""
        given, made = (
            loop(code.create, code.train_step, code.eval_step),
            loop(code.create, code.train_step),
        )
        _, after, _ = one_step(given)
        expected = given.evaluate(after, CASE.x, CASE.y)
        np.testing.assert_allclose(made.evaluate(after, CASE.x, CASE.y), expected, rtol=1e-6)
        assert "no eval_step" in made.notes[0]
        assert "eval_is_training_loss" in made.capabilities
        assert made.after_eval is None

    def test_an_accuracy_is_no_loss(self) -> None:
        """An accuracy is refused as a loss, with what to pass instead."""

        def accuracy(state: Any, batch: Any) -> Any:
            return (
                (code.predicted(state, batch["image"])[:, 0] > 0) == (batch["label"] > 0)
            ).mean()

        with pytest.raises(
            UsageError, match=r"gradient of 0 everywhere: is it an accuracy\?.*eval_loss="
        ):
            loop(code.create, code.train_step, accuracy)

    def test_a_report_without_a_loss_says_what_it_has(self) -> None:
        """The message lists the reported keys and the alternatives."""

        def errors(state: Any, batch: Any) -> Any:
            return {"error": code.eval_step(state, batch)["loss"]}

        with pytest.raises(UsageError, match="reports no loss: it reports the keys 'error'"):
            loop(code.create, code.train_step, errors)
        with pytest.raises(UsageError, match=r"no 'errors'.*did you mean 'error'"):
            loop(code.create, code.train_step, errors, eval_loss="errors")

    def test_a_sum_beside_its_denominator_is_a_mean(self) -> None:
        """As the metrics of Flax's examples of text; a loss that is named is taken as it is."""

        def summed(state: Any, batch: Any) -> Any:
            rows = len(batch["label"])
            mean = code.eval_step(state, batch)["loss"]
            return {"loss": mean * rows, "denominator": jnp.float32(rows)}

        plain, found, named = (
            loop(code.create, code.train_step, code.eval_step),
            loop(code.create, code.train_step, summed),
            loop(code.create, code.train_step, summed, eval_loss="loss"),
        )
        _, after, _ = one_step(plain)
        expected = plain.evaluate(after, CASE.x, CASE.y)
        np.testing.assert_allclose(found.evaluate(after, CASE.x, CASE.y), expected, rtol=1e-6)
        rows = len(CASE.y)
        np.testing.assert_allclose(
            named.evaluate(after, CASE.x, CASE.y), expected * rows, rtol=1e-6
        )


class TestRoles:
    def test_a_key_with_a_default_is_filled(self) -> None:
        """A key with the default None is passed all the same."""

        def step(state: Any, batch: Any, dropout_rng: Any = None) -> Any:
            jax.random.normal(dropout_rng)
            return code.train_step(state, batch)

        assert "key" in moved(loop(code.create, step)).extra

    def test_roles_say_what_names_do_not(self) -> None:
        """Inputs and targets with unknown parameter names are not guessed; roles= declares them."""

        def step(state: Any, left: Any, right: Any) -> Any:
            return code.train_step(state, {"image": left, "label": right})

        with pytest.raises(UsageError, match=r"what to pass as 'right'.*roles="):
            loop(code.create, step)
        roles = {"left": "inputs", "right": "targets"}
        _, after, _ = one_step(loop(code.create, step, roles=roles))
        _, expected, _ = one_step(loop(code.create, code.train_step))
        jax.tree_util.tree_map(np.testing.assert_array_equal, after.params, expected.params)
        with pytest.raises(
            UsageError, match=r"roles=\{'left': 'pictures'\} is not a role; the roles are"
        ):
            loop(code.create, step, roles={"left": "pictures"})

    def test_an_optimizer_that_no_function_takes_is_refused(self) -> None:
        """It would be ignored."""
        with pytest.raises(UsageError, match=r"optimizer= is passed to .* neither has one"):
            loop(code.create, code.train_step, optimizer=optax.adam)

    @pytest.mark.parametrize("mapped", [True, False])
    def test_an_optimizer_is_seen_outside_vmap(self, mapped: bool) -> None:
        """Inside, it gets the gradients of one model of an ensemble; the report says where to call it."""

        def create(rng: Any) -> Any:
            made = jax.vmap(code.variables)(jax.random.split(rng))
            init = jax.vmap(code.TX.init) if mapped else code.TX.init
            return {**made, "opt_state": init(made["params"])}

        def gradients(params: Any, stats: Any, batch: Any) -> Any:
            def loss(params: Any) -> Any:
                out, new = code.Model().apply(
                    {"params": params, "batch_stats": stats},
                    batch["image"],
                    train=True,
                    mutable=["batch_stats"],
                )
                return code.mse(out, batch["label"]), new["batch_stats"]

            return jax.value_and_grad(loss, has_aux=True)(params)

        def update(grads: Any, opt_state: Any, params: Any) -> Any:
            updates, opt_state = code.TX.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        def step(state: Any, batch: Any) -> Any:
            seen = jax.vmap(gradients, in_axes=(0, 0, None))
            (losses, stats), grads = jax.jit(seen)(state["params"], state["batch_stats"], batch)
            moved = jax.jit(jax.vmap(update)) if mapped else update
            params, opt_state = moved(grads, state["opt_state"], state["params"])
            new = {"params": params, "batch_stats": stats, "opt_state": opt_state}
            return new, {"loss": jnp.mean(losses)}

        subject = loop(create, step)
        assert (subject.optimizer is None) == mapped
        report = bnverify.verify(
            subject, "quick", select=["params_follow_the_optimizer"], proofs_only=mapped
        )
        (found,) = report.results
        if mapped:
            assert found.status == "exempt"
            assert "in one call, outside jax.vmap" in found.reason
        else:
            assert found.status == "held"

    def test_an_unknown_keyword_is_refused(self) -> None:
        """An unknown keyword raises a TypeError."""
        with pytest.raises(TypeError, match="unexpected keyword argument 'target'"):
            bnverify.train_state(code.create, code.train_step, target=False)  # type: ignore[call-arg]

    @pytest.mark.parametrize("how", ["shard_map", "pmap"])
    def test_a_step_for_many_devices_runs_as_one_shard(self, how: str) -> None:
        """A step with ``axis_index`` and averages over an axis works, with and without ``jax.jit``."""

        def step(state: Any, batch: Any) -> Any:
            loss = code.loss_fn(state, batch)
            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            grads, stats = jax.lax.pmean((grads, stats), "devices")
            value = jax.lax.pmean(value, "devices") + 0.0 * jax.lax.axis_index("devices")
            return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": value}

        wrapped: Any = jax.pmap(step, axis_name="devices")
        if how == "shard_map":
            shard_map: Any = getattr(jax, "shard_map", None)
            if shard_map is None:
                from jax.experimental.shard_map import shard_map  # type: ignore[no-redef]
            mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("devices",))
            spec = jax.sharding.PartitionSpec
            wrapped = jax.jit(
                shard_map(step, mesh=mesh, in_specs=(spec(), spec("devices")), out_specs=spec())
            )
        subject = loop(code.create, wrapped)
        _, after, info = one_step(subject)
        _, expected, _ = one_step(loop(code.create, code.train_step))
        assert info.grads is not None
        for ours, theirs in zip(
            jax.tree_util.tree_leaves(after.params),
            jax.tree_util.tree_leaves(expected.params),
            strict=True,
        ):
            # A bias before a normalisation has a gradient of nothing but rounding.
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)

    def test_a_function_compiled_inside_shows_its_gradients(self) -> None:
        """Gradients are observed if the optimizer is called in an inner compiled function."""

        @jax.jit
        def inner(state: Any, batch: Any) -> Any:
            return code.train_step(state, batch)

        def step(state: Any, batch: Any) -> Any:
            return inner(state, batch)

        _, _, info = one_step(loop(code.create, step))
        _, _, expected = one_step(loop(code.create, code.train_step))
        assert info.grads is not None
        for ours, theirs in zip(
            jax.tree_util.tree_leaves(info.grads),
            jax.tree_util.tree_leaves(expected.grads),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)

    def test_a_function_compiled_inside_shows_all_that_a_plain_one_does(self) -> None:
        """Its layers, its biases, its one update; and a library's own stop_gradient stays its own."""

        def loss_of(params: Any, state: Any, batch: Any) -> Any:
            out, stats = code.run(state, params, state.batch_stats, batch["image"])
            labels = jnp.zeros(len(batch["label"]), jnp.int32) + (batch["label"] > 0)
            losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
            return jnp.mean(losses), stats

        def plain(state: Any, batch: Any) -> Any:
            slope = jax.value_and_grad(loss_of, has_aux=True)
            (value, stats), grads = slope(state.params, state, batch)
            return state.apply_gradients(grads=grads, batch_stats=stats), {"loss": value}

        def step(state: Any, batch: Any) -> Any:
            return inner(state, batch)

        inner = jax.jit(plain)
        create = partial(code.create, model=code.Model(out=2))
        found, expected = loop(create, step), loop(create, plain)
        assert found.momentum == 0.9
        assert found.biases_before_norm == ("Dense_0/bias",)
        assert found.exempt == expected.exempt
        assert "gradients_are_gradients_of_the_loss" not in found.exempt

    def test_it_shows_it_to_the_next_loop_too(self) -> None:
        """Although JAX has kept its program from the first one, and from a call by the user."""
        inner = jax.jit(code.train_step)

        def step(state: Any, batch: Any) -> Any:
            return inner(state, batch)

        for _ in range(2):
            subject = loop(code.create, step)
            assert subject.momentum == 0.9
            assert subject.biases_before_norm == ("Dense_0/bias",)
            _, _, info = one_step(subject)
            assert info.grads is not None

    def test_functions_of_libraries_are_not_traced_again(self) -> None:
        """JAX's own compiled functions, such as jnp.where, are taken from its cache if nothing is missed."""
        traced = []

        @jax.jit
        def helper(x: Any) -> Any:
            traced.append(x)
            return x

        def step(state: Any, batch: Any) -> Any:
            return code.train_step(state, {**batch, "image": helper(batch["image"])})

        subject = loop(code.create, step)
        before = len(traced)
        for _ in range(3):
            one_step(subject)
        assert len(traced) <= before + 1

    @pytest.mark.parametrize("key", [jax.random.PRNGKey, jax.random.key])
    def test_a_key_that_is_carried_is_no_new_one(self, key: Any) -> None:
        """``rng, state, info = update(rng, state, batch)``: the step hands its own key on."""

        def step(rng: Any, state: Any, batch: Any) -> Any:
            rng, _ = jax.random.split(rng)
            state, info = code.train_step(state, batch)
            return rng, state, info

        def create(seed: Any, lr: Any) -> Any:
            return key(seed), code.create(jax.random.PRNGKey(seed), lr)

        subject = loop(create, step)
        before, after, _ = one_step(subject)
        assert paths(before.extra) == ["fields/rng", "fields/state/step"]
        rngs = [np.asarray(state.extra["fields"]["rng"]) for state in (before, after)]
        assert [(rng.shape, rng.dtype) for rng in rngs] == [((2,), np.uint32)] * 2
        assert np.any(rngs[0] != rngs[1])

    def test_any_name_of_a_random_number_generator_is_a_key(self) -> None:
        """``z_rng``, as in Flax's own VAE, and ``rng_g`` of a GAN."""

        def step(state: Any, rng_g: Any, batch: Any, z_rng: Any) -> Any:
            assert z_rng.shape == rng_g.shape == (2,)
            return code.train_step(state, batch)

        assert "key" in one_step(loop(code.create, step))[0].extra


class TestByHand:
    def test_a_subject_by_hand_is_looked_at(self) -> None:
        """The layers of a Subject written by hand are found, and its own attributes are kept."""
        made = loop(code.create, code.train_step, code.eval_step)
        bare = Subject(
            "by hand",
            made.init,
            made.step,
            made.evaluate,
            features=(3,),
            exempt={"a law": "mine"},
        )
        subject = bnverify.declare(bare, targets=False)
        assert subject.momentum == 0.9
        assert subject.biases_before_norm == ("Dense_0/bias",)
        assert subject.layer_inputs is not None
        assert subject.exempt["a law"] == "mine"
        assert "targets=False" in subject.exempt["targets_reach_the_params"]

    def test_statistics_that_it_keeps_elsewhere_are_noted(self) -> None:
        """Missing statistics in a Subject written by hand are a note, not an error."""

        def step(state: Any, x: Any, y: Any, lr: Any) -> Any:
            out, _ = model.apply(state.extra, x, train=True, mutable=["batch_stats"])
            return state, StepInfo(code.mse(out, y), None)

        model = code.Model()

        def init(seed: Any, x: Any) -> State:
            made = code.variables(jax.random.PRNGKey(seed))
            return State(made["params"], {}, (), made)

        def evaluate(state: Any, x: Any, y: Any) -> Any:
            return code.mse(model.apply(state.extra, x, train=False), y).reshape(1)

        subject = bnverify.declare(Subject("by hand", init, step, evaluate, features=(3,)))
        assert "no running statistics" in subject.notes[0]


class TestNnx:
    def test_what_nnx_split_gave_is_refused_with_the_way_out(self) -> None:
        """The functional form carries a graph and a state; bnverify takes the objects."""

        def create(rng: Any) -> Any:
            return nnx.split(nnx.BatchNorm(3, rngs=nnx.Rngs(rng)))

        with pytest.raises(UsageError, match=r"create returns what nnx\.split gave.*nnx\.update"):
            bnverify.loop(create, lambda graphdef, state, x: (state, 0.0), features=3)

    def test_an_update_by_closure_is_explained(self) -> None:
        """The error names the mistake and its fix."""

        def make(din: int, rngs: Any, lr: float) -> Any:
            model = nnx.Linear(din, 1, rngs=rngs)
            return model, nnx.Optimizer(model, optax.sgd(lr), wrt=nnx.Param)

        def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
            @jax.jit
            def update(x: Any, y: Any) -> Any:
                return nnx.value_and_grad(lambda m: code.mse(m(x), y))(model)[0]

            return update(x, y)

        with pytest.raises((SubjectError, UsageError)) as caught:
            bnverify.nnx_loop(make, step)
        assert isinstance(caught.value, SubjectError)
        assert caught.value.mistake.name in {"nnx_object_by_closure", "nnx_variable_from_outside"}


class TestFunctionsCompiledInside:
    """JAX keeps the program of an inner jit, so an observed or replaced call must be a new one."""

    @staticmethod
    def subject() -> Subject:
        model, tx = code.Model(), optax.sgd(0.1)

        def create(rng: Any) -> dict[str, Any]:
            variables = model.init(rng, jnp.ones((1, 3)), train=False)
            return {**variables, "opt_state": tx.init(variables["params"])}

        @jax.jit
        def update(state: Any, x: Any, y: Any) -> Any:
            def loss(params: Any) -> Any:
                variables = {"params": params, "batch_stats": state["batch_stats"]}
                out, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
                return jnp.mean((out.reshape(-1) - y) ** 2), new

            (value, new), grads = jax.value_and_grad(loss, has_aux=True)(state["params"])
            updates, opt_state = tx.update(grads, state["opt_state"])
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, **new, "opt_state": opt_state}, value

        def step(state: Any, x: Any, y: Any) -> Any:
            return update(state, x, y)

        return bnverify.loop(create, step, features=3)

    def test_gradients_are_observed_every_time(self) -> None:
        """Also in a second trace with the same shapes, and without jit."""
        subject = self.subject()
        x, y = np.eye(4, 3, dtype=np.float32), np.ones(4, np.float32)
        state = subject.init(0, x)
        seen = [
            jax.tree.structure(jax.eval_shape(lambda *args: subject.step(*args)[1].grads, *given))
            for given in 2 * [(state, x, y, 0.1)]
        ]
        seen.append(jax.tree.structure(subject.step(state, x, y, 0.1)[1].grads))
        assert seen == 3 * [jax.tree.structure(state.params)]

    def test_evaluation_without_an_eval_step_is_in_eval_mode(self) -> None:
        """The program of the training pass, compiled for the same shapes, is not used."""
        subject = self.subject()
        x, y = np.eye(4, 3, dtype=np.float32), np.ones(4, np.float32)
        state = subject.init(0, x)
        subject.step(state, x, y, 0.1)
        moved = state._replace(batch_stats=jax.tree.map(lambda leaf: leaf + 1, state.batch_stats))
        losses = [float(subject.evaluate(each, x, y)[0]) for each in (state, moved)]
        assert losses[0] != losses[1]

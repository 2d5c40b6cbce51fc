"""The canonical training step around any model: what linen and nnx modules have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import optax

from bnverify.adapters import reasons
from bnverify.adapters.explain import explaining
from bnverify.adapters.flows import reached
from bnverify.adapters.layers import Recording, Survey, layer_inputs, survey
from bnverify.subject import State, StepInfo, Subject, Tree

EXAMPLE = (4, 6)  # the rows and, where any D will do, the features of the traces made at the start
CLAIMS = frozenset({"lr", "row_losses", "eval_is_training_loss"})
INITIAL_RATE = 0.1  # of the first optimizer state: some optimizers keep the rate in it

Optimizer = Callable[[Any], optax.GradientTransformation]
Loss = Callable[[Any, Any], Any]


class Pass(NamedTuple):
    """One forward pass: what the model gives, what it should have given, what it leaves."""

    outputs: Any
    targets: Any
    batch_stats: Tree
    extra: Tree


class Model(Protocol):
    """A model whose variables are split into the parts of a State."""

    def init(self, seed: Any, x: Any) -> tuple[Tree, Tree, Tree]:
        """Return the initial params, statistics and extra."""

    def apply(
        self, state: State, x: Any, y: Any, *, train: bool, recording: Recording | None = None
    ) -> Pass:
        """Return one forward pass on the batch made from x and y."""


@dataclass(frozen=True, eq=False)
class Step:
    """The canonical step; see ``bnverify.reference`` for a remark on each of its lines."""

    model: Model
    optimizer: Optimizer
    loss: Loss

    @explaining("init")
    def init(self, seed: Any, x: Any) -> State:
        """Return the state before the first step."""
        params, batch_stats, extra = self.model.init(seed, x)
        return State(params, batch_stats, self.optimizer(INITIAL_RATE).init(params), extra)

    @explaining("the training step")
    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one training step."""

        def loss_fn(params: Any) -> tuple[Any, Any]:
            done = self.model.apply(state._replace(params=params), x, y, train=True)
            return self.loss(done.outputs, done.targets), (done.batch_stats, done.extra)

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        tx = self.optimizer(lr)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        batch_stats, extra = new
        return State(params, batch_stats, opt_state, extra), StepInfo(loss, grads)

    @explaining("evaluation")
    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the loss in eval mode, (1,)."""
        done = self.model.apply(state, x, y, train=False)
        return self.loss(done.outputs, done.targets).reshape(1)

    @explaining("evaluation")
    def after_eval(self, state: State, x: Any, y: Any) -> State:
        """Return the state that evaluation leaves."""
        done = self.model.apply(state, x, y, train=False)
        return state._replace(batch_stats=done.batch_stats, extra=done.extra)

    @explaining("the training step")
    def layer_inputs(self, state: State, x: Any, y: Any) -> Any:
        """Return what each normalisation layer is given in the training pass."""
        recording = Recording()
        return layer_inputs(partial(self._noted, recording), recording, (state, x, y))

    def shows_inputs(self, sizes: tuple[int, int]) -> bool:
        """Return whether the input of any normalisation layer can be told."""
        return bool(jax.eval_shape(self.layer_inputs, *self._example(sizes)))

    def survey(self, sizes: tuple[int, int]) -> Survey:
        """Return what one abstract trace of the training pass shows of the layers."""
        example = self._example(sizes)
        recording = Recording()
        with explaining("the training step"):
            jaxpr = jax.make_jaxpr(partial(self._noted, recording))(*example)
        return survey(jaxpr, recording, example[0])

    def exempt(self, sizes: tuple[int, int], *, online: bool) -> dict[str, str]:
        """Return the laws that the model's other variables and random numbers break.

        Args:
            sizes: (N, D) of the traces.
            online: whether the model is declared to normalise by its running values.
        """
        example = self._example(sizes)
        found: dict[str, str] = {}
        for train in (False, True):
            with explaining("the training step" if train else "evaluation"):
                jaxpr = jax.make_jaxpr(partial(self._flows, train))(*example)
            found |= reasons.of_pass(jaxpr, example[0], train=train)
            if train and online:
                found |= reasons.online(jaxpr, example[0])
        return found

    def keeps_rate(self, sizes: tuple[int, int]) -> bool:
        """Return whether the optimizer's state holds the rate, so that later ones do not count."""
        params = self._example(sizes)[0].params
        jaxpr = jax.make_jaxpr(lambda lr, p: self.optimizer(lr).init(p))(INITIAL_RATE, params)
        return any(reached(jaxpr, {0}))

    def _flows(self, train: bool, state: State, x: Any, y: Any) -> Any:
        done = self.model.apply(state, x, y, train=train)
        return self.loss(done.outputs, done.targets), done.batch_stats, done.extra

    def _noted(self, recording: Recording, state: State, x: Any, y: Any) -> Any:
        done = self.model.apply(state, x, y, train=True, recording=recording)
        return self.loss(done.outputs, done.targets)  # so that a second use of a value is seen

    def _example(self, sizes: tuple[int, int]) -> tuple[Any, Any, Any]:
        shape: Any = jax.ShapeDtypeStruct
        x, y = shape(sizes, "float32"), shape(sizes[:1], "float32")
        return jax.eval_shape(self.init, shape((), "int32"), x), x, y


def example_sizes(features: tuple[int, ...] | None) -> tuple[int, int]:
    """Return the (N, D) of the traces made at the start."""
    return EXAMPLE[0], features[0] if features else EXAMPLE[1]


def subject(
    model: Model,
    *,
    name: str,
    optimizer: Optimizer,
    loss: Loss,
    features: tuple[int, ...] | None,
    online: bool,
    exempt: Mapping[str, str],
) -> Subject:
    """Return the canonical training step of ``model``, with all that its traces show."""
    step = Step(model, optimizer, loss)
    sizes = example_sizes(features)
    seen = step.survey(sizes)
    found = step.exempt(sizes, online=online) | reasons.of_survey(seen)
    return Subject(
        name=name,
        init=step.init,
        step=step.step,
        evaluate=step.evaluate,
        features=features,
        optimizer=optimizer,
        exempt={**found, **exempt},
        momentum=seen.momentum,
        layer_inputs=step.layer_inputs if step.shows_inputs(sizes) else None,
        after_eval=step.after_eval,
        with_optimizer=lambda other: subject(
            model,
            name=f"{name}, another optimizer",
            optimizer=other,
            loss=loss,
            features=features,
            online=online,
            exempt=exempt,
        ),
        # Running values take no shift of the batch away.
        biases_before_norm=() if online else seen.biases,
        shows=CLAIMS - {"lr"} if step.keeps_rate(sizes) else CLAIMS,
    )

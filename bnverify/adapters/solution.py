"""One function of seed, batch and learning rate as a Subject, checked from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnverify.adapters.batches import rows
from bnverify.adapters.calls import plain
from bnverify.adapters.canonical import linen
from bnverify.adapters.explain import explaining
from bnverify.laws import LAWS
from bnverify.model import State, StepInfo, Subject

Solution = Callable[..., Any]

AGREEMENT = ("solution_is_init_step_evaluate", "float_seeds_act_as_their_integer_part")
OUTSIDE = (
    "float_seeds_act_as_their_integer_part",
    "eval_loss_is_finite",
    "eval_loss_has_shape_one",
    "eval_repeats_to_the_bit",
    "row_order_changes_nothing",
    "same_input_repeats_to_the_bit",
    "step_leaves_its_inputs_alone",
)
SEEDS = (0.0, 1.0, 2.0)  # replace all others if a function needs its seed as a Python number


def solution(
    function: Solution,
    *,
    batch: Callable[[Any, Any], tuple[Any, Any]] = rows,
    name: str | None = None,
    exempt: Mapping[str, str] | None = None,
) -> Subject:
    """Return a function that initialises, takes one step and evaluates as a Subject.

    The function is run twice on a small batch. If it uses a linen module that it initialises by
    ``module.init(jax.random.PRNGKey(int(seed)), x)``, it is compared with the canonical step (plain SGD,
    mean squared error) with that module: in every case the results must agree within rounding. For any
    other function only the result is checked: a finite number of shape (1,), the same for the same
    input and for reordered rows.

    Args:
        function: ``(seed: float, x_batch (N, D), y_batch (N,), lr: float) -> (1,)``.
        batch: (x, y) -> (inputs, targets), if the function preprocesses its batch for the module.
        name: its name in reports; None: the name of the function.
        exempt: law name -> why it does not apply.

    Returns:
        A Subject for which most laws are exempt, since one number shows neither gradients nor
        statistics.

    Raises:
        SubjectError: the function raises an error that a common mistake causes.
    """
    label = str(name or getattr(function, "__name__", type(function).__name__))
    given = dict(exempt or {})
    with explaining(label):
        canonical = _canonical(function, batch)
    if canonical is not None:
        return replace(
            canonical,
            name=label,
            solution=function,
            exempt={**_all_but(AGREEMENT, "it is only compared with the canonical step"), **given},
        )
    return Subject(
        name=label,
        init=_init,
        step=_step,
        evaluate=partial(_evaluate, function),
        exempt={**_all_but(OUTSIDE, "only the result of a single function is known"), **given},
        solution=function,
        capabilities=frozenset(),
    )


def _canonical(function: Solution, batch: Callable[..., Any]) -> Subject | None:
    """Return the canonical step around the module that ``function`` goes through."""
    generator = np.random.default_rng(0)
    subject = None
    for seed in (0, 7):
        x = generator.standard_normal((4, 6)).astype(np.float32)
        y = generator.standard_normal(4).astype(np.float32)
        result, watch = _watched(function, float(seed), x, y, 0.0)
        if not watch.modules:
            return None
        try:
            subject = subject or linen(watch.modules[-1], batch=batch)
            if not _starts_like(subject, seed, x, y, result, watch):
                return None
        except (ValueError, TypeError):  # the canonical step cannot use the module
            return None
    return subject


def _all_but(names: tuple[str, ...], reason: str) -> dict[str, str]:
    return {law: reason for law in LAWS if law not in names}


def _init(seed: Any, x: Any) -> State:
    return State((), (), (), {"seed": jnp.asarray(seed, jnp.int32), "lr": jnp.float32(0)})


def _step(state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
    # The function itself takes the step, in _evaluate, so its arguments are stored until then.
    extra = {**state.extra, "lr": jnp.asarray(lr, jnp.float32)}
    return state._replace(extra=extra), StepInfo(None, None)


def _evaluate(function: Solution, state: State, x: Any, y: Any) -> Any:
    seed, lr = state.extra["seed"], state.extra["lr"]
    if not any(isinstance(value, jax.core.Tracer) for value in (seed, lr, x, y)):
        return jnp.asarray(function(float(seed), np.asarray(x), np.asarray(y), float(lr)))
    try:
        return function(seed, x, y, lr)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError):
        branches = [partial(function, fixed) for fixed in SEEDS]
        return jax.lax.switch(seed % len(SEEDS), branches, x, y, lr)


# Finding the linen module that a function uses, by running it.

PLACES = 1e-5  # relative agreement of two float32 losses of the same computation


@dataclass
class _Watch:
    """The linen modules called in one run.

    Attributes:
        modules: the outermost module of each forward pass, in order, unbound.
        params: its params in that pass; None if they were tracers.
    """

    modules: list[nn.Module] = field(default_factory=list)
    params: list[Any] = field(default_factory=list)
    _depth: int = 0

    def __call__(self, call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        """Intercept one method call; see ``flax.linen.intercept_methods``."""
        self._depth += 1
        try:
            if self._depth == 1 and not context.module.path:
                self._note(context.module)
            return call(*args, **kwargs)
        finally:
            self._depth -= 1

    def _note(self, module: Any) -> None:
        params = None if module.is_initializing() else module.variables.get("params")
        leaves = jax.tree_util.tree_leaves(params)
        concrete = bool(leaves) and not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        self.modules.append(module.clone(parent=None, name=None))
        self.params.append(params if concrete else None)


def _watched(function: Callable[..., Any], *args: Any) -> tuple[Any, _Watch]:
    """Return the result of ``function``, and the modules that it called."""
    watch = _Watch()
    with nn.intercept_methods(watch):
        result = plain(function)(*args)
    return result, watch


def _starts_like(subject: Subject, seed: int, x: Any, y: Any, result: Any, watch: _Watch) -> bool:
    """Return whether a function, run with lr = 0, has the initial params of ``subject``.

    Args:
        subject: the canonical step with the module that was found.
        seed: the seed of the run.
        x: the inputs of the run.
        y: the targets of the run.
        result: what the run returned.
        watch: the modules called. With lr = 0 the params of the last pass are the initial ones; if no
            pass has concrete params, the loss must be that of the initial params, in either mode and
            with either reduction.
    """
    state = subject.init(np.int32(seed), x)
    seen = [params for params in watch.params if params is not None]
    if seen:
        with suppress(ValueError):  # trees of different structure
            alike = jax.tree_util.tree_map(np.array_equal, _plain(seen[-1]), _plain(state.params))
            return all(jax.tree_util.tree_leaves(alike))
        return False
    value = np.asarray(result, np.float64)
    return value.size == 1 and any(
        abs(value.reshape(()) - each) <= PLACES * abs(each)
        for each in _losses(subject, state, x, y)
    )


def _plain(tree: Any) -> Any:
    return jax.tree_util.tree_map(np.asarray, jax.tree_util.tree_map(lambda leaf: leaf, dict(tree)))


def _losses(subject: Subject, state: Any, x: Any, y: Any) -> Iterator[float]:
    """Yield the mean and the sum of the squared errors for the initial params, in every mode."""
    after, info = subject.step(state, x, y, np.float32(0))
    for loss in (
        subject.evaluate(after, x, y),
        subject.evaluate(state, x, y),
        info.loss,
    ):
        mean = float(np.asarray(loss).reshape(()))
        yield mean
        yield mean * len(y)

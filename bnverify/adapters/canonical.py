"""A linen or nnx module as a Subject: bnverify writes the training step around it.

The step is the same for both, and as in ``bnverify.reference``. A module needs only ``init`` and ``apply``
for it: ``_Variables`` and ``_NnxModule`` make them of a linen and of an nnx module, and put its variables
into the parts of a State. What it carries besides params and statistics goes to ``State.extra``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, Unpack

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import errors
from flax import nnx as flax_nnx

from bnverify.adapters import calls
from bnverify.adapters.analysis import completed
from bnverify.adapters.batches import mse, rows, under_axis
from bnverify.adapters.by_design import Declarations, declared_by
from bnverify.adapters.calls import Caller, Mode, call_mode, known_names, named
from bnverify.adapters.explain import explaining
from bnverify.adapters.objects import Parts, kinds_of_variables, of_seed
from bnverify.adapters.programs import RATE, example_of, sizes_of
from bnverify.adapters.traced import Flows
from bnverify.adapters.trees import extra_of
from bnverify.adapters.watch import noting
from bnverify.errors import UsageError
from bnverify.model import State, StepInfo, Subject, Tree

CLAIMS = frozenset({"lr", "row_losses", "eval_is_training_loss"})

Optimizer = Callable[[Any], optax.GradientTransformation]
Loss = Callable[[Any, Any], Any]
Batch = Callable[[Any, Any], tuple[Any, Any]]


def linen(
    module: nn.Module,
    *,
    optimizer: Optimizer = optax.sgd,
    loss: Loss = mse,
    batch: Batch = rows,
    train_argument: str | Mode | None = None,
    rngs: Sequence[str] = ("dropout",),
    mutable: bool | Sequence[str] | None = None,
    statistics: str = "batch_stats",
    axis_name: str | None = None,
    features: int | Collection[int] | None = None,
    name: str | None = None,
    **declared: Unpack[Declarations],
) -> Subject:
    """Return the canonical training step of ``module`` as a Subject.

    The module is traced a few times; nothing is compiled.

    Args:
        module: any linen module. It is called as ``module(inputs)``, or ``module(*inputs)`` if the
            inputs are a tuple, with the training argument by keyword.
        optimizer: learning rate -> Optax optimizer of ``params``.
        loss: (outputs, targets) -> scalar. The default, mean squared error, takes outputs (N, 1) or
            (N,).
        batch: (x (N, D) float32, y (N,) float32) -> (inputs, targets), traceable. For images reshape
            x; for labels use ``bnverify.classes``.
        train_argument: the argument that selects train mode: its name, or a function from a bool to
            keyword arguments. None: found in the signature of ``__call__``, or among the module's
            fields (``train``, ``is_training``, ``deterministic``, ``use_running_average`` and
            similar names). If there is none, evaluation runs without mutable collections.
        rngs: the names of the PRNG streams that the model may use, besides "params".
        mutable: as in ``module.apply``, for training. None: all collections except ``params``.
        statistics: the collection of the running statistics.
        axis_name: the mapped axis over which the model synchronises; it runs under ``jax.vmap`` as
            its only shard.
        features: the values of D that the module accepts; None: any.
        name: its name in reports; None: the module's class.
        **declared: ``targets``, ``row_losses``, ``online``, ``carried``, ``frozen``, ``passes``,
            ``momentum``, ``weights``, ``pretrained``, ``exempt``: see
            ``bnverify.adapters.by_design.Declared``.

    Returns:
        A Subject whose ``State.extra`` holds what the model carries besides params and
        statistics: "key" where it draws random numbers, "collections" and "carried".

    Raises:
        UsageError: an argument is invalid, or the statistics of normalisation layers are not found.
        ValueError: ``train_argument`` is a name whose meaning is unknown.
        SubjectError: the module raises an error that a common mistake causes.
    """
    calls.linen_module(module)
    calls.functions(optimizer=optimizer, loss=loss, batch=batch)
    sizes = calls.sizes(features)
    bound = _Module(module, _mode(module, train_argument), batch, axis_name, statistics)
    with explaining("the model"):
        model = _look(bound, sizes_of(sizes), tuple(rngs), mutable)
    return subject(
        model,
        name=name or f"linen:{type(module).__name__}",
        optimizer=optimizer,
        loss=loss,
        batch=batch,
        features=sizes,
        declared=declared,
    )


def nnx(
    make_module: Callable[..., flax_nnx.Module],
    *,
    optimizer: Optimizer = optax.sgd,
    loss: Loss = mse,
    batch: Batch = rows,
    train_argument: str | Mode | None = None,
    axis_name: str | None = None,
    features: int | Collection[int] | None = None,
    name: str | None = None,
    **declared: Unpack[Declarations],
) -> Subject:
    """Return the canonical training step of an nnx module as a Subject.

    ``nnx.Param`` is trained; ``nnx.BatchStat`` are the running statistics, and so are a running mean and
    variance of another type, by their names; all other variables
    (PRNG streams, counters, caches) are kept in ``State.extra``. The module is switched by ``train()``
    and ``eval()``, and by an argument of ``__call__`` if it has one.

    Args:
        make_module: a class or function that makes the module. It is called with the keyword
            ``rngs`` and, if it has another required parameter, with the number of features D.
        optimizer: learning rate -> Optax optimizer of the params.
        loss: (outputs, targets) -> scalar. The default, mean squared error, takes outputs (N, 1) or
            (N,).
        batch: (x (N, D) float32, y (N,) float32) -> (inputs, targets), traceable; see
            ``bnverify.linen``. Inputs that are a tuple are passed as several arguments.
        train_argument: the argument of ``__call__`` that selects train mode: its name, or a function
            from a bool to keyword arguments. None: found by its name.
        axis_name: the mapped axis over which the module synchronises; it runs under ``jax.vmap`` as
            its only shard.
        features: the values of D that the module accepts; None: any. Required if ``make_module`` has
            no parameter for it.
        name: its name in reports; None: the name of ``make_module``.
        **declared: ``targets``, ``row_losses``, ``online``, ``carried``, ``frozen``, ``passes``,
            ``momentum``, ``weights``, ``pretrained``, ``exempt``: see
            ``bnverify.adapters.by_design.Declared``.

    Returns:
        The step, with its momentum, layer inputs and exemptions if they are found.

    Raises:
        UsageError: an argument is invalid, or the module cannot be made.
        ValueError: ``train_argument`` is a name whose meaning is unknown.
    """
    calls.nnx_maker(make_module)
    calls.functions(optimizer=optimizer, loss=loss, batch=batch)
    sizes = calls.sizes(features)
    maker = calls.nnx_caller(make_module, "make_module", sizes)
    model = _NnxModule(maker, batch, train_argument, axis_name)
    label = getattr(make_module, "__name__", type(make_module).__name__)
    return subject(
        model,
        name=name or f"nnx:{label}",
        optimizer=optimizer,
        loss=loss,
        batch=batch,
        features=sizes,
        declared=declared,
    )


# The canonical step.


class Pass(NamedTuple):
    """One forward pass: outputs, targets, and the new batch_stats and extra."""

    outputs: Any
    targets: Any
    batch_stats: Tree
    extra: Tree


class Model(Protocol):
    """A model whose variables are split into the parts of a State."""

    def init(self, seed: Any, x: Any) -> tuple[Tree, Tree, Tree]:
        """Return the initial params, statistics and extra."""

    def apply(self, state: State, x: Any, y: Any, *, train: bool) -> Pass:
        """Return one forward pass on the batch made from x and y."""


@dataclass(frozen=True, eq=False)
class Step:
    """The canonical step; ``bnverify.reference`` comments on each of its lines."""

    model: Model
    optimizer: Optimizer
    loss: Loss

    @explaining("init")
    def init(self, seed: Any, x: Any) -> State:
        """Return the initial state."""
        params, batch_stats, extra = self.model.init(seed, x)
        return State(params, batch_stats, self.optimizer(RATE).init(params), extra)

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
        """Return the state after evaluation."""
        done = self.model.apply(state, x, y, train=False)
        return state._replace(batch_stats=done.batch_stats, extra=done.extra)

    def keeps_rate(self, sizes: tuple[int, int]) -> bool:
        """Return whether the optimizer state stores the learning rate, so that later ones are ignored."""
        seed, x, _ = example_of(sizes)
        params = jax.eval_shape(self.init, seed, x).params
        flows = Flows(jax.make_jaxpr(lambda lr, p: self.optimizer(lr).init(p))(RATE, params))
        return flows.depends_on(flows.inputs[:1])


def subject(
    model: Model,
    *,
    name: str,
    optimizer: Optimizer,
    loss: Loss,
    batch: Batch,
    features: tuple[int, ...] | None,
    declared: Declarations,
) -> Subject:
    """Return the canonical training step of ``model``, completed by an analysis of its traces."""
    said = declared_by(declared)
    said = replace(said, penalty=False)  # the canonical step differentiates the reported loss

    def plain(optimizer: Optimizer, name: str) -> Subject:
        step = Step(model, optimizer, loss)
        return Subject(
            name=name,
            init=step.init,
            step=step.step,
            evaluate=step.evaluate,
            features=features,
            optimizer=optimizer,
            after_eval=step.after_eval,
            with_optimizer=lambda other: plain(other, f"{name}, another optimizer"),
            capabilities=CLAIMS - {"lr"} if step.keeps_rate(sizes_of(features)) else CLAIMS,
        )

    return completed(plain(optimizer, name), said, batch=batch)


# A linen module.


def _mode(module: nn.Module, given: str | Mode | None) -> Mode:
    """Return how to select train mode: by arguments of the call, or else by fields of the module."""
    mode = call_mode(_call_of(module), given)
    if given is None and not mode(True):
        return named(known_names(vars(module)))
    return mode


def _call_of(module: nn.Module) -> Callable[..., Any]:
    call: Callable[..., Any] = type(module).__call__
    return call


@dataclass(frozen=True, eq=False)
class _Module:
    """A linen module, and how it is initialised and applied.

    Attributes:
        module: the user's module.
        mode: how to select train mode; see ``bnverify.adapters.calls``.
        batch: (x, y) -> (inputs, targets).
        axis_name: the mapped axis to run under; None: none.
        statistics: the collection of the running statistics.
    """

    module: nn.Module
    mode: Mode
    batch: Batch
    axis_name: str | None
    statistics: str

    def init(self, rngs: Any, inputs: Any) -> Any:
        """Return the initial variables, as ``module.init`` gives them in eval mode."""
        return under_axis(
            self.axis_name, lambda i: self._call("init", train=False)(rngs, *_positional(i)), inputs
        )

    def apply(
        self, variables: Any, inputs: Any, *, train: bool, mutable: Any, rngs: Any
    ) -> tuple[Any, Any]:
        """Return the outputs and the updated collections."""
        if not train and not self.mode(False):  # the module has no argument for it
            mutable = False

        def run(inputs: Any) -> Any:
            apply = self._call("apply", train=train)
            out = apply(variables, *_positional(inputs), mutable=mutable, rngs=rngs)
            return out if mutable is not False else (out, {})

        outputs, updated = under_axis(self.axis_name, run, inputs)
        return outputs, updated

    def _call(self, method: str, *, train: bool) -> Callable[..., Any]:
        arguments = self.mode(train)
        parameters = inspect.signature(_call_of(self.module)).parameters
        # Names that are no parameters of the call are fields of the module.
        fields: dict[str, Any] = {
            name: value
            for name, value in arguments.items()
            if name not in parameters and name in vars(self.module)
        }
        module = self.module.clone(**fields) if fields else self.module
        rest = {name: value for name, value in arguments.items() if name not in fields}
        return partial(getattr(module, method), **rest)


def _positional(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


@dataclass(frozen=True, eq=False)
class _Variables:
    """The variables of a linen module, and their places in a State.

    Attributes:
        module: the module.
        mutable: the mutable collections in training, as for ``module.apply``.
        rngs: the PRNG streams that it may use, besides "params".
        others: the collections besides ``params`` and the statistics that are part of the state.
        random: whether training draws random numbers.
        random_eval: whether evaluation draws random numbers.
    """

    module: _Module
    mutable: Any
    rngs: tuple[str, ...]
    others: tuple[str, ...] = ()
    random: bool = False
    random_eval: bool = False

    def init(self, seed: Any, x: Any) -> tuple[Tree, Tree, Tree]:
        """Return the initial params, statistics and extra."""
        key = jax.random.PRNGKey(seed)
        inputs, _ = self.module.batch(x, jnp.zeros(x.shape[:1], jnp.float32))
        variables = self.module.init({"params": key, **self._streams(key)}, inputs)
        # The names of streams are folded in from 1, so 0 is free for the steps' own key.
        return (
            variables.get("params", {}),
            variables.get(self.module.statistics, {}),
            self._extra(variables, jax.random.fold_in(key, 0)),
        )

    def apply(self, state: State, x: Any, y: Any, *, train: bool) -> Pass:
        """Return one forward pass on the batch made from x and y.

        The PRNG key only changes in training.
        """
        inputs, targets = self.module.batch(x, y)
        extra = extra_of(state)
        key = extra.get("key")
        rngs = None
        if key is not None and (train or self.random_eval):
            key, now = jax.random.split(key)
            rngs = self._streams(now)
        collections = dict(extra.get("collections", {}))
        variables = {"params": state.params, **collections}
        statistics = self.module.statistics
        if state.batch_stats:
            variables[statistics] = state.batch_stats
        outputs, updated = self.module.apply(
            variables, inputs, train=train, mutable=self.mutable, rngs=rngs
        )
        after = {name: updated.get(name, old) for name, old in collections.items()}
        new_key = key if train else extra.get("key")
        new = updated.get(statistics, state.batch_stats)
        return Pass(outputs, targets, new, self._extra(after, new_key))

    def _streams(self, key: Any) -> dict[str, Any]:
        return {name: jax.random.fold_in(key, i + 1) for i, name in enumerate(self.rngs)}

    def _extra(self, collections: Mapping[str, Any], key: Any) -> Tree:
        kept = {name: collections[name] for name in self.others}
        extra: dict[str, Any] = {"collections": kept} if kept else {}
        if (self.random or self.random_eval) and key is not None:
            extra["key"] = key
        return extra or ()


def _look(
    module: _Module,
    sizes: tuple[int, int],
    rngs: tuple[str, ...],
    mutable: bool | Sequence[str] | None,
) -> _Variables:
    """Return the variables of a module, found by tracing it.

    Args:
        module: the module.
        sizes: (N, D) of the trace.
        rngs: the names of the PRNG streams.
        mutable: the user's choice; None: all collections except ``params``.
    """
    seed, x, y = example_of(sizes)

    def initial(seed: Any, x: Any) -> Any:
        key = jax.random.PRNGKey(seed)
        streams = dict.fromkeys(("params", *rngs), key)
        inputs, _ = module.batch(x, jnp.zeros(x.shape[:1], jnp.float32))
        return module.init(streams, inputs)

    variables = jax.eval_shape(initial, seed, x)
    others = tuple(name for name in variables if name not in ("params", module.statistics))
    everything = [module.statistics, *others]
    chosen = everything if mutable is None else mutable
    chosen = chosen if isinstance(chosen, bool) else list(chosen)

    def after(mutable: Any, streams: Any, train: bool) -> Any:
        def run(variables: Any, x: Any, y: Any) -> Any:
            inputs, _ = module.batch(x, y)
            return module.apply(variables, inputs, train=train, mutable=mutable, rngs=streams)[1]

        return jax.eval_shape(run, variables, x, y)

    def draws(*, train: bool) -> bool:
        try:
            after(chosen, None, train)
        except errors.InvalidRngError:
            return True
        return False

    updated = after(everything, dict.fromkeys(rngs, jax.random.PRNGKey(0)), True)
    # Collections that grow with every call (``sow``) are outputs, not state.
    kept = tuple(
        name
        for name in others
        if name not in updated or _shapes(updated[name]) == _shapes(variables[name])
    )
    return _Variables(
        module,
        chosen,
        rngs,
        others=kept,
        random=draws(train=True),
        random_eval=draws(train=False),
    )


def _shapes(tree: Any) -> Any:
    return jax.tree_util.tree_map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree)


# An nnx module.


@dataclass(frozen=True, eq=False)
class _NnxModule:
    """An nnx module whose variables are split into the parts of a State.

    Attributes:
        maker: the function that makes the module.
        batch: (x, y) -> (inputs, targets).
        train_argument: see ``nnx``.
        axis_name: the mapped axis to run under; None: none.
    """

    maker: Caller
    batch: Batch
    train_argument: str | Mode | None
    axis_name: str | None
    _known: dict[int, Parts] = field(default_factory=dict)

    def _make(self, seed: Any, features: Any) -> Any:
        # The canonical step has its own optimizer and learning rate.
        made = self.maker({**of_seed(seed), "features": features, "lr": None, "tx": None})
        if not isinstance(made, flax_nnx.Module):
            raise UsageError(
                f"make_module returns a {type(made).__name__}, not an nnx module: return the model alone, "
                "or check your own loop with bnverify.nnx_loop"
            )
        return made

    def init(self, seed: Any, x: Any) -> tuple[Tree, Tree, Tree]:
        """Return the initial params, statistics and extra."""
        features = x.shape[1]
        params, batch_stats, *rest = self._parts(features).split(self._make(seed, features))
        return params, batch_stats, _extra(*rest)

    def apply(self, state: State, x: Any, y: Any, *, train: bool) -> Pass:
        """Return one forward pass on the batch made from x and y."""
        parts = self._parts(x.shape[1])
        inputs, targets = self.batch(x, y)
        extra = extra_of(state)

        def run(inputs: Any) -> Any:
            module = parts.merge(
                state.params, state.batch_stats, extra.get("streams", {}), extra.get("others", {})
            )
            module.train() if train else module.eval()
            mode = call_mode(type(module).__call__, self.train_argument)(train)
            with noting({"": module}):
                outputs = module(*_positional(inputs), **mode)
            _, batch_stats, *rest = parts.split(module)
            return outputs, batch_stats, _extra(*rest)

        outputs, batch_stats, extra_after = under_axis(self.axis_name, run, inputs)
        return Pass(outputs, targets, batch_stats, extra_after)

    def _parts(self, features: Any) -> Parts:
        # A symbolic size belongs to one trace, so nothing is cached for it.
        known = self._known.get(features) if isinstance(features, int) else None
        if known is None:
            known = Parts.of(lambda: self._make(0, features), kinds_of_variables)
            if isinstance(features, int):
                self._known[features] = known
        return known


def _extra(streams: Tree, others: Tree) -> Tree:
    extra = {"streams": streams, "others": others}
    return {name: tree for name, tree in extra.items() if tree} or ()

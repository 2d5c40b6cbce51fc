"""A user's own training loop as a Subject, run unchanged: what a user gives, and what becomes of it.

``create`` makes the state of the loop: train states, pytrees, nnx objects. ``train_step`` and
``eval_step`` are called with it, with a batch, and with other arguments matched by name. Their results
are split into the new state and the report, which has the loss. Gradients are observed where the step
passes them to an optimizer. ``bnverify.adapters.steps`` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Unpack

import optax

from bnverify.adapters import calls
from bnverify.adapters.analysis import completed
from bnverify.adapters.batches import Reading, image_and_label, rows
from bnverify.adapters.by_design import Declarations, declared_by
from bnverify.adapters.calls import caller, label_of
from bnverify.adapters.programs import sizes_of
from bnverify.adapters.steps import Loop, Optimizer
from bnverify.errors import UsageError
from bnverify.model import Subject

BY_TRAINING = "there is no eval_step: evaluation is the training loss with the model in eval mode"


class Options(Declarations, total=False):
    """Keyword arguments of ``loop``."""

    optimizer: Optimizer
    loss: Reading
    eval_loss: Reading
    params: str | None
    statistics: str | None
    opt_state: str | None
    roles: Mapping[str, str]
    switch: bool
    axis_name: str | None
    features: int | Collection[int] | None
    rows: int | None
    name: str | None


def loop(
    create: Callable[..., Any],
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any] | None = None,
    *,
    batch: Callable[[Any, Any], Any] = rows,
    **options: Unpack[Options],
) -> Subject:
    """Return a training loop as a Subject; its functions are called unchanged.

    They may be compiled, donate their state, or average over a mapped axis. Arguments are matched by the
    names of parameters (``rng``, ``batch``, ``labels``, ``learning_rate``, ...: see
    ``bnverify.adapters.calls``); bind all other parameters.

    Args:
        create: makes the initial state: a train state, a model and its optimizer, a tuple or dict of
            several objects. Called with a PRNG key, or ``nnx.Rngs`` for a parameter ``rngs``, and,
            if it has such parameters, with the number of features, the learning rate or an
            optimizer. The laws about the last two apply only then.
        train_step: takes the state and a batch, in any order; returns what it does not change in
            place, and a report: the loss, metrics with "loss", or metrics objects with "loss".
        eval_step: likewise; must report a loss. None: evaluation is the training loss with the model
            in eval mode.
        batch: (x (N, D) float32, y (N,) float32) -> the batch, traceable.
        **options: further keywords:

            optimizer: learning rate -> Optax optimizer, passed to functions that take an optimizer; any
                other is observed where it updates all params of a network in one call, outside
                ``jax.vmap`` and, if it is not in the state, outside functions that the step compiles.
            loss: where the loss is in the report of ``train_step``: a key, or a function of (report,
                batch). By default "loss" or the only key such as "train_loss", or the scalar that is
                returned; a pair is (sum, count). If there is none, the laws about the loss are exempt.
            eval_loss: likewise for ``eval_step``.
            params, statistics, opt_state: the paths of these trees in the state, joined by "/":
                "model_state/batch_stats". By default they are found by name, and the statistics
                also by what the normalisation layers write.
            roles: parameter -> its meaning, if its name does not tell: a key of
                ``bnverify.adapters.calls.ROLES``, or the kind of an object in the state.
            switch: whether ``model.train()`` and ``model.eval()`` are called before the steps, as
                in Flax's own nnx loops; default: True.
            axis_name: the mapped axis that the steps average over; they then run under ``jax.vmap``
                as its only shard. By default found from JAX's error about an unbound axis name.
            features: the values of D that the model accepts; by default any.
            rows: the number of rows is a multiple of it. By default found, if the step refuses other
                batches.
            name: its name in reports; by default that of ``train_step``.
            targets, row_losses, online, carried, frozen, passes, momentum, weights, pretrained,
            batches, same_loss, penalty, exempt: see ``bnverify.adapters.by_design.Declared``.

    Returns:
        The loop as a Subject, with its optimizer, momentum and layers if they are found.

    Raises:
        UsageError: the meaning of a parameter or a result is unknown, or the statistics of
            normalisation layers are not found.
        SubjectError: the code raises an error that a common mistake causes.
    """
    return _subject("loop", "create", create, train_step, eval_step, batch, options)


def train_state(
    create: Callable[..., Any],
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any] | None = None,
    *,
    batch: Callable[[Any, Any], Any] = image_and_label,
    **options: Unpack[Options],
) -> Subject:
    """Return a loop with Flax's TrainState, or a similar state, as a Subject; see ``loop``.

    Args:
        create: (rng, ...) -> a train state, or several.
        train_step: (state, batch) -> (state, report).
        eval_step: (state, batch) -> report, or (state, report).
        batch: by default (x, y) -> {"image": x, "label": y}, as in Flax's own examples.
        **options: see ``loop``.
    """
    return _subject("train_state", "create", create, train_step, eval_step, batch, options)


def nnx_loop(
    make: Callable[..., Any],
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any] | None = None,
    *,
    batch: Callable[[Any, Any], Any] = rows,
    **options: Unpack[Options],
) -> Subject:
    """Return a loop whose steps change nnx objects in place as a Subject; see ``loop``.

    Args:
        make: (din, rngs) -> (model, optimizer), and further objects that the steps take, such as
            metrics. A required parameter besides ``rngs`` is the number of features D.
        train_step: (model, optimizer, ..., batch) -> report, or nothing.
        eval_step: (model, ..., batch) -> report, or nothing.
        batch: by default (x, y).
        **options: see ``loop``.
    """
    return _subject("nnx_loop", "make", make, train_step, eval_step, batch, options)


def _subject(
    kind: str,
    creates: str,
    create: Callable[..., Any],
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any] | None,
    batch: Callable[[Any, Any], Any],
    options: Any,
) -> Subject:
    own = set(Options.__annotations__) - set(Declarations.__annotations__)
    said: Any = {key: value for key, value in options.items() if key not in own}
    declared = declared_by(said)
    optimizer = options.get("optimizer", optax.sgd)
    given: dict[str, Any] = {creates: create, "train_step": train_step}
    if eval_step is not None:
        given["eval_step"] = eval_step
    calls.functions(**given, optimizer=optimizer, batch=batch)
    accepted, rows = calls.sizes(options.get("features")), calls.multiple(options.get("rows"))
    told = dict(options.get("roles") or {})
    if kind == "nnx_loop":
        making = calls.nnx_caller(create, creates, accepted, told)
    else:
        roles = ("key", "rngs", "seed", "batch", "inputs", "targets", "lr", "tx", "features")
        words = {"rngs": "key"} if kind == "train_state" else {}
        making = caller(create, creates, allowed=roles, order=("key",), told={**words, **told})
    found = Loop(
        create=making,
        batch=batch,
        optimizer=optimizer,
        sizes=sizes_of(accepted, rows),
        loss=options.get("loss"),
        eval_loss=options.get("eval_loss"),
        switch=options.get("switch", True),
        axis_name=options.get("axis_name"),
        places={key: options.get(key) for key in ("params", "statistics", "opt_state")},
    )
    found = found.matched(train_step, eval_step, told, creates).with_statistics()
    if "optimizer" in options and not found.takes("tx"):
        raise UsageError(
            f"optimizer= is passed to a parameter 'tx', 'optimizer' or 'opt' of {creates} or train_step, "
            "and neither has one: add it, or leave optimizer= out, because the optimizer that the step "
            "uses is observed"
        )
    same_loss = declared.same_loss or found.evaluation is None
    subject = _plain(
        found,
        name=options.get("name") or f"{kind}:{label_of(train_step)}",
        features=accepted,
        rows=rows,
        same_loss=same_loss,
    )
    return completed(subject, declared, batch=batch, makers=[found.create.function, optimizer])


def _plain(
    found: Loop,
    *,
    name: str,
    features: tuple[int, ...] | None,
    rows: int | None,
    same_loss: bool,
) -> Subject:
    """Return a loop as a Subject that is not analysed yet."""

    def with_optimizer(optimizer: Optimizer) -> Subject:
        other = replace(found, optimizer=optimizer).settled()
        called = f"{name}, another optimizer"
        return _plain(other, name=called, features=features, rows=rows, same_loss=same_loss)

    claims = {
        "lr": found.takes_rate and not found.keeps_rate(),
        "row_losses": True,
        "eval_is_training_loss": same_loss,
    }
    return Subject(
        name=name,
        init=found.init,
        step=found.step,
        evaluate=found.evaluate,
        features=features,
        rows=rows,
        optimizer=found.optimizer_of,
        after_eval=found.state_after_evaluation if found.evaluation_returns_a_state() else None,
        with_optimizer=with_optimizer if found.takes("tx") else None,
        capabilities=frozenset(claim for claim, holds in claims.items() if holds),
        notes=() if found.evaluation is not None else (BY_TRAINING,),
    )

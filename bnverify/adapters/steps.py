"""A user's own functions, run as the functions of a Subject.

The objects in the state of a loop are found, and matched to the parameters of its steps. A State is made
of them and put back into them around every call. What only a trace reveals, such as the mapped axis or
where the gradients can be observed, is settled by trying.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from bnverify.adapters import calls, objects, trees
from bnverify.adapters.batches import (
    NoLoss,
    Reading,
    copied,
    described,
    inputs_and_targets,
    is_metrics,
    loss_of,
    things_and_report,
    under_axis,
)
from bnverify.adapters.calls import Caller, Thing, caller
from bnverify.adapters.explain import explaining
from bnverify.adapters.objects import by_variable_path
from bnverify.adapters.programs import RATE, example_of
from bnverify.adapters.traced import Flows, evaluated, holds_tracers, marks_within
from bnverify.adapters.watch import Updates, evaluating, noting, updates, watching
from bnverify.errors import UsageError, first_line
from bnverify.jaxpr.tracing import traced_anew, unused_axis
from bnverify.model import State, StepInfo

Optimizer = Callable[[Any], Any]

SPLIT = (
    "create returns what nnx.split gave. Use bnverify.nnx_loop with a function that makes the objects "
    "themselves, (model, optimizer), and in the step around yours write graphdef, state = "
    "nnx.split((model, optimizer)) before the call and nnx.update((model, optimizer), state) after it"
)


EVALUATION = "bnverify evaluation"
"""The mapped axis of training steps that are run, untraced, in eval mode: JAX keeps both programs."""

OBSERVED = "bnverify observed"
"""The mapped axis of traces that show whether steps compile what is observed."""


class _Done(NamedTuple):
    """The result of one call of a step."""

    state: State | None
    loss: Any
    grads: Any


@dataclass(frozen=True, eq=False)
class Loop:
    """A user's functions, and what is known about them.

    The "things" are the objects in the state of the loop. Attributes that are not listed here are
    those of ``loop``.

    Attributes:
        sizes: (N, D) of the traces.
        places: part of the State -> its path, if the user gave one.
        train: the training step; None until the things are known.
        evaluation: the evaluation step; None: evaluation is the training loss in eval mode.
        names: thing -> its name in the State, if there are several.
        whole: whether the steps take all things as one argument.
        of_nnx: whether the things are nnx objects, which the steps change in place.
        layout: where the parts of a State are in the things; computed per number of features for nnx.
        template: the things as ``create`` returned them, for everything that is not an array.
        gradients: how gradients are observed: "direct", as values; "marked", if an inner compiled
            function holds them; "hidden", not at all.
        earnest: whether ``create`` is run instead of traced for shapes.
        anew: whether functions that the steps compile are traced again each time, because what is
            observed happens in one of them.
        sources: network -> its optimizer, or its index among those in the things; filled while a
            step is traced. None: not to be filled.
    """

    create: Caller
    batch: Callable[[Any, Any], Any]
    optimizer: Optimizer
    sizes: tuple[int, int]
    loss: Reading
    eval_loss: Reading
    switch: bool
    axis_name: str | None
    places: Mapping[str, str | None]
    train: Any = None
    evaluation: Caller | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    of_nnx: bool = False
    layout: Any = None
    template: Any = None
    gradients: str = "direct"
    earnest: bool = False
    anew: bool = True
    sources: Any = None

    # What the loop carries.

    def created(self, seed: Any, x: Any, lr: Any) -> dict[str, Any]:
        """Return the things that ``create`` returns, by name."""
        batch = self.batch(x, jnp.zeros(x.shape[:1], jnp.float32))
        inputs, targets = inputs_and_targets(batch)
        made = self.create(
            {
                **objects.of_seed(seed),
                "batch": batch,
                "inputs": inputs,
                "targets": targets,
                "lr": lr,
                "tx": self.optimizer(lr),
                "features": x.shape[1],
            }
        )
        if made is None:
            raise UsageError("create returned None: it must return the initial state")
        if self.whole:
            return {"state": made}
        return _things(made)

    def matched(
        self,
        train_step: Callable[..., Any],
        eval_step: Callable[..., Any] | None,
        told: Mapping[str, str],
        creates: str,
    ) -> Loop:
        """Return this loop with its things matched to the parameters of its steps, and settled.

        A parameter ``state`` is the entry "state" of a dict, or the dict. The dict is tried if the step
        fails with the entry, and takes none of the others.

        Args:
            train_step: the training step.
            eval_step: the evaluation step, if there is one.
            told: parameter -> role, as declared by the user.
            creates: what the function that makes the things is called in messages.

        Raises:
            UsageError: a parameter or a result has no known meaning, or both ways fail.
        """

        def tried(roles: Mapping[str, str]) -> Loop:
            with explaining(creates):
                found.append(self.with_things(train_step, eval_step, roles))
            return found[-1].settled()

        found: list[Loop] = []
        try:
            return tried(told)
        except Exception as error:
            entry = found[0].lone_entry() if found else None
            if entry is None or entry[0] in told:
                raise
            parameter, name = entry
            try:
                return tried({**told, parameter: calls.ALL})
            except Exception as other:  # noqa: BLE001 - user code may raise anything
                both = _said(error), _said(other)
                raise UsageError(
                    f"train_step fails whether {parameter!r} is the entry {name!r} of the state, or all "
                    f"of it. As the entry: {both[0]}. As all of it: {both[1]}. Declare "
                    f"roles={{{parameter!r}: {name!r}}} or roles={{{parameter!r}: {calls.ALL!r}}} to see "
                    "one error alone"
                ) from error

    def lone_entry(self) -> tuple[str, str] | None:
        """Return (parameter, entry) if the training step takes one entry of several, by its name."""
        taken = {} if self.of_nnx or self.whole else self.train.things()
        if len(taken) != 1 or len(self.template) < 2:
            return None
        return next(iter(taken.items()))

    def with_things(
        self,
        train_step: Callable[..., Any],
        eval_step: Callable[..., Any] | None,
        told: Mapping[str, str],
    ) -> Loop:
        """Return this loop with its things matched to the parameters of its steps."""
        things, earnest = self._look_at_things(), False
        if any(isinstance(thing, nnx.GraphDef | nnx.State) for thing in things.values()):
            raise UsageError(SPLIT)
        of_nnx = any(map(objects.is_object, things.values()))
        kind_of = objects.kind_of if of_nnx else trees.kind_of
        kinds = [Thing(name, kind_of(thing)) for name, thing in things.items()]
        if of_nnx and len(things) < 2 and not objects.optimizers_of(things):
            raise UsageError(
                "make must return (model, optimizer) with an nnx.Optimizer, followed by any other "
                "objects that the steps change; it returned "
                + " and ".join(f"a {type(each).__name__}" for each in things.values())
            )
        allowed = ["batch", "inputs", "targets", "key", "lr", "rngs", "tx"]
        if any(thing.kind == "optimizer" for thing in kinds):
            allowed.remove("tx")
        order = ("batch", "inputs", "targets")
        asked: dict[str, Any] = {"allowed": allowed, "order": order, "told": told}
        train = caller(
            train_step, "train_step", things=kinds, whole=False if of_nnx else None, **asked
        )
        whole = train.takes(calls.ALL)
        if whole:
            kinds = [Thing("state")]
            asked["told"] = {n: "state" if r == calls.ALL else r for n, r in told.items()}
            train = caller(train_step, "train_step", things=kinds, **asked)
        evaluation = None
        if eval_step is not None:
            known = {**asked, "known": train.roles, "things": kinds}
            evaluation = caller(eval_step, "eval_step", **known, whole=False)
        names = {thing.name: thing.name for thing in kinds}
        names |= {thing: trees.own_name(parameter) for parameter, thing in train.things().items()}
        found = replace(
            self, train=train, evaluation=evaluation, names=names, whole=whole, of_nnx=of_nnx
        )
        found = replace(found, earnest=earnest)
        return found.with_layout()

    def with_layout(self, statistics: str | None = None) -> Loop:
        """Return this loop with the layout of a State in its things."""
        if self.of_nnx:
            self._layout(self.sizes[1])  # raises if there is none
            return self
        things = self._look_at_things()
        places = {**self.places, **({"statistics": statistics} if statistics else {})}
        return replace(self, layout=trees.layout(things, self.names, **places), template=things)

    def _look_at_things(self) -> dict[str, Any]:
        """Return the things; their leaves may be tracers of a finished trace."""
        if self.earnest:
            return self.created(0, jnp.zeros(self.sizes, jnp.float32), RATE)
        found: list[dict[str, Any]] = []

        def build(seed: Any, x: Any) -> None:
            found.append(self.created(seed, x, RATE))

        seed, x, _ = example_of(self.sizes)
        jax.eval_shape(build, seed, x)
        return found[0]

    def with_statistics(self) -> Loop:
        """Return this loop with its statistics found by what the normalisation layers write.

        If no layer is in train mode, perhaps by mistake, by what they read.
        """
        if self.of_nnx or self.layout.parts.get(trees.STATISTICS):
            return self
        with watching() as recording:
            jax.make_jaxpr(self.step)(*self.example(), RATE)
        calls = recording.calls.values()
        written = [call for call in calls if call.training]
        layers = {call.path: call.names for call in written or calls}
        called = {self.names.get(name, name): tree for name, tree in self.template.items()}
        place = trees.search(called, layers) if layers else None
        return self if place is None else self.with_layout(place)

    def takes(self, role: str) -> bool:
        """Return whether one of the functions has a parameter of that role."""
        functions = [self.create, self.train, *([self.evaluation] if self.evaluation else [])]
        return any(function.takes(role) for function in functions)

    @property
    def _made_for_a_rate(self) -> bool:
        return self.create.takes("lr", "tx")

    @property
    def takes_rate(self) -> bool:
        """Whether the learning rate can be set from outside."""
        return self._made_for_a_rate or bool(self.train.takes("lr", "tx"))

    def keeps_rate(self) -> bool:
        """Return whether the optimizer state stores the learning rate, so that later ones are ignored."""

        def opt_state(lr: Any) -> Any:
            things = self.created(0, jnp.zeros(self.sizes, jnp.float32), lr)
            return self._split(things, {}, self._layout(self.sizes[1], lr)).opt_state

        flows = Flows(jax.make_jaxpr(opt_state)(RATE))
        return flows.depends_on(flows.inputs)

    def _layout(self, features: Any, lr: Any = RATE) -> Any:
        """Return the layout of the things; for nnx it is computed in the current trace."""
        if not self.of_nnx:
            return self.layout
        x = jax.ShapeDtypeStruct((self.sizes[0], features), "float32")
        if self._made_for_a_rate or self.earnest:  # the optimizer holds the lr of the current trace
            zeros = jnp.zeros(x.shape, x.dtype)
            return objects.Layout.of(self.created(0, zeros, lr), self.names)
        found: list[Any] = []

        def build(x: Any) -> None:
            found.append(objects.Layout.of(self.created(0, x, lr), self.names))

        jax.eval_shape(build, x)
        return found[0]

    def _joined(self, state: State, x: Any, lr: Any, layout: Any) -> dict[str, Any]:
        """Return the things with the values of ``state``."""
        if self.of_nnx:
            merged: dict[str, Any] = layout.merge(state)
            return merged
        template = self.template
        if self._made_for_a_rate:
            template = self.created(0, jnp.zeros(x.shape, jnp.float32), lr)
        joined: dict[str, Any] = layout.join(copied(state), template)
        return joined

    def _split(self, things: Mapping[str, Any], more: Any, layout: Any) -> State:
        split: State = layout.split(things, more)
        return split

    # The functions of a Subject.

    @explaining("create")
    def init(self, seed: Any, x: Any) -> State:
        """Return the initial state."""
        more = {}
        if self.takes("key") or self.takes("rngs"):
            more["key"] = jax.random.fold_in(jax.random.PRNGKey(seed), 0)
        more = more if self.train.takes("key", "rngs") or self._evaluation_takes_key() else {}
        return self._split(self.created(seed, x, RATE), more, self._layout(x.shape[1]))

    def _evaluation_takes_key(self) -> bool:
        return self.evaluation is not None and self.evaluation.takes("key", "rngs")

    @explaining("train_step")
    def step(self, state: State, x: Any, y: Any, lr: Any) -> tuple[State, StepInfo]:
        """Take one training step."""
        if self.gradients != "marked":
            done = self._trained(state, x, y, lr)
            assert done.state is not None
            return done.state, StepInfo(done.loss, done.grads)
        with watching() as recording:
            before = len(recording.updates)
            done, found = evaluated(self._trained, state, x, y, lr)
            marks = recording.updates[before:]
        given = [
            {
                name: found[label][0]
                for name, label in names.items()
                if len(found.get(label, ())) == 1
            }
            for names in marks
        ]
        assert done.state is not None
        return done.state, StepInfo(done.loss, _gradients(given, state.params, self.networks()))

    @explaining("eval_step")
    def evaluate(self, state: State, x: Any, y: Any) -> Any:
        """Return the loss in eval mode, (1,)."""
        return self._evaluated(state, x, y).loss.reshape(1)

    @explaining("eval_step")
    def state_after_evaluation(self, state: State, x: Any, y: Any) -> Any:
        """Return the state that evaluation leaves; None: ``eval_step`` returns none."""
        return self._evaluated(state, x, y).state

    def _trained(self, state: State, x: Any, y: Any, lr: Any) -> _Done:
        more, now = _next_key(state)
        layout = self._layout(x.shape[1], lr)
        shows = self.gradients == "direct"

        def call(batch: Any) -> _Done:
            things = self._joined(state, x, lr, layout)
            self._switch(things, train=True)
            with updates() as seen, noting(self._models(things, layout)):
                found, report = self._called(self.train, things, batch, lr, now)
            self._note_sources(seen, things, state)
            if not found and not self.of_nnx:
                raise UsageError(
                    f"train_step does not return a {type(next(iter(things.values()))).__name__}: return "
                    "the new state, alone or in a tuple with the metrics"
                )
            after = {**things, **found}
            loss = self._loss_in(report, after, self.loss, batch)
            grads = _gradients(seen.gradients, state.params, self.networks()) if shows else None
            return _Done(self._split(after, more, layout), loss, grads)

        done: _Done = under_axis(self.axis_name, self._observable(call, state, x), self.batch(x, y))
        return done

    def _evaluated(self, state: State, x: Any, y: Any) -> _Done:
        extra = trees.extra_of(state)
        more = {"key": extra["key"]} if "key" in extra else {}
        layout = self._layout(x.shape[1])
        function, how = self.evaluation or self.train, self.eval_loss
        if self.evaluation is None:
            how = self.eval_loss if self.eval_loss is not None else self.loss

        def call(batch: Any) -> _Done:
            things = self._joined(state, x, RATE, layout)
            self._switch(things, train=False)
            with noting(self._models(things, layout)):
                if self.evaluation is None:
                    with evaluating():
                        found, report = self._called(
                            function, things, batch, RATE, extra.get("key")
                        )
                else:
                    found, report = self._called(function, things, batch, RATE, extra.get("key"))
            loss = self._loss_in(report, {**things, **found}, how, batch)
            if loss is None:
                raise NoLoss(self._no_loss(report))
            left = found or self.of_nnx
            after = self._split({**things, **found}, more, layout) if left else None
            return _Done(after, loss, None)

        mode = EVALUATION if self.evaluation is None else None
        observable = self._observable(call, state, x, untraced=mode)
        done: _Done = under_axis(self.axis_name, observable, self.batch(x, y))
        return done

    def _observable(
        self, call: Callable[[Any], _Done], *given: Any, untraced: str | None = None
    ) -> Callable[[Any], _Done]:
        """Return ``call`` such that what is observed while it is traced is not missed.

        Args:
            call: runs a step on a batch.
            *given: what it is run with: nothing is observed if none of it is traced.
            untraced: the mapped axis to run it in then; None: the user's own program is run.
        """
        if not self.anew:
            return call
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(given)):
            return traced_anew(call)
        return call if untraced is None else traced_anew(call, untraced)

    def _called(
        self, function: Caller, things: Mapping[str, Any], batch: Any, lr: Any, key: Any
    ) -> tuple[dict[str, Any], Any]:
        """Call a step; return the things that came back, and the report."""
        inputs, targets = inputs_and_targets(batch)
        values = {
            **{f"thing:{name}": thing for name, thing in things.items()},
            "batch": batch,
            "inputs": inputs,
            "targets": targets,
            "key": key,
            "rngs": nnx.Rngs(key) if function.takes("rngs") and self.of_nnx else key,
            "lr": lr,
            "tx": self.optimizer(lr),
        }
        returned = function(values)
        if self.of_nnx:
            return {}, returned
        return things_and_report(returned, dict(things))

    def _loss_in(self, report: Any, things: Mapping[str, Any], how: Reading, batch: Any) -> Any:
        """Return the loss in a report, or else in the metrics that the loop carries."""
        kept = [thing for thing in things.values() if is_metrics(thing)]
        if not self.of_nnx:
            kept += [trees.at(things, path) for path in self.layout.metrics]
        if callable(how):
            return loss_of(kept[0] if report is None and kept else report, how, batch)
        try:
            found = loss_of(report, how, batch)
        except NoLoss:
            if not kept:
                raise
            found = None
        for metrics in kept:
            if found is None:
                found = loss_of(metrics, how, batch)
        return found

    def _no_loss(self, report: Any) -> str:
        if self.evaluation is None:
            return (
                f"without an eval_step, train_step must report a loss; it reports "
                f"{described(report)}. Give the loss with loss=, a key or a function of (report, batch)"
            )
        return (
            f"eval_step reports no loss: it reports {described(report)}. Return metrics with the key "
            "'loss', or give the loss with eval_loss=, a key or a function of (report, batch); or "
            "leave eval_step out, to use the training loss in eval mode"
        )

    def _switch(self, things: Mapping[str, Any], *, train: bool) -> None:
        if not self.of_nnx or not (self.switch or self.evaluation is None):
            return
        for thing in things.values():
            if isinstance(thing, nnx.Module) and hasattr(thing, "train"):
                thing.train() if train else thing.eval()
            for held in [getattr(thing, "model", None)]:
                if isinstance(held, nnx.Module):
                    held.train() if train else held.eval()

    def _models(self, things: Mapping[str, Any], layout: Any) -> dict[str, Any]:
        if not self.of_nnx:
            return {}
        found = {}
        for network, path in layout.models.items():
            model = things[path[0].removeprefix("object_")]
            for name in path[1:]:
                model = getattr(model, name)
            found[network] = model
        return found

    def networks(self) -> tuple[str, ...]:
        """Return the names of the networks in the State; ("",) for a single one."""
        return tuple(
            (self.layout or self._layout(self.sizes[1])).models
            if self.of_nnx
            else (self.layout.networks())
        )

    def evaluation_returns_a_state(self) -> bool:
        """Return whether evaluation returns a state."""
        if self.evaluation is None:
            return False
        state, x, y = self.example()
        found: list[bool] = []
        jax.eval_shape(
            lambda *args: found.append(self.state_after_evaluation(*args) is not None), state, x, y
        )
        return found[0]

    # The optimizer.

    def _note_sources(self, seen: Updates, things: Mapping[str, Any], state: State) -> None:
        """Record where the optimizer of each network comes from."""
        if self.sources is None or self.sources:
            return
        known = _optimizers(things, of_nnx=self.of_nnx)
        for network, index in _matched(seen.gradients, state.params, self.networks()).items():
            used = seen.optimizers[index]
            place = next((i for i, tx in enumerate(known) if tx is used), None)
            self.sources[network] = used if place is None else place

    @property
    def optimizer_of(self) -> Optimizer | None:
        """Learning rate -> the user's optimizer; None if it was not observed."""
        sources = self.sources
        if self.gradients == "hidden" or set(sources or {}) != set(self.networks()):
            return None

        def made(lr: Any) -> Any:
            known: list[Any] = []
            if any(isinstance(source, int) for source in sources.values()):
                things = self.template
                if self._made_for_a_rate or self.of_nnx:
                    things = self.created(0, jnp.zeros(self.sizes, jnp.float32), lr)
                known = _optimizers(things, of_nnx=self.of_nnx)
            found = {
                network: known[source] if isinstance(source, int) else source
                for network, source in sources.items()
            }
            if self.train.takes("tx"):
                found = dict.fromkeys(found, self.optimizer(lr))
            return found[""] if set(found) == {""} else _jointly(found)

        return made

    # Properties that only a trace reveals.

    def example(self) -> tuple[Any, Any, Any]:
        """Return a state and a batch as ShapeDtypeStructs."""
        seed, x, y = example_of(self.sizes)
        return jax.eval_shape(self.init, seed, x), x, y

    def settled(self) -> Loop:
        """Return this loop with its mapped axis, and the way its gradients can be observed."""
        found = replace(self, gradients="direct", anew=False)
        for _ in range(6):  # each iteration settles one property, or raises
            found = replace(found, sources={})
            try:
                step = found.traced(partial(found.step, lr=RATE))
            except Exception as error:  # noqa: BLE001 - user code may raise anything
                found = found.mended(error)
            else:
                within = any(map(marks_within, (step, found.traced(found.evaluate))))
                anew = within and found.shows_less_again()
                return replace(found.with_lasting_sources(), anew=anew)
        raise RuntimeError("unreachable: there are fewer properties to settle")

    def traced(self, function: Callable[..., Any]) -> Any:
        """Return the program of a step, with marks.

        Raises:
            UnexpectedTracerError: the program contains values of another trace.
        """
        # What is traced within this axis is observed, so that functions in JAX's cache have marks, too.
        with watching():
            program = jax.make_jaxpr(traced_anew(function, OBSERVED))(*self.example())
        if holds_tracers(program):
            raise jax.errors.UnexpectedTracerError("create keeps arrays that it computes")
        return program

    def shows_less_again(self) -> bool:
        """Return whether fewer calls of models and optimizers are seen in a second trace of a step.

        JAX traces those in functions that a step compiles only once.
        """
        for function in (partial(self.step, lr=RATE), self.evaluate):
            axis, given = unused_axis(), self.example()
            seen = []
            for _ in range(2):
                with watching() as recording:
                    before = recording.size
                    jax.eval_shape(traced_anew(function, axis), *given)
                    seen.append(recording.size - before)
            if seen[1] < seen[0]:
                return True
        return False

    def with_lasting_sources(self) -> Loop:
        """Return this loop without optimizers that the step creates on every call."""
        made = {n: source for n, source in self.sources.items() if not isinstance(source, int)}
        if not made:
            return self
        again = replace(self, sources={})
        jax.eval_shape(lambda state, x, y: again.step(state, x, y, RATE), *self.example())
        lasting = {
            n: s for n, s in self.sources.items() if s is again.sources.get(n) or n not in made
        }
        # None: no later trace records its optimizer, which may hold values of that trace.
        return replace(self, sources=(lasting if self.gradients == "direct" else {}) or None)

    def mended(self, error: Exception) -> Loop:
        """Return this loop changed so that it no longer raises ``error``, or raise it again."""
        cause = error.__cause__ or error
        axis = re.search(r"unbound axis name: (\w+)", str(cause))
        if axis and self.axis_name is None:
            return replace(self, axis_name=axis[1])
        if isinstance(cause, jax.errors.UnexpectedTracerError):
            if self.gradients == "direct":  # an inner compiled function holds the gradients
                return replace(self, gradients="marked")
            if not self.earnest and not self._made_for_a_rate:
                # The optimizer or the model keeps arrays that create computes.
                return replace(self, earnest=True, gradients="direct").with_layout()
            if self.gradients == "marked":
                return replace(self, gradients="hidden")
        raise error


def _things(made: Any) -> dict[str, Any]:
    """Return the objects in what ``create`` returned, by name; a single one is called "0"."""
    if isinstance(made, tuple | list) and not hasattr(made, "_fields") and len(made) > 1:
        return {str(index): each for index, each in enumerate(made)}
    if type(made) is dict and all(isinstance(key, str) for key in made) and len(made) > 1:
        return dict(made)
    return {"0": made}


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, UsageError) else first_line(error)


def _next_key(state: State) -> tuple[dict[str, Any], Any]:
    extra = trees.extra_of(state)
    if "key" not in extra:
        return {}, None
    key, now = jax.random.split(extra["key"])
    return {"key": key}, now


def _matched(
    given: list[dict[tuple[str, ...], Any]], params: Any, networks: tuple[str, ...]
) -> dict[str, int]:
    """Return network -> the index of the update with its gradients; {} if that is ambiguous."""
    found: dict[str, int] = {}
    for network in networks:
        own = by_variable_path(params if network == "" else params[network])
        fitting = [
            index
            for index, gradients in enumerate(given)
            if set(gradients) == set(own)
            and all(gradients[path].size == leaf.size for path, leaf in own.items())
        ]
        if len(fitting) != 1 or fitting[0] in found.values():
            return {}
        found[network] = fitting[0]
    return found if len(given) == len(found) else {}


def _gradients(
    given: list[dict[tuple[str, ...], Any]], params: Any, networks: tuple[str, ...]
) -> Any:
    """Return the gradients passed to optimizers, a tree like ``params``; None if ambiguous."""
    places = _matched(given, params, networks)
    if not places:
        return None

    def tree(network: str) -> Any:
        gradients = given[places[network]]
        own = params if network == "" else params[network]
        # The axis of the surrounding vmap, of size 1, may remain.
        leaves = [gradients[p].reshape(leaf.shape) for p, leaf in by_variable_path(own).items()]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(own), leaves)

    return tree("") if set(places) == {""} else {network: tree(network) for network in places}


def _optimizers(things: Mapping[str, Any], *, of_nnx: bool) -> list[Any]:
    """Return the optimizers in the things, in a fixed order."""
    if of_nnx:
        return [optimizer.tx for optimizer in objects.optimizers_of(things)]
    found: list[Any] = []

    def visit(value: Any) -> None:
        if callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
            found.append(value)
        elif is_dataclass(value) and not isinstance(value, type):
            for each in fields(value):
                visit(getattr(value, each.name, None))
        elif isinstance(value, Mapping):
            for each in value.values():
                visit(each)
        elif isinstance(value, tuple | list):
            for each in value:
                visit(each)

    visit(dict(things))
    return found


def _jointly(optimizers: Mapping[str, Any]) -> Any:
    """Return one optimizer for several networks, each with its own optimizer."""

    def init(params: Any) -> Any:
        return {network: tx.init(params[network]) for network, tx in optimizers.items()}

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        done = {
            network: tx.update(grads[network], state[network], params[network])
            for network, tx in optimizers.items()
        }
        return {n: each[0] for n, each in done.items()}, {n: each[1] for n, each in done.items()}

    return optax.GradientTransformation(init, update)

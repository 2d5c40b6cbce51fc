"""How a user's functions are called: the role of each parameter, found by its name.

The roles are: the objects in the state of a loop ("things": a train state, a model, an optimizer, a
pytree), the batch or its inputs and targets, a PRNG key, the learning rate, an optimizer. Most are found
by name, others by order; ``roles=`` declares the rest. The user must bind all other parameters. The
argument of a module that selects train mode is found by its name, too.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeAlias

from bnverify import probe
from bnverify.errors import UsageError

_WORDS = {
    "key": "rng key prng rng_key prng_key init_rng init_key params_rng dropout_rng dropout_key "
    "random_key train_rng step_rng noise_rng noise_key",
    "rngs": "rngs",
    "seed": "seed",
    "batch": "batch data minibatch train_batch eval_batch",
    "inputs": "x xb xs inputs input images image imgs x_batch batch_x sample sample_input example "
    "dummy_input features_batch",
    "targets": "y yb ys labels label targets target y_batch batch_y",
    "lr": "lr learning_rate base_lr base_learning_rate step_size",
    "tx": "tx optimizer opt",
    "features": "features din in_features num_features input_dim",
}
ROLES = {role: tuple(words.split()) for role, words in _WORDS.items()}
"""Role -> the names of parameters that have it."""

ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


def role_of(parameter: str) -> str | None:
    """Return the role that a parameter's name suggests; None if it suggests none. "*_rng" is a key."""
    is_key = parameter.endswith("_rng") or parameter.startswith("rng_")
    return ROLE_OF.get(parameter) or ("key" if is_key else None)


_KINDS = {
    "model": "model net network module",
    "optimizer": "optimizer opt optim tx",
    "metrics": "metrics metric",
    "rngs": "rngs",
    "params": "params parameters weights variables",
    "batch_stats": "batch_stats stats statistics model_state running_stats bn_state",
    "opt_state": "opt_state optimizer_state optim_state",
}
KIND_OF = {name: kind for kind, words in _KINDS.items() for name in words.split()}
"""Name of a parameter -> the kind of thing that it takes."""

ALL = "things"
"""The role of a parameter that takes all things in one object, as ``create`` returned it."""

TARGET = "target"
"""A name used both for the targets and for a target network."""

# These are passed even if the parameter has a default: laws change the learning rate, and None is no
# valid key for a model that draws random numbers.
OPTIONAL = ("lr", "tx", "key", "rngs")


@dataclass(frozen=True)
class Thing:
    """One object in the state of a loop.

    Attributes:
        name: its name: that of the parameter that takes it, or a key.
        kind: one of the kinds in ``KIND_OF``; "" if none fits.
    """

    name: str
    kind: str = ""


@dataclass(frozen=True)
class Caller:
    """A user's function and the roles of its parameters.

    Attributes:
        function: the function without jit; see ``plain``.
        positional: the roles of its positional parameters, in order. "thing:NAME" is one thing,
            "things" all of them in one object.
        named: parameter -> role, for those passed by keyword.
        roles: parameter -> role, for the required ones.
    """

    function: Callable[..., Any]
    positional: tuple[str, ...]
    named: Mapping[str, str]
    roles: Mapping[str, str]

    def takes(self, *roles: str) -> bool:
        """Return whether any parameter has one of the roles."""
        return any(role in self.positional or role in self.named.values() for role in roles)

    def things(self) -> dict[str, str]:
        """Return parameter -> name of the thing that it takes."""
        return {n: r.removeprefix("thing:") for n, r in self.roles.items() if _is_thing(r)}

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Call the function with those of ``values``, role -> value, that it takes."""
        named = {name: values[role] for name, role in self.named.items()}
        return self.function(*(values[role] for role in self.positional), **named)


def caller(
    function: Callable[..., Any],
    what: str,
    *,
    allowed: Collection[str],
    order: Sequence[str] = (),
    told: Mapping[str, str] | None = None,
    things: Sequence[Thing] = (),
    known: Mapping[str, str] | None = None,
    whole: bool | None = None,
) -> Caller:
    """Return how to call ``function``.

    Args:
        function: a user's function.
        what: its name in messages: "create".
        allowed: the available roles.
        order: the roles of required parameters whose names are unknown, first to last.
        told: parameter -> role, as declared by the user.
        things: the objects in the state of the loop.
        known: parameter -> role in another function of the loop. Of the things that are not in it,
            only one is assigned.
        whole: whether one parameter takes all things in one object. None: if there are fewer
            unassigned parameters than things.

    Raises:
        UsageError: the role of a required parameter is unknown.
    """
    raw = plain(function)
    parameters = _parameters(raw)
    required = [p.name for p in parameters if _is_required(p)]
    asked = {name: role for name, role in dict(told or {}).items() if name in required}
    found = _Assignment(allowed, {thing.name: thing.kind for thing in things}, dict(known or {}))
    for name in required:
        if name in asked:
            found.assign(name, _role(asked[name], name, allowed, things))
        else:
            found.by_name(name)
    if TARGET not in asked:
        found.target_as_a_thing(required)
    found.things_in_order(whole=whole)
    found.target_as_targets()
    found.batch_in_order(order)
    if found.left:
        raise UsageError(_unknown_role(what, raw, found.left[0], allowed))
    roles = found.roles
    positional = [roles[p.name] for p in parameters if p.name in roles and not _by_keyword(p)]
    named = {p.name: roles[p.name] for p in parameters if p.name in roles and _by_keyword(p)}
    for p in parameters:
        role = role_of(p.name) or ""
        if _is_optional(p) and role in OPTIONAL and role in allowed and role not in roles.values():
            named[p.name] = role
    return Caller(raw, tuple(positional), named, roles)


class _Assignment:
    """Assigns roles to the required parameters of one function.

    Args:
        allowed: see ``caller``.
        unclaimed: name of a thing that is not assigned yet -> its kind.
        known: see ``caller``.

    Attributes:
        roles: parameter -> role.
        left: the parameters without a role.
    """

    def __init__(
        self, allowed: Collection[str], unclaimed: dict[str, str], known: dict[str, str]
    ) -> None:
        self.roles: dict[str, str] = {}
        self.left: list[str] = []
        self._allowed = allowed
        self._unclaimed = unclaimed
        self._count = len(unclaimed)
        self._known = known

    def assign(self, parameter: str, role: str) -> None:
        """Assign a role to a parameter."""
        self.roles[parameter] = role
        self._unclaimed.pop(role.removeprefix("thing:"), None)

    def by_name(self, parameter: str) -> None:
        """Assign the role that the parameter's name suggests, if any."""
        role = role_of(parameter)
        kind = "key" if role == "key" else KIND_OF.get(parameter)
        alike = [name for name, each in self._unclaimed.items() if each and each == kind]
        if parameter in self._unclaimed:
            self.assign(parameter, f"thing:{parameter}")
        elif parameter in self._known:
            self.assign(parameter, self._known[parameter])
        elif alike:
            self.assign(parameter, f"thing:{alike[0]}")
        elif role is not None and role in self._allowed:
            self.assign(parameter, role)
        else:
            self.left.append(parameter)

    def target_as_a_thing(self, parameters: Sequence[str]) -> None:
        """Leave ``target`` to the remaining things, unless the function takes inputs but no other targets."""
        others = {role for name, role in self.roles.items() if name != TARGET}
        is_half = "inputs" in others and "targets" not in others
        if self.roles.get(TARGET) == "targets" and self._unclaimed and not is_half:
            del self.roles[TARGET]
            self.left = [name for name in parameters if name in {*self.left, TARGET}]

    def target_as_targets(self) -> None:
        """Assign ``target`` to the targets if no thing was left for it."""
        if TARGET in self.left and "targets" in self._allowed:
            self.left.remove(TARGET)
            self.assign(TARGET, "targets")

    def things_in_order(self, *, whole: bool | None) -> None:
        """Assign the remaining things in order, or all of them to the first remaining parameter."""
        all_free = len(self._unclaimed) == self._count > 1
        if whole is None:
            whole = all_free and 0 < len(self.left) < self._count
        if whole and self.left:
            self.assign(self.left.pop(0), ALL)
            return
        while self.left and self._unclaimed:
            if self._known and any(map(_is_thing, self.roles.values())):
                return  # an evaluation needs only one thing; the other parameters are the batch
            self.assign(self.left.pop(0), f"thing:{next(iter(self._unclaimed))}")

    def batch_in_order(self, order: Sequence[str]) -> None:
        """Assign the batch, or its inputs and targets, to the remaining parameters."""
        taken = set(self.roles.values())
        halves = {"inputs", "targets"}
        following = [role for role in order if role not in taken]
        if taken & halves:
            following = [role for role in following if role != "batch"]
        elif "batch" in order:
            following = [role for role in following if role not in halves]
        while self.left and following:
            self.assign(self.left.pop(0), following.pop(0))


def _by_keyword(p: inspect.Parameter) -> bool:
    return p.kind is p.KEYWORD_ONLY


def _is_thing(role: str) -> bool:
    return role.startswith("thing:")


def _role(asked: str, parameter: str, allowed: Collection[str], things: Sequence[Thing]) -> str:
    if asked in {thing.name for thing in things}:
        return f"thing:{asked}"
    if asked in allowed or asked == ALL:
        return asked
    kinds = [thing.name for thing in things if thing.kind == asked]
    if kinds:
        return f"thing:{kinds[0]}"
    known = ", ".join([*sorted(allowed), ALL, *(thing.name for thing in things)])
    raise UsageError(f"roles={{{parameter!r}: {asked!r}}} is not a role; the roles are {known}")


def _unknown_role(what: str, function: Any, name: str, allowed: Collection[str]) -> str:
    return (
        f"{what}{inspect.signature(function)}: it is unknown what to pass as {name!r}. If it is one "
        f"of {', '.join(sorted(allowed))}, declare roles={{{name!r}: ...}}; otherwise bind it: "
        f"functools.partial({what}, {name}=...)"
    )


def _parameters(function: Any) -> list[inspect.Parameter]:
    # The metaclass of nnx modules hides the parameters of their own __init__.
    is_class = isinstance(function, type)
    found = inspect.signature(function.__init__ if is_class else function).parameters.values()
    return list(found)[1:] if is_class else list(found)


def required_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters that have no default."""
    return [p.name for p in _parameters(plain(function)) if _is_required(p)]


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of all parameters."""
    return [p.name for p in _parameters(plain(function))]


def _is_required(p: inspect.Parameter) -> bool:
    return p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)


def _is_optional(p: inspect.Parameter) -> bool:
    return p.default is not p.empty and p.kind is not p.POSITIONAL_ONLY


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function inside ``jax.jit``, ``jax.pmap``, ``nnx.jit`` or ``shard_map``.

    A compiled function is not traced again, so its layers could not be observed, and one that donates
    its arguments would delete a state that is still needed. A function mapped over devices runs as the
    only shard of its axis instead. Methods and ``functools.partial`` stay bound.
    """
    if isinstance(function, functools.partial):
        inner = plain(function.func)
        return functools.partial(inner, *function.args, **function.keywords)
    if isinstance(function, MethodType):  # a compiled method has the attributes of its function
        return MethodType(plain(function.__func__), function.__self__)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and (hasattr(function, "lower") or _is_shard_map(function)):
        return plain(wrapped)
    return function


def _is_shard_map(function: Any) -> bool:
    # JAX wraps the function once more, to shorten tracebacks.
    inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    codes = [getattr(each, "__code__", None) for each in (function, *inside)]
    return any(code is not None and "shard_map" in code.co_filename for code in codes)


def label_of(function: Callable[..., Any]) -> str:
    """Return the name of a user's function for reports."""
    inner: Any = plain(function)
    while isinstance(inner, functools.partial):
        inner = inner.func
    return str(getattr(inner, "__name__", type(inner).__name__))


# The argument that selects train or eval mode, found by its name.

TRAINING = ("train", "training", "is_training", "is_train", "train_mode")
INFERENCE = (
    "use_running_average",
    "use_running_avg",
    "deterministic",
    "eval_mode",
    "is_eval",
    "inference",
    "testing",
)

Mode: TypeAlias = Callable[[bool], Mapping[str, bool]]
"""Function from "train mode" (a bool) to the keyword arguments that select it."""


def named(names: tuple[str, ...]) -> Mode:
    """Return the mode that sets these arguments, inverted if they mean inference.

    Raises:
        ValueError: the meaning of a name is unknown.
    """
    for name in names:
        if name not in (*TRAINING, *INFERENCE):
            raise ValueError(
                f"train_argument is {name!r}, and it is unknown whether True means training; pass a "
                f"function, lambda train: {{{name!r}: train}} or its opposite"
            )
    return lambda train: {name: train if name in TRAINING else not train for name in names}


def call_mode(function: Callable[..., Any], given: str | Mode | None = None) -> Mode:
    """Return how to select train mode in a call of ``function``.

    Args:
        function: a module's ``__call__``.
        given: the argument's name, or a function from a bool to keyword arguments; None: all
            parameters with names in ``TRAINING`` and ``INFERENCE`` are set.

    Raises:
        ValueError: the meaning of the name ``given`` is unknown.
    """
    if callable(given):
        return given
    if given is not None:
        return named((given,))
    return named(known_names(inspect.signature(function).parameters))


def known_names(names: Any) -> tuple[str, ...]:
    """Return those of ``names`` that select train or eval mode."""
    return tuple(name for name in names if name in (*TRAINING, *INFERENCE))


def trains(values: Mapping[str, Any]) -> bool | None:
    """Return whether named values select train mode; None if they do not tell."""
    for name in known_names(values):
        if isinstance(values[name], bool):
            return values[name] if name in TRAINING else not values[name]
    return None


# Arguments of adapters are checked before anything runs, since later errors occur inside a trace.

FUNCTIONS = {
    "optimizer": (
        1,
        "a function of the learning rate, like optax.sgd or lambda lr: optax.adam(lr)",
    ),
    "loss": (2, "a function (outputs, targets) -> scalar"),
    "batch": (2, "a function (x, y) -> the model's batch"),
    "weights": (2, "a function (x, y) -> a weight for each row"),
    "create": (None, "a function that makes the train state"),
    "make": (None, "a function that makes the model and its optimizer"),
    "train_step": (None, "a function, the training step of the loop"),
    "eval_step": (None, "a function, the evaluation step of the loop"),
}
"""Name of an argument -> (the number of arguments of that function, None if they are matched by name;
what the function is)."""


def functions(**given: Any) -> None:
    """Check that arguments are functions as described in ``FUNCTIONS``.

    Raises:
        UsageError: one is not; the message names the argument and what it must be.
    """
    for name, function in given.items():
        count, meant = FUNCTIONS[name]
        if not callable(function):
            raise UsageError(f"{name} must be {meant}, got {_described(function)}")
        if count is not None and not _takes(function, count):
            called = getattr(function, "__name__", type(function).__name__)
            raise UsageError(f"{name} must be {meant}; {called} takes other arguments")


def sizes(features: int | Collection[int] | None) -> tuple[int, ...] | None:
    """Return the values of D that a user gave, as a tuple; None: any.

    Raises:
        UsageError: they are not positive integers.
    """
    if features is None:
        return None
    try:
        single = not isinstance(features, Collection)
        found = tuple(map(operator.index, [features] if single else features))  # type: ignore[arg-type]
    except TypeError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(
            f"features must be the D that the model accepts, or several values, got {features!r}"
        )
    return found


def multiple(rows: Any) -> int | None:
    """Return the divisor of the number of rows that a user gave; None if there is none.

    Raises:
        UsageError: it is not a positive whole number.
    """
    if rows is None:
        return None
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise UsageError(f"rows must be a number that divides N, got {rows!r}")
    return rows


def linen_module(module: Any) -> None:
    """Check that an argument is a linen module.

    Raises:
        UsageError: it is not; the message says what to pass.
    """
    kind = probe.flax_kind(module)
    if kind == "linen" and isinstance(module, type):
        raise UsageError(f"linen takes a module, not its class: {probe.wrapped(module)}")
    if kind == "nnx":
        raise UsageError(f"that is an nnx module: {probe.wrapped(module)}")
    if kind is None:
        raise UsageError(f"linen takes a flax.linen module, got {_described(module)}")


def nnx_maker(make_module: Any) -> None:
    """Check that an argument is a function or class that makes an nnx module.

    Raises:
        UsageError: it is not; the message says what to pass.
    """
    kind = probe.flax_kind(make_module)
    if kind == "linen":
        raise UsageError(f"that is a linen module: {probe.wrapped(make_module)}")
    if kind == "nnx" and not isinstance(make_module, type):
        raise UsageError(
            "nnx needs the class, or a function of rngs, because it makes a new module for every "
            f"seed: {probe.wrapped(make_module)}"
        )
    if not callable(make_module):
        raise UsageError(
            f"nnx needs a class or function that makes an nnx module, got {_described(make_module)}"
        )


def nnx_caller(
    make: Callable[..., Any],
    what: str,
    sizes: Collection[int] | None,
    told: Mapping[str, str] | None = None,
) -> Caller:
    """Return how to call a function that makes nnx objects: with ``rngs``, D, lr and an optimizer.

    The PRNG streams are passed as ``rngs`` or as the last required parameter, but a key as ``key`` and a
    number as ``seed``; one other required parameter is the number of features, whatever its name.

    Args:
        make: the user's function.
        what: its name in messages: "make".
        sizes: the values of D that its model accepts; None: any.
        told: parameter -> role, as declared by the user.

    Raises:
        UsageError: it has more required parameters, or none for D although any D is accepted.
    """
    roles = dict(told or {})
    names = [n for n in required_names(make) if n not in roles and role_of(n) not in ("lr", "tx")]
    random = [n for n in names if role_of(n) in ("key", "seed") and not _takes_rngs(make, n)]
    others = [name for name in names if name != "rngs" and name not in random]
    takes_rngs = "rngs" in parameter_names(make)
    rngs = "rngs" if takes_rngs else others.pop() if others and not random else None
    if len(others) > 1:
        raise UsageError(
            f"{what} has the required parameters {', '.join(names)}, but it is called only with rngs "
            "and the number of features: wrap it in a lambda"
        )
    roles |= {} if rngs is None else {rngs: "rngs"}
    roles |= dict.fromkeys(others, "features")
    allowed = ("rngs", "key", "seed", "features", "lr", "tx")
    found = caller(make, what, allowed=allowed, told=roles)
    if sizes is None and not found.takes("features"):
        raise UsageError(
            f"{what} has no parameter for the number of features: pass features=D, the D that its "
            "model accepts, or add one, as in lambda din, rngs: ..."
        )
    return found


def _takes_rngs(make: Callable[..., Any], parameter: str) -> bool:
    """Return whether a parameter is annotated as ``nnx.Rngs``, whatever its name."""
    return "Rngs" in str(inspect.signature(make).parameters[parameter].annotation)


def _takes(function: Any, count: int) -> bool:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return True
    return probe.accepts(signature, *["any"] * count)


def _described(value: Any) -> str:
    simple = value is None or isinstance(value, str | int | float)
    return repr(value) if simple else f"a {type(value).__name__}"

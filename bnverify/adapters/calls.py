"""How a user's functions are called: what each parameter means, told by its name.

A step is called as it is written. What its parameters are is told by role: the objects that a
loop carries from step to step ("things": a train state, a model, an optimizer, loose trees), the
batch or its halves, a key, the learning rate, an optimizer. Names say most of it; order says the
rest; ``roles=`` settles what neither does. Whatever else a function needs, its user binds.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnverify import flax_module, probe
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
"""What a parameter can be -> the names that say so."""

ROLE_OF = {name: role for role, names in ROLES.items() for name in names}


def role_of(parameter: str) -> str | None:
    """Return what a parameter's name says it is; None: nothing. Any name that ends in "_rng" is a key."""
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
"""Name of a parameter -> the kind of carried object that it takes."""

TARGET = "target"
"""As often the network that is followed by another as what a row should be."""

# Filled even where they have a default: laws need to set the rate, and a model that draws random
# numbers does not take None for a key.
OPTIONAL = ("lr", "tx", "key", "rngs")


@dataclass(frozen=True)
class Thing:
    """One object that a loop carries from step to step.

    Attributes:
        name: how it is known: the name of the parameter that takes it, or a key.
        kind: one of the kinds that a parameter's name can tell; "" where none fits.
    """

    name: str
    kind: str = ""


@dataclass(frozen=True)
class Caller:
    """A user's function and what it is called with.

    Attributes:
        function: not compiled: see ``plain``.
        positional: the roles of its required parameters, in order. "thing:NAME" is one of the
            objects that the loop carries, "things" all of them as one.
        named: parameter -> role, of those passed by keyword.
        roles: parameter -> role, of the required ones.
    """

    function: Callable[..., Any]
    positional: tuple[str, ...]
    named: Mapping[str, str]
    roles: Mapping[str, str]

    def takes(self, *roles: str) -> bool:
        """Return whether any parameter has one of the roles."""
        return any(role in self.positional or role in self.named.values() for role in roles)

    def things(self) -> dict[str, str]:
        """Return parameter -> name of the carried object that it takes."""
        return {n: r.removeprefix("thing:") for n, r in self.roles.items() if _is_thing(r)}

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Call the function with role -> value, of which only those it takes are used."""
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
        function: a user's.
        what: how messages call it: "create".
        allowed: the roles that there are values for.
        order: the roles of required parameters about which nothing else is known, first to last.
        told: parameter -> role, as the user says.
        things: the objects that the loop carries.
        known: parameter -> role, as another function of the loop takes them. Of things that are not
            known so, one alone is taken.
        whole: whether one parameter takes all things as one. None: where fewer parameters are
            left than there are things.

    Raises:
        UsageError: a required parameter's role cannot be told.
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
        raise UsageError(_untold(what, raw, found.left[0], allowed))
    roles = found.roles
    positional = [roles[p.name] for p in parameters if p.name in roles and not _by_keyword(p)]
    named = {p.name: roles[p.name] for p in parameters if p.name in roles and _by_keyword(p)}
    for p in parameters:
        role = role_of(p.name) or ""
        if _is_optional(p) and role in OPTIONAL and role in allowed and role not in roles.values():
            named[p.name] = role
    return Caller(raw, tuple(positional), named, roles)


class _Assignment:
    """Roles for the required parameters of one function, found one way after the other.

    Args:
        allowed: see ``caller``.
        unclaimed: name of a thing that no parameter takes yet -> its kind.
        known: see ``caller``.

    Attributes:
        roles: parameter -> role.
        left: the parameters without one.
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
        """Give a parameter its role."""
        self.roles[parameter] = role
        self._unclaimed.pop(role.removeprefix("thing:"), None)

    def by_name(self, parameter: str) -> None:
        """Give a parameter the role that its name tells, or leave it."""
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
        """Leave ``target`` to the things that are left, unless it is the other half of some inputs."""
        others = {role for name, role in self.roles.items() if name != TARGET}
        is_half = "inputs" in others and "targets" not in others
        if self.roles.get(TARGET) == "targets" and self._unclaimed and not is_half:
            del self.roles[TARGET]
            self.left = [name for name in parameters if name in {*self.left, TARGET}]

    def target_as_targets(self) -> None:
        """Take ``target`` for the targets where no thing was left for it."""
        if TARGET in self.left and "targets" in self._allowed:
            self.left.remove(TARGET)
            self.assign(TARGET, "targets")

    def things_in_order(self, *, whole: bool | None) -> None:
        """Give the parameters that are left the things that are, or the first of them all as one."""
        all_free = len(self._unclaimed) == self._count > 1
        if whole is None:
            whole = all_free and 0 < len(self.left) < self._count
        if whole and self.left:
            self.assign(self.left.pop(0), "things")
            return
        while self.left and self._unclaimed:
            if self._known and any(map(_is_thing, self.roles.values())):
                return  # one thing is enough for an evaluation: what is left is the batch
            self.assign(self.left.pop(0), f"thing:{next(iter(self._unclaimed))}")

    def batch_in_order(self, order: Sequence[str]) -> None:
        """Give the parameters that are left what is left of a batch: all of it, or one half."""
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
    if asked in allowed or asked == "things":
        return asked
    kinds = [thing.name for thing in things if thing.kind == asked]
    if kinds:
        return f"thing:{kinds[0]}"
    known = ", ".join([*sorted(allowed), *(thing.name for thing in things)])
    raise UsageError(f"roles: {parameter!r} is told to be {asked!r}; there are {known}")


def _untold(what: str, function: Any, name: str, allowed: Collection[str]) -> str:
    return (
        f"{what}{inspect.signature(function)}: what to pass as {name!r} cannot be told. If it is "
        f"one of {', '.join(sorted(allowed))}, say roles={{{name!r}: ...}}; anything else, bind: "
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
    """Return what ``jax.jit``, ``jax.pmap``, ``nnx.jit`` or ``shard_map`` was given, arguments bound.

    A compiled function is not traced again, so its layers could not be looked at; one that
    donates its arguments would take a state that is still needed. What is mapped over devices
    runs as the only shard of its axis instead.
    """
    if isinstance(function, functools.partial):
        inner = plain(function.func)
        return functools.partial(inner, *function.args, **function.keywords)
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None and (hasattr(function, "lower") or _is_shard_map(function)):
        return plain(wrapped)
    return function


def _is_shard_map(function: Any) -> bool:
    # JAX wraps what it returns once more, to shorten its tracebacks.
    inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    codes = [getattr(each, "__code__", None) for each in (function, *inside)]
    return any(code is not None and "shard_map" in code.co_filename for code in codes)


def label_of(function: Callable[..., Any]) -> str:
    """Return how a report calls a user's function."""
    inner: Any = plain(function)
    while isinstance(inner, functools.partial):
        inner = inner.func
    return str(getattr(inner, "__name__", type(inner).__name__))


# What adapters are given, looked at before anything runs: later it fails inside a trace.

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
    "train_step": (None, "a function, the loop's own training step"),
    "eval_step": (None, "a function, the loop's own evaluation"),
}
"""Name of an argument -> how many arguments that function takes (None: told by their names), and what
it is."""


def functions(**given: Any) -> None:
    """Refuse arguments that are not the functions of ``FUNCTIONS``.

    Raises:
        UsageError: naming the argument and what it must be.
    """
    for name, function in given.items():
        count, meant = FUNCTIONS[name]
        if not callable(function):
            raise UsageError(f"{name} must be {meant}, got {_described(function)}")
        if count is not None and not _takes(function, count):
            called = getattr(function, "__name__", type(function).__name__)
            raise UsageError(f"{name} must be {meant}; {called} takes other arguments")


def sizes(features: int | Collection[int] | None) -> tuple[int, ...] | None:
    """Return the feature sizes that a user named, as a tuple; None: any.

    Raises:
        UsageError: they are no positive whole numbers.
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
            f"features must be the D that the model takes, or several, got {features!r}"
        )
    return found


def multiple(rows: Any) -> int | None:
    """Return of which number the rows of a batch are a multiple, as a user says; None: not said.

    Raises:
        UsageError: it is no positive whole number.
    """
    if rows is None:
        return None
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise UsageError(f"rows must be the number of which N is a multiple, got {rows!r}")
    return rows


def linen_module(module: Any) -> None:
    """Refuse what is no linen module.

    Raises:
        UsageError: saying what it is, and what to pass.
    """
    kind = flax_module.kind(module)
    if kind == "linen" and isinstance(module, type):
        raise UsageError(f"linen takes a module, not its class: {flax_module.wrapped(module)}")
    if kind == "nnx":
        raise UsageError(f"that is an nnx module: {flax_module.wrapped(module)}")
    if kind is None:
        raise UsageError(f"linen takes a flax.linen module, got {_described(module)}")


def nnx_maker(make_module: Any) -> None:
    """Refuse what makes no nnx module.

    Raises:
        UsageError: saying what it is, and what to pass.
    """
    kind = flax_module.kind(make_module)
    if kind == "linen":
        raise UsageError(f"that is a linen module: {flax_module.wrapped(make_module)}")
    if kind == "nnx" and not isinstance(make_module, type):
        raise UsageError(
            "nnx makes the module anew for every seed, so it takes the class, or a function of "
            f"rngs: {flax_module.wrapped(make_module)}"
        )
    if not callable(make_module):
        raise UsageError(f"nnx takes what makes an nnx module, got {_described(make_module)}")


def nnx_caller(
    make: Callable[..., Any], what: str, told: Mapping[str, str] | None = None
) -> Caller:
    """Return how to call what makes nnx objects: with ``rngs``, and perhaps D, a rate, an optimizer.

    Random streams go by the name ``rngs`` or to the last required parameter; one other required
    parameter is the number of features, whatever its name.

    Raises:
        UsageError: it has more required parameters.
    """
    roles = dict(told or {})
    names = [n for n in required_names(make) if n not in roles and role_of(n) not in ("lr", "tx")]
    others = [name for name in names if name != "rngs"]
    rngs = "rngs" if "rngs" in parameter_names(make) else others.pop() if others else None
    if len(others) > 1:
        raise UsageError(
            f"{what} has the required parameters {', '.join(names)}; it is called with rngs and at "
            "most one more, the number of features: wrap it in a lambda"
        )
    roles |= {} if rngs is None else {rngs: "rngs"}
    roles |= dict.fromkeys(others, "features")
    return caller(make, what, allowed=("rngs", "features", "lr", "tx"), told=roles)


def _takes(function: Any, count: int) -> bool:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have none
        return True
    return probe.accepts(signature, *["any"] * count)


def _described(value: Any) -> str:
    simple = value is None or isinstance(value, str | int | float)
    return repr(value) if simple else f"a {type(value).__name__}"

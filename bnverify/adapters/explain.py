"""Explaining errors that JAX, Flax and Optax raise for common mistakes."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bnverify.errors import UsageError, first_line
from bnverify.mistakes import MISTAKES, Mistake

FLAX_BATCH_NORM = "https://flax.readthedocs.io/en/latest/guides/training_techniques/batch_norm.html"

REFUSED = {
    mistake.name: mistake
    for mistake in (
        Mistake(
            "statistics_not_passed",
            "the model is applied without a collection that it needs",
            'model.apply({"params": params, "batch_stats": batch_stats}, ...)',
            FLAX_BATCH_NORM,
        ),
        Mistake(
            "aux_missing",
            "has_aux=True was given, but the loss does not return a pair",
            "return loss, new_batch_stats from the function that is differentiated",
        ),
        Mistake(
            "random_stream_not_passed",
            "the model draws random numbers but was given no PRNG key",
            'pass rngs={"dropout": key} to model.apply, with a new key in each step; in bnverify.linen, '
            "rngs= lists the streams",
        ),
        Mistake(
            "other_input_shape",
            "the model is applied to inputs of a different size than it was initialised with",
            "pass features=D, the number of features that it accepts; for images also make the batch: "
            "features=64, batch=lambda x, y: (x.reshape(-1, 8, 8, 1), y)",
        ),
        Mistake(
            "labels_not_integers",
            "the loss takes integer labels, and the generated targets are real numbers",
            "make labels of them in the batch: batch=lambda x, y: (x, bnverify.classes(y, 10))",
        ),
        Mistake(
            "input_without_axes",
            "a layer is applied to a scalar, or to a key of a dict, instead of a batch",
            "pass a function that makes the batch from x (N, D) and y (N,): batch=lambda x, y: (x, y)",
        ),
        Mistake(
            "shapes_do_not_broadcast",
            "arrays whose shapes do not broadcast are combined",
            "give predictions and targets the same shape before subtracting: out.reshape(-1)",
        ),
        Mistake(
            "buffer_donated",
            "an array is used after it was donated",
            "use the result of the call; donate_argnums lets it reuse the argument's memory",
        ),
        Mistake(
            "not_traceable",
            "a traced value is converted to a Python or NumPy value",
            "use jnp and jax.lax.cond in the step; int(), float(), if and np.asarray need concrete values",
            "https://docs.jax.dev/en/latest/errors.html",
        ),
        Mistake(
            "value_leaks",
            "a traced value is used outside of the function that is being traced",
            "return it from the function; do not assign it to a global, an attribute or a list",
        ),
        Mistake(
            "axis_not_bound",
            "a collective such as pmean uses an axis name that is not bound",
            'pass axis_name="batch" to the adapter, or remove the pmean from single-device code',
        ),
        Mistake(
            "unknown_argument",
            "a function is called with an unknown argument, or without a required one",
            "give the name of the train-mode argument with train_argument=, or wrap the function",
        ),
        Mistake(
            "state_assigned",
            "a field of an immutable state is assigned",
            "state = state.replace(batch_stats=...), which returns a new state",
        ),
        Mistake(
            "no_statistics_field",
            "the train state has no field for the running statistics",
            "class TrainState(train_state.TrainState): batch_stats: Any, and pass them to create",
            FLAX_BATCH_NORM,
        ),
        Mistake(
            "nnx_variable_from_outside",
            "an nnx module is modified inside a transformation that it was not passed to",
            "use nnx.grad and nnx.jit, and pass the module as an argument instead of a closure",
        ),
        Mistake(
            "nnx_object_by_closure",
            "a compiled or differentiated function closes over an nnx model or optimizer",
            "use nnx.jit and nnx.grad, and pass the model and the optimizer as arguments",
            "https://github.com/google/flax/issues/4695",
        ),
        Mistake(
            "nnx_object_broadcast",
            "an nnx object is broadcast through a transformation that may modify it",
            "give the axes of its variables: in_axes=nnx.StateAxes({nnx.Param: 0, ...: None})",
        ),
        Mistake(
            "train_flag_traced",
            "nn.remat or nn.jit traces the argument that selects train mode",
            "make it static: nn.remat(Block, static_argnums=(2,)); self counts as 0",
            "https://github.com/google/flax/issues/3946",
        ),
        Mistake(
            "seed_not_a_key",
            "a traced seed is passed instead of a PRNG key",
            "nnx.Rngs(jax.random.key(seed))",
        ),
        Mistake(
            "nnx_optimizer_form",
            "nnx.Optimizer is called with the arguments of a different Flax release",
            "from flax 0.11 on: Optimizer(model, tx, wrt=nnx.Param) and optimizer.update(model, grads)",
        ),
        Mistake(
            "whole_batch_as_a_half",
            "the parameter has the name of one half of the batch, and the step reads all of it there",
            'say that it is the whole: roles={"inputs": "batch"}, with the parameter\'s own name',
        ),
        Mistake(
            "batch_key",
            "the batch does not have the key that the step reads",
            'pass a function that makes the batch: batch=lambda x, y: {"image": x, "label": y}, or (x, y)',
        ),
    )
}
"""Mistakes for which the libraries raise errors; those that violate laws are in
``bnverify.mistakes``."""


@dataclass(frozen=True)
class Symptom:
    """The error that a mistake raises.

    Attributes:
        mistake: the name of the mistake.
        types: the names of possible exception classes.
        pattern: a regular expression that the message must match; empty: any message.
    """

    mistake: str
    types: tuple[str, ...]
    pattern: str = ""

    def fits(self, error: BaseException) -> bool:
        """Return whether ``error`` has one of the types and a matching message."""
        names = {cls.__name__ for cls in type(error).__mro__}
        return bool(names & set(self.types)) and bool(
            re.search(self.pattern, str(error), re.DOTALL)
        )


# The first match counts. The messages are those of flax 0.8.5 to 0.12.12 and jax 0.4.30 to 0.12.
SYMPTOMS = (
    Symptom(
        "train_flag_traced",
        ("ConcretizationTypeError",),
        r"bool\[\].*(for checkpoint|for remat|tracing the function \w+ .*(linen|transforms))",
    ),
    Symptom(
        "nnx_object_by_closure",
        ("ValueError", "TraceContextError"),
        r"Cannot extract graph node from different trace level",
    ),
    Symptom(
        "nnx_object_broadcast",
        ("ValueError",),
        r"(Inconsistent aliasing|inconsistent.*(prefix|axes)|broadcast.*(graph|nnx|State))",
    ),
    Symptom("seed_not_a_key", ("ValueError", "TypeError"), r"Invalid rng value"),
    Symptom("mutable_forgotten", ("ModifyScopeVariableError",)),
    Symptom("has_aux_forgotten", ("TypeError",), r"scalar-output functions\. Output was \("),
    Symptom("aux_missing", ("TypeError",), r"aux output to return a two-element tuple"),
    Symptom("loss_not_reduced", ("TypeError",), r"scalar-output functions\. Output had shape"),
    Symptom("statistics_not_passed", ("ScopeCollectionNotFound",)),
    Symptom("random_stream_not_passed", ("InvalidRngError",)),
    Symptom("other_input_shape", ("ScopeParamShapeError",)),
    Symptom("other_input_shape", ("TypeError",), r"dot_general requires contracting dim"),
    Symptom("labels_not_integers", ("TypeError",), r"subdtype of .*integer.*got float"),
    Symptom(
        "labels_not_integers", ("TypeError",), r"take_along_axis indices must be of integer type"
    ),
    Symptom(
        "optimizer_on_all_variables",
        ("ValueError", "TypeError"),
        r"(pytree structure error|key mismatch).*\bbatch_stats\b",
    ),
    Symptom(
        "shapes_do_not_broadcast",
        ("ValueError", "TypeError"),
        r"[Ii]ncompatible shapes for broadcasting",
    ),
    Symptom("buffer_donated", ("RuntimeError", "ValueError"), r"has been (deleted|donated)"),
    Symptom("value_leaks", ("UnexpectedTracerError", "JaxTransformError")),
    Symptom(
        "not_traceable",
        (
            "ConcretizationTypeError",
            "TracerArrayConversionError",
            "TracerIntegerConversionError",
            "NonConcreteBooleanIndexError",
        ),
    ),
    Symptom("axis_not_bound", ("NameError",), r"unbound axis name"),
    Symptom("nnx_variable_from_outside", ("TraceContextError",)),
    Symptom(
        "nnx_optimizer_form",
        ("TypeError",),
        r"required argument `(wrt|grads)`|Optimizer\.update\(\) takes",
    ),
    Symptom("state_assigned", ("FrozenInstanceError",)),
    Symptom("no_statistics_field", ("AttributeError",), r"State' object has no attribute 'batch_"),
    Symptom("no_statistics_field", ("TypeError",), r"State\.__init__\(\) got .* 'batch_stats'"),
    Symptom(
        "unknown_argument",
        ("TypeError",),
        r"\(\) (got an unexpected keyword|missing \d+ required)",
    ),
    Symptom("batch_key", ("KeyError",), r"^('(images?|labels?|x|y|inputs?|targets?|data)'|[01])$"),
    Symptom("batch_key", ("AttributeError",), r"'(dict|tuple|list)' object has no attribute '\w+'"),
    Symptom("batch_key", ("TypeError",), r"tuple indices must be integers or slices, not str"),
    Symptom("whole_batch_as_a_half", ("TypeError",), r"does not support string indexing"),
    Symptom("input_without_axes", ("IndexError",), r"^tuple index out of range$"),
)


class SubjectError(UsageError):
    """An error raised by user code, explained by the mistake that usually causes it.

    Attributes:
        mistake: the mistake, with its name, title and fix.
        where: "path:line" of the innermost line of user code; "" if there is none.
    """

    def __init__(self, message: str, mistake: Mistake, where: str) -> None:
        super().__init__(message)
        self.mistake = mistake
        self.where = where


def mistake(error: BaseException) -> Mistake | None:
    """Return the mistake that usually causes ``error``; None if none is known."""
    for symptom in SYMPTOMS:
        if symptom.fits(error):
            return MISTAKES.get(symptom.mistake) or REFUSED[symptom.mistake]
    return None


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost frame of user code in ``error``; None if there is none."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame for frame in frames if not is_library(frame.filename)), None)


def is_library(filename: str) -> bool:
    """Return whether a file belongs to a library, to Python or to bnverify, not to the user."""
    if filename.startswith("<"):
        return True
    path = Path(filename)
    here = Path(__file__).parents[1]
    if path.is_relative_to(here):
        # The zoo contains models and loops like a user's own.
        return not path.is_relative_to(here / "zoo")
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(path.is_relative_to(place) for place in places)


def explained_error(error: Exception, doing: str) -> SubjectError | None:
    """Return ``error`` with an explanation; None if no common mistake causes it.

    Args:
        error: what was raised.
        doing: what was being done: "the training step".
    """
    found = mistake(error)
    if found is None:
        return None
    frame = user_frame(error)
    where = f"{frame.filename}:{frame.lineno}" if frame else ""
    line = f" ({where}: {frame.line})" if frame else ""
    return SubjectError(
        f"{doing} raises {first_line(error)}{line}; usually {found.title}. Fix: {found.fix}",
        found,
        where,
    )


@contextmanager
def explaining(doing: str) -> Iterator[None]:
    """Convert errors that common mistakes cause in this block to SubjectError.

    Args:
        doing: what is being done: "the training step".
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        explained = explained_error(error, doing)
        if explained is None:
            raise
        raise explained from error

"""Errors that JAX, Flax and Optax raise at a user's mistake, explained by the mistake's name."""

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
            "the model is applied without a collection that it reads",
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
            "the model draws random numbers and was given no key for them",
            'pass rngs={"dropout": key} to model.apply, a new key each step; here, rngs= names them',
        ),
        Mistake(
            "other_input_shape",
            "the model is applied to inputs of another size than it was initialised with",
            "give the subject features=D, the sizes it accepts, or make the batch from x with batch=",
        ),
        Mistake(
            "input_without_axes",
            "a layer is given something that is no batch: a number, or the key of a dict unpacked",
            "say how the batch is made of x (N, D) and y (N,): batch=lambda x, y: (x, y)",
        ),
        Mistake(
            "shapes_do_not_broadcast",
            "arrays of shapes that do not fit are combined",
            "bring predictions and targets to one shape before subtracting: out.reshape(-1)",
        ),
        Mistake(
            "buffer_donated",
            "an array is used after a call that was allowed to overwrite it",
            "use what the call returned; donate_argnums gives the argument's memory away",
        ),
        Mistake(
            "not_traceable",
            "a traced value is turned into a Python or NumPy one",
            "inside the step use jnp and jax.lax.cond; int(), float(), if and np.asarray need values",
            "https://docs.jax.dev/en/latest/errors.html",
        ),
        Mistake(
            "value_leaks",
            "a value is kept outside of the traced function that made it",
            "return it from the function; do not assign it to a global, an attribute or a list",
        ),
        Mistake(
            "axis_not_bound",
            "a collective names a mapped axis that nothing maps over",
            'pass axis_name="batch" here, or remove the pmean from single-device code',
        ),
        Mistake(
            "unknown_argument",
            "a function is called with an argument that it does not have, or without one it needs",
            "name the argument for train mode with train_argument=, or wrap the function",
        ),
        Mistake(
            "state_assigned",
            "a field of an immutable state is assigned to",
            "state = state.replace(batch_stats=...): it returns a new state",
        ),
        Mistake(
            "no_statistics_field",
            "the train state has no field for the running statistics",
            "class TrainState(train_state.TrainState): batch_stats: Any, and pass them to create",
            FLAX_BATCH_NORM,
        ),
        Mistake(
            "nnx_variable_from_outside",
            "an nnx module is written inside a transformation that it was not passed to",
            "use nnx.grad and nnx.jit and pass the module as an argument, not by closure",
        ),
        Mistake(
            "nnx_object_by_closure",
            "an nnx model or optimizer reaches a compiled or differentiated function by closure",
            "use nnx.jit and nnx.grad, and pass the model and the optimizer as arguments",
            "https://github.com/google/flax/issues/4695",
        ),
        Mistake(
            "nnx_object_broadcast",
            "an nnx object is broadcast through a transformation that may write it",
            "say which of its variables have an axis: nnx.StateAxes({nnx.Param: 0, ...: None}) as in_axes",
        ),
        Mistake(
            "train_flag_traced",
            "the argument that says whether the model trains is traced by nn.remat or nn.jit",
            "make it static: nn.remat(Block, static_argnums=(2,)); the numbers count self as 0",
            "https://github.com/google/flax/issues/3946",
        ),
        Mistake(
            "seed_not_a_key",
            "a seed that is traced is given where a key is needed",
            "nnx.Rngs(jax.random.key(seed))",
        ),
        Mistake(
            "nnx_optimizer_form",
            "nnx.Optimizer is used in the form of another Flax release",
            "from flax 0.11: Optimizer(model, tx, wrt=nnx.Param) and optimizer.update(model, grads)",
        ),
        Mistake(
            "whole_batch_as_a_half",
            "the parameter has the name of one half of the batch, and the step reads all of it there",
            'say that it is the whole: roles={"inputs": "batch"}, with the parameter\'s own name',
        ),
        Mistake(
            "batch_key",
            "the batch does not have the key that the step reads",
            'say how the batch is made: batch=lambda x, y: {"image": x, "label": y}, or (x, y)',
        ),
    )
}
"""What the libraries refuse; the laws' own mistakes are in ``bnverify.mistakes``."""


@dataclass(frozen=True)
class Symptom:
    """How a mistake shows.

    Attributes:
        mistake: its name.
        types: names of exception classes, any of which it raises as.
        pattern: what the message must match; empty: any.
    """

    mistake: str
    types: tuple[str, ...]
    pattern: str = ""

    def fits(self, error: BaseException) -> bool:
        """Return whether ``error`` is of one of the types and says so."""
        names = {cls.__name__ for cls in type(error).__mro__}
        return bool(names & set(self.types)) and bool(
            re.search(self.pattern, str(error), re.DOTALL)
        )


# The first that fits counts. Words are those of flax 0.8.5 to 0.12.12 and jax 0.4.30 to 0.12.
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
    """A user's code that a library refused, with the mistake that usually does it.

    Attributes:
        mistake: its name, title and fix.
        where: "path:line" of the innermost line of the user's own code; "" where there is none.
    """

    def __init__(self, message: str, mistake: Mistake, where: str) -> None:
        super().__init__(message)
        self.mistake = mistake
        self.where = where


def mistake(error: BaseException) -> Mistake | None:
    """Return the mistake that usually raises ``error``; None where no common one is known."""
    for symptom in SYMPTOMS:
        if symptom.fits(error):
            return MISTAKES.get(symptom.mistake) or REFUSED[symptom.mistake]
    return None


def user_frame(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost frame of ``error`` that belongs to no library; None: all do."""
    frames = reversed(traceback.extract_tb(error.__traceback__))
    return next((frame for frame in frames if not is_library(frame.filename)), None)


def is_library(filename: str) -> bool:
    """Return whether a file is no user's own: a library's, Python's, or of bnverify itself."""
    if filename.startswith("<"):
        return True
    path = Path(filename)
    here = Path(__file__).parents[1]
    if path.is_relative_to(here):
        # Models and loops like a user's own.
        return not any(path.is_relative_to(here / name) for name in ("zoo", "mutants"))
    places = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(path.is_relative_to(place) for place in places)


def explained_error(error: Exception, doing: str) -> SubjectError | None:
    """Return ``error`` explained; None where no common mistake raises it.

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
    """Raise what common mistakes raise in this block as SubjectError, anything else unchanged.

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

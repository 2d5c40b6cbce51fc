"""Loading the Subject that ``module:name`` or ``file.py:name`` names."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

from bnverify import probe
from bnverify.adapters import explain
from bnverify.errors import UsageError, did_you_mean, first_line
from bnverify.model import CheckpointedSubject, Parallel, Subject
from bnverify.probe import subject_of

T = TypeVar("T")

Target: TypeAlias = Subject | CheckpointedSubject | Parallel
"""What ``bnverify.verify`` accepts."""

REFERENCE = "bnverify.reference:sgd"
SOLUTION = ("seed", "x_batch", "y_batch", "lr")


class TargetError(UsageError):
    """A target that cannot be loaded or verified; the message is one line."""


_BESIDE: dict[str, tuple[Path, ModuleType]] = {}
"""Modules imported from beside a target: name -> the target's directory, and the module."""


@contextmanager
def importable(home: Path) -> Iterator[None]:
    """Put a directory first on ``sys.path`` while the block runs.

    Args:
        home: an absolute path.

    Raises:
        TargetError: ``home`` has a module of the same name as one that another target imported from
            its own directory. Python would give this target that one.
    """
    for name, (other, module) in _BESIDE.items():
        if other != home and sys.modules.get(name) is module and _holds(home, name):
            raise TargetError(
                f"{name} was imported from {other} for another target, and {home} has a module of "
                "that name, too: load the two in separate processes"
            )
    path, known = sys.path[:], set(sys.modules)
    sys.path.insert(0, str(home))
    importlib.invalidate_caches()  # a file written a moment ago must be found
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            if "." not in name and _holds(home, name):
                _BESIDE[name] = home, sys.modules[name]


def _holds(home: Path, name: str) -> bool:
    return (home / f"{name}.py").is_file() or (home / name).is_dir()


def load(target: str) -> Target:
    """Return the subject that ``target`` names.

    Args:
        target: ``package.module:name`` or ``path/file.py:name`` of a Subject, a CheckpointedSubject
            or a Parallel, of a function without arguments that returns one, or of a function with
            the signature of the reference, ``(seed, x_batch, y_batch, lr)``. A file may import
            modules from its own directory.

    Raises:
        TargetError: the target cannot be loaded or verified; the message says why, in one line.
    """
    source, name = _split(target)
    with importable(directory(target)):
        made = _made(_lookup(_import(source), source, name), target)
        _check(subject_of(made), target)
        if isinstance(made, Subject) and not made.hints:  # an adapter has looked already
            made = _looked_at(made)
    return made


def _looked_at(made: Subject) -> Subject:
    """Return a Subject written by hand, completed by an analysis of its traces."""
    from bnverify.adapters.analysis import completed

    try:
        return completed(made, written_by_hand=True)
    except Exception:  # noqa: BLE001 - a step that does not trace may still run
        return made


def directory(target: str) -> Path:
    """Return the directory for imports: that of the file, or the current one for a module."""
    source, _ = _split(target)
    return Path(source).resolve().parent if _is_file(source) else Path.cwd()


def anywhere(target: str) -> str:
    """Return ``target`` in a form that works from any directory, for counterexample scripts.

    A file, or a module in the current directory, is given by its absolute path. A module of a package
    keeps its name, and is found if the package is installed.
    """
    source, name = _split(target)
    if _is_file(source):
        return f"{Path(source).resolve()}:{name}"
    beside = Path.cwd() / f"{source}.py"
    return f"{beside}:{name}" if beside.is_file() else target


def line(target: str) -> tuple[str, int] | None:
    """Return the file and line where the name of ``target`` is defined; None if unknown.

    The module is parsed, not imported.
    """
    source, name = _split(target)
    path = Path(source)
    if not _is_file(source):
        with importable(directory(target)), contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(source)
            path = Path(spec.origin) if spec is not None and spec.origin else path
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None
    first = name.partition(".")[0]
    for node in tree.body:
        names = [getattr(node, "name", "")]
        bound = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names += [each.id for each in bound if isinstance(each, ast.Name)]
        if first in names:
            return str(path), node.lineno
    return str(path), 1


def _split(target: object) -> tuple[str, str]:
    source, _, name = target.rpartition(":") if isinstance(target, str) else ("", "", "")
    if not source or not all(part.isidentifier() for part in name.split(".")):
        missing = isinstance(target, str) and ":" not in target and target.endswith(".py")
        fix = f"; add the name of the subject in it: {target}:NAME" if missing else ""
        raise TargetError(f"a target is module:name or path/file.py:name, got {target!r}{fix}")
    return source, name


def _is_file(source: str) -> bool:
    dotted = all(part.isidentifier() for part in source.split("."))
    return source.endswith(".py") or not dotted or Path(source).is_file()


def _import(source: str) -> ModuleType:
    if _is_file(source):
        path = Path(source)
        if not path.exists():
            beside = path.parent.glob("*.py") if path.parent.is_dir() else ()
            raise TargetError(
                f"no file {source}{did_you_mean(path.name, (p.name for p in beside))}"
            )
        if not path.is_file() or path.suffix != ".py":
            raise TargetError(f"{source} is not a Python file (.py)")
        return _running_user_code(source, lambda: _execute(path.resolve()))
    return _running_user_code(source, lambda: importlib.import_module(source))


def _execute(path: Path) -> ModuleType:
    # A unique name, since the file may be named like a module that others import.
    name = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up here
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _running_user_code(source: str, run: Callable[[], T]) -> T:
    """Return ``run()``; any exception becomes a TargetError that names the line in the user's code."""
    try:
        return run()
    except UsageError as error:  # its message already explains the problem
        line = "" if isinstance(error, explain.SubjectError) else user_line(error)
        raise TargetError(f"{error}{line}") from None
    except SystemExit as error:
        raise TargetError(f"{source} exits with {error.code!r} when imported") from None
    except ModuleNotFoundError as error:
        if error.name and (source == error.name or source.startswith(f"{error.name}.")):
            raise TargetError(f"no module {error.name!r} here or installed") from None
        raise TargetError(f"{source} raises {first_line(error)}{user_line(error)}") from None
    except Exception as error:  # noqa: BLE001 - whatever a user's code raises
        hint = ""
        if isinstance(error, ImportError) and "relative import" in str(error):
            hint = "; name it by its module, package.module:name"
        raise TargetError(f"{source} raises {first_line(error)}{user_line(error)}{hint}") from None


def user_line(error: BaseException) -> str:
    """Return " (path:line: source)" of the innermost line of user code in ``error``; "" if none."""
    if isinstance(error, SyntaxError):
        text = (error.text or "").strip()
        return f" ({error.filename}:{error.lineno}: {text})" if error.filename else ""
    frame = explain.user_frame(error)
    return f" ({frame.filename}:{frame.lineno}: {frame.line})" if frame else ""


def running_line(thread: threading.Thread) -> str:
    """Return the same for the line of user code that a thread is executing."""
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - documented, for debugging
    frames = reversed(traceback.extract_stack(frame))
    at = next((each for each in frames if not explain.is_library(each.filename)), None)
    return f" ({at.filename}:{at.lineno}: {at.line})" if at else ""


def _lookup(module: ModuleType, source: str, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = [each for each in dir(value) if not each.startswith("_")]
            raise TargetError(f"{source} has no {name!r}{did_you_mean(part, known)}")
        value = getattr(value, part)
    return value


def _made(value: Any, target: str) -> Target:
    check = getattr(value, "bnverify_suite", None)
    if check is not None:  # a bnverify.suite, which counterexample scripts may name
        value = _running_user_code(target, lambda: check.subject)
    if isinstance(value, Target):
        return value
    _refuse_module(value, target)
    if not callable(value):
        raise TargetError(
            f"{target} is of type {type(value).__name__}, neither a bnverify.Subject nor a function"
        )
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some builtins have none
        raise TargetError(f"{target} has no signature to read; wrap it in a function") from None
    if probe.accepts(signature, *SOLUTION) and not probe.accepts(signature):
        from bnverify.adapters.solution import solution

        return _running_user_code(target, lambda: solution(value))
    if not probe.accepts(signature):
        raise TargetError(
            f"{target}{signature} must take no arguments and return a bnverify.Subject, or take "
            f"({', '.join(SOLUTION)}){_adapter(signature)}"
        )
    made = _running_user_code(target, value)
    _refuse_module(made, f"what {target}() returned")
    if not isinstance(made, Target):
        raise TargetError(f"{target}() returned {probe.described(made)}, not a bnverify.Subject")
    return made


def _refuse_module(value: Any, what: str) -> None:
    """Refuse a Flax module by itself, and say what makes a subject of it."""
    advice = probe.advice(value)
    if advice:
        raise TargetError(f"{what} is not a training step{advice}")


def _adapter(signature: inspect.Signature) -> str:
    """Return a hint which adapter to use, guessed from the first parameter; "" if unknown."""
    first = next(iter(signature.parameters), "")
    if first in {"params", "variables"}:
        return "; a step on loose trees: bnverify.loop(create, train_step, eval_step)"
    if first in {"state", "train_state"}:
        return "; a step on a TrainState: bnverify.train_state(create, train_step, eval_step)"
    if first == "model":
        return "; an nnx loop: bnverify.nnx_loop(make, train_step, eval_step)"
    return ""


def _check(subject: Subject, target: str) -> None:
    """Refuse a subject whose functions have the wrong signatures or results."""
    try:
        probe.check(subject)
    except probe.Unfit as error:
        raise TargetError(f"{target}: {error}") from None
    except Exception as error:  # noqa: BLE001 - user code may raise anything
        raise refused(error, target) from None


def refused(error: Exception, target: str) -> TargetError:
    """Return a TargetError for an exception raised by the code of ``target``."""
    known = explain.mistake(error)
    hint = f"; usually {known.title}. Fix: {known.fix}" if known else ""
    return TargetError(f"{target} raises {first_line(error)}{user_line(error)}{hint}")

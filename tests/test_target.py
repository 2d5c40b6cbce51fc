"""What a target names, and what is said of one that names nothing to verify."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnverify import target
from bnverify.model import Subject
from bnverify.target import TargetError, load

STEPS = """
import flax.linen as nn
import jax
import jax.numpy as jnp
from bnverify import State, StepInfo, Subject
import neighbour

def init(seed, x):
    return State({"w": jnp.zeros(x.shape[1])}, {}, ())

def step(state, x, y, lr):
    w = state.params["w"]
    return State({"w": w - lr * x.mean(0)}, {}, ()), StepInfo(jnp.mean(x @ w - y), {"w": x.mean(0)})

def evaluate(state, x, y):
    return jnp.mean(x @ state.params["w"] - y).reshape(1)

subject = Subject("mine", init, step, evaluate)

def make():
    import neighbour_of_the_function
    return subject

class Steps:
    inner = subject

number = 3

def two_arguments(a, b):
    return subject

def function(seed, x_batch, y_batch, lr):
    return jnp.mean(x_batch).reshape(1)

def function_of_none(seed, x_batch, y_batch, lr):
    return None

def forgetful_function(seed, x_batch, y_batch, lr):
    forgetful(None, x_batch, y_batch, lr)

module = nn.Dense(1)

def makes_a_module():
    return module

def train_step(state, batch):
    return state, {}

def train_model(model, optimizer, batch):
    return 0.0

def makes_a_number():
    return 3

def raises():
    return 1 / 0

def without(**changes):
    from dataclasses import replace
    return replace(subject, **changes)

step_of_two = without(step=lambda state, x: (state, StepInfo(None, None)))
step_returns_state = without(step=lambda state, x, y, lr: state)
step_returns_pair = without(step=lambda state, x, y, lr: (state, 1.0))
no_init = without(init=None)
init_returns_tuple = without(init=lambda seed, x: (1, 2, 3))
holds_key = without(init=lambda seed, x: State({"w": x}, {}, (), jax.random.key(seed)))
holds_text = without(init=lambda seed, x: State({"w": "text"}, {}, ()))
evaluates_to_none = without(evaluate=lambda state, x, y: None)

class ModifyScopeVariableError(Exception):
    pass

def forgetful(state, x, y, lr):
    raise ModifyScopeVariableError("as Flax does")

raises_in_step = without(step=forgetful)

def concrete(state, x, y, lr):
    if float(x[0, 0]) > 100:
        raise ValueError
    return step(state, x, y, lr)

does_not_trace = without(step=concrete)

def batches_of_24(state, x, y, lr):
    if x.shape[0] % 24:
        raise ValueError("not by 24")
    return step(state, x, y, lr)

takes_24 = without(step=batches_of_24)
two_features = without(features=(2,), init=lambda seed, x: State({"w": jnp.zeros(2)}, {}, ()))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "steps.py").write_text(STEPS)
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "neighbour_of_the_function.py").write_text("")
    (tmp_path / "syntax.py").write_text("x = (\n")
    (tmp_path / "missing_import.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "relative.py").write_text("from .steps import subject\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "steps.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize(
    "target", ["steps.py:subject", "steps.py:make", "steps.py:Steps.inner", "./steps.py:make",
               "steps:subject", "steps:make"]
)  # fmt: skip
def test_a_target_names_a_subject(here: Path, target: str) -> None:
    """A Subject, or a function that makes one, in a file or a module; neighbours import."""
    assert load(target).name == "mine"


def test_a_function_like_the_reference_is_a_subject(here: Path) -> None:
    """One function of seed, batch and learning rate is wrapped into a Subject."""
    subject = load("steps.py:function")
    assert subject.name == "function"
    assert subject.solution is not None


@pytest.mark.parametrize("name", ["does_not_trace", "takes_24", "two_features"])
def test_only_what_cannot_be_verified_is_refused(here: Path, name: str) -> None:
    """Code that does not trace, or takes some sizes only, is left to the laws."""
    assert isinstance(load(f"steps.py:{name}"), Subject)


def test_an_absolute_path_works_from_anywhere(here: Path) -> None:
    """The file's own directory is where it imports from."""
    (here / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here / "elsewhere")
        assert load(f"{here / 'steps.py'}:subject").name == "mine"
        assert load("../steps.py:subject").name == "mine"


def test_sys_path_is_left_alone(here: Path) -> None:
    """After loading, and after failing to, sys.path is what it was."""
    before = sys.path[:]
    load("steps.py:make")
    with pytest.raises(TargetError):
        load("steps.py:nothing")
    assert sys.path == before


def test_a_file_is_read_anew(here: Path) -> None:
    """A file that has changed since it was last loaded is what counts."""
    load("steps.py:subject")
    (here / "steps.py").write_text(STEPS.replace('"mine"', '"changed"'))
    assert load("steps.py:subject").name == "changed"


REFUSED = {
    "steps.py": "got 'steps.py'; add the name of the subject in it: steps.py:NAME",
    "steps.py:": "a target is module:name",
    "steps.py:not a name": "a target is module:name",
    "step.py:subject": "no file step.py; did you mean 'steps.py'?",
    "no/such/step.py:subject": "no file no/such/step.py",
    "steps.txt:subject": "steps.txt is not a Python file",
    ".:subject": ". is not a Python file",
    "no_such_module:subject": "no module 'no_such_module'",
    "bnverify.no_such_module:subject": "no module 'bnverify.no_such_module'",
    "steps.py:subjet": "steps.py has no 'subjet'; did you mean 'subject'?",
    "steps.py:Steps.outer": "steps.py has no 'Steps.outer'",
    "syntax.py:x": "(syntax.py:1: x = ()",
    "missing_import.py:x": "missing_import.py:1: import no_such_module_anywhere",
    "relative.py:x": "name it by its module",
    "exits.py:x": "exits.py exits with 3 when imported",
    "steps.py:number": "steps.py:number is of type int, neither a bnverify.Subject nor a function",
    "steps.py:two_arguments": "two_arguments(a, b) must take no arguments and return",
    "steps.py:train_step": "a step on a TrainState: bnverify.train_state(create, train_step,",
    "steps.py:train_model": "an nnx loop: bnverify.nnx_loop(make, train_step,",
    "steps.py:module": "steps.py:module is not a training step; to check a training step with a Flax",
    "steps.py:makes_a_module": "makes_a_module() returned is not a training step; to check a",
    "steps.py:nn.Dense": "with a Flax module, write subject = bnverify.linen(Dense(...))",
    "steps.py:makes_a_number": "returned a value of type int, not a bnverify.Subject",
    "steps.py:raises": "raises ZeroDivisionError: division by zero",
    "steps.py:step_of_two": "step(state, x) cannot be called as step(state, x, y, lr)",
    "steps.py:step_returns_state": "step must return (State, StepInfo), got (dict, dict, tuple",
    "steps.py:step_returns_pair": "step must return (State, StepInfo), got (State, float)",
    "steps.py:no_init": "init is None, not a function init(seed, x)",
    "steps.py:init_returns_tuple": "init must return a bnverify.State, got (int, int, int)",
    "steps.py:holds_key": "init returns a State whose extra holds a typed PRNG key, which NumPy cannot "
    "hold: keep jax.random.key_data(key) there, and make it a key again with jax.random.wrap_key_data",
    "steps.py:holds_text": "init returns a State whose params holds a value of type str",
    "steps.py:evaluates_to_none": "evaluate must return an array of shape (1,), got None",
    "steps.py:raises_in_step": "usually batch_stats was not declared mutable. Fix: model.apply",
    "steps.py:function_of_none": "must return an array of shape (1,), got None",
    "steps.py:forgetful_function": "usually batch_stats was not declared mutable. Fix: model.apply",
    "builtins:iter": "has no signature to read",
}


@pytest.mark.parametrize("target", REFUSED)
def test_a_target_that_names_nothing_is_refused(here: Path, target: str) -> None:
    """One line says what is wrong."""
    with pytest.raises(TargetError) as refusal:
        load(target)
    message = str(refusal.value)
    assert REFUSED[target] in message.replace(f"{here}/", "")
    assert "\n" not in message


def test_the_line_that_raises_is_shown(here: Path) -> None:
    """The user's own line, not one of a library's or of ours."""
    number = STEPS.splitlines().index("    return 1 / 0") + 1
    with pytest.raises(TargetError, match=rf"\({here}/steps.py:{number}: return 1 / 0\)"):
        load("steps.py:raises")


@pytest.mark.parametrize("package", [True, False], ids=["package", "module"])
def test_modules_of_one_name_beside_two_targets_are_refused(here: Path, package: bool) -> None:
    """The second is not verified with the first one's model: each needs a process of its own."""
    for name in ("one", "two"):
        home = here / name
        (home / "model").mkdir(parents=True)
        if package:
            (home / "model" / "__init__.py").write_text("")
        else:
            (home / "model.py").write_text("")
        (home / "check.py").write_text(
            "import model\nfrom bnverify import reference\nsubject = reference.sgd()\n"
        )
    load("one/check.py:subject")
    load("one/check.py:subject")
    with pytest.raises(TargetError, match=rf"model was imported from {here}/one for another"):
        load("two/check.py:subject")
    del sys.modules["model"]
    load("two/check.py:subject")
    del sys.modules["model"]


def test_what_a_program_had_imported_stays(here: Path) -> None:
    """A file called like a module that is imported already hides nothing and is refused nothing."""
    import json

    for name in ("one", "two"):
        (here / name).mkdir()
        (here / name / "json.py").write_text("")
        with target.importable(here / name):
            assert sys.path[0] == str(here / name)
            assert sys.modules["json"] is json


def test_the_path_is_restored_after_an_error(tmp_path: Path) -> None:
    """Whatever happens in the block, sys.path is as before."""
    before = sys.path[:]
    with contextlib.suppress(KeyError), target.importable(tmp_path):
        assert sys.path[0] == str(tmp_path)
        raise KeyError
    assert sys.path == before


def test_importing_the_module_loads_no_jax() -> None:
    """Refusing a misspelt file must not take the seconds that importing jax does."""
    code = (
        "import sys, bnverify\n"
        "try: bnverify.load('nowhere.py:x')\n"
        "except bnverify.TargetError: pass\n"
        "assert not {'jax', 'flax', 'hypothesis'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_target_is_named_so_that_any_directory_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file by its whole path, and a module that lies here as that file; others keep their name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").write_text("x = 1\n")
    assert target.anywhere("here.py:x") == f"{tmp_path / 'here.py'}:x"
    assert target.anywhere("here:x") == f"{tmp_path / 'here.py'}:x"
    assert target.anywhere("bnverify.reference:sgd") == "bnverify.reference:sgd"


def test_the_line_of_a_target_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a function, an assignment and an annotated one; a name made elsewhere leads to line 1."""
    monkeypatch.chdir(tmp_path)
    text = "raise SystemExit\n\n@f\ndef step(): ...\n\nx: int = 2\n(a, b) = c = 3\nclass K: ...\n"
    (tmp_path / "lines.py").write_text(text)
    where = str(tmp_path / "lines.py")
    for name, line in {"step": 4, "x": 6, "c": 7, "K": 8, "K.f": 8, "made": 1}.items():
        assert target.line(f"{where}:{name}") == (where, line)
    assert target.line("lines:x") == (where, 6)
    assert target.line("no/such/file.py:x") is None
    assert target.line("no_such_module_at_all:x") is None

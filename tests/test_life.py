"""The life of a state: what may happen between two steps, and what it must leave alone."""

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

import bnverify
from bnverify import reference
from bnverify.adapters.canonical import linen
from bnverify.check import show_again
from bnverify.cli import main
from bnverify.evidence import Call, Counterexample, Evidence, Violation
from bnverify.laws import LAWS
from bnverify.laws.life import ANOTHER_PROCESS, EmaHistory
from bnverify.lifetime.life import (
    ORBAX,
    WAYS,
    Life,
    has_orbax,
    kinds_differ,
    suspect,
    values_differ,
)
from bnverify.lifetime.lives import NAMES, Lives, drawn, scripted
from bnverify.mistakes import MISTAKES
from bnverify.model import Case, CheckpointedSubject, State, Subject
from bnverify.observe import CompiledSubject
from bnverify.probe import subject_of
from bnverify.profile import Profile
from bnverify.shrink import fewest, shorten
from tests.faults.life import LIFE_FAULTS, correct

HISTORIES = tuple(name for name in NAMES if name != ANOTHER_PROCESS)
"""The laws about sequences of calls."""

SCRIPTED = Profile("scripted", examples=0)  # one life for each way to save, nothing drawn
FEW = Profile("few", examples=2)
ONLY_DRAWN = Profile("drawn", examples=20)

CASE = Case.of(0, [[1.0, 2.0], [3.0, 5.0]], [0.0, 1.0], 0.1)

ADAM = CompiledSubject(reference.adam(), "jit")
"""What most lives here are lives of: compiled once."""


def lives(
    lived: Subject | CheckpointedSubject,
    plan: Profile,
    names: Collection[str] = HISTORIES,
    seed: int = 0,
) -> dict[str, Evidence]:
    """Return what is known of the life of a subject, by law; one like ``ADAM`` is ``ADAM``."""
    calls = ADAM if subject_of(lived).name == ADAM.subject.name else None
    if calls is not None:
        shared = ADAM.subject
        lived = replace(lived, subject=shared) if isinstance(lived, CheckpointedSubject) else shared
    found = Lives(lived, plan, names, calls=calls).run(seed)
    return dict(zip(names, found, strict=True))


class Droops(nn.Module):
    """A model that draws random numbers and keeps two sorts of statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return nn.Dense(1)(nn.Dropout(0.25, deterministic=not train)(x))


# A user's test, as the documentation shows it; pytest collects it here like any other.
TestLifeOfTheReference = bnverify.life(reference.adam()).TestCase
TestLifeOfTheReference.settings = settings(max_examples=10, stateful_step_count=10, deadline=None)


def test_the_machine_is_hypothesis_own() -> None:
    """What ``life`` returns is a state machine that any Hypothesis setting applies to."""
    assert issubclass(bnverify.life(reference.sgd()), RuleBasedStateMachine)


@pytest.mark.parametrize("name", sorted(correct()))
def test_a_correct_life_holds(name: str) -> None:
    """No law objects to a correct step, whatever it carries and however it is saved."""
    found = lives(correct()[name], FEW)
    assert {law: each.status for law, each in found.items()} == dict.fromkeys(HISTORIES, "held")
    assert all(each.cases for each in found.values())


def test_every_law_is_reached_without_drawing() -> None:
    """The scripted lives alone ask every law at least once."""
    found = lives(reference.adam(), SCRIPTED)
    assert all(each.cases and each.status == "held" for each in found.values())


def test_a_linen_model_with_dropout_holds() -> None:
    """An adapted model with a key in its state lives as the reference does."""
    found = lives(linen(Droops()), SCRIPTED)
    assert [law for law, each in found.items() if each.status == "violated"] == []


@pytest.mark.parametrize("name", sorted(LIFE_FAULTS))
def test_each_fault_is_caught_and_named(name: str) -> None:
    """Each fault breaks the law it must break, and its mistake is the one that is named."""
    fault = LIFE_FAULTS[name]
    found = lives(fault.make(), SCRIPTED, [fault.law])[fault.law]
    assert found.status == "violated"
    assert found.diagnosis is not None
    if name != "rate_counted_in_python" and not name.startswith("first_checkpoint"):
        assert found.diagnosis.startswith(f"{fault.mistake}:")


@pytest.mark.parametrize("profile", [SCRIPTED, ONLY_DRAWN], ids=lambda profile: profile.name)
def test_a_counterexample_is_short_and_runs(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it was found, the life is a few calls long, and breaks the same claim when pasted."""
    if profile is ONLY_DRAWN:
        monkeypatch.setattr("bnverify.lifetime.lives.scripted", lambda way, shape: ())
    fault = LIFE_FAULTS["statistics_not_saved"]
    lived = replace(fault.make(), subject=ADAM.subject)
    (found,) = Lives(lived, profile, [fault.law], "drops:statistics", ADAM).run(0)
    assert found.counterexample is not None
    history = found.counterexample.history
    assert [call.name for call in history] == ["begin", "train", "save", "restore"]
    begin, train, *_ = (call.argument for call in history)
    assert begin is train
    script = found.counterexample.script
    assert "subject = bnverify.load('drops:statistics')" in script
    with pytest.raises(Violation, match=fault.law):
        exec(  # noqa: S102 - this script was made a few lines above
            script.replace("bnverify.load('drops:statistics')", "lived"), {"lived": lived}
        )


TARGET = """
import bnverify
from tests.faults.life import LIFE_FAULTS

lived = LIFE_FAULTS["statistics_not_saved"].make()
"""


def test_check_takes_a_step_with_its_own_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line holds a CheckpointedSubject to the laws, and what it says to paste shows the violation."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.py").write_text(TARGET)
    law = "a_checkpoint_keeps_every_value"
    line = ["check", "steps.py:lived", "--profile", "quick", "--select", law, "--json", "-"]
    assert main(line) == 1
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["law"], result["family"], result["status"]) == (law, "life", "violated")
    with pytest.raises(Violation, match=law):
        exec(result["counterexample"], {})  # noqa: S102 - printed a line above


def test_a_history_is_kept_as_data() -> None:
    """Read back from JSON it does the same: it breaks the faulty, and leaves the fixed alone."""
    fault = LIFE_FAULTS["statistics_not_saved"]
    found = lives(fault.make(), SCRIPTED, [fault.law])[fault.law].counterexample
    assert found is not None
    text = json.dumps(found.to_json())
    again = Counterexample.from_json(json.loads(text))
    assert again.script == found.script
    with pytest.raises(Violation, match=fault.law):
        show_again(fault.make(), again)
    show_again(correct()["own_checkpoint"], again)


def test_what_does_not_trace_is_told_by_every_law() -> None:
    """A step that needs its batch as Python numbers is not asked, and no error either."""
    plain = reference.sgd()

    def step(state: bnverify.State, x: Any, y: Any, lr: Any) -> Any:
        return plain.step(state, x, y, float(lr))

    exempt = {"a_copy_keeps_everything": "because"}
    subject = replace(plain, name="untraceable", step=step, exempt=exempt)
    found = lives(subject, SCRIPTED)
    assert found.pop("a_copy_keeps_everything").reason == "because"
    assert {each.status for each in found.values()} == {"untriggered"}
    assert all("cannot be traced with 2, 4, 24 rows" in each.reason for each in found.values())


def test_a_jitted_step_hides_no_state() -> None:
    """What a step counts in Python shows in a resumed process, though JAX keeps a jitted trace."""
    plain, traces = reference.sgd(), [0]

    @jax.jit
    def jitted(state: State, x: Any, y: Any, lr: Any) -> Any:
        traces[0] += 1
        return plain.step(state, x, y, lr / traces[0])

    subject = replace(plain, name="jitted", step=jitted)
    law = "a_resumed_process_continues_to_the_bit"
    found = lives(subject, SCRIPTED, [law])[law]
    assert found.status == "violated"
    assert "state/params/" in found.reason


def test_a_shortened_life_loses_nothing_it_needs() -> None:
    """Nothing more can be left out, and what is left still breaks the claim."""

    def breaks(calls: Sequence[Call]) -> bool:
        names = [call.name for call in calls]
        batch = calls[0].argument
        assert isinstance(batch, Case)
        return names.count("train") >= 2 and "save" in names and batch.x[1, 0] != 0

    life, _ = scripted("bytes", (2, 2))
    short = shorten(life, breaks)
    assert breaks(short)
    assert sorted(call.name for call in short) == ["begin", "save", "train", "train"]
    (batch,) = {id(call.argument): call.argument for call in short if call.name != "save"}.values()
    assert batch.code() == Case.of(0, [[0, 0], [1, 0]], [0, 0], 0).code()


@pytest.mark.parametrize("needed", [(), (0,), (3, 7), (2, 3, 4, 15, 16)])
def test_the_fewest_are_those_that_are_needed(needed: tuple[int, ...]) -> None:
    """Of twenty things exactly the needed ones are left, in their order."""
    assert fewest(range(20), lambda some: set(needed) <= set(some)) == list(needed)


def test_lives_are_drawn_from_the_seed_alone() -> None:
    """The same seed gives the same lives; in many of them everything happens, in a possible order."""
    one, two, other = (list(drawn(seed, 50, ("bytes",), (2, 2))) for seed in (3, 3, 4))
    shown, same, others = (
        [Counterexample("", history=tuple(life)).script for life in each]
        for each in (one, two, other)
    )
    assert shown == same
    assert shown != others
    names = {call.name for life in one for call in life}
    assert names == {"begin", "train", "evaluate", "save", "restore", "copy", "resume"}
    for life in one:
        order = [call.name for call in life]
        assert "restore" not in order or order.index("save") < order.index("restore")


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ([Call("restore")], "nothing was saved"),
        ([Call("save", "floppy")], "'floppy' is not one of bytes, state_dict"),
        ([Call("copy", "device_putt")], "did you mean 'device_put'"),
        ([Call("begin", CASE)], "begin\\(\\) may be called only once"),
        ([Call("__class__")], "'__class__' is not a call; the calls are begin, train"),
    ],
)
def test_what_cannot_happen_is_refused(calls: list[Call], said: str) -> None:
    """A call that cannot happen is an error of the caller's, named, and no violation."""
    life = Life(ADAM.subject, calls=ADAM)
    with pytest.raises(ValueError, match="the first call must be begin"):
        life.train(CASE)
    life.begin(CASE)
    with pytest.raises(ValueError, match=said):
        life.live(calls)


@pytest.mark.parametrize(
    "name", ["statistics_not_saved", "every_second_batch_twice", "evaluation_folds_its_batch"]
)
def test_the_users_machine_finds_faults(name: str) -> None:
    """The state machine for users' tests breaks on what check_life finds."""
    fault = LIFE_FAULTS[name]
    machine = bnverify.life(fault.make())
    found_at_once = settings(
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        phases=[Phase.generate],  # shrinking is Hypothesis' own
        stateful_step_count=30,
        max_examples=300,
    )
    with pytest.raises(Violation, match=fault.law):
        run_state_machine_as_test(machine, settings=found_at_once)


def test_the_same_seed_gives_the_same_evidence() -> None:
    """Evidence is a function of subject, profile and seed."""
    one, two = (lives(reference.adam(), FEW, seed=3) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("way", [*WAYS, "orbax"])
def test_each_way_restores_everything(way: str) -> None:
    """Each way to save gives back values and containers, into a template of another seed."""
    saver = WAYS.get(way, ORBAX)
    if way == "orbax" and not has_orbax():
        pytest.skip("orbax is not installed, or too new for this jax")
    x = np.ones((2, 2), np.float32)
    state, template = (ADAM.single("init", ADAM.subject.init, seed, x) for seed in (0, 1))
    restored = saver.restore(template, saver.save(state))
    assert values_differ(restored, state) == []
    assert kinds_differ(restored, state) == ""


def test_what_the_libraries_cannot_save_is_said() -> None:
    """A typed key, which flax cannot write as bytes, is a reason and no violation."""
    plain = reference.sgd()

    def init(seed: object, x: object) -> bnverify.State:
        return plain.init(seed, x)._replace(extra={"key": jax.random.key(0)})

    def step(state: bnverify.State, *batch: object) -> tuple[bnverify.State, bnverify.StepInfo]:
        new, info = plain.step(state, *batch)
        return new._replace(extra=state.extra), info

    subject = bnverify.Subject("typed key", init, step, plain.evaluate)
    values = lives(subject, SCRIPTED)["a_checkpoint_keeps_every_value"]
    assert values.status == "held"
    assert "bytes cannot save it" in values.reason


@pytest.mark.parametrize("name", NAMES)
def test_laws_name_known_mistakes(name: str) -> None:
    """Every mistake that a law of the life of a state names is known."""
    assert LAWS[name].mistakes
    assert all(mistake in MISTAKES for mistake in LAWS[name].mistakes)


def test_unknown_laws_are_refused() -> None:
    """A misspelt law is refused by name."""
    said = "is named 'a_copy_keeps_all'; did you mean 'a_copy_keeps_everything'"
    with pytest.raises(ValueError, match=said):
        bnverify.check_life(ADAM.subject, SCRIPTED, select="a_copy_keeps_all")


def test_a_life_breaks_as_it_happens() -> None:
    """Without Hypothesis, the call that shows a broken law is the one that raises."""
    lived = replace(LIFE_FAULTS["optimizer_state_not_saved"].make(), subject=ADAM.subject)
    life = Life(lived, calls=ADAM)
    life.begin(CASE)
    life.train(CASE)
    life.save("own")
    with pytest.raises(Violation, match="checkpoint_drops_optimizer_state"):
        life.restore()


def step_of_adam(state: State, case: Case) -> State:
    """Return the state after one step of ``ADAM``."""
    given = state, case.x, case.y, case.lr
    after: State = ADAM.single("step", ADAM.subject.step, *given)[0]
    return after


def test_the_fold_allows_rounding_and_no_more() -> None:
    """After 100 steps the reference is within the bound, a thousandth off is far outside."""
    state, fold = ADAM.single("init", ADAM.subject.init, 0, CASE.x), EmaHistory()
    assert fold.error(state)[0] < 0
    for _ in range(100):
        fold = fold.after(state, CASE, step_of_adam)
        state = step_of_adam(state, CASE)
    assert 0 <= fold.error(state)[0] <= 1
    off = jax.tree_util.tree_map(lambda leaf: leaf * 1.001, state.batch_stats)
    residual, mismatch = fold.error(state._replace(batch_stats=off))
    assert residual > 10
    assert mismatch is not None
    assert mismatch.where.startswith("batch_stats/BatchNorm_0/")
    other = fold.after(state._replace(batch_stats={}), CASE, step_of_adam)
    assert other.error(state)[0] < 0


def test_statistics_that_overflow_are_not_compared() -> None:
    """Where the expected value is not finite there is nothing to compare."""
    case = Case.of(0, np.full((2, 2), 1e25), [0, 1], 0)
    state = ADAM.single("init", ADAM.subject.init, 0, case.x)
    fold = EmaHistory().after(state, case, step_of_adam)
    new = step_of_adam(state, case)
    assert not bool(jnp.all(jnp.isfinite(new.batch_stats["BatchNorm_0"]["var"])))
    assert fold.error(new)[0] <= 1


@pytest.mark.parametrize("counted", [("opt_state",), ("opt_state", "extra")])
def test_a_counter_alone_tells_a_reset_count(counted: tuple[str, ...]) -> None:
    """A count that came back as zero is the optimizer's only where nothing else is off."""
    kept = State({"w": np.ones(2)}, {}, {"count": np.int32(3)}, {"steps": np.int32(3)})
    lost = {name: jax.tree_util.tree_map(np.zeros_like, getattr(kept, name)) for name in counted}
    template = jax.tree_util.tree_map(np.zeros_like, kept)._replace(batch_stats={})
    named = suspect(kept._replace(**lost), kept, template)
    assert (named == "counter_reset_on_restore") == (counted == ("opt_state",))


def test_life_loads_no_hypothesis_for_a_script() -> None:
    """Replaying a counterexample needs no Hypothesis machinery: only ``Life``."""
    code = "import sys, bnverify; bnverify.Life; sys.exit('hypothesis' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

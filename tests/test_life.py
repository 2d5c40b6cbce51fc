"""The life of a state: what may happen between two steps, and what it must leave alone."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

import bnverify
from bnverify import reference
from bnverify.adapters.linen import linen
from bnverify.broken import Broken
from bnverify.case import Case
from bnverify.checking.replay import again
from bnverify.cli import main
from bnverify.lifetime import check
from bnverify.lifetime.calls import Call, parse, script
from bnverify.lifetime.checkpoint import ORBAX, WAYS, has_orbax
from bnverify.lifetime.claims import CLAIMS
from bnverify.lifetime.differences import kinds_differ, values_differ
from bnverify.lifetime.fold import Fold
from bnverify.lifetime.life import Life
from bnverify.lifetime.lives import drawn, scripted
from bnverify.lifetime.shorten import fewest, shorten
from bnverify.mistakes import MISTAKES
from bnverify.mutants.life_faults import LIFE_FAULTS, correct
from bnverify.profile import Profile

SCRIPTED = Profile("scripted", examples=0)  # one life for each way to save, nothing drawn
FEW = Profile("few", examples=4)
ONLY_DRAWN = Profile("drawn", examples=20)


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
    """No claim objects to a correct step, whatever it carries and however it is saved."""
    evidence = bnverify.check_life(correct()[name], FEW)
    assert {each.law: each.status for each in evidence} == dict.fromkeys(CLAIMS, "held")


def test_every_claim_is_reached_without_drawing() -> None:
    """The scripted lives alone ask every claim at least once."""
    evidence = bnverify.check_life(reference.sgd(), SCRIPTED)
    assert all(each.cases and each.status == "held" for each in evidence)


def test_a_linen_model_with_dropout_holds() -> None:
    """An adapted model with a key in its state lives as the reference does."""
    evidence = bnverify.check_life(linen(Droops()), SCRIPTED)
    assert [each.law for each in evidence if each.status == "violated"] == []


@pytest.mark.parametrize("name", sorted(LIFE_FAULTS))
def test_each_fault_is_caught_and_named(name: str) -> None:
    """Each fault breaks the claim it must break, and its mistake is the one that is named."""
    fault = LIFE_FAULTS[name]
    (found,) = bnverify.check_life(fault.make(), SCRIPTED, select=[fault.expected])
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
        monkeypatch.setattr(check, "scripted", lambda way, shape: ())
    fault = LIFE_FAULTS["statistics_not_saved"]
    (found,) = bnverify.check_life(
        fault.make(), profile, select=[fault.expected], target="drops:statistics"
    )
    assert found.counterexample is not None
    calls = [line for line in found.counterexample.splitlines() if line.startswith("life.")]
    assert calls == [
        "life.begin(case_0)",
        "life.train(case_0)",
        "life.save('own')",
        "life.restore()",
    ]
    assert "life = bnverify.Life(bnverify.load('drops:statistics'))" in found.counterexample
    script = found.counterexample.replace("bnverify.load('drops:statistics')", "fault.make()")
    with pytest.raises(Broken, match=fault.expected):
        exec(script, {"fault": fault})  # noqa: S102 - this script was made a line above


TARGET = """
import bnverify
from bnverify.mutants.life_faults import LIFE_FAULTS

lived = LIFE_FAULTS["statistics_not_saved"].make()
"""


def test_check_takes_a_step_with_its_own_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line holds a Lived to the claims, and what it says to paste shows the violation."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steps.py").write_text(TARGET)
    claim = "a_checkpoint_keeps_every_value"
    line = ["check", "steps.py:lived", "--profile", "quick", "--select", claim, "--json", "-"]
    assert main(line) == 1
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert (result["law"], result["family"], result["status"]) == (claim, "life", "violated")
    with pytest.raises(Broken, match=claim):
        exec(result["counterexample"], {})  # noqa: S102 - printed a line above


def test_a_life_is_read_from_its_script() -> None:
    """What a script does is done again: it breaks the faulty, and leaves the mended alone."""
    fault = LIFE_FAULTS["statistics_not_saved"]
    (found,) = bnverify.check_life(fault.make(), SCRIPTED, select=[fault.expected])
    text = found.counterexample or ""
    assert script(parse(text), None) == text
    with pytest.raises(Broken, match=fault.expected):
        again(fault.make(), fault.expected, text)
    again(correct()["own_checkpoint"], fault.expected, text)
    with pytest.raises(ValueError, match="no life in the script"):
        parse("import bnverify")


def test_what_does_not_trace_is_told_by_every_claim() -> None:
    """A step that needs its batch as Python numbers is not asked, and no error either."""
    plain = reference.sgd()

    def step(state: bnverify.State, x: Any, y: Any, lr: Any) -> Any:
        return plain.step(state, x, y, float(lr))

    subject = bnverify.Subject("untraceable", plain.init, step, plain.evaluate)
    report = bnverify.verify(subject, "quick", select=["life"])
    assert {each.status for each in report.results} == {"untriggered"}
    assert all("traces at none of 2, 4, 24 rows" in each.reason for each in report.results)


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
    assert [script(life, None) for life in one] == [script(life, None) for life in two]
    assert [script(life, None) for life in one] != [script(life, None) for life in other]
    names = {call.name for life in one for call in life}
    assert names == {"begin", "train", "evaluate", "save", "restore", "copy", "resume"}
    for life in one:
        order = [call.name for call in life]
        assert "restore" not in order or order.index("save") < order.index("restore")


def test_restoring_needs_something_saved() -> None:
    """A life that restores before it saves is refused."""
    life = Life(reference.sgd())
    life.begin(Case.of(0, [[1.0], [2.0]], [0.0, 1.0], 0.1))
    with pytest.raises(ValueError, match="nothing was saved"):
        life.restore()


@pytest.mark.parametrize(
    "name", ["statistics_not_saved", "every_second_batch_twice", "evaluation_folds_its_batch"]
)
@pytest.mark.once
def test_the_users_machine_finds_faults(name: str) -> None:
    """The state machine for users' tests breaks on what check_life finds."""
    fault = LIFE_FAULTS[name]
    machine = bnverify.life(fault.make())
    few = settings(derandomize=True, database=None, deadline=None, print_blob=False)
    with pytest.raises(Broken, match=fault.expected):
        run_state_machine_as_test(machine, settings=few)


def test_the_same_seed_gives_the_same_evidence() -> None:
    """Evidence is a function of subject, profile and seed."""
    one, two = (bnverify.check_life(reference.sgd(), FEW, 3) for _ in range(2))
    assert one == two


@pytest.mark.parametrize("way", [*WAYS, "orbax"])
def test_each_way_restores_everything(way: str) -> None:
    """Each way to save gives back values and containers, into a template of another seed."""
    saver = WAYS.get(way, ORBAX)
    if way == "orbax" and not has_orbax():
        pytest.skip("orbax is not installed, or too new for this jax")
    x = np.ones((2, 2), np.float32)
    state, template = (reference.adam().init(seed, x) for seed in (0, 1))
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
    evidence = {each.law: each for each in bnverify.check_life(subject, SCRIPTED)}
    values = evidence["a_checkpoint_keeps_every_value"]
    assert values.status == "held"
    assert "bytes cannot save it" in values.reason


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_claims_name_known_mistakes(name: str) -> None:
    """Every mistake that a claim names has a mend."""
    assert CLAIMS[name].mistakes
    assert all(mistake in MISTAKES for mistake in CLAIMS[name].mistakes)


def test_unknown_claims_are_refused() -> None:
    """A misspelt claim is refused by name."""
    with pytest.raises(ValueError, match="no claim about the life of a state is named 'valuse'"):
        bnverify.check_life(reference.sgd(), SCRIPTED, select="valuse")


def test_a_life_breaks_as_it_happens() -> None:
    """Without Hypothesis, the call that shows a broken claim is the one that raises."""
    case = bnverify.Case.of(0, [[1.0, 2.0], [3.0, 5.0]], [0.0, 1.0], 0.1)
    life = Life(LIFE_FAULTS["optimizer_state_not_saved"].make())
    life.begin(case)
    life.train(case)
    life.save("own")
    with pytest.raises(Broken, match="checkpoint_drops_optimizer_state"):
        life.restore()


def test_the_fold_allows_rounding_and_no_more() -> None:
    """After 200 steps the reference is within the bound, a thousandth off is far outside."""
    subject = reference.sgd()
    step = jax.jit(subject.step)
    x = np.linspace(-2, 3, 8, dtype=np.float32).reshape(4, 2)
    batch = x, x[:, 0], np.float32(0.01)
    state, fold = subject.init(0, x), Fold()
    for _ in range(200):
        fold = fold.after(state, lambda one: step(one, *batch)[0])
        state, _ = step(state, *batch)
    assert 0 <= fold.worst(state)[0] <= 1
    off = jax.tree_util.tree_map(lambda leaf: leaf * 1.001, state.batch_stats)
    assert fold.worst(state._replace(batch_stats=off))[0] > 10


def test_statistics_that_overflow_are_not_compared() -> None:
    """Where the expected value is not finite there is nothing to compare."""
    subject = reference.sgd()
    x = np.full((2, 1), 1e25, np.float32)
    state = subject.init(0, x)
    step = jax.jit(subject.step)
    fold = Fold().after(state, lambda one: step(one, x, x[:, 0], np.float32(0))[0])
    new, _ = step(state, x, x[:, 0], np.float32(0))
    assert not bool(jnp.all(jnp.isfinite(new.batch_stats["BatchNorm_0"]["var"])))
    assert fold.worst(new)[0] <= 1


def test_life_loads_no_hypothesis_for_a_script() -> None:
    """Replaying a counterexample needs no Hypothesis machinery: only ``Life``."""
    code = "import sys, bnverify.lifetime; sys.exit('bnverify.lifetime.machine' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Steps on many devices: they equal the step on one, and where they do not the mistake is named."""

import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import bnverify
from bnverify import reference
from bnverify.check import choose
from bnverify.cli import main
from bnverify.errors import UsageError
from bnverify.evidence import Evidence, Violation
from bnverify.laws import LAWS
from bnverify.mistakes import MISTAKES
from bnverify.parallel.devices import FLAG, NAMES, check_parallel, environment, find, on_devices
from bnverify.profile import named
from tests.faults import parallel as faults
from tests.faults.parallel import PARALLEL_FAULTS, TWINS, axis_name

REFERENCE = "tests.faults.parallel:reference"
AXIS_NAME = "tests.faults.parallel:axis_name"
FAULTS = "tests.faults.parallel"
VMAP = "vmap_with_an_axis_equals_one_device"

CASE = bnverify.Case.of(0, [[1.0], [2.0], [3.0], [5.0]], [0.0, 1.0, 0.0, 2.0], 0.5)

Found = dict[str, dict[str, Evidence]]
"""Target -> law -> its evidence."""


def on_four_devices(targets: list[str]) -> Found:
    """Return the evidence on some targets, from one process with four devices."""
    found = on_devices(targets, named("quick"), 0, NAMES)
    return {target: {each.law: each for each in found[target][0]} for target in targets}


@pytest.fixture(scope="module")
def right() -> Found:
    """The evidence on both references and the twins of some faults."""
    return on_four_devices([REFERENCE, AXIS_NAME, *(f"{FAULTS}:{name}" for name in TWINS)])


@pytest.fixture(scope="module")
def wrong() -> Found:
    """The evidence on every fault."""
    return on_four_devices([f"{FAULTS}:{name}" for name in PARALLEL_FAULTS])


def test_the_reference_holds_under_every_mapping(right: Found) -> None:
    """vmap, pmap, shard_map and sharded jit give the single-device step, within its rounding."""
    found = right[REFERENCE]
    assert {name: each.status for name, each in found.items()} == dict.fromkeys(NAMES, "held")
    assert all(each.residual is not None and each.residual < 0.8 for each in found.values())


def test_flax_own_axis_name_holds(right: Found) -> None:
    """BatchNorm(axis_name) and pmean hold; what takes no padding is exempt from that law."""
    statuses = [each.status for each in right[AXIS_NAME].values()]
    assert statuses == ["held"] * 5 + ["exempt"]


@pytest.mark.parametrize("multiple", [3, 4])
def test_each_device_gets_a_number_of_rows_that_the_step_accepts(multiple: int) -> None:
    """A step that splits its batch declares ``rows``; padding needs rows that devices share unequally."""
    whole = faults.reference()

    def split(function: Any) -> Any:
        def step(state: Any, x: Any, *rest: Any) -> Any:
            x.reshape(multiple, -1, x.shape[1])  # raises for other sizes
            return function(state, x, *rest)

        return step

    single = replace(whole.single, step=split(whole.single.step), rows=multiple)
    found = check_parallel(replace(whole, single=single, step=split(whole.step)), "quick")
    by_law = {each.law: each for each in found}
    assert by_law[VMAP].status == "held", by_law[VMAP].reason
    assert not [each for each in found if each.status == "violated"]


@pytest.mark.parametrize("name", TWINS)
def test_a_right_twin_holds(name: str, right: Found) -> None:
    """A law that it violates is wrong."""
    statuses = {each.status for each in right[f"{FAULTS}:{name}"].values()}
    assert statuses <= {"held", "exempt"}


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(PARALLEL_FAULTS))
def test_each_fault_is_caught_and_named(name: str, wrong: Found) -> None:
    """Each fault breaks the law it must break, and its mistake is the one that is named."""
    fault = PARALLEL_FAULTS[name]
    found = wrong[f"{FAULTS}:{name}"][fault.law]
    assert found.status == "violated"
    assert (found.diagnosis or "").startswith(f"{fault.mistake}:")


@pytest.mark.nightly
def test_counterexamples_read_well(wrong: Found) -> None:
    """What was found by wild numbers is shown by few rows of plain ones."""
    for fault in PARALLEL_FAULTS.values():
        shown = wrong[f"{FAULTS}:{fault.name}"][fault.law].counterexample
        assert shown is not None
        assert shown.devices
        assert f"bnverify.load('{FAULTS}:{fault.name}')" in shown.script
        case = shown.case
        assert case is not None
        assert case.seed == 0
        assert max(case.shape) <= 8
        assert np.all(case.x == np.round(case.x))
        assert np.all(case.y == np.round(case.y))


@pytest.mark.nightly
def test_faults_of_unequal_shards_hold_where_shards_are_equal(wrong: Found) -> None:
    """What is wrong with padding alone is no violation without it."""
    for fault in PARALLEL_FAULTS.values():
        if fault.law == "unequal_shards_equal_one_device":
            found = wrong[f"{FAULTS}:{fault.name}"]
            assert [law for law, each in found.items() if each.status == "violated"] == [fault.law]


def test_one_device_is_enough_for_vmap() -> None:
    """In a process with one device the rest reads untriggered, and a counterexample replays."""
    fault = PARALLEL_FAULTS["gradients_summed"]
    found = {each.law: each for each in bnverify.check_parallel(fault.make(), "quick")}
    assert found["pmap_equals_one_device"].status == "untriggered"
    broken = found[VMAP]
    assert broken.status == "violated"
    with pytest.raises(Violation, match="gradients_summed"):
        bnverify.replay(fault.make(), CASE, VMAP)
    assert (bnverify.replay(axis_name(), CASE, VMAP) or 0) <= 1


def test_what_cannot_be_run_here_is_said() -> None:
    """A law that needs more devices than there are is refused by replay, not passed."""
    with pytest.raises(UsageError, match="this process has 1 of the 4 devices"):
        bnverify.replay(axis_name(), CASE, "shard_map_equals_one_device")


def test_a_step_that_raises_breaks_the_law() -> None:
    """What a mapped step raises is the reason, and the batch it raised on the counterexample."""

    def step(*args: Any) -> Any:
        raise TypeError("no axis here")

    (found,) = (
        each
        for each in bnverify.check_parallel(replace(axis_name(), step=step), "quick")
        if each.law == VMAP
    )
    assert (found.status, found.reason) == ("violated", "it raises TypeError: no axis here")
    assert found.counterexample is not None


def test_a_step_that_fails_on_one_device_is_told() -> None:
    """Where the step on one device takes no such batch, nothing is held against that on many."""

    def init(*args: Any) -> Any:
        raise TypeError("no such batch")

    single = replace(reference.sgd(), init=init)
    found = bnverify.check_parallel(replace(axis_name(), single=single), "quick")
    (vmapped,) = (each for each in found if each.law == VMAP)
    assert vmapped.status == "untriggered"
    assert vmapped.reason == "on one device the step raises TypeError: no such batch"


def test_check_takes_a_step_for_many_devices(capsys: pytest.CaptureFixture[str]) -> None:
    """The laws of many devices are part of its report, from a process that has them."""
    target = f"{FAULTS}:gradients_summed"
    line = ["check", target, "--profile", "quick", "--select", "parallel", "--json", "-"]
    assert main(line) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["subject"] == "fault[gradients_summed]"
    assert [result["law"] for result in data["results"]] == list(NAMES)
    broken = {each["law"]: each for each in data["results"] if each["status"] == "violated"}
    assert set(broken) == {
        VMAP,
        "pmap_equals_one_device",
        "shard_map_equals_one_device",
    }
    vmapped = broken[VMAP]["counterexample"]
    assert f"bnverify.load({target!r})" in vmapped
    with pytest.raises(Violation, match="gradients_summed"):
        # As pasted, but that the environment of this process must not change.
        exec(vmapped.partition("import bnverify\n")[2], {"bnverify": bnverify})  # noqa: S102


def test_a_step_for_one_device_is_not_asked() -> None:
    """Of another step nothing is said of many devices, or that it is exempt where that is asked."""
    assert "parallel" not in {LAWS[name].family for name in choose((), ())}
    (only,) = bnverify.verify(reference.sgd(), select=["pmap_equals_one_device"]).results
    assert only.status == "exempt"


def test_this_process_keeps_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated devices are the child's alone, and another number of them is overruled."""
    monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_enable_fast_math=false {FLAG}=2")
    assert environment()["XLA_FLAGS"] == f"--xla_cpu_enable_fast_math=false {FLAG}=4"
    assert os.environ["XLA_FLAGS"].endswith("=2")


@pytest.mark.parametrize(
    ("target", "refusal"),
    [
        ("bnverify.reference:sgd", "bnverify.reference:sgd is not a bnverify.Parallel"),
        ("bnverify.nowhere:thing", "no module 'bnverify.nowhere' here or installed"),
        ("bnverify:nothing", "bnverify has no 'nothing'"),
    ],
)
def test_other_targets_are_refused(target: str, refusal: str) -> None:
    """What names no Parallel is refused in one line."""
    with pytest.raises(UsageError, match=refusal):
        find(target)


@pytest.mark.parametrize("name", NAMES)
def test_laws_name_known_mistakes(name: str) -> None:
    """Every mistake that a law of many devices names is known."""
    assert LAWS[name].mistakes
    assert all(mistake in MISTAKES for mistake in LAWS[name].mistakes)

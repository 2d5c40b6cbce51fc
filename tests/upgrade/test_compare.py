"""Comparison: every change is found and classified, with a script that reproduces it."""

from __future__ import annotations

import ast
import math
import subprocess
import sys

import altered_step
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bnverify.errors import UsageError
from bnverify.upgrade import record as recorder
from bnverify.upgrade import recording, values
from bnverify.upgrade.compare import _distribution, compare
from tests.tiers import first_of

# Compares NumPy arrays from files; test_recording.py makes such files with every release.

FLOATS = hnp.arrays(np.float64, 4, elements=st.floats(-1e6, 1e6))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the small step."""
    directory = tmp_path_factory.mktemp("step")
    altered_step.write(directory)
    return directory


@pytest.fixture(scope="module")
def record(home):
    """A function that records the altered step, once for each alteration."""
    known = {}

    def call(old=None, laws=False, **altered):
        key = old is not None, laws, repr(altered)
        if key not in known:
            altered_step.alter(home, **altered)
            sys.modules.pop("side", None)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(recorder, "ROWS", (5,))
                patch.setattr(recorder, "CASES", 6)
                target = f"{home / 'steps.py'}:make"
                known[key] = recorder.record(target, old=old, laws=laws)
        return known[key]

    return call


@pytest.fixture(scope="module")
def old(record):
    """The recording of the unaltered step."""
    return record()


@pytest.fixture(scope="module")
def changes(record, old):
    """A function from an alteration to the reported changes: class -> leaves."""

    def call(**altered):
        found = {}
        for each in compare(old, record(old, **altered)).differences:
            found.setdefault(each.kind, set()).add(each.leaf)
        return found

    return call


def test_the_same_step_has_no_differences(changes):
    """In the same environment a replay is bit-identical with its recording."""
    assert changes() == {}


@pytest.mark.parametrize(
    ("altered", "leaves"),
    [
        ({"momentum": 0.99}, {"batch_stats/mean", "batch_stats/var"}),
        ({"ddof": 1}, {"batch_stats/var", "loss", "grads/kernel"}),
        ({"epsilon": 1.1e-3}, {"loss", "grads/kernel", "grads/out", "eval_loss"}),
    ],
    ids=["momentum", "variance divisor", "epsilon"],
)
def test_a_changed_layer_is_a_change_of_meaning(changes, altered, leaves):
    """The right leaves are named, and it is not classified as initialisation."""
    found = changes(**altered)
    assert leaves <= found["meaning"]
    assert "initialisation" not in found
    if "momentum" in altered:
        assert found == {"meaning": leaves}


def test_different_random_bits_are_initialisation(changes):
    """A different random stream with the same distribution is neither meaning nor a violated law."""
    assert changes(seed=1000) == {"initialisation": {"init/params/kernel"}}


def test_another_initialiser_is_a_change_of_meaning(changes):
    """A different spread or constant cannot be explained by chance."""
    assert changes(scale=2.0) == {"meaning": {"init/params/kernel"}}


def test_one_ulp_is_rounding(changes):
    """The loss is multiplied by 1 plus an ulp."""
    found = changes(last_places=True)
    assert set(found) == {"rounding"}
    assert "loss" in found["rounding"]


def test_another_dtype_is_reported_as_dtype(changes):
    """The leaf is named; the effect of fewer digits on values is reported as well."""
    assert changes(dtype="bfloat16")["dtype"] == {"batch_stats/var"}


def test_another_leaf_is_structure(changes):
    """The path is named."""
    assert "params/new" in changes(leaf=True)["structure"]


def test_code_that_no_longer_runs_is_api(record, old):
    """The difference has the exception's message and the line in the user's code."""
    (difference,) = compare(old, record(old, raises=True)).differences
    assert difference.kind == "api"
    assert "gone since" in difference.text


def test_a_law_that_held_and_is_violated_is_a_change_of_meaning(record):
    """A variance divided by n - 1 changes when the batch is doubled."""
    old = record(laws=True)
    new = record(old, laws=True, ddof=1)
    texts = [d.text for d in compare(old, new).differences if d.leaf is None]
    assert any("doubling_the_batch_changes_nothing" in text for text in texts)


@pytest.mark.parametrize(
    "altered", first_of([{"momentum": 0.99}, {"scale": 2.0}, {"raises": True}])
)
def test_the_witness_fails_where_the_step_differs_and_passes_where_it_does_not(
    home, record, old, altered
):
    """The script needs no bnverify, unless the target imports it."""
    compared = compare(old, record(old, **altered))
    script = next(d.witness for d in compared.differences if d.witness)
    assert "from bnverify" not in script
    for now, status in (({}, 0), (altered, 1)):
        altered_step.alter(home, **now)
        done = subprocess.run(
            [sys.executable, "-B", "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stderr
    if "raises" not in altered:
        assert "recorded:" in done.stdout


def test_a_malicious_leaf_name_is_not_executed_in_the_witness(record, old):
    """A recording from an untrusted source may contain any leaf names."""
    from bnverify.upgrade import witness

    new = record(old, momentum=0.99)
    evil = 'batch_stats/mean"""\nraise SystemExit(7)\n"""'
    rename = {"batch_stats/mean": evil}
    trees = [
        {
            name: {**tree, "leaves": [[rename.get(p, p), *rest] for p, *rest in tree["leaves"]]}
            for name, tree in trees.items()
        }
        for trees in old.manifest["trees"]
    ]
    arrays = {name.replace("batch_stats/mean", evil): array for name, array in old.arrays.items()}
    hostile = [recording.Recording({**r.manifest, "trees": trees}, arrays) for r in (old, new)]
    place = values.Place(0, 0, 0, evil, (0,), 1.0, 2.0, 1e-6, 1e6)
    for script in (
        witness.of_value(*hostile, place),
        witness.of_draws(*hostile, evil, 0, 512, 6.0),
    ):
        assert script
        raised = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Raise)]
        assert raised == []


def test_recordings_that_are_not_replays_are_rejected(record, old):
    """Values from different states cannot be compared."""
    with pytest.raises(UsageError, match="not a replay"):
        compare(old, record(momentum=0.5))
    claims = record(old)
    more = {name: claims.manifest[name] * 2 for name in ("shapes", "trees")}
    with pytest.raises(UsageError, match="not a replay"):
        compare(old, recording.Recording({**claims.manifest, **more}, claims.arrays))
    with pytest.raises(UsageError, match="swap the two files"):
        compare(record(old, momentum=0.99), old)


def test_comparing_imports_no_jax():
    """Neither of the two environments is needed."""
    code = "import sys, bnverify.upgrade.compare; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(FLOATS, FLOATS)
def test_the_distance_is_zero_only_for_equal_values(old, new):
    """This holds whatever is allowed."""
    sizes = values.sizes(old, new, np.full(4, 0.5))
    assert np.array_equal(sizes == 0, old == new)
    assert np.array_equal(sizes > 1, np.abs(old - new) > 0.5)


def test_infinite_noise_is_not_compared_and_unknown_noise_is_counted():
    """Infinite noise hides a difference; NaN on one side is replaced by the other side's noise."""
    one, two = np.zeros(1), np.ones(1)
    noise = np.full(1, 0.1, np.float32)
    hidden = values.allowed(one, two, noise, np.full(1, np.inf, np.float32), 0.0)
    assert np.isnan(values.sizes(one, two, hidden)[0])
    other = values.allowed(one, two, noise, np.full(1, np.nan, np.float32), 0.0)
    assert values.sizes(one, two, other)[0] == pytest.approx(5)
    unknown = values.allowed(one, two, None, None, 0.0)
    assert np.isnan(values.sizes(one, two, unknown)[0])
    assert values.sizes(one, np.full(1, np.nan), np.ones(1))[0] == math.inf
    assert values.sizes(np.full(1, np.nan), np.full(1, np.nan), np.ones(1))[0] == 0


@given(st.integers(0, 2**32 - 1))
def test_chance_is_not_another_initialiser(seed):
    """Two samples from one distribution do not differ."""
    rng = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        rows = rng.standard_normal((512, 12))
        averages = np.stack([(rows**p).mean(1) for p in (1, 2, 4)], axis=1)
        draws = np.stack([averages.mean(0), averages.var(0, ddof=1)])
        sides.append(recording.Recording({}, {"draws/w": draws}))
    assert _distribution(*sides, "w") is None


def test_the_command_reports_and_exits_by_the_policy(
    home, record, old, tmp_path, monkeypatch, capsys
):
    """The exit status is 0, 1 or 2; a policy can accept a failing difference."""
    from bnverify.cli import main

    files = [str(tmp_path / name) for name in ("old.bnv", "new.bnv")]
    sides = (old, record(old, momentum=0.99))
    for file, side in zip(files, sides, strict=True):
        recording.write(file, side.manifest, side.arrays)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *files]) == 1
    assert "batch_stats/mean" in capsys.readouterr().out
    assert main(["compare", files[0], files[0]]) == 0
    assert main(["compare", files[0], str(tmp_path / "none")]) == 2
    assert main(["compare", *files, "--format", "xml"]) == 2
    (tmp_path / "bnverify.toml").write_text(
        '[[accept]]\nclass = "meaning"\nleaf = "batch_stats/*"\n'
        'reason = "retrained"\nexpires = 9999-12-31\n'
    )
    assert main(["compare", *files]) == 0
    assert "retrained" in capsys.readouterr().out
    (tmp_path / "bnverify.toml").write_text("accept = 1\n")
    assert main(["compare", *files]) == 2

"""How many faults, put into bnverify itself by hand, does the default tier of its tests catch?

    python benchmarks/mutation.py                     all of them
    python benchmarks/mutation.py --only rounding_does_not_round

Each fault is one edit of one file. For each, a copy of this checkout is edited and its tests are run,
those in ``near`` first, until one fails. Only where none of these does is the whole default tier run.
Prints a line for each fault and how many were caught; exit status 1 where fewer than 95%.

``tests/test_mutation.py`` asserts that every edit still fits its file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 0.95
COPIED = ("bnverify", "properties", "tests", "benchmarks", "docs", "examples", "pins")


class Fault(NamedTuple):
    """One edit of bnverify that makes it wrong.

    Attributes:
        name: says what is wrong after it.
        file: what is edited.
        old: occurs in it exactly once.
        new: what stands there instead.
        near: pytest arguments of the tests that are run first.
    """

    name: str
    file: str
    old: str
    new: str
    near: tuple[str, ...]


ROUNDING = ("tests/jaxpr/test_rounding.py",)
PRIMITIVES = ("tests/jaxpr/test_primitives.py",)
RED = ("tests/laws/test_red.py", "tests/laws/test_stacked.py")
LAWS = ("tests/laws/test_arithmetic.py", *RED, "tests/laws/test_allowances.py")
RUNS = ("tests/test_runs.py",)
LIFE = ("tests/test_life.py",)
LOOP = ("tests/adapters/test_loop.py", "tests/adapters/test_train_state.py")
COMPARE = ("tests/upgrade/test_compare.py",)
POLICY = ("tests/upgrade/test_policy.py",)
RECORDING = ("tests/upgrade/test_recording_file.py", "tests/upgrade/test_recording.py")
COMMANDS = ("tests/test_cli.py",)

FAULTS = (
    # How rounding is read.
    Fault(
        "rounding_does_not_round",
        "bnverify/jaxpr/rounding.py",
        "size = units * SIZE * float(info.eps) / 2",
        "size = units * SIZE * float(info.eps) / 2**12",
        ROUNDING,
    ),
    Fault(
        "what_overflows_stays_finite",
        "bnverify/jaxpr/rounding.py",
        "some[size > per_row(largest, some)] = np.inf",
        "some[size > per_row(largest, some)] = 0",
        ROUNDING,
    ),
    Fault(
        "sums_of_products_share_all_errors",
        "bnverify/jaxpr/rounding.py",
        "summed: Array = output + np.where(np.isfinite(length), length, 0.0) * errors",
        "summed: Array = output + 0 * errors",
        (*ROUNDING, "tests/jaxpr"),
    ),
    Fault(
        "a_branch_is_taken_as_if_it_were_certain",
        "bnverify/jaxpr/rounding.py",
        "return [self.mark_unknown(value, agreed) for value in outputs]",
        "return outputs",
        ROUNDING,
    ),
    Fault(
        "kinks_are_never_in_doubt",
        "bnverify/jaxpr/kinks.py",
        "doubt = moved > np.abs(exact) / times - threshold",
        "doubt = moved > np.abs(exact) * 1e9 + threshold",
        ROUNDING,
    ),
    Fault(
        "a_denominator_near_zero_keeps_its_digits",
        "bnverify/jaxpr/kinks.py",
        "lost = POLE * np.abs(value - exact) > np.abs(exact)",
        "lost = np.abs(value - exact) > 1e9 * np.abs(exact)",
        ROUNDING,
    ),
    Fault(
        "a_dot_product_counts_no_terms",
        "bnverify/jaxpr/arithmetic.py",
        "count = math.prod(shapes[0][axis] for axis in contracted)",
        "count = 1",
        (*ROUNDING, "tests/jaxpr"),
    ),
    Fault(
        "the_slope_is_extrapolated_the_wrong_way",
        "bnverify/jaxpr/slope.py",
        "slope = (4 * narrow - wide) / 3",
        "slope = (4 * wide - narrow) / 3",
        ("tests/jaxpr/test_slope.py",),
    ),
    Fault(
        "rounding_to_even_rounds_half_up",
        "bnverify/jaxpr/numeric.py",
        "return np.rint(inputs[0]) if to_even else round_away(inputs[0])",
        "return np.floor(inputs[0] + 0.5) if to_even else round_away(inputs[0])",
        PRIMITIVES,
    ),
    Fault(
        "select_takes_the_other_case",
        "bnverify/jaxpr/numeric.py",
        "return np.where(which, cases[-1], cases[0])",
        "return np.where(which, cases[0], cases[-1])",
        PRIMITIVES,
    ),
    # What can reach what.
    Fault(
        "the_way_of_a_leak_is_not_found",
        "bnverify/jaxpr/influence.py",
        "if path is not None:\n                equations",
        "if path is None:\n                equations",
        ("tests/jaxpr/test_graph.py", "tests/jaxpr/test_step_influence.py"),
    ),
    Fault(
        "an_opaque_call_hides_what_it_reads",
        "bnverify/jaxpr/interpreter.py",
        "return callback or eqn.primitive.name in _FOREIGN or bool(inner_jaxprs(eqn))",
        "return callback",
        ("tests/jaxpr", "tests/test_untraced.py"),
    ),
    Fault(
        "a_proof_is_claimed_where_a_flow_is_forbidden",
        "bnverify/proof.py",
        "if absent or forbidden(law, flows):",
        "if absent:",
        ("tests/laws/test_red.py", "tests/test_properties.py"),
    ),
    Fault(
        "a_narrow_trace_counts_as_a_proof",
        "bnverify/proof.py",
        "if flows is None or not flows.proved:",
        "if flows is None:",
        ("tests/jaxpr/test_step_influence.py", "tests/test_untraced.py"),
    ),
    # The laws.
    Fault(
        "a_law_allows_a_thousand_times_as_much",
        "bnverify/laws/update.py",
        "return residual(new, expected, 2 * unit(new) * scale + smallest(new))",
        "return residual(new, expected, 2e6 * unit(new) * scale + smallest(new))",
        LAWS,
    ),
    Fault(
        "a_law_allows_half_of_what_rounding_makes",
        "bnverify/laws/arithmetic.py",
        "allowed = xp.where(measurable(zero), 8 * unit(new) * scale + smallest(new), np.inf)",
        "allowed = xp.where(measurable(zero), unit(new) * scale / 8, np.inf)",
        (*LAWS, "properties/test_statistics.py"),
    ),
    Fault(
        "an_error_where_none_is_allowed_passes",
        "bnverify/laws/arithmetic.py",
        "ratio = xp.where(error == 0, 0.0, error / xp.where(allowed > 0, allowed, 0.0))",
        "ratio = xp.where(allowed == 0, 0.0, error / xp.where(allowed > 0, allowed, 1.0))",
        LAWS,
    ),
    Fault(
        "what_is_not_finite_passes",
        "bnverify/laws/arithmetic.py",
        "error = xp.where(xp.isfinite(error), error, np.inf)",
        "error = xp.where(xp.isfinite(error), error, 0.0)",
        LAWS,
    ),
    Fault(
        "only_the_last_leaf_is_judged",
        "bnverify/laws/arithmetic.py",
        "worst = xp.maximum(worst, value)",
        "worst = value",
        LAWS,
    ),
    Fault(
        "the_sample_variance_is_expected",
        "bnverify/laws/arithmetic.py",
        "return Moments(mean, xp.sum(squares * weights, axis=1) / count, count)",
        "return Moments(mean, xp.sum(squares * weights, axis=1) / (count - 1), count)",
        LAWS,
    ),
    Fault(
        "statistics_in_16_bits_are_fine",
        "bnverify/laws/structure.py",
        "if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float32:",
        "if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype == jnp.float64:",
        RED,
    ),
    # Running and judging.
    Fault(
        "a_residual_of_1_5_is_no_violation",
        "bnverify/runs.py",
        "return self.worst > 1\n",
        "return self.worst > 1.5\n",
        RUNS,
    ),
    Fault(
        "a_law_that_no_case_reached_holds",
        "bnverify/runs.py",
        'return "untriggered", UNREACHED',
        'return "held", UNREACHED',
        RUNS,
    ),
    Fault(
        "nothing_confirms_any_violation",
        "bnverify/shrink.py",
        "if case is not None and runner.confirmed(law, case, worst):",
        "if case is not None and not runner.confirmed(law, case, worst):",
        RUNS,
    ),
    Fault(
        "a_warm_state_is_the_initial_one",
        "bnverify/observe.py",
        "for done in range(int(np.max(warmup))):",
        "for done in range(0):",
        ("tests/laws", "tests/test_runs.py", "tests/test_properties.py"),
    ),
    Fault(
        "a_second_run_is_not_compared",
        "bnverify/observe.py",
        'facts["again"] = Again(before, *single.outcome(t.before, case))',
        'facts["again"] = Again(t.before, t.after, t.info, t.eval_loss)',
        RED,
    ),
    Fault(
        "faint_batches_are_held_to_ordinary_noise",
        "bnverify/judge.py",
        "faint = (largest > 0) & (largest < FAINT)",
        "faint = (largest > 0) & (largest < 0)",
        ("tests/test_runs.py", "tests/test_properties.py", "properties"),
    ),
    Fault(
        "a_check_that_is_to_stop_goes_on",
        "bnverify/check.py",
        'return STOPPED if self.fail_fast and broken else ""',
        'return ""',
        RUNS,
    ),
    # The life of a state, and many devices.
    Fault(
        "the_fold_forgets_the_momentum",
        "bnverify/laws/life.py",
        "own, kept = wide(zero), self.momentum * self.expected",
        "own, kept = wide(zero), 0.9 * self.expected",
        LIFE,
    ),
    Fault(
        "a_broken_life_goes_on_as_held",
        "bnverify/lifetime/lives.py",
        "return replace(self._broken[name], cases=self._record.seen[name])",
        'return Evidence.of(name, "held", cases=self._record.seen[name])',
        LIFE,
    ),
    Fault(
        "a_life_that_nobody_lived_is_held",
        "bnverify/lifetime/lives.py",
        'return Evidence.of(name, "untriggered", reason=reason or "no sequence reached it")',
        'return Evidence.of(name, "held", reason=reason or "no sequence reached it")',
        LIFE,
    ),
    # The adapters.
    Fault(
        "the_adapter_forgets_the_new_statistics",
        "bnverify/adapters/canonical.py",
        "return State(params, batch_stats, opt_state, extra), StepInfo(loss, grads)",
        "return State(params, state.batch_stats, opt_state, extra), StepInfo(loss, grads)",
        ("tests/adapters/test_linen.py",),
    ),
    Fault(
        "the_adapter_evaluates_in_train_mode",
        "bnverify/adapters/canonical.py",
        "done = self.model.apply(state, x, y, train=False)\n        return self.loss(",
        "done = self.model.apply(state, x, y, train=True)\n        return self.loss(",
        ("tests/adapters/test_linen.py",),
    ),
    # The upgrade gate.
    Fault(
        "another_dtype_is_another_structure",
        "bnverify/upgrade/compare.py",
        'return f"was {before[0]}, is now {after[0]}", "dtype"',
        'return f"was {before[0]}, is now {after[0]}", "structure"',
        COMPARE,
    ),
    Fault(
        "any_two_recordings_are_compared",
        "bnverify/upgrade/compare.py",
        "    _check(old, new)\n",
        "",
        COMPARE,
    ),
    Fault(
        "a_recording_loses_a_leaf",
        "bnverify/upgrade/recording.py",
        "np.savez_compressed(file, manifest=np.frombuffer(text, np.uint8), **members)",
        "np.savez_compressed(\n"
        "            file, manifest=np.frombuffer(text, np.uint8), **dict([*members.items()][1:])\n"
        "        )",
        RECORDING,
    ),
    Fault(
        "a_recording_may_hold_pickles",
        "bnverify/upgrade/recording.py",
        "np.lib.format.read_array(content, allow_pickle=False)",
        "np.lib.format.read_array(content, allow_pickle=True)",
        RECORDING,
    ),
    Fault(
        "acceptances_never_expire",
        "bnverify/upgrade/policy.py",
        "return today > self.expires",
        "return False",
        POLICY,
    ),
    Fault(
        "a_cost_that_is_not_a_number_passes",
        "bnverify/upgrade/policy.py",
        "is not None and not ratio <= bound",
        "is not None and ratio > bound",
        POLICY,
    ),
    # What the user sees.
    Fault(
        "an_unusable_target_exits_1",
        "bnverify/cli.py",
        'return _say(f"bnverify: {error}", 2)',
        'return _say(f"bnverify: {error}", 1)',
        COMMANDS,
    ),
    Fault(
        "a_missing_shard_is_not_missed",
        "bnverify/merge.py",
        'if missing:\n        raise UsageError(f"missing: shard',
        'if missing and False:\n        raise UsageError(f"missing: shard',
        ("tests/test_merge.py",),
    ),
    Fault(
        "a_shard_takes_its_neighbours_items",
        "bnverify/profile.py",
        "return list(items[self.index - 1 :: self.count])",
        "return list(items[self.index :: self.count])",
        ("tests/test_merge.py",),
    ),
)


def tests_fail(checkout: Path, arguments: tuple[str, ...]) -> bool:
    """Return whether pytest in ``checkout`` finds a failure.

    Raises:
        RuntimeError: it ends in another way than with failures or without.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode not in {0, 1, 2}:  # 2: a test module does not import
        raise RuntimeError(f"pytest {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.returncode != 0


def copy_of(checkout: Path) -> None:
    """Copy what the tests need of this checkout into a directory."""
    for name in COPIED:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, checkout)
    shutil.copytree(ROOT / ".ci", checkout / ".ci", ignore=shutil.ignore_patterns("venv"))


def edited(fault: Fault) -> str:
    """Return the text of a fault's file with the fault in it.

    Raises:
        ValueError: what is to be replaced does not occur exactly once.
    """
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has its text {text.count(fault.old)} times")
    return text.replace(fault.old, fault.new)


def caught_by(fault: Fault, *, near_only: bool) -> str:
    """Return which tests notice a fault, "" where none does."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder)
        copy_of(checkout)
        (checkout / fault.file).write_text(edited(fault), encoding="utf-8")
        for test in fault.near:
            if tests_fail(checkout, (test,)):
                return test
        return "the rest" if not near_only and tests_fail(checkout, ("-n", "2")) else ""


def main() -> int:
    """Run and print; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--near", action="store_true", help="run the nearest tests alone")
    options = parser.parse_args()
    chosen = options.only
    faults = [fault for fault in FAULTS if not chosen or fault.name in chosen]
    caught = 0
    for fault in faults:
        began = time.perf_counter()
        by = caught_by(fault, near_only=options.near)
        caught += bool(by)
        verdict = f"caught by {by}" if by else "LIVES"
        print(f"{fault.name}: {verdict}, {time.perf_counter() - began:.0f} s", flush=True)
    print(f"{caught} of {len(faults)} caught")
    return 0 if caught >= ENOUGH * len(faults) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The pytest plugin. pytest loads it in every run, so it imports neither jax nor Hypothesis."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bnverify.profile import FAMILIES, PROFILES, Shard

if TYPE_CHECKING:
    from bnverify.testing.known_failures import KnownFailure

STALE = pytest.StashKey[list[str]]()
ENTRIES = pytest.StashKey["tuple[KnownFailure, ...]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("bnverify", "training steps with batch statistics")
    group.addoption(
        "--bnverify-target",
        metavar="TARGET",
        help="the target of bnverify's own properties: module:name or path/file.py:name",
    )
    group.addoption(
        "--bnverify-profile",
        metavar="NAME",
        choices=list(PROFILES),
        help="the profile of every bnverify.suite, instead of its own",
    )
    group.addoption(
        "--bnverify-seed",
        metavar="N",
        type=int,
        default=0,
        help="the seed of the cases of every bnverify.suite; default: 0",
    )
    group.addoption(
        "--bnverify-known-failures",
        metavar="FILE",
        help="a TOML file of known failures: law, subject, reason, issue, versions",
    )
    group.addoption("--bnverify-shard", metavar="K/N", help="run only part K of N of all tests")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and read the known failures."""
    config.addinivalue_line(
        "markers", "bnverify(law, subject): tests one law on one subject (from bnverify.suite)"
    )
    for family in FAMILIES:
        text = f"bnverify_{family}: tests a law of the family {family!r} (from bnverify.suite)"
        config.addinivalue_line("markers", text)
    config.addinivalue_line("markers", "xdist_group(name): tests for one pytest-xdist worker")
    config.stash[STALE] = []
    config.stash[ENTRIES] = ()
    file = config.getoption("bnverify_known_failures")
    if file is None:
        return
    from bnverify.errors import UsageError
    from bnverify.testing import known_failures

    path = Path(file) if Path(file).exists() else config.rootpath / file
    try:
        config.stash[ENTRIES] = known_failures.read(path)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def claim(item: pytest.Item) -> tuple[str, str] | None:
    """Return (law, subject name) for a test of one law, else None."""
    mark = item.get_closest_marker("bnverify")
    if mark is None:
        return None
    try:
        return mark.kwargs["law"], mark.kwargs["subject"].name
    except Exception:  # noqa: BLE001 - the function that makes the subject failed; its tests report it
        return None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """Mark known failures, find stale ones, then select this shard's tests."""
    entries = config.stash[ENTRIES]
    if entries:  # before -k and -m, so that tests they deselect do not make entries stale
        _mark_known(items, entries)
        if _is_full_run(config):
            _find_stale(config, items, entries)
    yield
    text = config.getoption("bnverify_shard")
    if text:
        kept = _shard(text).take(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def _shard(text: str) -> Shard:
    from bnverify.errors import UsageError

    try:
        return Shard.parse(text)
    except UsageError as error:
        raise pytest.UsageError(f"--bnverify-shard: {error}") from None


def _mark_known(items: list[pytest.Item], entries: tuple[KnownFailure, ...]) -> None:
    from bnverify.evidence import Violation
    from bnverify.testing.suite import KNOWN

    known = {(entry.law, entry.subject): entry for entry in entries if entry.applies}
    for item in items:
        entry = known.get(claim(item) or ("", ""))
        if entry is not None:
            reason = f"{entry.reason} ({entry.issue})"
            item.stash[KNOWN] = reason
            # strict: an expected violation that does not occur is a failure.
            item.add_marker(pytest.mark.xfail(raises=Violation, strict=True, reason=reason))


def _is_full_run(config: pytest.Config) -> bool:
    """Return whether the run collects everything that a plain `pytest` would."""
    options = config.option
    narrowed = options.ignore or options.ignore_glob or options.bnverify_target
    return config.args_source is not pytest.Config.ArgsSource.ARGS and not narrowed


def _find_stale(
    config: pytest.Config, items: list[pytest.Item], entries: tuple[KnownFailure, ...]
) -> None:
    from bnverify.testing.known_failures import stale

    claims = {found for item in items if (found := claim(item))}
    config.stash[STALE] = [str(entry) for entry in stale(entries, claims)]
    if hasattr(config, "workeroutput"):  # in a pytest-xdist worker; the controller reports
        config.workeroutput["bnverify_stale"] = config.stash[STALE]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take over the stale entries from a pytest-xdist worker; all workers find the same."""
    found = getattr(node, "workeroutput", {}).get("bnverify_stale", [])
    if found:
        node.config.stash[STALE] = found


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a known failure matches no test."""
    if session.config.stash.get(STALE, None) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """List the known failures that match no test."""
    found = config.stash.get(STALE, [])
    if found:
        terminalreporter.section("stale known failures", red=True, bold=True)
        for entry in found:
            terminalreporter.line(f"no test matches {entry}: delete the entry")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """Show a violation by its message only, since its traceback is inside bnverify.

    The short summary shows the leaf and the reason; the test's name already has the law.
    """
    report = yield
    mark = item.get_closest_marker("bnverify")
    if mark is not None and call.excinfo is not None and report.failed:
        from bnverify.evidence import Violation

        if isinstance(call.excinfo.value, Violation):
            representation: Any = call.excinfo.getrepr(style="value")
            if representation.reprcrash is not None:
                representation.reprcrash.message = call.excinfo.value.evidence.reason
            report.longrepr = representation
    return report

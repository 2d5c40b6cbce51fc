"""README.md and docs/: what they show is what happens."""

import doctest
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
"""Executed in the default tier; the other pages in the nightly."""

PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]

FINDINGS = ROOT / "docs" / "findings.md"
PRINTED = "0.10.2"
"""The jax of which that page shows the output: it names faults of others, release by release."""


@pytest.mark.parametrize(
    "page",
    [page if page == README else pytest.param(page, marks=pytest.mark.nightly) for page in PAGES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_sessions_on_the_page_run_as_shown(page: Path) -> None:
    """Every ``>>>`` in a python block gives the output printed below it."""
    if page == FINDINGS and metadata.version("jax") != PRINTED:
        pytest.skip(f"the page shows what jax {PRINTED} and its contemporaries print")
    blocks = re.findall(
        r"^```(?:python|pycon)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )
    source = "\n".join(block for block in blocks if ">>>" in block)
    test = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_code_on_the_pages_is_python() -> None:
    """Every other python block at least compiles."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if ">>>" not in block:
                compile(block, str(page), "exec")


def anchors(text: str) -> set[str]:
    """Return what the headings of a page are called in links to them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    """Every relative link names a file of the repository and, after #, a heading of that page."""
    lost = []
    for page in [
        *PAGES,
        *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
    ]:
        text = page.read_text(encoding="utf-8")
        for to in re.findall(r"\]\((?!https?:)([^)\s]+)", text):
            path, _, heading = to.partition("#")
            file = page.parent / path if path else page
            if file.exists() and not heading:
                continue
            if not file.exists() or heading not in anchors(file.read_text(encoding="utf-8")):
                lost.append((page.name, to))
    assert lost == []


def plain(line: str) -> str:
    """Return a line of the terminal without what differs from profile to profile."""
    line = re.sub(r"\s+[\d.,]+k? cases?(, worst [\d.]+)?$", "", line.rstrip())
    return re.sub(r"profile \w+|; [\d,]+ cases in [\d.]+ s", "", line)


def test_the_readme_shows_what_check_prints() -> None:
    """The block below the first command holds lines of its output, in their order."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```text\n(reference.*?)^```", readme, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-m", "bnverify", "check", "--profile", "quick"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
        check=False,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    printed = iter([plain(line) for line in done.stdout.splitlines()])
    lost = [line for line in shown.splitlines() if line != "…" and plain(line) not in printed]
    assert lost == []

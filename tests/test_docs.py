"""README.md and docs/: what they show is what happens."""

import doctest
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
"""Executed in the default tier; the other pages in the nightly."""

PAGES = [README, *sorted(ROOT.glob("docs/**/*.md"))]

FINDINGS = ROOT / "docs" / "findings.md"
PRINTED = "0.10.2"
"""The jax whose output the pages show: findings differ by release, and so do the digits of a case."""


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


def test_the_page_of_supported_releases_lists_the_pins_and_their_tox_environments() -> None:
    """A row for each file in pins/, oldest jax first, with the environment of tox that installs it."""
    tox = (ROOT / "tox.ini").read_text(encoding="utf-8")
    factors = {
        file: factor
        for factor, file in re.findall(r"^ +(jax\d+): -r (pins/\S+)", tox, re.MULTILINE)
    }
    (label,) = re.findall(r"^ +matrix = (.*)$", tox, re.MULTILINE)
    python = {
        f"jax{n}": py
        for py, many in re.findall(r"(py\d+)-jax(\{[^}]*\}|\d+)", label)
        for n in re.findall(r"\d+", many)
    }
    expected = []
    for file in (ROOT / "pins").glob("*.txt"):
        pins = dict(re.findall(r"^([\w-]+)==(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE))
        factor = factors.get(f"pins/{file.name}")
        environment = f"`{python[factor]}-{factor}`" if factor else ""
        expected.append((*(pins[name] for name in ("jax", "flax", "optax", "numpy")), environment))
    expected.sort(key=lambda row: Version(row[0]))
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ?(\S*) ?\|$", page, re.MULTILINE
    )
    assert rows == expected


def plain(line: str) -> str:
    """Return a line of the terminal without numbers of cases and seconds."""
    line = re.sub(r"\s+[\d.,]+k? cases?(, worst [\d.]+)?$", "", line.rstrip())
    return re.sub(r"; [\d,]+ cases in [\d.]+ s", "", line)


def printed(*arguments: str, directory: Path = ROOT) -> tuple[int, list[str]]:
    """Return the exit status of ``bnverify check``, and the lines of its report."""
    places = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": places, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "bnverify", "check", *arguments],
        env={**os.environ, **settings},
        cwd=directory,
        check=False,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    return done.returncode, done.stdout.splitlines()


def block(start: str) -> list[str]:
    """Return the lines of the README's text block that begins so."""
    readme = README.read_text(encoding="utf-8")
    (shown,) = re.findall(rf"^```text\n({start}.*?)^```", readme, re.MULTILINE | re.DOTALL)
    return [line for line in shown.splitlines() if line != "…"]


def recorded(picture: Path) -> list[str]:
    """Return the lines of a terminal that rich drew, neither indented nor with its window's title."""
    lines: dict[float, str] = {}
    for text in ET.parse(picture).iter("{http://www.w3.org/2000/svg}text"):  # noqa: S314 - our own picture
        if not (text.get("class") or "").endswith("-title"):
            height = float(text.attrib["y"])
            lines[height] = lines.get(height, "") + "".join(text.itertext())
    shown = [lines[height].replace("\xa0", " ").strip() for height in sorted(lines)]
    assert len(shown) > 20
    return [line for line in shown if line]


def test_the_readme_shows_what_check_prints() -> None:
    """The block below the first command holds lines of its output, in their order."""
    status, lines = printed()
    assert status == 0
    left = iter([plain(line) for line in lines])
    assert [line for line in block("reference") if plain(line) not in left] == []


def test_the_readme_shows_what_the_broken_loss_prints(tmp_path: Path) -> None:
    """The example with its mistake made: the same lines in their order, whatever the numbers.

    In the text and in the picture of the terminal, which docs/pictures.py makes.
    """
    if metadata.version("jax") != PRINTED:
        pytest.skip(f"the numbers, and so the line breaks, are those of jax {PRINTED}")
    for file in (ROOT / "examples" / "linen_regression").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        text = text.replace(
            "error = predictions.squeeze(-1) - targets", "error = predictions - targets"
        )
        (tmp_path / file.name).write_text(text, encoding="utf-8")
    status, lines = printed("check.py:subject", "--profile", "quick", directory=tmp_path)
    assert status == 1

    def alike(line: str) -> str:
        line = line.replace(str(tmp_path), "/home/you/project")
        return re.sub(r"-?\d[\d.,]*(e[+-]?\d+)?", "N", line.strip())

    for shown in (block("linen"), recorded(ROOT / "docs" / "images" / "check.svg")):
        left = iter(map(alike, lines))
        assert [line for line in shown if alike(line) not in left] == []
    (wrong,) = re.findall(r"^ +(error = .*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert wrong in (tmp_path / "model.py").read_text(encoding="utf-8")

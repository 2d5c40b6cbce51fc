"""The pages of the site that docs/generated.py makes; MkDocs itself runs in ``tox -e docs``."""

from __future__ import annotations

import html
import importlib.util
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import yaml

import bnverify
from bnverify.commands import __path__ as command_path
from bnverify.evidence import Status
from bnverify.laws import FAMILIES, LAWS
from bnverify.mistakes import MISTAKES
from bnverify.proof import MISSING_CAPABILITY

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def generated() -> ModuleType:
    """Return the module docs/generated.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("generated", DOCS / "generated.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generated: ModuleType) -> dict[str, str]:
    """Return the generated pages: path under docs/ -> Markdown."""
    made: dict[str, str] = generated.pages()
    return made


def test_each_law_has_a_page_that_says_all_that_is_known_of_it(pages: dict[str, str]) -> None:
    """Claim, source, derivation, and the code of each mistake that breaks it."""
    for law in LAWS.values():
        page = html.unescape(pages[f"laws/{law.name}.md"].replace("\\", ""))
        for text in (law.claim, law.source):
            assert text in page, law.name
        assert "".join(law.derivation.splitlines()[-1:]) in page, law.name
        for mistake in (MISTAKES[name] for name in law.mistakes):
            assert mistake.wrong in page, (law.name, mistake.name)
            assert mistake.right in page, (law.name, mistake.name)


def test_each_mistake_has_a_page_that_names_the_laws_that_notice_it(pages: dict[str, str]) -> None:
    """With its code, wrong and right, and a fix."""
    for mistake in MISTAKES.values():
        page = pages[f"mistakes/{mistake.name}.md"]
        assert f'```python title="Wrong"\n{mistake.wrong}\n```' in page
        assert f'```python title="Right"\n{mistake.right}\n```' in page
        noticing = {law.name for law in LAWS.values() if mistake.name in law.mistakes}
        assert set(re.findall(r"\.\./laws/(\w+)\.md", page)) == noticing


def test_a_law_that_allows_for_rounding_says_so(pages: dict[str, str]) -> None:
    """Whose derivation counts roundings, or which asks for the step's noise, is not called exact."""
    for law in LAWS.values():
        (allowed,) = re.findall(
            r"^- \*\*Tolerance:\*\* (.*)$", pages[f"laws/{law.name}.md"], re.MULTILINE
        )
        if "noise" in law.observes:
            assert "rounding.md" in allowed, law.name
        elif re.search(r"\d u\b", law.derivation):
            assert allowed.startswith("Derived below"), law.name


def test_links_among_the_generated_pages_lead_somewhere(pages: dict[str, str]) -> None:
    """Every relative link from one of them names a page of the site or a file of docs/."""
    lost = []
    for name, text in pages.items():
        for to in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(name), to))
            if path not in pages and not (DOCS / path).exists():
                lost.append((name, to))
    assert lost == []


def test_no_generated_page_is_committed(pages: dict[str, str]) -> None:
    """A file of that name would be an old copy of it."""
    assert [name for name in pages if (DOCS / name).exists()] == []


def test_the_navigation_holds_every_page_of_the_docs(pages: dict[str, str]) -> None:
    """And names none that is not there; laws and mistakes are put in when the site is built."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = set(re.findall(r"[\w/]+\.md", yaml.safe_dump(nav)))
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    made = {name for name in pages if not re.match(r"(laws|mistakes)/(?!index)", name)}
    assert listed == written | made


def test_every_command_and_every_public_name_is_described(pages: dict[str, str]) -> None:
    """Each command with its options, each name of the package once."""
    commands = {path.stem for path in Path(next(iter(command_path))).glob("[!_]*.py")}
    for command in commands:
        assert f"usage: bnverify {command} " in pages["command_line.md"], command
    described = re.findall(r"^::: bnverify\.(\w+)$", pages["api.md"], re.MULTILINE)
    assert sorted(described) == sorted({*bnverify.__all__, "strategies"} - {"__version__"})


def test_terms_of_the_glossary_are_in_use() -> None:
    """Each occurs, beyond the glossary, in the package or on another page."""
    glossary = DOCS / "glossary.md"
    terms = re.findall(r"^(\S.*)\n:   ", glossary.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(terms) > 20
    files = [*(ROOT / "bnverify").rglob("*.py"), *DOCS.rglob("*.md"), ROOT / "README.md"]
    text = " ".join(file.read_text(encoding="utf-8") for file in files if file != glossary)
    text = " ".join(text.lower().split())
    assert [term for term in terms if not re.search(rf"\b{re.escape(term.lower())}", text)] == []


def test_what_the_docs_name_is_in_the_glossary_or_the_api(pages: dict[str, str]) -> None:
    """Every family, status and capability, and every class of the package that a page names."""
    glossary = (DOCS / "glossary.md").read_text(encoding="utf-8")
    terms = {term.lower() for term in re.findall(r"^(\S.*)\n:   ", glossary, re.MULTILINE)}
    assert {*FAMILIES, *get_args(Status), *MISSING_CAPABILITY} <= terms
    package = ROOT / "bnverify"
    files = [path for path in package.rglob("*.py") if path.parent.name != "zoo"]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    classes = set(re.findall(r"^class ([A-Z]\w+)", source, re.MULTILINE))
    described = set(re.findall(r"^::: bnverify\.(\w+)$", pages["api.md"], re.MULTILINE))
    undefined = []
    for page in (*DOCS.rglob("*.md"), ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        spans = " ".join(re.findall(r"`[^`]+`|\*\*[^*]+\*\*", prose))
        of_examples = set(re.findall(r"class (\w+)", text))
        named = classes.intersection(re.findall(r"\b[A-Z]\w+", spans)) - of_examples - described
        undefined += [(page.name, name) for name in named if name.lower() not in terms]
    assert undefined == []


def test_the_site_is_told_of_no_other_host() -> None:
    """No font, script or style is named that a reader's browser would fetch elsewhere."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert config["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css", "repo_url"} & set(config)


def test_generating_pages_imports_no_jax() -> None:
    """The site is built from descriptions; nothing is run for it."""
    code = (
        "import importlib.util, sys; "
        "spec = importlib.util.spec_from_file_location('generated', sys.argv[1]); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "module.pages(); assert 'jax' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(DOCS / "generated.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

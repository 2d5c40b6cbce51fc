"""The page: verdict first, nothing loaded, nothing run, readable at any width."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from bnverify.case import Case
from bnverify.evidence import Counterexample, Evidence, Report
from bnverify.laws.mismatch import Mismatch
from bnverify.show.html import page
from bnverify.upgrade.compare import Comparison
from bnverify.upgrade.difference import Difference
from bnverify.upgrade.judgement import judge
from bnverify.upgrade.policy import Policy
from bnverify.upgrade.values import Distance, Place

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "params/<img src=x onerror=alert(1)>/\"'&" + "very_long_name" * 12
MATRIX = {
    "scope": "every N and D",
    "proved": True,
    "unknown": [],
    "matrix": {"params": ["params", "x", "y", "lr"], "batch_stats": ["batch_stats", "x"]},
}


def manifest(version: str, **changes):
    return {
        "bnverify": "0",
        "python": "3.11.7",
        "versions": {"jax": version, "flax": "1"},
        "laws": {"variance_is_never_negative": {"status": "held", "residual": 0.25}},
        "influence": MATRIX,
        "costs": {"run_time": 1e-3},
        **changes,
    }


@pytest.fixture(scope="module")
def text():
    """A page with one of everything."""
    place = Place(0, 0, 0, HOSTILE, (0,), 1.0, 2.0, 1e-6, 1e6)
    distances = {
        HOSTILE: Distance(place, place, 10, 10, 0),
        "loss": Distance(None, None, 10, 10, 0),
        "grads/w": Distance(None, None, 0, 10, 0),
    }
    found = (
        Difference(
            kind="meaning",
            subject="s",
            leaf=HOSTILE,
            size=1e6,
            text="was 1 and is 2",
            witness="x = 1\n" + "y" * 300 + "</pre><script>alert(2)</script>\n",
        ),
        Difference(kind="initialisation", subject="s", leaf="init/w", text="other numbers"),
    )
    leak = {**MATRIX, "matrix": {**MATRIX["matrix"], "params": ["batch_stats", "params", "x"]}}
    new = manifest("2", influence=leak)
    new["laws"] = {"variance_is_never_negative": {"status": "violated", "residual": np.inf}}
    new["laws"]["variance_is_never_negative"]["residual"] = 3.5
    compared = Comparison("<my step>", manifest("1"), new, found, distances, {"run_time": 1.0})
    return page([judge(compared, Policy(), old="old.txt", new="new.txt")])


class Reader(HTMLParser):
    """Collects tags and checks that they close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_loads_nothing(text):
    """No script, no image, no link, no style sheet from elsewhere; hostile names are text."""
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    tags = {tag for tag, _ in reader.seen}
    assert not tags & {"script", "img", "link", "iframe", "a", "object"}
    names = {name for _, attributes in reader.seen for name in attributes}
    assert not {"src", "href", "onerror"} & names
    assert "url(" not in text
    assert "@import" not in text


def test_the_verdict_comes_first_and_all_parts_are_there(text):
    """Verdict, differences, heat map, matrices, witness, costs; told by signs, not by colour."""
    parts = [
        "not accepted",
        "What changed",
        "Leaves and laws",
        "What depends on what",
        "See it",
        "Costs",
    ]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "✗ 1e+06" in text
    assert "✗ leaks ≠" in text
    assert ">~<" in text
    assert ">=<" in text
    assert ">?<" in text
    assert html.escape("</pre><script>alert(2)</script>") in text


def test_a_page_without_differences_says_so():
    """And several upgrades share one heat map."""
    same = Comparison(
        "s", manifest("1"), manifest("1"), (), {"loss": Distance(None, None, 1, 1, 0)}, {}
    )
    made = judge(same, Policy(), old="a", new="b")
    assert "nothing changed, to the last bit" in page([made])
    assert page([made, made]).count("<thead>") >= 1


def test_a_green_page_explains_itself():
    """Where all that differs is rounding, that is said, and nothing reads like a failure."""
    found = (Difference(kind="rounding", subject="s", leaf="loss", size=0.5, text="differs"),)
    same = Comparison("s", manifest("1"), manifest("2"), found, {}, {})
    made = page([judge(same, Policy(), old="a", new="b")])
    assert "No value, shape or dtype differs beyond rounding." in made
    assert "1 leaf differs by rounding alone" in made
    assert "✗ 0.5" not in made


def test_the_page_of_a_check_has_all_of_the_report_and_loads_nothing():
    """Cause, fix, values, script, every law with its residual; hostile names are text."""
    law = "variance_is_never_negative"
    found = Evidence.of(
        law,
        "violated",
        cases=12,
        residual=3e9,
        reason="it is",
        counterexample=Counterexample(law, Case.of(0, [[1.0]], [0.0], 0.1), f"{HOSTILE}.py:x"),
        diagnosis="slip: it is <wrong>. Fix: do it right. Or else.",
        mismatch=Mismatch(HOSTILE, (0,), -0.25, 0.0, 1e-7),
        failed=7,
    )
    held = Evidence.of("momentum_is_as_declared", "held", cases=5, residual=0.25)
    report = Report("<my step>", "quick", 0, (found, held), 12, 0.1, {"jax": "1"}, MATRIX, ("<b>",))
    made = page([report])
    reader = Reader()
    reader.feed(made)
    assert reader.open == []
    assert not {tag for tag, _ in reader.seen} & {"script", "img", "link", "iframe", "a", "b>"}
    for part in ("it is <wrong>.", "do it right.", HOSTILE, "-0.25", "in 7 of 12 cases", "<b>"):
        assert html.escape(part).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in made
    assert "0.25 times the tolerance" in made
    assert held.law in made
    frame = report._repr_html_()
    assert frame.startswith("<iframe")
    assert "<script" not in frame


@pytest.mark.nightly
@pytest.mark.skipif(BROWSER is None, reason="no chromium here to look at the page with")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_it_without_sideways_scrolling(text, tmp_path, width):
    """The page is as wide as the window; wide tables and the script scroll inside it."""
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(text, quote=True)}"></iframe>'
        "<script>onload = () => { const page = frames[0].document.documentElement;"
        "document.body.dataset.wide = page.scrollWidth + ' ' + page.clientWidth;"
        "document.body.dataset.title = frames[0].document.title; }</script>",
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"]
    done = subprocess.run(
        [*command, frame.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.search(r'data-wide="(\d+) (\d+)"', done.stdout)
    assert found, done.stdout[-500:]
    assert int(found[1]) <= int(found[2])
    assert "upgrade" in done.stdout

"""HTML pages: verdict first, self-contained, readable at any width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from bnverify.evidence import Call, Cause, Counterexample, Evidence, Report
from bnverify.laws import LAWS
from bnverify.laws.mismatch import Mismatch
from bnverify.mistakes import MISTAKES
from bnverify.model import Case
from bnverify.report.html import _of_check, page
from bnverify.upgrade.compare import Comparison
from bnverify.upgrade.policy import Difference, Policy, judge
from bnverify.upgrade.values import Distance, Place

LOOK = """
onload = () => {
  const page = frames[0].document, window_ = page.documentElement.clientWidth;
  for (const details of page.querySelectorAll("details")) details.open = true;
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), unseen = [];
  let count = 0;
  for (let text; (text = texts.nextNode()); ) {
    if (!text.data.trim() || text.parentElement.closest(".wide, pre")) continue;
    const range = page.createRange();
    range.selectNodeContents(text);
    count += 1;
    const at = range.getBoundingClientRect(), style = getComputedStyle(text.parentElement);
    if (!at.width || !at.height || at.left < 0 || at.right > window_ || style.visibility != "visible")
      unseen.push(text.data.trim() + " " + at.left + " " + at.right);
  }
  const width = page.documentElement.scrollWidth;
  document.body.dataset.seen = JSON.stringify({width, window: window_, texts: count, unseen});
};
"""
"""Reports the width of the page in the frame, and which of its text is not visible."""

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
    """Collects tags and checks that they are closed in order."""

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
    """No script, image, link or external style sheet; malicious names are shown as text."""
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    tags = {tag for tag, _ in reader.seen}
    assert not tags & {"script", "img", "link", "iframe", "a", "object"}
    names = {name for _, attributes in reader.seen for name in attributes}
    assert not {"src", "href", "onerror"} & names
    assert "url(" not in text
    assert "@import" not in text


def test_the_verdict_comes_first_and_all_sections_are_there(text):
    """Verdict, differences, heat map, matrices, witness, costs; marked by signs as well as colour."""
    parts = [
        "not accepted",
        "What changed",
        "Leaves and laws",
        "What depends on what",
        "To reproduce",
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
    """Several upgrades share one heat map."""
    same = Comparison(
        "s", manifest("1"), manifest("1"), (), {"loss": Distance(None, None, 1, 1, 0)}, {}
    )
    made = judge(same, Policy(), old="a", new="b")
    assert "nothing changed; all values are bit-identical" in page([made])
    assert page([made, made]).count("<thead>") >= 1


def test_a_page_with_only_rounding_says_so():
    """Nothing on it looks like a failure."""
    found = (Difference(kind="rounding", subject="s", leaf="loss", size=0.5, text="differs"),)
    same = Comparison("s", manifest("1"), manifest("2"), found, {}, {})
    made = page([judge(same, Policy(), old="a", new="b")])
    assert "No value, shape or dtype differs beyond rounding." in made
    assert "1 leaf differs by rounding only" in made
    assert "✗ 0.5" not in made


LAW, HELD = "variance_is_never_negative", "momentum_is_as_declared"
LIFE = "a_checkpoint_keeps_every_value"
PATH = ("batch_stats", f"mul at /home/you/{'long_name/' * 12}steps.py:3 (<step>)", "params")


def checked():
    """Return a check's report with one of everything."""
    x = np.linspace(-1, 1, 12 * 11, dtype=np.float32).reshape(12, 11)
    found = Evidence.of(
        LAW,
        "violated",
        cases=12,
        residual=1e5,
        reason=str(Mismatch(HOSTILE, (0,), -0.25, 0.0, 1e-7)),
        counterexample=Counterexample(LAW, Case.of(0, x, x[:, 0], 0.1, 2), f"{HOSTILE}.py:x"),
        cause=Cause("sample_variance", "the variance is <wrong>"),
        mismatch=Mismatch(HOSTILE, (0,), -0.25, 0.0, 1e-7),
        failed=7,
        path=PATH,
    )
    batch = Case.of(0, [[1.0]], [0.0], 0.5)
    history = (Call("begin", batch), Call("save", "bytes"), Call("restore"))
    lost = Evidence.of(
        LIFE,
        "violated",
        cases=1,
        residual=np.inf,
        reason="opt_state: 1 is 0",
        cause=Cause("checkpoint_drops_optimizer_state"),
        counterexample=Counterexample(LIFE, history=history),
    )
    others = [name for name, law in LAWS.items() if law.kind == "residual" and name != LAW]
    held = [Evidence.of(name, "held", cases=5, residual=0.25) for name in others]
    exact = Evidence.of("gradients_are_gradients_of_the_loss", "held", cases=5, residual=0.0)
    held = [exact if each.law == exact.law else each for each in held]
    witness = Evidence.of("targets_reach_the_params", "held", cases=5, residual=0.0)
    results = (found, lost, *held, witness)
    leak = {**MATRIX, "matrix": {**MATRIX["matrix"], "params": ["batch_stats", "params", "x"]}}
    return Report("<my step>", "quick", 0, results, 12, 0.1, {"jax": "1"}, leak, ("<b>",))


def test_the_page_of_a_check_is_complete_and_self_contained():
    """Cause, fix, values, script, path, every law with its residual; malicious names are text."""
    report = checked()
    made = page([report])
    reader = Reader()
    reader.feed(made)
    assert reader.open == []
    assert not {tag for tag, _ in reader.seen} & {"script", "img", "link", "iframe", "a", "b>"}
    fix = MISTAKES["sample_variance"].fix
    for part in ("is <wrong>).", fix, HOSTILE, "-0.25", "in 7 of 12 cases", "<b>", *PATH):
        assert html.escape(part).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in made
    assert "at most 0.25x the tolerance" in made
    assert all(evidence.law in made for evidence in report.results)
    frame = report._repr_html_()
    assert frame.startswith("<iframe")
    assert "<script" not in frame


def test_the_length_of_a_bar_is_its_error():
    """On the shared axis 1e2 is halfway between 1e-3 and 1e7; the bound is at 1 in every bar."""
    context = _of_check(checked())
    bars = context["bars"]
    rows = {row["name"]: row for row in bars["rows"] + bars["rest"]}
    assert [row["name"] for row in bars["rows"]][:2] == [LIFE, LAW]
    assert (rows[LIFE]["width"], rows[LIFE]["label"]) == ("100.0%", "✗ ∞")
    # The counterexample's error exceeds the residual of the cases: 0.25 / 1e-7 = 2.5e6.
    assert (rows[LAW]["label"], bars["bound"]) == ("✗ 2.5e+06", "30.0%")
    assert float(rows[LAW]["width"][:-1]) == pytest.approx(10 * (3 + np.log10(2.5e6)), abs=0.05)
    assert float(rows[HELD]["width"][:-1]) == pytest.approx(10 * (3 + np.log10(0.25)), abs=0.05)
    assert "gradients_are_gradients_of_the_loss" in bars["note"]
    assert "targets_reach_the_params" not in bars["note"]  # a witness law measures no error


def test_a_counterexample_is_a_small_table():
    """A batch has a row for each example, a history a row for each call; large ones are cut."""
    batch, history = (each["table"] for each in _of_check(checked())["groups"])
    assert batch["head"] == ["row", *(f"x[{d}]" for d in range(8)), "…", "y"]
    assert len(batch["rows"]) == 9
    assert batch["rows"][0][:2] == ["0", "-1"]
    assert batch["rows"][0][-2:] == ["…", "-1"]
    assert batch["caption"] == (
        "Batch; seed 0, lr 0.1, after 2 steps on the same batch, x of shape (12, 11)"
    )
    assert history["rows"] == [
        ["1", "begin", "a batch of shape (1, 1), lr 0.5"],
        ["2", "save", "bytes"],
        ["3", "restore", ""],
    ]


@pytest.mark.nightly
@pytest.mark.skipif(BROWSER is None, reason="no chromium here to look at the page with")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("of", ["check", "upgrade"])
def test_a_browser_shows_all_text_without_horizontal_scrolling(text, tmp_path, of, width):
    """The page fits the window, except for elements that scroll by themselves."""
    shown = text if of == "upgrade" else page([checked()])
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(shown, quote=True)}"></iframe>'
        f"<script>{LOOK}</script>",
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"]
    done = subprocess.run(
        [*command, frame.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found, done.stdout[-500:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["width"] <= seen["window"]
    assert seen["texts"] > 50
    assert seen["unseen"] == []

"""The pages of the site that are generated from the code, and the MkDocs hooks that add them.

None of these pages is committed: `pages` renders the descriptions of laws, mistakes, commands and public
names as Markdown. It needs neither MkDocs nor jax, so the tests can call it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any
from unittest import mock

import bnverify
from bnverify import cli, commands
from bnverify.commands.explain import HOW
from bnverify.laws import FAMILIES, LAWS, Law
from bnverify.mistakes import MISTAKES, Mistake

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

COPIED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
"""Files at the root of the repository -> the pages that show them."""

API = {
    "Making a subject": "linen nnx train_state nnx_loop loop solution declare load "
    "Subject State StepInfo LayerInput",
    "Checking it": "verify suite replay Profile Case Domain InvalidCase",
    "What a check returns": "Report Evidence Violation TargetError",
    "Checkpoints": "CheckpointedSubject check_life life Life",
    "Several devices": "Parallel check_parallel",
    "The reference": "train_step",
}
"""Headings of the API page -> public names, in order; all other public names come last."""

WIDE = "---\nhide:\n  - toc\n---\n"
"""Front matter that hides the table of contents, to make room for two pieces of code side by side."""


def pages() -> dict[str, str]:
    """Return the generated pages: path under docs/ -> Markdown."""
    made = {page: _moved((ROOT / file).read_text("utf-8")) for file, page in COPIED.items()}
    made["laws/index.md"] = _law_index()
    made |= {f"laws/{law.name}.md": _law(law) for law in LAWS.values()}
    made["mistakes/index.md"] = _mistake_index()
    made |= {f"mistakes/{each.name}.md": _mistake(each) for each in MISTAKES.values()}
    made["command_line.md"] = _command_line()
    made["api.md"] = _api()
    return made


def _moved(text: str) -> str:
    """Return a page of the root directory with its links rewritten for docs/."""
    text = re.sub(r'(\]\(|src="|srcset="|href=")docs/', r"\1", text)
    for file, page in COPIED.items():
        text = text.replace(f"]({file}", f"]({page}")
    return text


# Laws and mistakes.


def _law_index() -> str:
    lines = ["# Laws", ""]
    lines += [f"A training step is checked against {len(LAWS)} laws in {len(FAMILIES)} families."]
    lines += ["`bnverify explain LAW` prints one of these pages in a terminal."]
    for family in FAMILIES:
        lines += ["", f"## {family.capitalize()}", "", "| law | claim |", "|---|---|"]
        for law in (law for law in LAWS.values() if law.family == family):
            lines.append(f"| [{law.name}]({law.name}.md) | {_cell(_prose(law.claim))} |")
    return "\n".join(lines) + "\n"


def _law(law: Law) -> str:
    how = HOW[law.kind]
    if law.must_not_reach:
        how = f"proved if the traced step has no such dependency, else {how}"
    facts = [
        ("Family", f"[{law.family}](index.md#{law.family})"),
        ("Checked", f"{how[0].upper()}{how[1:]}."),
        ("Tolerance", _tolerance(law)),
    ]
    if law.must_not_reach:
        flows = ", ".join(f"`{source}` to `{output}`" for output, source in law.must_not_reach)
        facts.append(("Forbidden dependencies", flows))
    if law.capabilities:
        named = ", ".join(f"`{name}`" for name in law.capabilities)
        facts.append(("Needs", f"a subject with {named}; for others the law is exempt"))
    facts.append(("Source", _prose(law.source)))
    lines = [f"{WIDE}# {law.name}", "", f"**{_prose(law.claim)}**", ""]
    lines += [f"- **{name}:** {text}" for name, text in facts]
    if law.derivation:
        lines += ["", "## Derivation", "", _roles(law.derivation)]
    if law.mistakes:
        lines += ["", "## Mistakes that violate it"]
    for mistake in (MISTAKES[name] for name in law.mistakes):
        lines += ["", f"### [{mistake.name}](../mistakes/{mistake.name}.md)", ""]
        lines += [f"{_title(mistake)} {_fix(mistake)}", *_code(mistake)]
    return "\n".join(lines) + "\n"


def _tolerance(law: Law) -> str:
    """Return the tolerance of a law, in a sentence or two."""
    noise = "[rounding noise](../rounding.md)"
    beyond = f" beyond the step's {noise}" if "noise" in law.observes else ""
    more = " See the derivation for the factor." if law.derivation else ""
    rules = (
        (
            law.kind == "structure" and not {"look", "retraced"}.intersection(law.observes),
            "None: the law compares structures, shapes and dtypes, not values.",
        ),
        (
            law.kind == "structure" and not law.derivation,
            "None: the law is read off the traced program.",
        ),
        (law.kind == "structure", "As derived below, if any values are compared."),
        (law.kind == "witness", f"One case with a change{beyond} is enough."),
        ("noise" in law.observes, f"The step's own {noise}, for each case.{more}"),
        (
            law.kind == "parallel" and "bit" not in law.name,
            f"The {noise} of the step on one device.",
        ),
        (
            re.search(r"\d u\b|units of", law.derivation),
            "Derived below; u is 2^-24, the relative rounding error of float32.",
        ),
        ("derived in" in law.source, "Derived in the source named below."),
        (True, "None: the claim is exact."),
    )
    return next(text for applies, text in rules if applies)


def _mistake_index() -> str:
    lines = ["# Mistakes", "", "These are the mistakes that reports name as likely causes."]
    lines += ["`bnverify explain MISTAKE` prints one of these pages in a terminal.", ""]
    lines += ["| mistake | what was done |", "|---|---|"]
    lines += [
        f"| [{mistake.name}]({mistake.name}.md) | {_cell(_title(mistake))} |"
        for mistake in MISTAKES.values()
    ]
    return "\n".join(lines) + "\n"


def _mistake(mistake: Mistake) -> str:
    lines = [f"{WIDE}# {mistake.name}", "", f"**{_title(mistake)}**"]
    if mistake.looks:
        lines += ["", f"Symptoms: {_prose(mistake.looks)}"]
    lines += ["", _fix(mistake), *_code(mistake), "", "## Laws that detect it", ""]
    noticed = [law for law in LAWS.values() if mistake.name in law.mistakes]
    lines += [f"- [{law.name}](../laws/{law.name}.md): {_prose(law.claim)}" for law in noticed]
    if not noticed:
        lines.append(
            "No law lists it. bnverify recognises it by the error that the step raises, or by what is "
            "missing from a restored state."
        )
    if mistake.source:
        lines += ["", f"Seen at {mistake.source}"]
    return "\n".join(lines) + "\n"


def _title(mistake: Mistake) -> str:
    return _prose(f"{mistake.title[0].upper()}{mistake.title[1:]}.")


def _fix(mistake: Mistake) -> str:
    return f"**Fix:** {_prose(mistake.fix)}."


def _code(mistake: Mistake) -> Iterator[str]:
    """Yield the wrong and the right code, side by side if the window is wide enough."""
    if not mistake.wrong:
        return
    yield from ("", '<div class="grid" markdown>')
    for title, code in (("Wrong", mistake.wrong), ("Right", mistake.right)):
        yield from ("", f'```python title="{title}"', code, "```")
    yield from ("", "</div>")


def _prose(text: str) -> str:
    """Return plain text escaped for Markdown, except for code and URLs."""
    parts = re.split(r"(``?[^`]+``?|https?://\S+)", text)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*_\[\]])", r"\\\1", parts[i]).replace("<", "&lt;")
    return "".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _roles(text: str) -> str:
    """Return a docstring without Sphinx roles, which MkDocs does not resolve."""
    return re.sub(r":(?:class|func|mod|meth|attr|data):`", "`", text)


# The command line and the API.


def _command_line() -> str:
    names = [module.name for module in iter_modules(commands.__path__)]
    lines = ["# Command line", "", "```text", _help(), "```"]
    for name in (name for name in names if not name.startswith("_")):
        lines += ["", f"## bnverify {name}", "", "```text", _help(name), "```"]
    return "\n".join(lines) + "\n"


def _help(*command: str) -> str:
    """Return what ``bnverify COMMAND --help`` prints."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "88", "NO_COLOR": "1"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        cli.build_parser().parse_args([*command, "--help"])
    return printed.getvalue().rstrip()


def _api() -> str:
    lines = ["# API", "", "All of these are attributes of the package: `import bnverify`."]
    groups = {heading: names.split() for heading, names in API.items()}
    named = {name for names in groups.values() for name in names}
    groups["Other names"] = [
        name for name in bnverify.__all__ if name not in named and not name.startswith("_")
    ]
    for heading, names in groups.items():
        lines += ["", f"## {heading}"] if names else []
        for name in names:
            lines += ["", f"::: bnverify.{name}"]
    lines += ["", "## Strategies", "", "::: bnverify.strategies"]
    return "\n".join(lines) + "\n"


# MkDocs hooks.


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of laws and mistakes to the navigation."""
    families: list[Any] = ["laws/index.md"]
    for family in FAMILIES:
        laws = [f"laws/{law.name}.md" for law in LAWS.values() if law.family == family]
        families.append({family.capitalize(): laws})
    listed = {
        "Laws": families,
        "Mistakes": ["mistakes/index.md", *(f"mistakes/{name}.md" for name in MISTAKES)],
    }
    config.nav = [
        {title: listed.get(title, below) for title, below in entry.items()}
        for entry in config.nav or []
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Remove Sphinx roles from docstrings, which mkdocstrings does not resolve."""
    return re.sub(r":(?:class|func|mod|meth|attr|data):(?=<code>)", "", html)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that would load a resource from another host.

    Raises:
        mkdocs.exceptions.PluginError: the page loads such a resource.
    """
    from mkdocs.exceptions import PluginError

    tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", output)
    own = config.site_url or "/"
    loads = [
        address
        for tag in tags
        for address in re.findall(r'(?:src|href)="(https?://[^"]+)"', tag)
        if not address.startswith(own)
    ]
    if loads:
        raise PluginError(f"{page.file.src_uri} would load {', '.join(loads)}")
    return output

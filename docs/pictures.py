"""The pictures in docs/images, made from real runs: ``python docs/pictures.py [NAME ...]``.

check.svg   what ``bnverify check`` prints for the broken loss of the README, recorded by rich
check.png   the HTML page of the same check
gate.png    the HTML page of ``bnverify gate`` for a step whose momentum changes with the release of flax

The pages are photographed by a headless Chromium, which must be on the PATH. gate.png needs a package
index too, from which uv makes both environments.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
EXAMPLE = ROOT / "examples" / "linen_regression"
BROKEN = ("error = predictions.squeeze(-1) - targets", "error = predictions - targets")
CHECK = ["check", "check.py:subject", "--profile", "quick"]

SIZES = {"check": (1100, 1380), "gate": (1200, 1116)}
"""Width and height of the part of a page that is shown, in pixels."""

GATED = """
import flax.linen as nn
import bnverify
from flax import __version__

# As if the default had changed with flax 0.11.
MOMENTUM = 0.99 if tuple(map(int, __version__.split(".")[:2])) < (0, 11) else 0.9


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
        return nn.Dense(1)(nn.relu(x))


def subject():
    return bnverify.linen(Model())
"""


def main() -> None:
    """Make the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    makers: dict[str, Callable[[Path], None]] = {"check": _check, "gate": _gate}
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of: {', '.join(makers)}")
    names = parser.parse_args().names or list(makers)
    if unknown := set(names) - set(makers):
        parser.error(f"no picture is named {min(unknown)!r}; there are {', '.join(makers)}")
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            makers[name](Path(directory))


def _check(directory: Path) -> None:
    for file in EXAMPLE.glob("*.py"):
        (directory / file.name).write_text(file.read_text("utf-8").replace(*BROKEN), "utf-8")
    printed = _recorded([*CHECK, "--format", "terminal", "--format", "html=page.html"], directory)
    _as_svg(printed, "bnverify " + " ".join(CHECK), IMAGES / "check.svg")
    _photograph("check", directory)


def _gate(directory: Path) -> None:
    (directory / "my_training.py").write_text(GATED, "utf-8")
    sides = ["--from", "jax==0.4.38,flax==0.10.2", "--to", "jax==0.10.2,flax==0.12.8"]
    _recorded(["gate", "my_training.py:subject", *sides, "--format", "html=page.html"], directory)
    _photograph("gate", directory)


def _recorded(arguments: Sequence[str], directory: Path) -> str:
    """Return what bnverify prints to a terminal of 80 columns, with its colours."""
    ours, theirs = pty.openpty()
    places = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"COLUMNS": "80", "TERM": "xterm-256color", "PYTHONPATH": places}
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    command = [sys.executable, "-m", "bnverify", *arguments]
    settings = {**environment, **settings}
    with subprocess.Popen(command, cwd=directory, env=settings, stdout=theirs) as process:
        os.close(theirs)
        printed = _read(ours)
    if process.returncode != 1:  # each of them shows what is wrong
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}\n{printed}")
    return _elsewhere(printed, directory)


def _read(terminal: int) -> str:
    parts = []
    with os.fdopen(terminal, "rb", buffering=0) as file:
        while True:
            try:
                part = file.read(65536)
            except OSError:  # Linux's way to say that nobody writes any more
                break
            if not part:
                break
            parts.append(part)
    return b"".join(parts).decode().replace("\r\n", "\n")


def _elsewhere(text: str, directory: Path) -> str:
    """Return a text in which the example's project lies where a reader's would."""
    return text.replace(str(directory), "/home/you/project")


def _as_svg(printed: str, title: str, file: Path) -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    console.print(Text.from_ansi(printed.rstrip()), soft_wrap=True)
    console.print()  # the last line of a picture is cut below its letters
    drawn = console.export_svg(title=title, unique_id="bnverify")
    # Not in rich's font, which a reader's browser would fetch from another host.
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    drawn = drawn.replace("Fira Code", "ui-monospace, Menlo, Consolas")
    file.write_text("\n".join(line.rstrip() for line in drawn.splitlines()) + "\n", "utf-8")


def _photograph(name: str, directory: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("no Chromium is on the PATH to photograph the page with")
    page = directory / "page.html"
    page.write_text(_elsewhere(page.read_text("utf-8"), directory), "utf-8")
    width, height = SIZES[name]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={directory / 'profile'}", f"--window-size={width},{height}"]
    command += [f"--screenshot={IMAGES / name}.png", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()

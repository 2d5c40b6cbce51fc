"""The progress of a check on stderr: a bar on a terminal, otherwise one line per phase."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from bnverify.report.symbols import STYLES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bnverify.check import Event, Listener, PhaseStarted

SILENCE = 20.0
"""Seconds after which progress is printed again, if there is no bar."""


@contextmanager
def progress(name: str) -> Iterator[Listener]:
    """Show the progress of a check.

    Args:
        name: the subject's name.

    Yields:
        The listener to pass to ``verify``.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _EventPrinter(
            lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True)
        ).listen
        return
    columns = (
        # A long description is cut, not the percentage or the time.
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True)),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(escape(name), total=1.0)

        def show_phase(phase: str, done: float) -> None:
            bar.update(task, description=escape(f"{name}: {phase}"), completed=done)

        def line(text: str) -> None:
            style = STYLES["violated"] if text.startswith("violated") else ""
            bar.console.print(text, style=style, markup=False)

        yield _EventPrinter(line, show_phase).listen


def occasionally(line: Callable[[str], None]) -> Listener:
    """Return a listener that prints a phase if nothing was printed for ``SILENCE`` seconds."""
    from bnverify.check import PhaseStarted  # imports jax

    printed = time.monotonic()

    def listen(event: Event) -> None:
        nonlocal printed
        if isinstance(event, PhaseStarted) and time.monotonic() - printed > SILENCE:
            printed = time.monotonic()
            line(f"{event.done:.0%} {event.phase}, {event.cases:,} cases so far")

    return listen


class _EventPrinter:
    """Turns the events of a check into lines and progress.

    Args:
        line: prints a line.
        phase: shows the phase and the fraction done; None: print these as lines, too.
    """

    def __init__(
        self, line: Callable[[str], None], phase: Callable[[str, float], None] | None = None
    ) -> None:
        self._line, self._show_phase = line, phase
        self._phase, self._printed = "", time.monotonic()
        self._proved: int | None = 0
        self._violated: set[str] = set()

    def listen(self, event: Event) -> None:
        """Handle one event."""
        from bnverify.check import LawJudged, PhaseStarted  # imports jax

        if isinstance(event, PhaseStarted):
            self._start(event)
        elif isinstance(event, LawJudged):
            evidence = event.evidence
            if evidence.status == "proved" and self._proved is not None:
                self._proved += 1
            elif evidence.status == "violated" and evidence.law not in self._violated:
                self._violated.add(evidence.law)
                self._line(f"violated: {evidence.law}: {evidence.reason}")

    def _start(self, event: PhaseStarted) -> None:
        if self._proved and event.phase != self._phase:
            self._line(
                f"{self._proved} {'law' if self._proved == 1 else 'laws'} proved from the trace"
            )
            self._proved = None
        cases = f", {event.cases:,} cases so far" if event.cases else ""
        if self._show_phase is not None:
            self._show_phase(f"{event.phase}{cases}", event.done)
        elif event.phase != self._phase or time.monotonic() - self._printed > SILENCE:
            self._line(f"{event.done:4.0%} {event.phase}{cases}")
            self._printed = time.monotonic()
        self._phase = event.phase

"""The influence matrix of a report: its entries, and which of them matter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnverify.laws import LAWS

INPUTS = ("params", "batch_stats", "opt_state", "extra", "x", "y", "lr")

LEGEND = {
    "shown": "required dependency, observed in a case",
    "may": "possible dependency",
    "cannot": "no dependency",
    "kept out": "no dependency, as required",
    "open": "possible dependency, to be ruled out by running cases",
    "leaks": "possible dependency, but forbidden",
    "missing": "no dependency, but one is required",
}


@dataclass(frozen=True)
class Matrix:
    """The influence matrix for display.

    Attributes:
        inputs: the columns.
        rows: output -> for each input a key of ``LEGEND``.
    """

    inputs: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]

    def kinds(self) -> list[str]:
        """Return the kinds of entry that occur, in the order of the legend."""
        found = {kind for row in self.rows.values() for kind in row}
        return [kind for kind in LEGEND if kind in found]


def matrix(
    flows: Mapping[str, list[str]],
    held: Collection[str] = (),
    violated: Collection[str] | None = None,
    unjudged: Collection[str] = (),
) -> Matrix:
    """Return the matrix for ``report.influence["matrix"]`` or ``report.influence["leaves"]``.

    Inputs and outputs without any dependency are left out, as they have no leaves.

    Args:
        flows: output -> the inputs that may reach it.
        held: the names of the laws that hold: their required dependencies were observed in a case.
        violated: the names of the violated laws: only these can be the reason that an entry leaks.
            None: all laws.
        unjudged: the names of the laws that no case has reached: what they forbid is open.
    """
    reached = {output: {_tree(source) for source in sources} for output, sources in flows.items()}
    busy = {_tree(output) for output, sources in reached.items() if sources}
    busy = busy.union(*reached.values())
    inputs = tuple(name for name in INPUTS if name in busy)
    forbidden = {pair for law in LAWS.values() for pair in law.must_not_reach}
    broken = LAWS if violated is None else violated
    leaking = {pair for name in broken if name in LAWS for pair in LAWS[name].must_not_reach}
    undecided = {pair for name in unjudged if name in LAWS for pair in LAWS[name].must_not_reach}
    required = {
        pair for name in (*broken, *unjudged) if name in LAWS for pair in LAWS[name].must_reach
    }
    observed = {pair for name in held if name in LAWS for pair in LAWS[name].must_reach}

    def kind(output: str, source: str) -> str:
        kept_out = (_tree(output), source) in forbidden
        if source in reached[output]:
            if (_tree(output), source) in leaking:
                return "leaks"
            if (_tree(output), source) in undecided:
                return "open"
            return "shown" if (output, source) in observed else "may"
        if (output, source) in required:
            return "missing"
        return "kept out" if kept_out else "cannot"

    empty = set(INPUTS) - busy
    rows = [output for output in flows if _tree(output).removeprefix("eval_") not in empty]
    return Matrix(inputs, {out: tuple(kind(out, source) for source in inputs) for out in rows})


def _tree(leaf: str) -> str:
    return leaf.split("/", 1)[0]


def scope(influence: Mapping[str, Any]) -> str:
    """Return for which sizes the matrix holds, as text."""
    claim = "for all values" if influence.get("proved") else "as an example"
    return f"from the traced step, {claim}, {influence.get('scope', '')}"


def legend(kinds: Sequence[str], signs: Mapping[str, str]) -> list[str]:
    """Return a line for each kind of entry: its sign and its meaning."""
    width = max((len(signs[kind]) for kind in kinds), default=0)
    return [f"{signs[kind]:<{width}}  {LEGEND[kind]}" for kind in kinds]

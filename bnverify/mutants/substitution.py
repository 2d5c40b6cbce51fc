"""Put a fault in the place of ``module:name`` as that module is imported, on disk nothing changed.

A finder on ``sys.meta_path`` lets the module be found and executed as ever; then, before anyone
has seen it, one of its names is bound to a faulty version. Whoever imports it, by whatever name,
gets that.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from bnverify.mutants.transplant import TRANSPLANTS, faulty

VARIABLE = "BNVERIFY_TRANSPLANT"
STARTUP = Path(__file__).parent / "startup"


@dataclass(frozen=True)
class Order:
    """What is to be substituted in a process.

    Attributes:
        targets: each ``module:name`` or ``path/file.py:name``.
        fault: a name in TRANSPLANTS; empty: only tell what is reached.
        mark: a file to append to: "imported TARGET", "touched".
    """

    targets: tuple[str, ...]
    fault: str
    mark: str

    def dump(self) -> str:
        """Return the order as the text of the environment variable."""
        return json.dumps([self.targets, self.fault, self.mark])

    @classmethod
    def load(cls, text: str) -> Order:
        """Return the order in such a text."""
        targets, fault, mark = json.loads(text)
        return cls(tuple(targets), fault, mark)

    def note(self, line: str) -> None:
        """Append one line to the mark."""
        with Path(self.mark).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def install() -> None:
    """Install the finder, if the environment orders a substitution."""
    text = os.environ.get(VARIABLE)
    if text:
        sys.meta_path.insert(0, Finder(Order.load(text)))


class Finder(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, and substitutes in it."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the module's own spec, its loader wrapped where a target is in the module."""
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is None:
                continue
            names = [each for each in self._order.targets if _is_in(each, spec)]
            if names and spec.loader is not None:
                spec.loader = Loader(spec.loader, self._order, names)
            return spec
        return None


def _is_in(target: str, spec: importlib.machinery.ModuleSpec) -> bool:
    source, _, _ = target.rpartition(":")
    if source.endswith(".py"):
        return bool(spec.origin) and Path(str(spec.origin)).resolve() == Path(source).resolve()
    return source == spec.name


class Loader(importlib.abc.Loader):
    """Executes a module with its own loader, then substitutes.

    Args:
        loader: the module's own.
        order: what is to be substituted.
        targets: the targets in this module.
    """

    def __init__(self, loader: Any, order: Order, targets: Sequence[str]) -> None:
        self._loader = loader
        self._order = order
        self._targets = targets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # sources and data, for tracebacks and resources

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Return the module as its own loader makes it."""
        made: ModuleType | None = self._loader.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module and put the fault into it."""
        self._loader.exec_module(module)
        for target in self._targets:
            substitute(module, target, self._order)


def substitute(module: ModuleType, target: str, order: Order) -> None:
    """Bind the name that ``target`` names in ``module`` to a faulty version.

    Raises:
        ImportError: the module has no such name.
    """
    holder: Any = module
    *outer, name = target.rpartition(":")[2].split(".")
    try:
        for part in outer:
            holder = getattr(holder, part)
        value = getattr(holder, name)
    except AttributeError as error:
        raise ImportError(f"{target}: {error}") from None
    order.note(f"imported {target}")
    if order.fault:
        changed = faulty(value, TRANSPLANTS[order.fault], lambda: order.note("touched"))
        setattr(holder, name, changed)

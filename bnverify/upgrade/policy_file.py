"""Reading a policy from `bnverify.toml` or `pyproject.toml`, refusing what it could misunderstand."""

from __future__ import annotations

import datetime as dt
import math
import tomllib
from typing import TYPE_CHECKING

from bnverify.unusable import cause, did_you_mean
from bnverify.upgrade.difference import KINDS, Kind
from bnverify.upgrade.policy import COSTS, FAILING, Acceptance, Policy

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path


class PolicyError(ValueError):
    """A policy file cannot be used: its name, the key, the value, and what is allowed."""


def find(directory: Path) -> Policy:
    """Return the policy of a project: its bnverify.toml, or its pyproject.toml, or the default.

    Raises:
        PolicyError: as `load`; or both files hold a policy, so that one would be ignored.
    """
    own, shared = directory / "bnverify.toml", directory / "pyproject.toml"
    shared_policy = load(shared) if shared.is_file() and _table(shared) is not None else None
    if not own.is_file():
        return shared_policy or Policy()
    if shared_policy:
        raise PolicyError(f"{own} and [tool.bnverify] in {shared} are two policies; keep one")
    return load(own)


def load(path: Path) -> Policy:
    """Return the policy in a file; in a pyproject.toml, the one under [tool.bnverify].

    Raises:
        PolicyError: the file is missing or no TOML, or a key or value in it is not allowed.
    """
    table = _table(path) or {}
    _only(path, "", table, ("fail", "accept", "bounds"))
    return Policy(
        fail=frozenset(_kinds(path, table.get("fail", list(FAILING)))),
        accept=tuple(
            _acceptance(path, f"accept[{i}]", entry)
            for i, entry in enumerate(_list(path, "accept", table.get("accept", [])))
        ),
        bounds=_bounds(path, table.get("bounds", {})),
        source=path,
    )


def _table(path: Path) -> dict[str, object] | None:
    """Return the policy's own table, None where a pyproject.toml has none."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise PolicyError(f"cannot read the policy {path}: {cause(error)}") from None
    if path.name != "pyproject.toml":
        return document
    tool = document.get("tool", {})
    table = tool.get("bnverify") if isinstance(tool, dict) else None
    return None if table is None else _mapping(path, "tool.bnverify", table)


def _acceptance(path: Path, key: str, value: object) -> Acceptance:
    entry = _mapping(path, key, value)
    _only(path, f"{key}.", entry, ("class", "leaf", "subject", "reason", "expires"))
    return Acceptance(
        kind=_kind(path, f"{key}.class", entry.get("class")),
        leaf=_text(path, f"{key}.leaf", entry["leaf"]) if "leaf" in entry else None,
        subject=_text(path, f"{key}.subject", entry["subject"]) if "subject" in entry else None,
        reason=_text(path, f"{key}.reason", entry.get("reason")),
        expires=_date(path, f"{key}.expires", entry.get("expires")),
    )


def _kinds(path: Path, value: object) -> list[Kind]:
    items = _list(path, "fail", value)
    return [_kind(path, f"fail[{i}]", item) for i, item in enumerate(items)]


def _kind(path: Path, key: str, value: object) -> Kind:
    if value not in KINDS:
        raise _wrong(path, key, value, f"one of {', '.join(KINDS)}")
    return value


def _bounds(path: Path, value: object) -> dict[str, float]:
    table = _mapping(path, "bounds", value)
    _only(path, "bounds.", table, COSTS)
    bounds = {}
    for key, ratio in table.items():
        if type(ratio) is bool or not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf:
            raise _wrong(path, f"bounds.{key}", ratio, "new / old, a finite number above 0")
        bounds[key] = float(ratio)
    return bounds


def _text(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(path, key, value, "text that is not empty")
    return value


def _date(path: Path, key: str, value: object) -> dt.date:
    if isinstance(value, str):
        try:
            return dt.date.fromisoformat(value)
        except ValueError:
            raise _wrong(path, key, value, "a date, as 2027-01-31") from None
    if not isinstance(value, dt.date) or isinstance(value, dt.datetime):
        raise _wrong(path, key, value, "a date, as 2027-01-31")
    return value


def _list(path: Path, key: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise _wrong(path, key, value, "a list")
    return value


def _mapping(path: Path, key: str, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _wrong(path, key, value, "a table")
    return value


def _only(path: Path, prefix: str, table: dict[str, object], allowed: Collection[str]) -> None:
    for key in table:
        if key not in allowed:
            hint = did_you_mean(key, allowed)
            message = f"{path}: unknown key {prefix}{key}; allowed are {', '.join(allowed)}{hint}"
            raise PolicyError(message)


def _wrong(path: Path, key: str, value: object, allowed: str) -> PolicyError:
    if value is None:
        return PolicyError(f"{path}: {key} is missing; it must be {allowed}")
    return PolicyError(f"{path}: {key} = {str(value)!r:.80} is not allowed; it must be {allowed}")

"""JSON with everything refused that reads differently elsewhere or costs more than its size.

Refused: NaN and infinities, numbers beyond float64 or 64-bit integers, repeated keys, text that is
not Unicode, nesting beyond 64. Canonical: sorted keys, no spaces, ASCII. What `dump` writes, `parse`
reads back equal (a tuple as a list), and `dump` refuses whatever `parse` would.

Runs on Python 3.9, where recordings of old releases are made.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
MAX_DIGITS = 20  # of an integer; Python 3.9 parses them in time quadratic in their number


class RefusedError(ValueError):
    """A value or a text is refused: what it is, and where it stands."""


def dump(value: object, name: str = "value") -> bytes:
    """Return the value as canonical JSON.

    Raises:
        RefusedError: JSON has no place for a part of it; the message says for which.
    """
    _check(value, name)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse(text: bytes, name: str = "value") -> Any:
    """Return the value of a JSON text from anywhere.

    Raises:
        RefusedError: it is not JSON, or one of the dangers above.
    """
    try:
        value = json.loads(
            text.decode(),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except RecursionError:
        raise RefusedError(f"JSON nested deeper than {MAX_DEPTH}") from None
    except RefusedError:
        raise
    except ValueError as error:  # not JSON, or not UTF-8
        raise RefusedError(f"no JSON: {error}") from None
    _check(value, name)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise RefusedError("JSON with a repeated key")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise RefusedError(f"JSON with an integer of {len(digits)} characters")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RefusedError("JSON with a number beyond float64")
    return value


def _constant(name: str) -> float:
    raise RefusedError(f"JSON with {name}")


def _check(value: object, name: str) -> None:
    todo: list[tuple[str, object, int]] = [(name, value, 0)]
    while todo:
        where, value, depth = todo.pop()
        if depth > MAX_DEPTH:
            raise RefusedError(f"JSON nested deeper than {MAX_DEPTH}")
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise RefusedError(f"{where} has the key {key!r:.80}: keys must be str")
                _check_leaf(where, key)
                inside = f"{where}[{key!r:.80}]" if depth < 4 else where  # keep paths short
                todo.append((inside, item, depth + 1))
        elif isinstance(value, (list, tuple)):
            todo += [(where, item, depth + 1) for item in value]
        else:
            _check_leaf(where, value)


def _check_leaf(where: str, value: object) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RefusedError(f"{where} holds half a surrogate pair, which is no text") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RefusedError(f"{where} is {value}, which JSON lacks: put it in an array")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise RefusedError(f"{where} is an integer beyond 64 bits")
    elif value is not None:
        raise RefusedError(f"{where} is a {type(value).__name__}, which JSON lacks")

"""JSON that reads back as it was written, or not at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnverify.upgrade import strict_json

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_a_value_survives_the_round_trip(value):
    """What dump writes, parse reads back equal, negative zero and integer floats included."""
    assert repr(strict_json.parse(strict_json.dump(value))) == repr(
        json.loads(json.dumps(value, sort_keys=True))
    )


@given(st.dictionaries(st.text(), leaves))
def test_the_same_value_is_the_same_text(value):
    """The text does not depend on the order in which a dict was filled."""
    backwards = dict(reversed(value.items()))
    assert strict_json.dump(value) == strict_json.dump(backwards)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": float("nan")}}, r"value\['a'\]\['b'\] is nan"),
        ([float("-inf")], "value is -inf"),
        (2**64, "beyond 64 bits"),
        (-(2**63) - 1, "beyond 64 bits"),
        ({1: 2}, "the key 1: keys must be str"),
        ({"a": b"bytes"}, r"value\['a'\] is a bytes"),
        ("\ud800", "half a surrogate pair"),
        ({"\ud800": 1}, "half a surrogate pair"),
    ],
)
def test_dump_names_the_part_that_json_lacks(value, message):
    """A value that would not read back is refused, by its place."""
    with pytest.raises(strict_json.RefusedError, match=message):
        strict_json.dump(value)


def test_dump_refuses_a_value_that_holds_itself():
    """A cycle is endless nesting."""
    value: list[object] = []
    value += [value, value]
    with pytest.raises(strict_json.RefusedError, match="nested deeper"):
        strict_json.dump(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100 + b"]" * 100, "nested deeper"),
        (b"[" * 200_000, "nested deeper"),
        (b'{"a":' * 200_000, "nested deeper"),
        (b"1" * 100_000, "an integer of 100000 characters"),
        (b"184467440737095516160", "an integer of 21"),
        (b"18446744073709551616", "beyond 64 bits"),
        (b"1e999", "beyond float64"),
        (b"NaN", "NaN"),
        (b"-Infinity", "-Infinity"),
        (b'{"a": 1, "a": 2}', "repeated key"),
        (b'"\\ud800"', "half a surrogate pair"),
        (b'{"\\udfff": 1}', "half a surrogate pair"),
        (b"\xff", "no JSON"),
        (b"", "no JSON"),
        (b"{} {}", "no JSON"),
    ],
)
def test_parse_refuses_hostile_json(text, message):
    """What another reader would take differently, or what costs more than its size, is refused."""
    with pytest.raises(strict_json.RefusedError, match=message):
        strict_json.parse(text)

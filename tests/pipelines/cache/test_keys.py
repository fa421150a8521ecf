"""A key is the hash of one text per value: golden texts written by hand, and Python's own equality as the oracle."""

from __future__ import annotations

import enum
import hashlib
import json
import struct
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpress.convert.json_reader import parse_json
from quantpress.pipelines.cache.keys import canonical, is_key, key_of, plain
from quantpress.quant.errors import UsageError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


class Form(str, enum.Enum):
    GPTQ = "gptq"


def exactly(value: Any) -> Any:
    """A value as something that Python compares exactly: types told apart, floats by their bits."""
    if isinstance(value, dict):
        return ("dict", frozenset((name, exactly(item)) for name, item in value.items()))
    if isinstance(value, list):
        return ("list", tuple(exactly(item) for item in value))
    if isinstance(value, float):
        return ("float", struct.pack("<d", value))
    return (type(value).__name__, value)


def test_the_text_that_is_hashed_is_this_one() -> None:
    material = {"stage": {"version": 1, "name": "gptq"}, "b": [1, 1.0, 0.1, True, None], "a": "ä\n"}
    text = r'{"a":"\u00e4\n","b":[1,1.0,0.1,true,null],"stage":{"name":"gptq","version":1}}'
    assert canonical(material) == text.encode()
    assert key_of(material) == hashlib.sha256(text.encode()).hexdigest()
    assert is_key(key_of(material))


@given(st.dictionaries(st.text(), VALUES, max_size=4), st.dictionaries(st.text(), VALUES, max_size=4))
def test_two_keys_are_equal_where_the_values_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (key_of(one) == key_of(other)) == (exactly(one) == exactly(other))


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_reading_the_text_gives_the_value_back(value: dict[str, Any]) -> None:
    assert exactly(json.loads(canonical(value))) == exactly(value)
    assert exactly(parse_json(canonical(value), name="key")) == exactly(value)


def test_the_order_of_names_does_not_matter_and_that_of_lists_does() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of({"a": [1, 2]}) != key_of({"a": [2, 1]})


def test_forms_of_the_same_plain_value_give_the_same_key() -> None:
    assert key_of({"a": (1, 2), "b": Form.GPTQ, "c": np.float64(0.5)}) == key_of({"a": [1, 2], "b": "gptq", "c": 0.5})
    assert key_of(MappingProxyType({"a": MappingProxyType({})})) == key_of({"a": {}})
    assert type(plain({"b": Form.GPTQ})["b"]) is str


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [0, float("nan")]}}, r"a\.b\.1: nan cannot be part of a key"),
        ({"a": float("-inf")}, r"a: -inf cannot be"),
        ({"a": {1, 2}}, r"a: \{1, 2\} of type set is no plain value"),
        ({"a": Path("x")}, "of type PosixPath"),
        ({"a": b"x"}, "of type bytes"),
        ({"a": np.float32(1)}, "of type float32"),
        ({"a": {1: 2}}, "a: 1 is no text"),
        ({"a": 10**20}, "a: 1000.* does not fit 64 bits"),
        ({"a": "x\udc80"}, "a: .* is a name that is not UTF-8"),
        ({"a": {"\udfff": 1}}, "a: .* is a name that is not UTF-8"),
    ],
)
def test_what_is_no_plain_value_is_refused_with_its_place(value: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        key_of(value)


def test_names_with_many_dots_are_no_deep_values() -> None:
    assert is_key(key_of({"." * 100: {"a.b": 1}}))


def test_a_value_inside_itself_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(UsageError, match="nested deeper"):
        key_of(endless)


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "A" * 64, "../" + "0" * 61, "g" * 64])
def test_what_is_no_key_is_told(text: str) -> None:
    assert not is_key(text)

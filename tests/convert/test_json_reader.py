"""The JSON reader gives what json.loads gives for good text, and refuses the rest before building it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpress.convert.json_reader import parse_json, read_json
from quantpress.quant.errors import InputError

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(_VALUES, st.booleans())
def test_values_are_those_of_the_standard_library(value: object, escape: bool) -> None:
    text = json.dumps(value, ensure_ascii=escape).encode("utf-8", "surrogatepass")
    assert parse_json(text, name="x") == json.loads(text)


def test_the_mark_of_a_tokenizer_without_a_limit_is_read() -> None:
    # transformers: tokenization_utils_base.py, VERY_LARGE_INTEGER, in the tokenizer_config.json of very many models
    text = json.dumps({"model_max_length": int(1e30)}).encode()
    assert parse_json(text, name="tokenizer_config.json") == {"model_max_length": int(1e30)}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b'[{"b": {"a": 1, "c": 0, "a": 1}}]', "key 'a' twice"),
        (b'{"eps": NaN}', "NaN"),
        (b'{"eps": Infinity}', "Infinity"),
        (b'{"eps": -Infinity}', "-Infinity"),
        (b'{"eps": 1e999}', "1e999"),
        (b'{"layers": 18446744073709551616}', "64 bits"),
        (b'{"layers": -9223372036854775809}', "64 bits"),
        (b"[" + b"9" * 100_000 + b"]", "64 bits"),
        (b"[0." + b"9" * 100_000 + b"]", "finite"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a"', "not JSON"),
        (b"", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        ("{}".encode("utf-16"), "not UTF-8"),
    ],
    ids=str,
)
def test_bad_text_is_refused_in_one_line_that_names_the_file(data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        parse_json(data, name="config.json")
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


def test_depth_is_counted_before_anything_recurses() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, name="x") is not None
    for opening in (b"[", b'{"a":'):
        with pytest.raises(InputError, match="deeper than 64"):
            parse_json(opening * 65, name="x")
        with pytest.raises(InputError, match="deeper than 64"):
            parse_json(opening * 5_000_000, name="x")


def test_brackets_inside_strings_are_not_depth() -> None:
    text = json.dumps(["[" * 1000, '\\"' + "{" * 1000, "\\" * 999 + "[" * 100, '"[' * 300])
    assert parse_json(text.encode(), name="x") == json.loads(text)


@pytest.mark.parametrize("shift", range(4))
def test_strings_and_escapes_may_lie_across_the_chunks_of_the_scan(shift: int) -> None:
    million = 1 << 20
    value = ["x" * (million - 6 + shift) + '\\\\"[[' * 20, "\\" * (2 * million + shift) + "[" * 70, [1]]
    text = json.dumps(value)
    assert parse_json(text.encode(), name="x") == value
    deep = text[:-1] + "," + "[" * 64
    with pytest.raises(InputError, match="deeper"):
        parse_json(deep.encode(), name="x")


@pytest.mark.parametrize("before", range(1, 22))
def test_an_integer_across_the_chunks_of_the_scan_must_fit_64_bits(before: int) -> None:
    start = b"[" + b" " * ((1 << 20) - 1 - before)
    assert parse_json(start + b"18446744073709551615]", name="a.json") == [(1 << 64) - 1]
    for beyond in (b"18446744073709551616]", b"-9223372036854775809]"):
        with pytest.raises(InputError, match="does not fit 64 bits"):
            parse_json(start + beyond, name="a.json")


def test_too_many_values_are_refused_within_two_seconds() -> None:
    for pattern in (b"1,", b"[],", b'"",', b'{"":0},'):
        start = time.process_time()
        with pytest.raises(InputError, match="more than 4000000 values"):
            parse_json(b"[" + pattern * (48_000_000 // len(pattern)) + b"0]", name="x")
        assert time.process_time() - start < 2


def test_a_real_tokenizer_is_read_as_the_standard_library_reads_it(shared: Path) -> None:
    path = shared / "models" / "glasslm-en-hf" / "tokenizer.json"
    assert read_json(path) == json.loads(path.read_text(encoding="utf-8"))
    with pytest.raises(InputError, match="at most 100"):
        read_json(path, limit=100)

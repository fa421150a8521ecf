"""Reading YAML: the values of YAML 1.2's core schema, their places, and bounds that hold for hostile files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.pipelines.batch.yaml_file import MAX_BYTES, Node, parse_yaml, read_yaml
from quantpress.quant.errors import InputError, UsageError

# without what YAML calls a line break and PyYAML writes as it is
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="\ufeff"), max_size=12)
# PyYAML writes texts as `0E0` without quotes, which are numbers since YAML 1.2
WORDS = st.text(st.characters(categories=("L", "P", "S"), exclude_characters="\ufeff"), max_size=12)
LEAVES = st.none() | st.booleans() | st.integers(-(10**15), 10**15)


def nested(leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
    )


def plain(text: str) -> Any:
    return parse_yaml(text.encode(), "f.yaml").plain()


def refused(text: str | bytes) -> str:
    with pytest.raises(UsageError) as caught:
        parse_yaml(text.encode() if isinstance(text, str) else text, "f.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


@settings(max_examples=100, deadline=None)
@given(nested(LEAVES | TEXTS, TEXTS))
def test_what_json_writes_is_read_as_json_reads_it(value: Any) -> None:
    assert plain(json.dumps(value)) == value


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(WORDS, nested(LEAVES | WORDS, WORDS), min_size=1, max_size=3))
def test_what_pyyaml_writes_in_blocks_is_read_as_it_was_meant(value: Any) -> None:
    assert plain(yaml.safe_dump(value, default_flow_style=False, allow_unicode=True)) == value


@settings(max_examples=250, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="ab:-[]{}&*!|>?#'\"\n \t,%@`\\0", max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused_with_a_place(data: bytes) -> None:
    message = "f.yaml: read"
    try:
        parse_yaml(data, "f.yaml")
    except UsageError as error:
        message = str(error)
    assert message.startswith("f.yaml:")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # YAML 1.2.2, section 10.3.2: what its core schema says of plain texts
        ("[null, Null, NULL, ~, ]", [None, None, None, None]),
        ("[true, True, TRUE, false, False, FALSE]", [True, True, True, False, False, False]),
        ("[0, 12, -7, +5, 0o17, 0x1F]", [0, 12, -7, 5, 15, 31]),
        ("[0.5, .5, 1., 1e3, 1e-3, -2.5E+2]", [0.5, 0.5, 1.0, 1000.0, 0.001, -250.0]),
        # and what YAML 1.1 made of them
        ("[yes, no, on, off, y, n]", ["yes", "no", "on", "off", "y", "n"]),
        ("[12:30, 2024-01-01, 1_000, 0b11, =]", ["12:30", "2024-01-01", "1_000", "0b11", "="]),
        # a nought in front is eight's power for some readers and nothing for others, so it is no number
        ("[010, 1.10]", ["010", 1.1]),
        ("{no: 1, 12: 2, null: 3}", {"no": 1, "12": 2, "null": 3}),
        ("a: 'true'", {"a": "true"}),
        ('a: "5"', {"a": "5"}),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ("a:\n", {"a": None}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: &x [1, 2]\nb: *x", {"a": [1, 2], "b": [1, 2]}),
        ("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}", {"a": {"p": 1, "q": 2}, "b": {"q": 3, "p": 1}}),
        ("b: {<<: [{p: 1}, {p: 2, q: 2}]}", {"b": {"p": 1, "q": 2}}),
    ],
)
def test_plain_texts_have_the_types_of_yaml_1_2(text: str, value: Any) -> None:
    found = plain(text)
    assert found == value
    assert repr(found) == repr(value)  # 1 == True == 1.0


def test_every_value_and_key_knows_its_line_and_column() -> None:
    text = "alpha: beta\ngamma:\n  - delta: epsilon\n  - [zeta, 'eta']\n"
    lines = text.splitlines()

    def check(node: Node) -> None:
        items = node.value.items() if isinstance(node.value, dict) else ()
        for key, child in items:
            mark = node.key_mark(key)
            assert lines[mark.line - 1][mark.column - 1 :].startswith(key)
            check(child)
        for child in node.value if isinstance(node.value, list) else ():
            check(child)
        if isinstance(node.value, str):
            rest = lines[node.mark.line - 1][node.mark.column - 1 :]
            assert rest.lstrip("'").startswith(node.value)

    check(parse_yaml(text.encode(), "f.yaml"))


def test_a_merged_key_stands_where_it_was_written_last() -> None:
    node = parse_yaml(b"a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3\n", "f").items()["b"]
    places = {key: (node.key_mark(key).line, node.items()[key].mark.line) for key in node.items()}
    assert places == {"p": (1, 1), "q": (4, 4)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml:1:1: the file is empty"),
        ("# nothing\n", "f.yaml:1:1: the file is empty"),
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3:1: key 'a' is here twice; the first one is in line 1"),
        ("a: !!python/object:os.system x", "f.yaml:1:4: tag "),
        ("a: !!str 5", "f.yaml:1:4: tag "),
        ("a: ! 5", "f.yaml:1:4: tag "),
        ("a: *b", "f.yaml:1:4: *b: no such anchor"),
        ("a: &x [*x]", "f.yaml:1:8: *x: the value would hold itself"),
        ("a: &x {<<: *x}", "f.yaml:1:12: *x: the value would hold itself"),
        ("a: {<<: 3}", "f.yaml:1:9: << takes an alias of a mapping"),
        ("{[a]: b}", "f.yaml:1:2: a key must be a plain text"),
        ("a: ${b}: c", "f.yaml:1:8: not YAML: mapping values are not allowed here; a text with"),
        ("a: {b: ${c}}", "f.yaml:1:9: not YAML: "),
        ("a:\n\tb: 1", "f.yaml:2:1: not YAML: found character '\\t' that cannot start any token; indent with blanks"),
        ("--- 1\n--- 2\n", "f.yaml:2:1: a second document starts here"),
        ("a: .inf", "f.yaml:1:4: .inf: not a finite number"),
        ("a: 1e999", "f.yaml:1:4: 1e999: not a finite number"),
        ("a: 1234567890123456789", "f.yaml:1:4: 1234567890123456789: at most 18 digits"),
        ("a: \x07", "f.yaml:1:4: character '\\x07' is not allowed"),
        ('a: "\\ud800"', "f.yaml:1:4: half of a surrogate pair"),
        ('a: "\\UFFFFFFFF"', "f.yaml:1:"),
        ("[" * 40 + "]" * 40, "f.yaml:1:33: lists and mappings are nested deeper than 32"),
        (b"a: 1\nb: \xff", "f.yaml:2:4: not UTF-8"),
        ("a: 1".encode("utf-16"), "f.yaml:1:1: not UTF-8"),
    ],
)
def test_what_is_no_pipeline_file_is_refused_at_its_place(text: str | bytes, message: str) -> None:
    assert refused(text).startswith(message)


def test_a_billion_laughs_are_refused_before_they_are_laughed() -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 30)]
    start = time.monotonic()
    assert "more than 200000 values" in refused("l0: &l0 [ha]\n" + "\n".join(levels))
    merged = [f"m{n}: &m{n}\n" + "\n".join(f"  k{k}: *m{n - 1}" for k in range(10)) for n in range(1, 30)]
    assert "more than 200000 values" in refused("m0: &m0 {k: ha}\n" + "\n".join(merged))
    assert time.monotonic() - start < 5


def test_files_that_are_too_large_or_no_files_are_refused(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(InputError, match="at most 1000000 are read"):
        read_yaml(large)
    with pytest.raises(InputError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="this is a folder"):
        read_yaml(tmp_path)
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(InputError, match="this is a named pipe"):
        read_yaml(tmp_path / "pipe.yaml")

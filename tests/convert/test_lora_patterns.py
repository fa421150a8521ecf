"""Regular expressions of strangers: the answers of `re`, without its endless searches."""

from __future__ import annotations

import contextlib
import json
import re
import time
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from quantpress.convert.lora.config import AdapterConfig
from quantpress.convert.lora.config_file import read_config
from quantpress.convert.lora.patterns import MAX_LENGTH, Budget, compile_pattern
from quantpress.quant.errors import InputError


def parse(**values: Any) -> AdapterConfig:
    text = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **values})
    return read_config(text.encode(), name="adapter_config.json")


atoms = st.sampled_from(
    [
        "a",
        "b",
        ".",
        r"\.",
        r"\d",
        r"\w",
        r"\W",
        r"\S",
        "[ab]",
        "[^a.]",
        "[a-c0-9]",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\A",
        r"\Z",
        "",
    ]
)


def combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    repeats = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}?", "{,3}"])
    groups = st.sampled_from(["(", "(?:", "(?=", "(?!", "(?i:"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(groups, inner).map(lambda pair: f"{pair[0]}{pair[1]})"),
        st.tuples(inner, repeats).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.sampled_from(["a", "b", "ab", r"\d\."]).map(lambda text: f"(?<={text})"),
    )


@given(st.recursive(atoms, combined, max_leaves=7), st.text("ab.c1AB_", max_size=8))
@settings(max_examples=1500, deadline=None)
def test_the_matcher_answers_as_re_does(pattern: str, text: str) -> None:
    try:
        theirs = re.compile(pattern)
    except re.error:
        assume(False)
    # Python 3.14 changed \B in an empty text
    assume(text or r"\B" not in pattern)
    ours = compile_pattern(pattern, Budget("c"))
    assert ours.match(text) == bool(theirs.match(text))
    assert ours.fullmatch(text) == bool(theirs.fullmatch(text))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*b",
        "(.*)*" * 20 + "x",
        ".*" * 400 + "x",
        "a?" * 300 + "a" * 300,
        "(" * 90 + "a" + ")*" * 90 + "b",
        "(?=" * 40 + "a.*" + ")" * 40 + "b",
        "((a{0,1000}){0,1000}){0,1000}b",
        "(?:a?){4000000000}b",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_patterns_that_hang_re_are_answered_or_refused_at_once(pattern: str) -> None:
    start = time.process_time()
    with contextlib.suppress(InputError):
        config = parse(target_modules=pattern)
        for layer in range(100):
            config.targets("a" * 900 + str(layer))
    # RELIABILITY: refused within 2 s; the machine that runs the tests may be twice as slow
    assert time.process_time() - start < 4


def test_work_without_end_is_refused_with_file_and_key() -> None:
    config = parse(target_modules="(?:(?:.*a)*b)*c")
    with pytest.raises(InputError, match=r"^adapter_config.json: target_modules: the patterns take too long"):
        any(config.targets("ab" * 300 + str(number)) for number in range(100_000))


def test_long_and_deep_patterns_are_refused() -> None:
    for pattern in ("a" * (MAX_LENGTH + 1) + "?", "(" * 200 + "a" + ")" * 200):
        with pytest.raises(InputError, match="target_modules"):
            parse(target_modules=pattern)


def test_thousands_of_plain_patterns_cost_no_time() -> None:
    ranks = {f"model.layers.{layer}.experts.{expert}.w1": layer + 1 for layer in range(50) for expert in range(64)}
    config = parse(rank_pattern=ranks)
    start = time.process_time()
    assert all(config.rank_of(path) == rank for path, rank in ranks.items())
    assert time.process_time() - start < 2

"""Pre-tokenizers: what their structure says, what their hash says, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from quantpress.convert.gguf.pretokenizers import (
    GPT2_SPLIT,
    detect,
    known,
    name_by_hash,
    name_by_structure,
    named,
    probe_text,
    split_steps,
)
from quantpress.quant.errors import InputError

# Pre-tokenizers as published tokenizer.json files have them
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3_LAST = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
DEEPSEEK3 = [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3_LAST]


def split(regex: str, *, removed: bool = False) -> dict[str, Any]:
    behavior = {"behavior": "Removed", "invert": True} if removed else {"behavior": "Isolated", "invert": False}
    return {"type": "Split", "pattern": {"Regex": regex}, **behavior}


def sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


PUBLISHED: list[tuple[str, dict[str, Any], bool]] = [
    ("gpt-2", GPT2, False),
    ("smollm", sequence(DIGITS, GPT2), False),
    ("llama-bpe", sequence(split(LLAMA3_REGEX), BYTES), True),
    ("smaug-bpe", sequence(split(LLAMA3_REGEX), BYTES), False),
    ("qwen2", sequence(split(LLAMA3_REGEX.replace("{1,3}", "")), BYTES), False),
    ("qwen2", sequence(split(LLAMA3_REGEX.replace("{1,3}", ""), removed=True), BYTES), False),
    ("deepseek-v3", sequence(*map(split, DEEPSEEK3), BYTES), False),
    (
        "falcon",
        sequence({"type": "Punctuation", "behavior": "Contiguous"}, GPT2, split("[0-9][0-9][0-9]")),
        False,
    ),
]


@pytest.mark.parametrize(("name", "pre_tokenizer", "ignore_merges"), PUBLISHED)
def test_published_structures_have_their_name(name: str, pre_tokenizer: dict[str, Any], ignore_merges: bool) -> None:
    assert name_by_structure(pre_tokenizer, ignore_merges=ignore_merges) == name


def test_the_hash_decides_between_names_of_one_structure_only() -> None:
    assert name_by_structure(GPT2, ignore_merges=False, hashed="olmo") == "olmo"
    assert name_by_structure(GPT2, ignore_merges=False, hashed="llama-bpe") == "gpt-2"


def test_every_name_stands_for_one_structure() -> None:
    names = [name for entry in known() for name in entry.names]
    assert len(names) == len(set(names)) == 90
    assert all(named(name).names for name in names)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        {"type": "Whitespace"},
        {**GPT2, "add_prefix_space": True},  # llama.cpp puts no space before byte-level text
        sequence({"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Removed", "invert": False}, BYTES),
        split("x"),
    ],
)
def test_steps_that_are_no_plain_splits_have_no_structure(pre_tokenizer: dict[str, Any] | None) -> None:
    assert split_steps(pre_tokenizer) is None


def test_the_same_splits_in_other_spellings_are_equal() -> None:
    assert split_steps(sequence(split(GPT2_SPLIT + r"|\s+"), BYTES)) == split_steps(GPT2)
    assert split_steps(sequence(split("[\r\n]"), BYTES)) == split_steps(sequence(split(r"[\r\n]"), BYTES))


def unknown_ids(text: str) -> Sequence[int]:
    assert text == probe_text()
    return [1, 2, 3]


def test_an_unknown_pretokenizer_is_an_error_that_says_what_to_do() -> None:
    tokenizer_json = {"pre_tokenizer": sequence(split(r"\w+"), BYTES), "model": {}}
    with pytest.raises(InputError, match=r"ck: pre-tokenizer .*\\\\w\+.*--override-kv tokenizer\.ggml\.pre=str:NAME"):
        detect(tokenizer_json, unknown_ids, where="ck")


def test_detection_says_what_it_rests_on() -> None:
    assert detect({"pre_tokenizer": GPT2, "model": {}}, unknown_ids, where="ck") == ("gpt-2", "structure")


def test_a_name_that_llama_cpp_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="'gpt-9' is not a pre-tokenizer"):
        named("gpt-9")


def test_other_ids_have_no_name() -> None:
    assert name_by_hash([0]) is None

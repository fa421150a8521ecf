"""Steps of a tokenizer.json that would make a text explode are refused; those of published models are not."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Regex, normalizers

from quantpress.convert.tokenizer_steps import check_steps, growth_of
from quantpress.quant.errors import InputError


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _sequence(*steps: Any) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


_BLANK = {"String": " "}
_GOOD: dict[str, dict[str, Any]] = {
    "llama": _sequence({"type": "Prepend", "prepend": "▁"}, _replace(_BLANK, "▁")),
    "t5": _sequence({"type": "Precompiled", "precompiled_charsmap": "x"}, _replace({"Regex": " {2,}"}, "▁")),
    "xlnet": _sequence(_replace({"String": "``"}, '"'), _replace({"String": "''"}, '"'), {"type": "NFKD"}),
    "clip": _sequence({"type": "NFC"}, _replace({"Regex": r"\s+"}, " "), {"type": "Lowercase"}),
    "twenty patterns that always take a character": _sequence(
        *[_replace({"Regex": f"[{n}]+"}, "-") for n in range(20)]
    ),
    "nothing": {"normalizer": None},
}
_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "doubling": (_sequence(*[_replace(_BLANK, "  ")] * 9), "more than 256 characters for one"),
    "doubling in a sequence of sequences": (
        _sequence(*[_sequence(*[_replace(_BLANK, "  ")] * 3)["normalizer"]] * 3),
        "more than 256",
    ),
    "a pattern that matches nothing": (_sequence(*[_replace({"Regex": "b*?"}, "x")] * 9), "more than 256"),
    "a pattern between characters": (_sequence(*[_replace({"Regex": "(?=.)"}, "x")] * 9), "more than 256"),
    "an empty text": (_sequence(*[_replace({"String": ""}, "x")] * 9), "more than 256"),
    "a long replacement": (_sequence(_replace(_BLANK, "x" * 300)), "more than 256"),
    "a long beginning": (_sequence({"type": "Prepend", "prepend": "x" * 2000}), "1024 before a text"),
    "doubling while text is put together": ({"decoder": _replace(_BLANK, "x" * 300)}, "the decoder may write"),
    "deep groups": ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(" * 65}}}, "groups 65 deep"),
    "a long pattern": ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a" * 10**6}}}, "1000000 characters"),
    "the text a thousand times": (
        {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 1000}},
        "1000 pieces",
    ),
}


@pytest.mark.parametrize("name", _GOOD)
def test_steps_of_published_models_are_accepted(name: str) -> None:
    check_steps(_GOOD[name], "m/tokenizer.json")


@pytest.mark.parametrize("name", _BAD)
def test_steps_that_would_explode_are_refused(name: str) -> None:
    said, words = _BAD[name]
    with pytest.raises(InputError, match=words) as caught:
        check_steps(said, "m/tokenizer.json")
    assert str(caught.value).startswith("m/tokenizer.json: ")


@pytest.mark.parametrize(
    ("regex", "content"),
    [(" ", "xy"), ("b*?", "x"), ("(?=.)", "x"), (".", "xyz"), (r"\b", "xx"), ("^", "x"), ("", "xy")],
)
def test_no_replacement_leaves_more_than_is_believed(regex: str, content: str) -> None:
    """The library itself is asked."""
    text = "ab ab" * 20
    written = normalizers.Replace(Regex(regex), content).normalize_str(text)
    assert len(written) <= len(text) * growth_of({"Regex": regex}, content) + len(content)  # and one at the end

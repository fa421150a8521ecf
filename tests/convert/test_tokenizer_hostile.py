"""Tokenizer files that libraries panic over, or that they read and nobody else does: an error that names the file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.tokenizer import Tokenizer, special_ids
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.convert.tokenizer_library import library_errors
from quantpress.quant.errors import InputError
from tests.fuzz.tokenizer_seeds import sentencepiece_seeds, tokenizer_json_seeds
from tests.tiny import VOCABULARY


def _files(name: str, **change: Any) -> TokenizerFiles:
    found = json.loads(tokenizer_json_seeds()[name])
    return TokenizerFiles({"tokenizer.json": json.dumps({**found, **change}).encode()}, "m")


def _refused(files: TokenizerFiles, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Tokenizer(files)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
            "m/tokenizer.json: not a tokenizer: .*pre",
        ),
        ({"normalizer": [[]]}, r"not a tokenizer: normalizer is \[\[\]\], wanted an object"),
        ({"normalizer": {"type": "Sequence", "normalizers": [[1]]}}, r"normalizer is \[1\], wanted an object"),
        ({"pre_tokenizer": ["ByteLevel"]}, "pre_tokenizer is .* wanted an object"),
        ({"post_processor": {"type": "Sequence", "processors": ["x"]}}, "post_processor is 'x', wanted an object"),
    ],
)
def test_what_the_library_panics_over_or_alone_understands_is_refused(change: dict[str, Any], words: str) -> None:
    _refused(_files("good", **change), words)


def test_a_panic_while_a_text_is_cut_is_an_error_too() -> None:
    """The map is whole as far as it can be told from its length; its entries lead out of it."""
    data = sentencepiece_seeds("unigram")["charsmap-blob"]
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 4}
    tokenizer = Tokenizer(
        TokenizerFiles({"spiece.model": data, "tokenizer_config.json": json.dumps(settings).encode()}, "m")
    )
    with pytest.raises(InputError, match=r"m/tokenizer.json: the tokenizer cannot cut this text: .*out of bounds"):
        tokenizer.encode("naïve", special=False)


def test_what_is_no_panic_is_left_alone() -> None:
    with pytest.raises(KeyboardInterrupt), library_errors("m", "not a tokenizer"):
        raise KeyboardInterrupt


def test_ids_that_no_runtime_can_hold_are_refused() -> None:
    vocab = json.loads(tokenizer_json_seeds()["good"])["model"]
    _refused(_files("good", model={**vocab, "vocab": {**vocab["vocab"], "x": 1 << 31}}), "has the id 2147483648")


def test_fields_that_the_library_does_not_read_change_nothing() -> None:
    """`unk_id` is Unigram's, `single` a template's: elsewhere they may hold anything."""
    good = json.loads(tokenizer_json_seeds()["good"])
    odd = _files(
        "good",
        model={**good["model"], "unk_id": "x"},
        post_processor={**good["post_processor"], "single": [1, 2], "processors": 5},
    )
    plain = Tokenizer(_files("good"))
    assert (
        Tokenizer(odd).encode("the press", special=False).tolist() == plain.encode("the press", special=False).tolist()
    )
    assert special_ids(odd, plain.token_id) == special_ids(_files("good"), plain.token_id)


@pytest.mark.parametrize("key", ["²", "-1", "9" * 5000, "0x1", ""])
def test_ids_of_added_tokens_are_plain_numbers(key: str) -> None:
    config = json.dumps({"added_tokens_decoder": {key: {"content": "x"}}}).encode()
    _refused(TokenizerFiles({**_files("good").files, "tokenizer_config.json": config}, "m"), "has no valid id")


def test_a_score_beyond_float32_is_refused() -> None:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", 1e308]]}
    with pytest.raises(InputError, match=r"piece 1 has the score 1e.308, not one of float32"):
        plan_vocab(_files("good-unigram", model=model, added_tokens=[]), vocab_size=VOCABULARY, model_type="t5")


def test_a_piece_that_is_not_utf_8_is_refused() -> None:
    _refused(TokenizerFiles({"tokenizer.model": sentencepiece_seeds("bpe")["latin"]}, "m"), "not a SentencePiece model")


@pytest.mark.parametrize(
    ("file", "data"),
    [("vocab.txt", b"a\n"), ("spiece.model", b"a"), ("vocab.json", b"{}")],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("name", ["x" * 9000, "a\nb"], ids=["long", "lines"])
def test_classes_with_odd_names_are_told_of_in_one_line(file: str, data: bytes, name: str) -> None:
    config = json.dumps({"tokenizer_class": name}).encode()
    _refused(TokenizerFiles({file: data, "merges.txt": b"", "tokenizer_config.json": config}, "m"), "not known")

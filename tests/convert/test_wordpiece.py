"""WordPiece: from vocab.txt as transformers reads it, and what GGUF cannot say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantpress.convert.gguf.container import plain_metadata
from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.gguf.vocab_rebuild import tokenizer_files_from_gguf
from quantpress.convert.tokenizer import Tokenizer
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.pipelines.tokenizer_proof import HARD_CASES
from quantpress.quant.errors import InputError

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *SPECIALS, "the", "press", "##es", "##ing", "a", "model", "##s", "cafe", "caf", "##e", "Cafe", "Caf", "##é",
    *map(chr, range(33, 48)), *"abcdefghijklmnopqrstuvwxyz", *"ABCXYZ", *(f"##{sign}" for sign in "abcdefgnorstu123"),
    "1", "2", "中", "文", "日", "本", "##語", "語",
]  # fmt: skip


def files_of(**config: Any) -> TokenizerFiles:
    settings = {"tokenizer_class": "BertTokenizer", **config}
    vocab = "\n".join(dict.fromkeys(PIECES)) + "\n"
    return TokenizerFiles({"vocab.txt": vocab.encode(), "tokenizer_config.json": json.dumps(settings).encode()}, "m")


@pytest.mark.parametrize(
    "config",
    [{}, {"do_lower_case": False}, {"strip_accents": False}, {"tokenize_chinese_chars": False}],
    ids=["uncased", "cased", "accents", "chinese"],
)
def test_vocab_txt_cuts_as_transformers_does(config: dict[str, Any]) -> None:
    from transformers import BertTokenizer

    theirs = BertTokenizer(vocab={piece: number for number, piece in enumerate(dict.fromkeys(PIECES))}, **config)
    ours = Tokenizer(files_of(**config))
    texts = ["The presses: pressing a model!", "Café CAFE café, abc123", "中文 日本語 (the) x-y", *HARD_CASES]
    for text in texts:
        assert ours.encode_in_template(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("lowercase", [True, False])
def test_gguf_and_back_cut_the_same(lowercase: bool) -> None:
    files = files_of(do_lower_case=lowercase)
    tokenizer = Tokenizer(files)
    plan = plan_vocab(files, vocab_size=tokenizer.size + 3, model_type="bert")
    metadata = plain_metadata(plan.metadata)
    assert metadata["tokenizer.ggml.normalizer.lowercase"] is lowercase
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.token_id("[CLS]") == 2
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.token_id("[SEP]") == 3
    again = Tokenizer(tokenizer_files_from_gguf(metadata))
    for text in ("The presses: pressing a model!", "Café CAFE café", *HARD_CASES):
        assert again.encode_in_template(text) == tokenizer.encode_in_template(text)


def changed(part: str, value: Any) -> TokenizerFiles:
    """Gives the files with a part of tokenizer.json replaced."""
    found = files_of().tokenizer_json
    assert found is not None
    return TokenizerFiles({"tokenizer.json": json.dumps({**found, part: value}).encode()}, "m")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer .* is not BERT's"),
        ("normalizer", {"type": "NFKC"}, "normalizer .* is not BERT's"),
    ],
)
def test_what_llama_cpp_does_not_do_before_wordpiece_is_refused(part: str, value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan_vocab(changed(part, value), vocab_size=len(PIECES), model_type="bert")


def test_two_tokens_with_one_text_in_gguf_are_refused() -> None:
    found = files_of().tokenizer_json
    assert found is not None
    vocab = {**found["model"]["vocab"], "##▁press": len(dict.fromkeys(PIECES))}
    files = changed("model", {**found["model"], "vocab": vocab})
    with pytest.raises(InputError, match="both become '▁press' in GGUF"):
        plan_vocab(files, vocab_size=len(vocab), model_type="bert")


def test_differences_are_told() -> None:
    normalizer = {
        "type": "BertNormalizer", "clean_text": False, "handle_chinese_chars": False, "strip_accents": None,
        "lowercase": False,
    }  # fmt: skip
    plan = plan_vocab(changed("normalizer", normalizer), vocab_size=len(PIECES), model_type="bert")
    assert len(plan.notes) == 3
    assert not plan.apart  # accents stay, so Korean and Indic texts are cut alike


@pytest.mark.parametrize(
    ("config", "message"),
    [({"tokenizer_class": "CamembertTokenizer"}, "CamembertTokenizer"), ({"cls_token": "<cls>"}, "'<cls>' is not in")],
)
def test_a_vocab_txt_of_another_kind_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tokenizer(files_of(**config))

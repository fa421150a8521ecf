"""GGUF vocabulary metadata: tokens, types, special ids, templates, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quantpress.convert.gguf.vocab import gguf_vocab, plan_vocab
from quantpress.convert.gguf.vocab_merges import divergence, merges_from_scores, scores_from_merges
from quantpress.convert.gguf.vocab_sentencepiece import read_sentencepiece
from quantpress.convert.gguf.vocab_tokens import TokenType, looks_special
from quantpress.convert.tokenizer import TokenizerFiles
from quantpress.quant.errors import InputError

LETTERS = "abcdefghij"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def added(token_id: int, content: str, *, special: bool = False, **flags: bool) -> dict[str, Any]:
    base = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **base, **flags, "special": special}


def tokenizer_json(*tokens: dict[str, Any], **changes: Any) -> dict[str, Any]:
    vocab = {letter: one for one, letter in enumerate(LETTERS)} | {"ab": 10, "cd": 11}
    return {
        "version": "1.0",
        "added_tokens": list(tokens),
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", "c d"]},
        **changes,
    }


def spm_json(merges: list[list[str]], *, prefix: bool, letters: str = "▁abc") -> dict[str, Any]:
    """SentencePiece style with all bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokens += dict.fromkeys(left + right for left, right in merges)
    escape: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, escape] if prefix else [escape]
    vocab = {token: one for one, token in enumerate(tokens)}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": merges}
    normalizer = {"type": "Sequence", "normalizers": steps}
    return tokenizer_json(
        added(0, "<unk>", special=True), normalizer=normalizer, pre_tokenizer=None, decoder=None, model=model
    )


def files(tokenizer: dict[str, Any], **others: Any) -> TokenizerFiles:
    named = {f"{name}.json": json.dumps(value).encode() for name, value in others.items()}
    return TokenizerFiles({"tokenizer.json": json.dumps(tokenizer).encode(), **named}, "ck")


def test_token_types_follow_llama_cpps_converter() -> None:
    tokens = (
        added(12, "<|end|>"),
        added(13, "<think>"),
        added(14, "<s>", special=True),
        added(15, "x▁y"),
        added(16, "<unused7>"),
    )
    metadata = gguf_vocab(files(tokenizer_json(*tokens)), vocab_size=20, model_type="llama")
    kind, types = metadata["tokenizer.ggml.token_type"]
    assert kind == "array[int32]"
    assert types.dtype == "int32"
    assert types[9:].tolist() == [1, 1, 1, 3, 4, 3, 4, 3, 5, 5, 5]
    assert metadata["tokenizer.ggml.tokens"][1][15:] == ["x▁y", "<unused7>", "[PAD17]", "[PAD18]", "[PAD19]"]
    assert metadata["tokenizer.ggml.merges"] == ("array[string]", ["a b", "c d"])
    assert metadata["tokenizer.ggml.model"] == ("string", "gpt2")
    assert metadata["tokenizer.ggml.pre"] == ("string", "gpt-2")
    assert "tokenizer.ggml.scores" not in metadata


@pytest.mark.parametrize(
    ("token", "special"),
    [("<pad>", True), ("<|x|>", True), ("<｜x｜>", True), ("<unused1>", True), ("<x>", False), ("<|x>", False)],
)
def test_control_tokens_are_recognized_by_their_look(token: str, special: bool) -> None:
    assert looks_special(token) is special


def test_a_token_beyond_the_embedding_is_an_error_that_names_rows_and_id() -> None:
    tokenizer = tokenizer_json(added(12, "<extra>"))
    with pytest.raises(
        InputError, match=r"ck/tokenizer\.json: token '<extra>' has id 12, but the embedding has 12 rows"
    ):
        gguf_vocab(files(tokenizer), vocab_size=12, model_type="llama")


def test_an_image_placeholder_without_row_is_left_out_and_noted() -> None:
    plan = plan_vocab(files(tokenizer_json(added(12, "<image_soft_token>"))), vocab_size=12, model_type="gemma3_text")
    assert len(plan.metadata["tokenizer.ggml.tokens"][1]) == 12
    assert any("<image_soft_token>" in note for note in plan.notes)


def test_two_ids_with_one_text_are_refused() -> None:
    tokenizer = spm_json([["a", "b"]], prefix=False)
    first = len(tokenizer["model"]["vocab"])
    tokenizer["added_tokens"] += [added(first, "▁▁"), added(first + 1, "  ")]
    with pytest.raises(InputError, match="both stand for"):
        gguf_vocab(files(tokenizer), vocab_size=first + 2, model_type="llama")


def test_special_ids_come_from_config_then_generation_config() -> None:
    tokens = (added(12, "<s>", special=True), added(13, "</s>", special=True), added(14, "<|e|>", special=True))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    generation = {"eos_token_id": [13, 14, 3], "pad_token_id": 14, "bos_token_id": 0}
    source = files(tokenizer_json(*tokens), tokenizer_config=config, generation_config=generation)
    metadata = gguf_vocab(source, vocab_size=15, model_type="llama")
    ids = {key: value for key, value in metadata.items() if key.endswith("token_id")}
    assert ids == {
        "tokenizer.ggml.bos_token_id": ("uint32", 12),
        "tokenizer.ggml.eos_token_id": ("uint32", 13),
        "tokenizer.ggml.eot_token_id": ("uint32", 14),
        "tokenizer.ggml.eom_token_id": ("uint32", 3),
        "tokenizer.ggml.padding_token_id": ("uint32", 14),
    }
    assert metadata["tokenizer.ggml.add_bos_token"] == ("bool", True)
    assert metadata["tokenizer.ggml.add_eos_token"] == ("bool", False)


def test_an_id_outside_the_embedding_is_left_out_and_noted() -> None:
    plan = plan_vocab(files(tokenizer_json(), generation_config={"pad_token_id": 99}), vocab_size=12, model_type="x")
    assert "tokenizer.ggml.padding_token_id" not in plan.metadata
    assert any("padding_token_id is 99" in note for note in plan.notes)


def test_fill_in_the_middle_tokens_are_found_by_text() -> None:
    tokens = (added(12, "<|fim_prefix|>"), added(13, "<|fim_suffix|>"), added(14, "<|fim_middle|>"))
    metadata = gguf_vocab(files(tokenizer_json(*tokens)), vocab_size=15, model_type="qwen2")
    found = [metadata[f"tokenizer.ggml.fim_{kind}_token_id"][1] for kind in ("pre", "suf", "mid")]
    assert found == [12, 13, 14]


def test_chat_templates_are_written_by_name() -> None:
    templates = [{"name": "default", "template": "D"}, {"name": "tool use", "template": "T"}]
    metadata = gguf_vocab(
        files(tokenizer_json(), tokenizer_config={"chat_template": templates}), vocab_size=12, model_type="x"
    )
    assert metadata["tokenizer.chat_template"] == ("string", "D")
    assert metadata["tokenizer.chat_template.tool_use"] == ("string", "T")
    assert metadata["tokenizer.chat_templates"] == ("array[string]", ["tool_use"])


def test_a_name_from_the_user_replaces_detection() -> None:
    odd = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    sequence = {"type": "Sequence", "pretokenizers": [odd, {**BYTE_LEVEL, "use_regex": False}]}
    source = files(tokenizer_json(pre_tokenizer=sequence, normalizer={"type": "Lowercase"}))
    with pytest.raises(InputError, match="Lowercase"):
        gguf_vocab(source, vocab_size=12, model_type="x")
    plan = plan_vocab(source, vocab_size=12, model_type="x", pre="qwen2")
    assert plan.metadata["tokenizer.ggml.pre"] == ("string", "qwen2")
    assert any("Lowercase" in note for note in plan.notes)


def test_ignore_merges_that_matters_is_not_lost_silently() -> None:
    tokenizer = tokenizer_json()
    tokenizer["model"] |= {"ignore_merges": True}
    gguf_vocab(files(tokenizer), vocab_size=12, model_type="x")  # every token is made by merges: no difference
    tokenizer["model"]["vocab"]["abcd"] = 12
    with pytest.raises(InputError, match="ignore_merges is true here but not under"):
        gguf_vocab(files(tokenizer), vocab_size=13, model_type="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "is not what llama.cpp does for Unigram"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}}, "not a tokenizer"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "both have id 0"),
        ({"pre_tokenizer": [1]}, "not a tokenizer"),
        ({"pre_tokenizer": {"type": "Whitespace"}, "decoder": None}, "Whitespace"),
        ({"pre_tokenizer": None, "decoder": None}, "neither byte-level nor SentencePiece style"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_imitate_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gguf_vocab(files(tokenizer_json(**change)), vocab_size=12, model_type="x")


def test_scores_and_merges_say_the_same() -> None:
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    scores = [0.0, 0.0, 0.0, -2.0, -1.0, -3.0]
    merges = merges_from_scores(tokens, scores)
    assert merges == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]
    assert scores_from_merges(tokens, merges)[3:].tolist() == [-1.0, 0.0, -2.0]


def test_merges_that_scores_cannot_order_are_noticed() -> None:
    """The list has ab + c but not a + bc, and bc comes first: by merges `abc` stays a bc, by scores it is joined."""
    vocab = {token: one for one, token in enumerate(["a", "b", "c", "bc", "ab", "abc"])}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    assert divergence(vocab, merges, merges_from_scores(list(vocab), [0, 0, 0, 0, -1, -2])) == "abc"


def test_a_space_prefix_with_such_merges_is_an_error_and_without_one_merges_are_written() -> None:
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]
    with pytest.raises(InputError, match="would cut 'abc' differently"):
        gguf_vocab(files(spm_json(merges, prefix=True)), vocab_size=300, model_type="llama")
    metadata = gguf_vocab(files(spm_json(merges, prefix=False)), vocab_size=300, model_type="llama")
    assert metadata["tokenizer.ggml.pre"] == ("string", "sarvam-moe")
    assert metadata["tokenizer.ggml.token_type"][1][1] == TokenType.BYTE


def test_complete_merges_are_written_as_scores() -> None:
    metadata = gguf_vocab(files(spm_json([["a", "b"]], prefix=True)), vocab_size=262, model_type="llama")
    assert metadata["tokenizer.ggml.model"] == ("string", "llama")
    assert metadata["tokenizer.ggml.add_space_prefix"] == ("bool", True)
    assert metadata["tokenizer.ggml.scores"][1].dtype == "float32"
    assert metadata["tokenizer.ggml.token_type"][1][0] == TokenType.UNKNOWN


def test_a_token_across_a_cut_of_the_pretokenizer_is_refused() -> None:
    tokenizer = spm_json([["a", "▁"]], prefix=False)
    tokenizer["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True}
    with pytest.raises(InputError, match="spans a place where the pre-tokenizer cuts"):
        gguf_vocab(files(tokenizer), vocab_size=262, model_type="llama")


@pytest.mark.parametrize(
    "data",
    [b"", b"\x0a\x05ab", b"\xff" * 20, b"\x0b", b"\x0a\x04\x0a\x02\xff\xfe", b"\x0a\x05\x0a\x01a\x18\x09"],
)
def test_damaged_sentencepiece_models_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="ck: not a SentencePiece model"):
        read_sentencepiece(data, where="ck")


def test_no_tokenizer_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="ck: no tokenizer"):
        gguf_vocab(TokenizerFiles({}, "ck"), vocab_size=1, model_type="llama")

"""Small tokenizer.json and tokenizer.model of every kind, made on the spot."""

from __future__ import annotations

import functools
import io
import json
import struct
from collections.abc import Mapping
from typing import Any

from tests.tiny import _tokenizer_json

__all__ = ["sentencepiece_seeds", "tokenizer_json_seeds"]

_TEXT = (
    "The press takes a model and gives a file. The file is read, run and compared with the model. "
    "What was written in the morning is read in the evening; what differs is thrown away. "
)
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def tokenizer_json_seeds() -> Mapping[str, bytes]:
    """Gives byte-level BPE, BPE in SentencePiece's manner, Unigram and WordPiece, and some that are a little wrong."""
    byte_level = json.loads(_tokenizer_json())
    bpe = _spaces()
    unigram = {**bpe, "normalizer": None, "pre_tokenizer": _metaspace(), "decoder": _metaspace(), "model": _unigram()}
    values: dict[str, Any] = {
        "good": byte_level, "good-spaces": bpe, "good-unigram": unigram, "good-wordpiece": _wordpiece(),
        "unknown-id": {**byte_level, "model": {**byte_level["model"], "unk_id": "x"}},
        "template": {**byte_level, "post_processor": {**byte_level["post_processor"], "single": [1, 2]}},
        "regex": {**byte_level, "pre_tokenizer": _split(r"(?=(a+)+$)|\p{L}+")},
        "broken-regex": {**byte_level, "pre_tokenizer": _split("(")},
        "gap": {**byte_level, "added_tokens": [{"id": 999, "content": "<x>", **_FLAGS}]},
        "empty-token": {**byte_level, "added_tokens": [{"id": 320, "content": "", **_FLAGS}]},
        "large-id": {**byte_level, "model": {**byte_level["model"], "vocab": {"a": (1 << 32) - 1}, "merges": []}},
        "charsmap": {**unigram, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "////AAAA"}},
        "charsmap-empty": {**unigram, "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        "id-beyond": {**byte_level, "model": {**byte_level["model"], "vocab": _with_id(byte_level, 1 << 31)}},
        "steps": {**byte_level, "normalizer": {"type": "NFC", "normalizers": [[1]]}},
        "lists": {**byte_level, "normalizer": [[[[]]]]},
        "score": {**unigram, "model": {**_unigram(), "vocab": [["<unk>", 0.0], ["a", 1e308]]}},
        "truncation": {**byte_level, "truncation": {"max_length": 0, "stride": 9, "strategy": "LongestFirst",
                                                    "direction": "Right"}},
        "no-model": {"version": "1.0"}, "word-level": {**byte_level, "model": {"type": "WordLevel", "vocab": {"a": 0},
                                                                            "unk_token": "a"}},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


def _with_id(tokenizer: Any, token_id: int) -> dict[str, int]:
    return {**tokenizer["model"]["vocab"], "beyond": token_id}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def _metaspace() -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


def _spaces() -> dict[str, Any]:
    """Llama 2's manner: spaces become U+2581, bytes stand for unknown characters."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, *"▁abcdefghijklmnopqrstuvwxyz", "th", "the", "▁the"]
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    names = ("<unk>", "<s>", "</s>")
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": [{"id": one, "content": text, **_FLAGS} for one, text in enumerate(names)],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": {piece: one for one, piece in enumerate(pieces)}, "merges": ["t h", "th e", "▁ the"],
        },
    }  # fmt: skip


def _unigram() -> dict[str, Any]:
    pieces = ["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz", "▁the", "▁press"]
    return {"type": "Unigram", "unk_id": 0, "vocab": [[piece, -float(one)] for one, piece in enumerate(pieces)]}


def _wordpiece() -> dict[str, Any]:
    from quantpress.convert.wordpiece import wordpiece_json

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "press", "##es", *"abcdefghijklmnopqrstuvwxyz"]
    return wordpiece_json("\n".join(pieces), {}, {}, "vocab.txt")


@functools.cache
def sentencepiece_seeds(good: str) -> Mapping[str, bytes]:
    """Gives a trained model of the kind that is read, one of the other kind, and models that are a little wrong."""
    bpe, unigram = _trained("bpe"), _trained("unigram")
    trained = {"good" if kind == good else kind: model for kind, model in (("bpe", bpe), ("unigram", unigram))}
    piece = _message(1, _message(1, b"a") + b"\x15" + struct.pack("<f", -1.0))
    nan = _message(1, _message(1, b"b") + b"\x15" + struct.pack("<f", float("nan")))
    return {
        **trained, "nan": unigram + nan, "twice": bpe + piece + piece, "one": piece,
        "minus": unigram + _message(1, _message(1, b"c") + b"\x15" + struct.pack("<f", float("-inf"))),
        "charsmap": unigram + _message(3, _message(2, b"\xff\xff\xff\x7fabc")),
        "charsmap-short": unigram + _message(3, _message(2, b"\x00")),
        "charsmap-blob": unigram + _message(3, _message(2, struct.pack("<I", 8) + b"\xff" * 8 + b"a")),
        "latin": bpe + _message(1, _message(1, b"\xad\xff") + b"\x18\x03"), "known": _without_unknown(bpe),
        "far": bpe + _message(2, b"\xc0\x02\x8f\x4e"),
        "word": unigram + _message(2, b"\x18\x03"), "cut": bpe[: len(bpe) // 2],
        "empty-piece": unigram + _message(1, b"\x15" + struct.pack("<f", -1.0)),
    }  # fmt: skip


def _without_unknown(model: bytes) -> bytes:
    """Makes the unknown piece one that is not used."""
    return model.replace(b"<unk>\x15\x00\x00\x00\x00\x18\x02", b"<unk>\x15\x00\x00\x00\x00\x18\x05")


def _trained(kind: str) -> bytes:
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.split(". ") * 4), model_writer=made, model_type=kind, vocab_size=60,
        normalization_rule_name="identity", hard_vocab_limit=False, pad_id=-1 if kind == "bpe" else 3, minloglevel=9,
    )  # fmt: skip
    return made.getvalue()


def _message(number: int, data: bytes) -> bytes:
    from tests.onnx_wire import field

    return field(number, data)

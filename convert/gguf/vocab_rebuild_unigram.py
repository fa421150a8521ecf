"""From the Unigram vocabulary of a GGUF file ("t5") back to normalizer, pre-tokenizer and model of tokenizer.json."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.gguf.vocab_tokens import SPACE, TokenType
from quantpress.convert.gguf.vocab_unigram import read_charsmap
from quantpress.quant.errors import InputError

__all__ = ["UNIGRAM_DEFAULTS", "unigram_core"]

UNIGRAM_DEFAULTS = {"eos": 1, "unk": 2, "pad": 0}
"""Ids that llama.cpp takes where the file says none (src/llama-vocab.cpp, llama_vocab::impl::load)."""


def unigram_core(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], *, unknown: str | None, name: str
) -> dict[str, Any]:
    """Gives `normalizer`, `pre_tokenizer`, `decoder` and `model`.

    Args:
        metadata: GGUF keys and plain values.
        tokens: text of each id.
        types: type of each id.
        unknown: text of the unknown token.
        name: the file, for messages.

    Raises:
        InputError: scores or the character map are missing or damaged.
    """
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, Sequence) or len(scores) < len(tokens):
        raise InputError(f"{name}: tokenizer.ggml.scores is missing or shorter than tokenizer.ggml.tokens")
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    squeezes = bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False))
    scheme = "always" if prefix or squeezes else "never"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    return {
        "normalizer": _normalizer(metadata, squeezes, name),
        "pre_tokenizer": metaspace,
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": None if unknown is None else tokens.index(unknown),
            "byte_fallback": False,
            "vocab": _pieces(tokens, types, scores),
        },
    }


def _normalizer(metadata: Mapping[str, Any], squeezes: bool, name: str) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    stored = metadata.get("tokenizer.ggml.precompiled_charsmap")
    if stored:
        where = f"{name}: tokenizer.ggml.precompiled_charsmap"
        if not isinstance(stored, Sequence) or not all(isinstance(one, int) and -128 <= one < 256 for one in stored):
            raise InputError(f"{where}: {shown(stored, 40)}, wanted bytes")
        text = base64.b64encode(bytes(one & 0xFF for one in stored)).decode("ascii")
        read_charsmap(text, where)
        steps.append({"type": "Precompiled", "precompiled_charsmap": text})
    if squeezes:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _pieces(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[list[Any]]:
    """Pieces with their scores.

    llama.cpp never makes control tokens of text and scores an unknown character by the least score of a normal piece;
    the library knows no types, so that tokens of other types get that least score: it stays the least, and no text is
    likely to be cut into them.
    """
    normal = [score for score, kind in zip(scores, types, strict=False) if kind == TokenType.NORMAL]
    least = min(normal, default=0.0)
    pieces: list[list[Any]] = []
    for token, kind, score in zip(tokens, types, scores, strict=False):
        if kind == TokenType.USER_DEFINED:
            pieces.append([token, 0.0])
        else:
            pieces.append([token, float(score) if kind == TokenType.NORMAL else least])
    return pieces

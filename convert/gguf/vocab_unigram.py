"""SentencePiece's Unigram model in GGUF: `tokenizer.ggml.model` is "t5" there, whatever model it belongs to.

llama.cpp's tokenizer (src/llama-vocab.cpp, llm_tokenizer_ugm) rewrites text by SentencePiece's own character map, joins
spaces, and takes the pieces with the greatest sum of scores over the whole text. A tokenizer.json may cut the text into
words first; pieces that go beyond a word are therefore kept from llama.cpp.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantpress.convert.files import shown
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.vocab_tokens import SPACE, TokenTable, TokenType
from quantpress.quant.errors import InputError

__all__ = [
    "UNIGRAM_KEEPS",
    "UnigramStyle",
    "is_unigram",
    "place_pieces",
    "read_charsmap",
    "read_pieces",
    "read_unigram",
    "unigram_metadata",
]

UNIGRAM_KEEPS = frozenset({TokenType.UNKNOWN, TokenType.BYTE})
"""Types that pieces keep where an added token has their id."""

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_FORMS = ("NFC", "NFD", "NFKC", "NFKD", "Nmt")
_WORD = re.compile(rf"{SPACE}?[^{SPACE}]*")
_GREATEST = float(np.finfo(np.float32).max)  # of a score; NaN is not below it either
_MIN_MAP = 5  # bytes: its length in four, and at least one of replacements


@dataclass(frozen=True, slots=True)
class UnigramStyle:
    """How the tokenizer prepares text.

    Attributes:
        charsmap: SentencePiece's compiled character map, empty where text is not rewritten.
        prefix: a space is put before the text.
        squeezes: outer and doubled spaces are dropped.
        words: pieces never go beyond a word.
        notes: what llama.cpp does differently.
    """

    charsmap: bytes
    prefix: bool
    squeezes: bool
    words: bool
    notes: tuple[str, ...]


def is_unigram(tokenizer_json: Mapping[str, Any]) -> bool:
    """Whether the model of a tokenizer.json is Unigram; files of old versions do not name it."""
    model = tokenizer_json["model"]
    return bool(model.get("type", "Unigram" if "unk_id" in model else "") == "Unigram")


def read_unigram(tokenizer_json: Mapping[str, Any], *, where: str) -> UnigramStyle:
    """Reads normalizer and pre-tokenizer.

    Raises:
        InputError: a step is not one that llama.cpp's tokenizer can stand for.
    """
    charsmap, squeezes, splits, notes = b"", False, False, []
    escapes, prefix, words = False, False, False
    for step in _flat(tokenizer_json.get("normalizer"), "normalizers"):
        kind, pattern = step.get("type"), step.get("pattern") or {}
        if kind == "Precompiled" and not charsmap:
            charsmap = read_charsmap(step.get("precompiled_charsmap"), where)
        elif kind == "Strip" or (kind == "Replace" and pattern.get("Regex") == " {2,}"):
            squeezes = True
        elif kind == "Replace" and pattern.get("String") == " " and step.get("content") == SPACE:
            escapes = True
        elif kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind in _FORMS:
            notes.append(f"text that is not in the form of the normalizer ({kind}) is rewritten by the tokenizer only")
        else:
            raise InputError(f"{where}: normalizer {shown(dict(step), 120)} rewrites text in a way llama.cpp cannot")
    for step in _flat(tokenizer_json.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "WhitespaceSplit":
            splits = words = True
        elif step.get("type") == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            escapes, prefix, words = True, prefix or scheme != "never", words or bool(step.get("split", True))
            if scheme == "first":
                notes.append("llama.cpp puts a space after every special token, the tokenizer only before the text")
        else:
            raise InputError(f"{where}: pre-tokenizer {shown(dict(step), 120)} is not what llama.cpp does for Unigram")
    if not escapes:
        raise InputError(f"{where}: spaces are not written as U+2581; llama.cpp has no such Unigram tokenizer")
    if splits and not charsmap:
        notes.append("the tokenizer takes tabs and newlines for spaces; without a character map llama.cpp does not")
    if (squeezes or splits) and not prefix:
        notes.append("llama.cpp puts a space before every text whose spaces it joins, the tokenizer does not")
    return UnigramStyle(charsmap, prefix, squeezes or splits, words, tuple(notes))


def read_charsmap(value: object, where: str) -> bytes:
    """Decodes `precompiled_charsmap` of a tokenizer.json, within what llama.cpp loads.

    Raises:
        InputError: it is not what SentencePiece compiles: four bytes of length, so many bytes of entries, replacements.
    """
    if not value:
        return b""
    try:
        found = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError):
        found = b""
    if len(found) < _MIN_MAP or int.from_bytes(found[:4], "little") + 4 >= len(found) or found[-1] != 0:
        raise InputError(f"{where}: precompiled_charsmap is {shown(value, 40)}, no character map of SentencePiece")
    return found


def read_pieces(model: Mapping[str, Any], where: str) -> list[tuple[str, float]]:
    """Gives text and score of each piece by id.

    Raises:
        InputError: the vocabulary is no list of texts with finite scores.
    """
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or not vocab:
        raise InputError(f"{where}: the vocabulary of a Unigram model is {shown(vocab, 40)}, wanted a list")
    pieces: list[tuple[str, float]] = []
    for entry in vocab:
        pair = entry if isinstance(entry, list) and len(entry) == 2 else [None, None]
        text, score = pair
        if not isinstance(text, str) or isinstance(score, bool) or not isinstance(score, int | float):
            raise InputError(f"{where}: piece {len(pieces)} is {shown(entry, 60)}; a text and a score expected")
        if not abs(score) <= _GREATEST:
            raise InputError(f"{where}: piece {len(pieces)} has the score {score}, not one of float32")
        pieces.append((text, float(score)))
    return pieces


def place_pieces(table: TokenTable, model: Mapping[str, Any], style: UnigramStyle) -> list[str]:
    """Puts all pieces into the table; returns what llama.cpp does differently."""
    notes = []
    pieces, unknown, has_bytes = read_pieces(model, table.where), model.get("unk_id"), bool(model.get("byte_fallback"))
    beyond = 0
    for token_id, (text, score) in enumerate(pieces):
        kind = TokenType.NORMAL
        if token_id == unknown:
            kind = TokenType.UNKNOWN
        elif has_bytes and _BYTE.fullmatch(text):
            kind = TokenType.BYTE
        elif style.words and not _WORD.fullmatch(text):
            # the tokenizer never gives it; llama.cpp looks for pieces of every type but control, unknown and byte
            kind, beyond = TokenType.CONTROL, beyond + 1
        table.place(token_id, text, kind, score)
    if beyond:
        notes.append(f"{beyond} pieces that go beyond a word are written as control tokens; no text has them")
    if has_bytes:
        notes.append("characters without a piece become bytes in the tokenizer and the unknown token in llama.cpp")
    return notes


def unigram_metadata(table: TokenTable, style: UnigramStyle) -> dict[str, MetadataValue]:
    """Gives the keys of a vocabulary whose tokens are all in the table (llama.cpp conversion/t5.py, set_vocab)."""
    texts, types, scores = table.finish(unescape=True)
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": ("string", "t5"),
        "tokenizer.ggml.pre": ("string", "default"),
        "tokenizer.ggml.tokens": ("array[string]", texts),
        "tokenizer.ggml.scores": ("array[float32]", scores),
        "tokenizer.ggml.token_type": ("array[int32]", types),
        "tokenizer.ggml.add_space_prefix": ("bool", style.prefix),
        "tokenizer.ggml.remove_extra_whitespaces": ("bool", style.squeezes),
    }
    if style.charsmap:
        values = np.frombuffer(style.charsmap, np.uint8)
        metadata["tokenizer.ggml.precompiled_charsmap"] = ("array[uint8]", values)
    return metadata


def _flat(step: object, key: str) -> Iterator[Mapping[str, Any]]:
    if not isinstance(step, Mapping):
        return
    if step.get("type") == "Sequence":
        for inner in step.get(key) or []:
            yield from _flat(inner, key)
    else:
        yield step

"""SentencePiece-style BPE in tokenizer.json: how it treats spaces, and which llama.cpp tokenizer can stand for it.

llama.cpp has two candidates. "llama" joins any neighbours that make a token, by score, over the whole text, and can put
a space before it. "gpt2" with a pre-tokenizer that works on plain UTF-8 ("sarvam-moe", "gemma4") uses the merge list
itself, over whole lines, and puts no space before the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.gguf.pretokenizers import named
from quantpress.convert.gguf.vocab_merges import Merge, divergence, merges_from_scores, scores_from_merges
from quantpress.convert.gguf.vocab_tokens import SPACE, TokenType
from quantpress.quant.errors import InputError

__all__ = ["SpacePlan", "SpaceStyle", "plan_spaces", "read_spaces"]

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SQUEEZES = (r"\A +| +\z", r" {2,}")  # patterns by which tokenizer.json says remove_extra_whitespaces
# Splits that cut only where two given characters meet, so that they change nothing when no token spans such a place:
# their expression -> what a token must look like to lie in one piece
_SPLITS: Mapping[str, str] = {
    r"\n|▁*[^▁\n]+|▁+": r"\n|▁*[^▁\n]+|▁+",
    r"\n|▁?[^▁\n]+|▁": r"\n|▁?[^▁\n]+|▁",
}
_PRE = "sarvam-moe"  # lines, then merges over UTF-8; nothing else
_PRE_NEWLINES = "gemma4"  # the same, and runs of newlines that are tokens stay whole (forces BOS)


@dataclass(frozen=True, slots=True)
class SpaceStyle:
    """How a tokenizer.json treats spaces.

    Attributes:
        prefix: a space is put before the text.
        squeezes: outer and doubled spaces are dropped.
        piece: regular expression that every token must match whole, because the pre-tokenizer would cut any other.
        notes: what llama.cpp does differently.
    """

    prefix: bool
    squeezes: bool
    piece: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SpacePlan:
    """A way to write a SentencePiece-style vocabulary.

    Attributes:
        pre: pre-tokenizer name for the "gpt2" tokenizer, or None for the "llama" tokenizer.
        tokens: id -> text, type and score.
        notes: what llama.cpp does differently.
    """

    pre: str | None
    tokens: dict[int, tuple[str, TokenType, float]]
    notes: tuple[str, ...]


def read_spaces(tokenizer_json: Mapping[str, Any], *, where: str) -> SpaceStyle:
    """Reads normalizer and pre-tokenizer of a tokenizer.json that is not byte-level.

    Raises:
        InputError: a step is not one that llama.cpp's tokenizers can stand for.
    """
    escapes, prefix, squeezes, notes = False, False, False, []
    for step in _flat(tokenizer_json.get("normalizer"), "normalizers"):
        kind = step.get("type")
        pattern = step.get("pattern") or {}
        if kind == "Replace" and pattern.get("String") == " " and step.get("content") == SPACE:
            escapes = True
        elif kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif (kind == "Replace" and pattern.get("Regex") in _SQUEEZES) or kind == "Strip":
            squeezes = True
        elif kind in ("NFC", "NFKC", "Precompiled", "Nmt"):
            notes.append(f"text that is not in the form of the normalizer ({kind}) is rewritten by the tokenizer only")
        else:
            raise InputError(f"{where}: normalizer {shown(dict(step))} rewrites text in a way llama.cpp cannot")
    piece = None
    for step in _flat(tokenizer_json.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            escapes, prefix = True, prefix or scheme != "never"
            piece = r"▁?[^▁]*" if step.get("split", True) else piece
            if scheme != "never":
                notes.append("before a text that begins with a space llama.cpp puts one more, the tokenizer does not")
            if scheme == "first":
                notes.append("llama.cpp puts a space after every special token, the tokenizer only before the text")
        else:
            piece = _split_piece(step, piece, where)
    if not escapes:
        raise InputError(
            f"{where}: neither byte-level nor SentencePiece style (spaces are not written as U+2581); llama.cpp has no "
            "tokenizer for it"
        )
    if squeezes:
        notes.append("the tokenizer drops outer and doubled spaces; llama.cpp keeps them")
    return SpaceStyle(prefix, squeezes, piece, tuple(notes))


def plan_spaces(
    model: Mapping[str, Any], merges: Sequence[Merge], style: SpaceStyle, *, pre: str | None, where: str
) -> SpacePlan:
    """Chooses how to write the vocabulary: by scores if that is the same, else by its merges.

    Args:
        model: `model` of tokenizer.json.
        merges: its merges.
        style: how it treats spaces.
        pre: pre-tokenizer name that the user asks for, or None.
        where: the file, for messages.

    Raises:
        InputError: neither way cuts text as the tokenizer does.
    """
    vocab: Mapping[str, int] = model["vocab"]
    for left, right in merges:
        if style.piece is not None and not re.fullmatch(style.piece, left + right):
            raise InputError(
                f"{where}: token {shown(left + right)} spans a place where the pre-tokenizer cuts; "
                "llama.cpp has no such cut"
            )
    has_bytes = bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocab for byte in range(256))
    texts = sorted(vocab, key=vocab.__getitem__)
    scores = scores_from_merges(texts, merges)
    different = None
    if pre in (None, "default") and has_bytes:
        different = divergence(vocab, merges, merges_from_scores(texts, scores))
        if different is None:
            return SpacePlan(None, _typed(model, texts, scores.tolist()), ())
    if style.prefix:
        raise InputError(
            f"{where}: llama.cpp puts a space before the text only in its 'llama' tokenizer, which needs a token "
            f"for each byte (found: {has_bytes}) and merges wherever it can"
            + (f"; it would cut {shown(different)} differently" if different is not None else "")
        )
    return _plan_merges(model, texts, has_bytes=has_bytes, pre=pre, where=where)


def _plan_merges(
    model: Mapping[str, Any], texts: Sequence[str], *, has_bytes: bool, pre: str | None, where: str
) -> SpacePlan:
    notes = []
    broken = [text for text in texts if "\n" in text and text != "\n"]
    if mixed := [text for text in broken if text.strip("\n")]:
        raise InputError(f"{where}: token {shown(mixed[0])} goes beyond a line; llama.cpp merges within lines only")
    if pre in (None, "default"):
        pre = _PRE_NEWLINES if broken else _PRE
    elif named(pre).byte_level:
        raise InputError(f"{where}: {pre!r} is for byte-level vocabularies; {_PRE!r} is for this one")
    if pre == _PRE_NEWLINES:
        notes.append("llama.cpp adds BOS to every text under pre-tokenizer 'gemma4', whatever the file says")
    if not has_bytes:
        notes.append(
            "characters that are no tokens become the unknown token in the tokenizer and are dropped by llama.cpp"
        )
    return SpacePlan(pre, _typed(model, texts, [0.0] * len(texts)), tuple(notes))


def _typed(
    model: Mapping[str, Any], texts: Sequence[str], scores: Sequence[float]
) -> dict[int, tuple[str, TokenType, float]]:
    unknown = model.get("unk_token")
    result = {}
    for text, score in zip(texts, scores, strict=True):
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        result[model["vocab"][text]] = (text, TokenType.UNKNOWN if text == unknown else kind, score)
    return result


def _split_piece(step: Mapping[str, Any], piece: str | None, where: str) -> str | None:
    pattern = (step.get("pattern") or {}) if step.get("type") == "Split" else None
    if pattern is not None and pattern.get("String") == " ":
        return piece  # spaces are U+2581 by now, so nothing matches
    if pattern is not None and pattern.get("Regex") in _SPLITS and step.get("behavior") == "Isolated":
        return _SPLITS[pattern["Regex"]]
    raise InputError(
        f"{where}: pre-tokenizer {shown(dict(step), 120)} is not byte-level and not one that llama.cpp can stand for"
    )


def _flat(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(step, Mapping):
        return []
    if step.get("type") == "Sequence":
        return [part for inner in step.get(key) or [] for part in _flat(inner, key)]
    return [step]

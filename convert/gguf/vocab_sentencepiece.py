"""Reads tokenizer.model: the few fields of SentencePiece's protocol buffer that GGUF needs, within bounds."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from quantpress.quant.errors import InputError

__all__ = ["BPE", "UNIGRAM", "SentencePieceModel", "read_sentencepiece"]

# Field numbers of sentencepiece_model.proto
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # ModelProto
_PIECE, _SCORE, _TYPE = 1, 2, 3  # ModelProto.SentencePiece
_MODEL_TYPE, _SUFFIX, _BYTES = 3, 24, 35  # TrainerSpec: model_type, treat_whitespace_as_suffix, byte_fallback
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE = 2, 3, 4, 5  # NormalizerSpec
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType

_MAX_PIECES = 1 << 21  # eight times the largest vocabulary in use


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """A SentencePiece vocabulary.

    Attributes:
        pieces: text, score and type of each id; types are numbered as in GGUF (1 normal, 2 unknown, 3 control,
            4 user defined, 5 unused, 6 byte).
        model_type: `BPE` or `UNIGRAM`, or another number of the format.
        add_dummy_prefix: a space is put before the text.
        remove_extra_whitespaces: runs of spaces become one, outer ones are removed.
        escape_whitespaces: spaces become U+2581.
        suffix_spaces: a word carries its space behind it.
        normalizes: the text is rewritten by a character map (NFKC and the like) first.
        charsmap: that map as SentencePiece compiles it, empty where there is none.
        byte_fallback: characters without a piece become bytes.
    """

    pieces: tuple[tuple[str, float, int], ...]
    model_type: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    suffix_spaces: bool
    normalizes: bool
    charsmap: bytes = b""
    byte_fallback: bool = False


def read_sentencepiece(data: bytes, *, where: str) -> SentencePieceModel:
    """Reads a serialized ModelProto.

    Args:
        data: contents of tokenizer.model.
        where: the file, for messages.

    Raises:
        InputError: the bytes are not a SentencePiece model.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for field, value in _fields(data):
            if field == _PIECES and isinstance(value, bytes):
                pieces.append(_piece(dict(_fields(value))))
                if len(pieces) > _MAX_PIECES:
                    raise InputError(f"{where}: more than {_MAX_PIECES} pieces")
            elif field == _TRAINER and isinstance(value, bytes):
                trainer = dict(_fields(value))
            elif field == _NORMALIZER and isinstance(value, bytes):
                normalizer = dict(_fields(value))
    except (ValueError, struct.error) as error:
        raise InputError(f"{where}: not a SentencePiece model: {error}") from error
    if not pieces:
        raise InputError(f"{where}: not a SentencePiece model: it has no pieces")
    model_type, charsmap = trainer.get(_MODEL_TYPE, UNIGRAM), normalizer.get(_CHARSMAP, b"")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=model_type if isinstance(model_type, int) else UNIGRAM,
        add_dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        remove_extra_whitespaces=bool(normalizer.get(_EXTRA_SPACES, 1)),
        escape_whitespaces=bool(normalizer.get(_ESCAPE, 1)),
        suffix_spaces=bool(trainer.get(_SUFFIX, 0)),
        normalizes=bool(charsmap),
        charsmap=charsmap if isinstance(charsmap, bytes) else b"",
        byte_fallback=bool(trainer.get(_BYTES, 0)),
    )


def _piece(fields: dict[int, int | bytes]) -> tuple[str, float, int]:
    text, score, kind = fields.get(_PIECE, b""), fields.get(_SCORE, b"\0\0\0\0"), fields.get(_TYPE, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError("a piece has fields of the wrong kind")
    if not 1 <= kind <= 6:
        raise ValueError(f"a piece has type {kind}")
    return text.decode("utf-8"), float(struct.unpack("<f", score)[0]), kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of one protocol buffer message in file order: numbers as int, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes ends after the file")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("the file ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than ten bytes ends at byte {at}")

"""WordPiece in GGUF: `tokenizer.ggml.model` is "bert", and tokens that begin a word begin with U+2581.

llama.cpp's tokenizer (src/llama-vocab.cpp, llm_tokenizer_wpm_session) does what BertNormalizer and BertPreTokenizer do,
puts U+2581 before each word, and takes the longest token that fits each time (conversion/bert.py, BertModel.set_vocab).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.vocab_tokens import SPACE, TokenTable, TokenType
from quantpress.quant.errors import InputError

__all__ = ["WordPieceStyle", "bert_defaults", "is_wordpiece", "plan_wordpiece", "read_wordpiece", "wordpiece_core"]

_LOWERCASE, _STRIP_ACCENTS = (f"tokenizer.ggml.normalizer.{name}" for name in ("lowercase", "strip_accents"))
_AROUND = (("cls", 101), ("seperator", 102))
_APART = (
    "Korean and Indic texts are cut differently: with the accents the tokenizer takes Korean syllables apart and keeps"
    " vowel signs, llama.cpp does neither"
)
_PLANES = 0x20000  # characters of all scripts but rare Chinese ones
_PREFIX = "##"  # what vocabularies put before tokens that go on with a word


@dataclass(frozen=True, slots=True)
class WordPieceStyle:
    """How the tokenizer prepares text.

    Attributes:
        lowercase: letters are made small.
        strip_accents: accents are taken off.
        prefix: what stands before tokens that go on with a word.
        notes: what llama.cpp does differently.
    """

    lowercase: bool
    strip_accents: bool
    prefix: str
    notes: tuple[str, ...]


def is_wordpiece(tokenizer_json: Mapping[str, Any]) -> bool:
    """Whether the model of a tokenizer.json is WordPiece."""
    return bool(tokenizer_json["model"].get("type") == "WordPiece")


def read_wordpiece(tokenizer_json: Mapping[str, Any], *, where: str) -> WordPieceStyle:
    """Reads normalizer and pre-tokenizer.

    Raises:
        InputError: a step is not one that llama.cpp's tokenizer can stand for.
    """
    splitter = tokenizer_json.get("pre_tokenizer") or {}
    if splitter.get("type") != "BertPreTokenizer":
        raise InputError(f"{where}: pre-tokenizer {shown(splitter, 120)} is not BERT's, the one that llama.cpp knows")
    normalizer, notes = tokenizer_json.get("normalizer"), []
    if normalizer is None:
        normalizer = {"lowercase": False, "clean_text": False, "handle_chinese_chars": False}
    elif normalizer.get("type") != "BertNormalizer":
        raise InputError(f"{where}: normalizer {shown(normalizer, 120)} is not BERT's, the one that llama.cpp knows")
    lowercase = bool(normalizer.get("lowercase", True))
    strips = normalizer.get("strip_accents")
    if not normalizer.get("clean_text", True):
        notes.append("llama.cpp drops control characters, the tokenizer does not")
    if not normalizer.get("handle_chinese_chars", True):
        notes.append("llama.cpp takes each Chinese character for a word, the tokenizer does not")
    if not lowercase:
        notes.append("the tokenizer keeps capital letters; llama.cpp of before September 2026 makes them small")
    prefix = tokenizer_json["model"].get("continuing_subword_prefix") or ""
    return WordPieceStyle(lowercase, lowercase if strips is None else bool(strips), prefix, tuple(notes))


def plan_wordpiece(
    table: TokenTable, tokenizer_json: Mapping[str, Any], added: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, MetadataValue], tuple[str, ...], Mapping[str, str]]:
    """Puts all tokens into a table.

    Args:
        table: without tokens yet.
        tokenizer_json: with a WordPiece model.
        added: tokens as `TokenizerFiles.added_tokens` gives them.

    Returns:
        The keys of the vocabulary, what llama.cpp does differently, and characters that it cuts differently
        (`VocabPlan.apart`).

    Raises:
        InputError: llama.cpp has no such tokenizer, or two tokens get the same text, which it does not load.
    """
    style = read_wordpiece(tokenizer_json, where=table.where)
    for text, token_id in tokenizer_json["model"]["vocab"].items():
        table.place(token_id, text, TokenType.NORMAL)
    table.place_added(added, keep=frozenset())
    return _metadata(table, style), style.notes, {_apart(): _APART} if style.strip_accents else {}


@functools.cache
def _apart() -> str:
    """Gives an expression for Korean syllables and for marks that are no accents, of which llama.cpp knows nothing."""
    marks = (chr(code) for code in range(_PLANES) if unicodedata.category(chr(code)) in ("Mc", "Me"))
    return f"[\uac00-\ud7a3{''.join(marks)}]"


def _metadata(table: TokenTable, style: WordPieceStyle) -> dict[str, MetadataValue]:
    texts, types, _ = table.finish()
    phantoms = [_phantom(text, kind, style.prefix) for text, kind in zip(texts, types.tolist(), strict=True)]
    first: dict[str, int] = {}
    for token_id, text in enumerate(phantoms):
        if (other := first.setdefault(text, token_id)) != token_id:
            raise InputError(f"{table.where}: ids {other} and {token_id} both become {shown(text)} in GGUF")
    return {
        "tokenizer.ggml.model": ("string", "bert"),
        "tokenizer.ggml.pre": ("string", "default"),
        "tokenizer.ggml.tokens": ("array[string]", phantoms),
        "tokenizer.ggml.token_type": ("array[int32]", types),
        _LOWERCASE: ("bool", style.lowercase),
        _STRIP_ACCENTS: ("bool", style.strip_accents),
    }


def _phantom(text: str, kind: int, prefix: str) -> str:
    """Gives a token's text in GGUF; those that are looked for in raw text stay as they are."""
    if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
        return text
    if prefix and text.startswith(prefix) and text != prefix:
        return text[len(prefix) :]
    return SPACE + text


def bert_defaults(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Gives the ids that llama.cpp takes where a file with such a vocabulary names none (llama_vocab::impl::load).

    It begins a text with BOS, which files of its own converter name as CLS, and always ends it with SEP.
    """
    first, last = (metadata.get(f"tokenizer.ggml.{key}_token_id", other) for key, other in _AROUND)
    return {"bos": int(first), "eos": int(last), "unk": 100, "sep": 102, "pad": 0, "mask": 103}


def wordpiece_core(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], *, unknown: str, name: str
) -> dict[str, Any]:
    """Gives normalizer, pre-tokenizer, decoder and model of a tokenizer.json that cuts text as llama.cpp does.

    Args:
        metadata: GGUF keys and plain values.
        tokens: texts by id.
        types: of the tokens.
        unknown: text of the unknown token.
        name: the file, for messages.

    Raises:
        InputError: two tokens are the same without their marks.
    """
    vocab: dict[str, int] = {}
    for token_id, (text, kind) in enumerate(zip(tokens, types, strict=False)):
        plain = text
        if kind not in (TokenType.CONTROL, TokenType.USER_DEFINED):
            plain = text.removeprefix(SPACE) if text.startswith(SPACE) else _PREFIX + text
        if vocab.setdefault(plain, token_id) != token_id:
            raise InputError(f"{name}: tokens {vocab[plain]} and {token_id} are both {shown(plain)}")
    lowercase = bool(metadata.get(_LOWERCASE, True))
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": bool(metadata.get(_STRIP_ACCENTS, lowercase)),
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": _PREFIX, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": _PREFIX,
            "max_input_chars_per_word": 1 << 20,  # llama.cpp has no bound
            "vocab": vocab,
        },
    }

"""Counts the token ids that the tokenizer's files of a checkpoint know, without loading a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.convert.tokenizer_tiktoken import count_ranks
from quantpress.quant.errors import InputError

__all__ = ["count_tokens"]

# Placeholders that Gemma 3's text models name but have no embedding row for; no text gives their ids.
_WITHOUT_ROW = frozenset({"<image_soft_token>", "<audio_soft_token>"})


def count_tokens(checkpoint: Checkpoint) -> int | None:
    """Gives one more than the greatest token id, or None if no file says.

    Raises:
        InputError: a tokenizer file is damaged.
    """
    files = TokenizerFiles(checkpoint.tokenizer_files, name=checkpoint.name)
    if files.tiktoken is not None:  # its merges, which take seconds to find, are not needed here
        return max([count_ranks(files.files[files.tiktoken]), *map(_after, files.side_added_tokens)])
    found = files.tokenizer_json
    if found is not None:
        ids = _vocabulary_ids(found["model"].get("vocab"), files.where("tokenizer.json"))
        return 1 + max([ids, *_added_ids(files)])
    if "tokenizer.model" in files:
        return max([_count_pieces(files), *(1 + token_id for token_id in _added_ids(files))])
    return None


def _after(token: Mapping[str, Any]) -> int:
    return 1 + int(token["id"])


def _added_ids(files: TokenizerFiles) -> list[int]:
    return [int(token["id"]) for token in files.added_tokens if token["content"] not in _WITHOUT_ROW]


def _vocabulary_ids(vocab: Any, where: str) -> int:
    """Gives the greatest id of a vocabulary: text -> id (BPE, WordPiece), or a list of (text, score) (Unigram)."""
    if isinstance(vocab, list):
        return len(vocab) - 1
    if not isinstance(vocab, dict):
        raise InputError(f"{where}: the vocabulary is {shown(vocab)}, wanted an object or a list")
    for text, token_id in vocab.items():
        if type(token_id) is not int or token_id < 0:
            raise InputError(f"{where}: token {shown(text)} has the id {shown(token_id)}, wanted a number from 0")
    return max((one for text, one in vocab.items() if text not in _WITHOUT_ROW), default=-1)


def _count_pieces(files: TokenizerFiles) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_proto=files.files["tokenizer.model"]).get_piece_size())
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(f"{files.where('tokenizer.model')}: not a SentencePiece model: {error}") from error

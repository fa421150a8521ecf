"""The token list of a GGUF vocabulary: one text, type and score for every row of the embedding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["SPACE", "TokenTable", "TokenType", "looks_special"]

SPACE = "▁"  # U+2581, SentencePiece's visible space
_ADDED_SCORE = -1000.0  # what llama.cpp's converter gives added tokens
_PAD_SCORE = -10000.0  # and rows without a token

# Image placeholders that text-only checkpoints keep in the tokenizer although the embedding has no row for them
# (Gemma 3 1B: 262,144 rows, id 262144).
_WITHOUT_ROW = frozenset({"<image_soft_token>", "<audio_soft_token>"})


class TokenType(IntEnum):
    """Types of `tokenizer.ggml.token_type` (include/llama.h, llama_token_type)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def looks_special(token: str) -> bool:
    """Says whether an added token that is not marked special is a control token all the same.

    Source: llama.cpp conversion/base.py, does_token_look_special.
    """
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(token.startswith(start) and token.endswith(end) for start, end in brackets)


class TokenTable:
    """Collects tokens by id and completes the list to the rows of the embedding.

    Attributes:
        rows: rows of the embedding.
        where: the tokenizer file, for messages.
        ids: text of each token as the tokenizer writes it -> id.
        left_out: tokens that have no row and were dropped because text models never use them.
    """

    def __init__(self, rows: int, where: str) -> None:
        self.rows, self.where = rows, where
        self.ids: dict[str, int] = {}
        self.left_out: list[str] = []
        self._tokens: dict[int, tuple[str, TokenType, float]] = {}

    def place(self, token_id: int, text: str, kind: TokenType, score: float = 0.0) -> None:
        """Puts a token of the base vocabulary at its id.

        Raises:
            InputError: the embedding has no row for the id, or another token has it.
        """
        if token_id in self._tokens:
            other = self._tokens[token_id][0]
            raise InputError(f"{self.where}: tokens {shown(other)} and {shown(text)} both have id {token_id}")
        self._put(token_id, text, kind, score)

    def _put(self, token_id: int, text: str, kind: TokenType, score: float) -> None:
        if not 0 <= token_id < self.rows:
            if text in _WITHOUT_ROW:
                self.left_out.append(text)
                return
            raise InputError(
                f"{self.where}: token {shown(text)} has id {token_id}, but the embedding has {self.rows} rows "
                f"(ids 0 to {self.rows - 1}); resize the model's embedding, or take the token out of the tokenizer"
            )
        if (before := self._tokens.get(token_id)) is not None and self.ids.get(before[0]) == token_id:
            del self.ids[before[0]]
        self._tokens[token_id] = (text, kind, score)
        self.ids[text] = token_id

    def place_added(self, tokens: Iterable[Mapping[str, Any]], *, keep: frozenset[TokenType]) -> None:
        """Puts the checkpoint's added tokens in place (llama.cpp conversion/base.py, get_vocab_base).

        Args:
            tokens: added tokens as `TokenizerFiles.added_tokens` gives them.
            keep: types that a token at the id keeps (SentencePiece has its own unknown and control tokens).
        """
        for token in tokens:
            token_id, text = token["id"], token["content"]
            _, kind, _ = self._tokens.get(token_id, ("", TokenType.NORMAL, 0.0))
            if kind not in keep:
                control = token["special"] or looks_special(text)
                kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            self._put(token_id, text, kind, _ADDED_SCORE)

    def type_of(self, token_id: int) -> TokenType:
        """Gives the type of the token at an id; UNUSED for a row without a token."""
        return self._tokens.get(token_id, ("", TokenType.UNUSED, 0.0))[1]

    def finish(self, *, unescape: bool = False) -> tuple[list[str], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Gives texts, types and scores of all rows; rows without a token become unused `[PADn]`.

        Args:
            unescape: write U+2581 in user-defined tokens as a space: llama.cpp looks for them in raw text, before it
                turns spaces into U+2581.

        Raises:
            InputError: two ids have the same text, which llama.cpp does not load.
        """
        texts: list[str] = []
        types = np.full(self.rows, TokenType.UNUSED, np.int32)
        scores = np.full(self.rows, _PAD_SCORE, np.float32)
        for token_id in range(self.rows):
            text, kind, score = self._tokens.get(token_id, (f"[PAD{token_id}]", TokenType.UNUSED, _PAD_SCORE))
            texts.append(text.replace(SPACE, " ") if unescape and kind == TokenType.USER_DEFINED else text)
            types[token_id], scores[token_id] = kind, score
        first: dict[str, int] = {}
        for token_id, text in enumerate(texts):
            if (other := first.setdefault(text, token_id)) != token_id:
                raise InputError(
                    f"{self.where}: ids {other} and {token_id} both stand for {shown(text)}; llama.cpp needs different "
                    "texts: rename one of the tokens"
                )
        return texts, types, scores

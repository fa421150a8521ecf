"""Merges and scores: two ways to order the same byte-pair merging, and when one can stand for the other.

The `tokenizers` library merges pairs from a list, lowest rank first. llama.cpp's "llama" tokenizer merges any two
neighbours whose concatenation is a token, greatest score first, leftmost among equals (src/llama-vocab.cpp,
llm_tokenizer_spm_session). They agree when every way to cut a token into two tokens is in the list, and the list is
ordered by the token that results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["Merge", "divergence", "merges_from_scores", "reaches_all_tokens", "read_merges", "scores_from_merges"]

Merge = tuple[str, str]

_PROBE_CHARACTERS = 200_000  # of English text, a fraction of a second
_PROBE_TOKENS = 50_000  # texts of single tokens that are compared at most


def merges_from_scores(tokens: Sequence[str], scores: npt.ArrayLike) -> list[Merge]:
    """Gives the merge list that merges like llama.cpp does by scores.

    Args:
        tokens: text of each id.
        scores: (len(tokens),) score of each id; a greater one is merged first.

    Returns:
        All pairs of tokens whose concatenation is a token, by falling score of the result; equal scores by id.
    """
    ids = {token: one for one, token in enumerate(tokens)}
    order = np.argsort(-np.asarray(scores, np.float32), kind="stable")
    merges: list[Merge] = []
    for one in order.tolist():
        token = tokens[one]
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def scores_from_merges(tokens: Sequence[str], merges: Sequence[Merge]) -> npt.NDArray[np.float32]:
    """Gives scores that order tokens as the merge list does: (len(tokens),) float32, 0 for the first merged token.

    Tokens that no merge makes (single characters, bytes) come after all others, in the order of their ids.
    """
    first: dict[str, int] = {}
    for left, right in merges:
        first.setdefault(left + right, len(first))
    scores = np.empty(len(tokens), np.float32)
    unmerged = len(first)
    for one, token in enumerate(tokens):
        rank = first.get(token)
        if rank is None:
            rank, unmerged = unmerged, unmerged + 1
        scores[one] = -rank
    return scores


def divergence(vocab: Mapping[str, int], merges: Sequence[Merge], full: Sequence[Merge]) -> str | None:
    """Looks for a text that two merge lists over one vocabulary cut differently.

    The lists are compared first; where they differ, the cuts of every token's text, of the pairs that only `full`
    has, and of English prose decide.

    Returns:
        A text that is cut differently, or None when none was found.
    """
    if set(merges) == set(full) and _grouped(merges):
        return None
    own, other = _bpe(vocab, merges), _bpe(vocab, full)
    listed = set(merges)
    extra = list(dict.fromkeys(left + right for left, right in full if (left, right) not in listed))
    for text in [*extra[:_PROBE_TOKENS], *list(vocab)[:_PROBE_TOKENS], *_prose()]:
        if [piece.id for piece in own.tokenize(text)] != [piece.id for piece in other.tokenize(text)]:
            return text
    return None


def reaches_all_tokens(vocab: Mapping[str, int], merges: Sequence[Merge], tokens: Iterable[str]) -> bool:
    """Says whether merging makes each of these tokens from its own text, so that `ignore_merges` changes nothing."""
    bpe = _bpe(vocab, merges)
    return all([piece.id for piece in bpe.tokenize(token)] == [vocab[token]] for token in tokens)


def _grouped(merges: Sequence[Merge]) -> bool:
    """Whether all merges that make one token stand together."""
    seen: set[str] = set()
    last = ""
    for left, right in merges:
        token = left + right
        if token != last and token in seen:
            return False
        seen.add(token)
        last = token
    return True


def _bpe(vocab: Mapping[str, int], merges: Sequence[Merge]) -> Any:
    from tokenizers.models import BPE

    return BPE(vocab=dict(vocab), merges=list(merges), cache_capacity=0)


def _prose() -> list[str]:
    """English text of Python's own documentation, a paragraph at a time, written with U+2581 for spaces."""
    import pydoc_data.topics  # 700 kB, needed only for a list of merges that is not complete

    text = "\n\n".join(pydoc_data.topics.topics.values())[:_PROBE_CHARACTERS]
    return ["▁" + part.replace(" ", "▁") for part in text.split("\n\n") if part]


def read_merges(merges: Sequence[Any], where: str) -> list[Merge]:
    """Reads a merge list in both spellings of tokenizer.json: "a b" and ["a", "b"].

    Raises:
        InputError: an entry is neither.
    """
    result: list[Merge] = []
    for entry in merges:
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise InputError(f"{where}: merge {len(result)} is {shown(entry)}; two texts expected")
        result.append((pair[0], pair[1]))
    return result

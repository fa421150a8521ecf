"""tiktoken's vocabulary files (`qwen.tiktoken`, GLM-4's `tokenizer.model`): what they stand for as a tokenizer.json.

Such a file has the bytes of each token and its rank, which is its id. tiktoken joins, of all neighbours whose bytes
together are a token, those of the lowest rank, the leftmost first (tiktoken, src/lib.rs, `byte_pair_merge`). The two
tokens that a third one is made of last are therefore what comes of its bytes if only lower ranks are joined, and these
pairs, by the rank of what they make, are the merges of a BPE.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["byte_letters", "count_ranks", "looks_like_tiktoken", "read_ranks", "tiktoken_json"]

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d{1,10}\r?\n")
_RANKS = re.compile(rb" (\d{1,10})\r?$", re.MULTILINE)
_MAX_TOKENS = 1 << 21  # eight times the largest vocabulary in use
_MAX_TOKEN = 1 << 10  # bytes; the longest in use have 128


def looks_like_tiktoken(data: bytes) -> bool:
    """Says whether a file begins with a line of base64, a space and a number, which no SentencePiece model does."""
    return _LINE.match(data) is not None


@lru_cache(maxsize=1)
def count_ranks(data: bytes) -> int:
    """Gives one more than the greatest rank; a look at the numbers alone, `read_ranks` checks the file."""
    return 1 + max(map(int, _RANKS.findall(data)), default=-1)


def read_ranks(data: bytes, *, where: str) -> dict[bytes, int]:
    """Reads a file of lines `base64 rank`.

    Args:
        data: contents of the file.
        where: the file, for messages.

    Returns:
        Bytes of a token -> rank, in the order of the ranks.

    Raises:
        InputError: a line is something else, a token or a rank is there twice, or one of the 256 bytes is no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        token, rank = _read_line(line, f"{where}: line {number}")
        if token in ranks:
            raise InputError(f"{where}: line {number}: token {shown(token)} is there twice")
        ranks[token] = rank
        if len(ranks) > _MAX_TOKENS:
            raise InputError(f"{where}: more than {_MAX_TOKENS} tokens")
    if len(set(ranks.values())) != len(ranks):
        raise InputError(f"{where}: two tokens have the same rank")
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise InputError(f"{where}: byte {missing[0]} is no token; every byte must be one")
    return dict(sorted(ranks.items(), key=lambda pair: pair[1]))


def _read_line(line: bytes, where: str) -> tuple[bytes, int]:
    parts = line.split()
    try:
        token, rank = binascii.a2b_base64(parts[0], strict_mode=True), int(parts[1])
    except (binascii.Error, ValueError, IndexError) as error:
        raise InputError(f"{where}: {shown(line)} is not a token in base64 and its rank") from error
    if len(parts) != 2 or not 0 < len(token) <= _MAX_TOKEN or not 0 <= rank < _MAX_TOKENS:
        raise InputError(f"{where}: {shown(line)} is not a token in base64 and its rank")
    return token, rank


def byte_letters() -> tuple[str, ...]:
    """Gives the letter that stands for each byte in byte-level vocabularies (GPT-2, encoder.py, `bytes_to_unicode`).

    Bytes of visible characters stand for themselves, the others for those from U+0100 on, in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in visible else chr(next(others)) for byte in range(256))


@lru_cache(maxsize=1)  # seconds for 150,000 tokens, and asked for by each reader of the tokenizer's files
def tiktoken_json(data: bytes, *, split: str, nfc: bool, where: str) -> dict[str, Any]:
    """Gives a tokenizer.json that cuts text as tiktoken does; added tokens are left to the caller.

    Args:
        data: contents of the file.
        split: expression whose matches are the pieces that are merged, in the `tokenizers` library's spelling.
        nfc: text is put into Unicode NFC first.
        where: the file, for messages.

    Raises:
        InputError: as `read_ranks`.
    """
    ranks = read_ranks(data, where=where)
    letters = byte_letters()
    names = {token: "".join([letters[byte] for byte in token]) for token in ranks}
    merges, whole = [], True
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        pair = _last_pair(ranks, token, rank)
        if pair is None:
            whole = False  # never made by joining; only a piece that is this token whole gives it
        else:
            merges.append([names[pair[0]], names[pair[1]]])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    isolated = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [isolated, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": not whole,
            "vocab": {names[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }


def _last_pair(ranks: Mapping[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes] | None:
    """Gives the two tokens that lower ranks join a token's bytes to; None where more are left."""
    parts = [token[at : at + 1] for at in range(len(token))]
    found = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
    while len(parts) > 2:
        least = min(found)
        if least >= rank:
            return None
        at = found.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del found[at]
        if at > 0:
            found[at - 1] = ranks.get(parts[at - 1] + parts[at], rank)
        if at < len(found):
            found[at] = ranks.get(parts[at] + parts[at + 1], rank)
    return parts[0], parts[1]

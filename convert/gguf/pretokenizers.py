"""Which of llama.cpp's named pre-tokenizers splits text as a tokenizer.json does, and the split each name means.

Three witnesses, in this order: the structure of the pre-tokenizer (its regular expressions), the hash of the ids of a
probe text that llama.cpp's converter also uses, and a comparison on real text in llama.cpp itself, which the caller
makes. The facts are in pretokenizers.json with the version of llama.cpp they belong to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = [
    "GPT2_SPLIT",
    "Pretokenizer",
    "detect",
    "is_byte_level",
    "known",
    "name_by_hash",
    "name_by_structure",
    "named",
    "probe_text",
    "split_steps",
]

# ByteLevel(use_regex=True) of the `tokenizers` library; the trailing `|\s+` of the original changes nothing, because
# what no alternative matches becomes a piece as well
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ANY_CASE_SPELLED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]"  # Unicode P plus the ASCII marks that are symbols
_PUNCTUATION_SPELLED = r"[\p{P}!-/:-@\[-`{-~]"


@dataclass(frozen=True, slots=True)
class Pretokenizer:
    """One way of splitting text that llama.cpp knows.

    Attributes:
        names: values of `tokenizer.ggml.pre` that mean it, the one to prefer first.
        splits: regular expressions (Oniguruma) applied one after the other; each match and each rest is a piece.
        ignore_merges: a piece that is a token is taken as it is, without merging.
        byte_level: pieces are written in GPT-2's byte alphabet before merging; else spaces become U+2581.
        sources: the expressions as tokenizer.json files have them, where they differ from `splits`.
        caveat: where llama.cpp cuts unlike the tokenizers it stands for, or empty.
        rebuilds: whether `splits` are expressions that the `tokenizers` library understands.
    """

    names: tuple[str, ...]
    splits: tuple[str, ...]
    ignore_merges: bool
    byte_level: bool
    sources: tuple[tuple[str, ...], ...]
    caveat: str
    rebuilds: bool


@lru_cache(maxsize=1)
def _facts() -> dict[str, Any]:
    path = Path(__file__).with_name("pretokenizers.json")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return facts


@lru_cache(maxsize=1)
def known() -> tuple[Pretokenizer, ...]:
    """Gives every pre-tokenizer of the version of llama.cpp that pretokenizers.json names."""
    return tuple(
        Pretokenizer(
            names=tuple(entry["names"]),
            splits=tuple(entry["splits"]),
            ignore_merges=entry["ignore_merges"],
            byte_level=entry["byte_level"],
            sources=tuple(tuple(source) for source in entry.get("source_splits", [entry["splits"]])),
            caveat=entry.get("caveat", ""),
            rebuilds=entry.get("rebuilds", True),
        )
        for entry in _facts()["structures"]
    )


def named(name: str) -> Pretokenizer:
    """Gives the pre-tokenizer of a `tokenizer.ggml.pre` value.

    Raises:
        InputError: llama.cpp has no such name.
    """
    for candidate in known():
        if name in candidate.names:
            return candidate
    raise InputError(
        f"tokenizer.ggml.pre: {shown(name)} is not a pre-tokenizer of llama.cpp {_facts()['llama_cpp']}; "
        "set one of its names with --override-kv tokenizer.ggml.pre=str:NAME"
    )


def probe_text() -> str:
    """Gives the text whose ids llama.cpp's converter hashes (conversion/base.py, get_vocab_base_pre)."""
    return str(_facts()["probe"])


def name_by_hash(ids: Sequence[int]) -> str | None:
    """Gives the name for the ids of `probe_text()`, special tokens of the tokenizer's template included."""
    digest = hashlib.sha256(str([int(one) for one in ids]).encode()).hexdigest()
    found: str | None = _facts()["hashes"].get(digest)
    return found


def split_steps(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Writes a byte-level pre-tokenizer as the regular expressions it applies, in one spelling.

    Args:
        pre_tokenizer: `pre_tokenizer` of tokenizer.json.

    Returns:
        The expressions in order, or None when a step is not a split, or text is not turned into bytes.
    """
    steps: list[str] = []
    byte_level = False
    for part in _flat(pre_tokenizer):
        kind = part.get("type")
        if kind == "ByteLevel":
            byte_level = True
            if part.get("add_prefix_space"):
                return None
            steps += [GPT2_SPLIT] if part.get("use_regex", True) else []
        elif (split := _one_split(part)) is not None:
            steps.append(split)
        else:
            return None
    return tuple(_spelled(step) for step in steps) if byte_level else None


def name_by_structure(
    pre_tokenizer: Mapping[str, Any] | None, *, ignore_merges: bool, hashed: str | None = None
) -> str | None:
    """Gives the name of the pre-tokenizer with the same splits, or None.

    Args:
        pre_tokenizer: `pre_tokenizer` of tokenizer.json.
        ignore_merges: `ignore_merges` of the BPE model; names that differ only in it are told apart by it.
        hashed: name by hash; decides between several names of one structure.
    """
    steps = split_steps(pre_tokenizer)
    if steps is None:
        return None
    matches = [
        entry
        for entry in known()
        if entry.byte_level and any(tuple(map(_spelled, source)) == steps for source in entry.sources)
    ]
    same = [entry for entry in matches if entry.ignore_merges == ignore_merges] or matches[:1]
    exact = [entry for entry in same if tuple(map(_spelled, entry.splits)) == steps] or same
    if any(hashed in entry.names for entry in same):
        return hashed
    return exact[0].names[0] if exact else None


def detect(tokenizer_json: Mapping[str, Any], probe: Callable[[str], Sequence[int]], *, where: str) -> tuple[str, str]:
    """Finds the name to write as `tokenizer.ggml.pre` for a byte-level BPE.

    Args:
        tokenizer_json: parsed tokenizer.json.
        probe: text -> ids as the tokenizer gives them by default (special tokens of its template included).
        where: the file, for messages.

    Returns:
        The name, and what it rests on: "structure", "structure and hash" or "hash".

    Raises:
        InputError: neither structure nor hash is known.
    """
    hashed = name_by_hash(probe(probe_text()))
    pre_tokenizer = tokenizer_json.get("pre_tokenizer")
    ignore_merges = bool(tokenizer_json["model"].get("ignore_merges", False))
    name = name_by_structure(pre_tokenizer, ignore_merges=ignore_merges, hashed=hashed)
    if name is not None:
        return name, "structure and hash" if name == hashed else "structure"
    if hashed is not None:
        return hashed, "hash"
    steps = split_steps(pre_tokenizer)
    raise InputError(
        f"{where}: pre-tokenizer {shown(steps if steps is not None else pre_tokenizer, 160)} is not one that llama.cpp "
        f"{_facts()['llama_cpp']} knows; if it splits text like one of its names, say which with "
        "--override-kv tokenizer.ggml.pre=str:NAME and verify the result"
    )


def is_byte_level(tokenizer_json: Mapping[str, Any]) -> bool:
    """Whether tokens are written in GPT-2's alphabet of bytes, as the decoder of a tokenizer.json says."""
    decoder = tokenizer_json.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return any(isinstance(part, dict) and part.get("type") == "ByteLevel" for part in parts)


def _flat(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not isinstance(pre_tokenizer, Mapping):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [part for inner in pre_tokenizer.get("pretokenizers") or [] for part in _flat(inner)]
    return [pre_tokenizer]


def _one_split(part: Mapping[str, Any]) -> str | None:
    """The expression whose matches and rests are the pieces that one step makes; None for any other step."""
    kind, behavior = part.get("type"), part.get("behavior")
    if kind == "Digits":
        return r"\p{N}" if part.get("individual_digits") else r"\p{N}+"
    if kind == "Punctuation" and behavior in ("Isolated", "Contiguous", None):
        return _PUNCTUATION + ("+" if behavior == "Contiguous" else "")
    if kind != "Split" or not isinstance(part.get("pattern"), Mapping):
        return None
    pattern = part["pattern"].get("Regex")
    if pattern is None and isinstance(text := part["pattern"].get("String"), str):
        pattern = re.escape(text)
    keeps_matches = (behavior == "Isolated") or (behavior == "Removed" and part.get("invert") is True)
    return pattern if isinstance(pattern, str) and keeps_matches else None


def _spelled(expression: str) -> str:
    """One spelling for expressions that mean the same in the `tokenizers` library."""
    for old, new in (
        ("\r", r"\r"),
        ("\n", r"\n"),
        ("\t", r"\t"),
        (_ANY_CASE, _ANY_CASE_SPELLED),
        (r"\p{N}{1}", r"\p{N}"),
        (_PUNCTUATION_SPELLED, _PUNCTUATION),
        (r"[\p{P}\$\+<=>\^~\|]", _PUNCTUATION),
    ):
        expression = expression.replace(old, new)
    return expression.removesuffix(r"|\s+") if expression.endswith(r"|\s+(?!\S)|\s+") else expression

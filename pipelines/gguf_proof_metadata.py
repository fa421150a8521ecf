"""Settings and vocabulary of a GGUF file beside its source's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.gguf.container import plain_metadata
from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.gguf.vocab_tokens import TokenType
from quantpress.convert.preflight import Preflight
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.pipelines.content_proof import Finding
from quantpress.quant.errors import QuantpressError

__all__ = ["MetadataFound", "compare_metadata"]

_FLOAT32 = 2.0**-22  # relative: what a float of 32 bits may lose of a number in config.json, and once more on the way
# what llama.cpp finds out by itself, or does not compute with
_FREE = {"vocab_size", "pooling_type", "rope.scaling.original_context_length"}
_DERIVED = {"rope.dimension_count", "attention.key_length", "attention.value_length", "feed_forward_length"}
_DEFAULTS: Mapping[str, Any] = {"rope.freq_base": 10_000.0, "rope.scaling.type": "none", "attention.causal": True}
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_IDS = ("bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token", "add_space_prefix")


@dataclass
class MetadataFound:
    """How many settings and tokens were compared, what could not be, and what is wrong."""

    settings: int = 0
    tokens: int = 0
    skipped: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def compare_metadata(
    source: Checkpoint, checked: Preflight, metadata: Mapping[str, Any], overridden: frozenset[str] = frozenset()
) -> MetadataFound:
    """Compares what llama.cpp reads of the graph and of the tokenizer.

    Args:
        source: the model.
        checked: its table.
        metadata: of the file, plain values.
        overridden: keys that the user has set to something else.
    """
    found = MetadataFound()
    _settings(found, source, checked, metadata, overridden)
    try:
        _vocabulary(found, source, checked, metadata, overridden)
    except QuantpressError as error:
        found.skipped.append(f"vocabulary: {error}")
    return found


def _settings(
    found: MetadataFound,
    source: Checkpoint,
    checked: Preflight,
    metadata: Mapping[str, Any],
    overridden: frozenset[str],
) -> None:
    spec, prefix = checked.spec, str(metadata.get("general.architecture"))
    if prefix != spec.gguf:
        found.skipped.append(f"settings: the file is of architecture {shown(prefix)}, the source's is {spec.gguf!r}")
        return
    wanted = plain_metadata(dict(spec.gguf_metadata(checked.hyper, source.config)))
    for key, value in wanted.items():
        full = key if key.startswith("tokenizer.") else f"{prefix}.{key}"
        if key in _FREE or full in overridden or key.startswith("tokenizer."):
            continue
        if full not in metadata:
            if key not in _DERIVED and not (key in _DEFAULTS and _same(_DEFAULTS[key], value)):
                found.findings.append(Finding("settings", full, "missing", shown(value)))
            continue
        found.settings += 1
        if not _same(metadata[full], value):
            found.findings.append(Finding("settings", full, shown(metadata[full]), shown(value)))


def _same(found: Any, wanted: Any) -> bool:
    many = [isinstance(each, Sequence) and not isinstance(each, str) for each in (found, wanted)]
    if all(many):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    if any(many):  # one number for all layers, or one for each
        values, one = (found, wanted) if many[0] else (wanted, found)
        return all(_same(each, one) for each in values)
    if isinstance(found, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(found, wanted, rel_tol=_FLOAT32, abs_tol=1e-37)
    return bool(found == wanted)


def _vocabulary(
    found: MetadataFound,
    source: Checkpoint,
    checked: Preflight,
    metadata: Mapping[str, Any],
    overridden: frozenset[str],
) -> None:
    wanted = _planned(source, checked.hyper.vocab)
    if _TOKENS not in metadata or _TOKENS not in wanted:
        found.skipped.append("vocabulary: the file or the source has none")
        return
    if metadata.get("tokenizer.ggml.model") != wanted.get("tokenizer.ggml.model"):
        found.skipped.append("vocabulary: of another kind than the source's tokenizer gives")
        return
    kinds = wanted.get(_TYPES) or [TokenType.NORMAL] * len(wanted[_TOKENS])
    used = [number for number, kind in enumerate(kinds) if kind != TokenType.UNUSED]
    _compare_lists(found, _TOKENS, metadata[_TOKENS], wanted[_TOKENS], used, "token")
    found.tokens = len(used)
    _compare_types(found, metadata.get(_TYPES), wanted.get(_TYPES), used)
    if scores := metadata.get("tokenizer.ggml.scores"):
        normal = [number for number in used if kinds[number] == TokenType.NORMAL]
        _compare_lists(found, "tokenizer.ggml.scores", scores, wanted.get("tokenizer.ggml.scores"), normal, "score of")
    if merges := metadata.get("tokenizer.ggml.merges"):
        planned = wanted.get("tokenizer.ggml.merges")
        _compare_lists(found, "tokenizer.ggml.merges", merges, planned, range(len(planned or ())), "merge")
    for name in _IDS:
        key = f"tokenizer.ggml.{name}"
        if key in metadata and key in wanted and key not in overridden and not _same(metadata[key], wanted[key]):
            found.findings.append(Finding("vocabulary", key, shown(metadata[key]), shown(wanted[key])))


def _compare_types(found: MetadataFound, held: Any, wanted: Any, places: Sequence[int]) -> None:
    """Compares what kind of token each is; converters differ in which of those that are never text are control."""
    if held is None or wanted is None or (len(places) and max(places) >= len(held)):
        return
    apart = TokenType.CONTROL, TokenType.USER_DEFINED
    wrong = [n for n in places if held[n] != wanted[n] and not (held[n] in apart and wanted[n] in apart)]
    if wrong:
        first, more = wrong[0], f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        found.findings.append(
            Finding("vocabulary", f"{_TYPES}: type of {first}", f"{held[first]}{more}", str(int(wanted[first])))
        )


def _planned(source: Checkpoint, rows: int) -> Mapping[str, Any]:
    """What the exporter makes of the source's tokenizer; of a GGUF source its own."""
    kept = {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
    if not kept:
        files = TokenizerFiles(source.tokenizer_files, name=source.name)
        kept = dict(plan_vocab(files, vocab_size=rows, model_type=str(source.config.get("model_type"))).metadata)
    return plain_metadata(kept)


def _compare_lists(
    found: MetadataFound, key: str, held: Any, wanted: Any, places: Sequence[int], what: str
) -> None:  # fmt: skip
    """Compares two lists at some places; one finding, of the first that differs."""
    if wanted is None:
        return
    if len(places) and max(places) >= len(held):
        found.findings.append(Finding("vocabulary", key, f"{len(held)} entries", f"{len(wanted)}"))
        return
    wrong = [place for place in places if not _same(held[place], wanted[place])]
    if wrong:
        first, more = wrong[0], f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        found.findings.append(
            Finding("vocabulary", f"{key}: {what} {first}", shown(held[first]) + more, shown(wanted[first]))
        )

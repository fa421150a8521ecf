"""Tied embeddings under adapters: what acts on the input embedding, what on the head, and when they stay tied.

The truth is what PEFT computes before it merges. Its merge_and_unload writes into the tied parameter, so a LoRA on
either end acts on both afterwards, and twice with `ensure_weight_tying`; here each end gets what it was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantpress.convert.lora.edits import Edit, Twin
from quantpress.convert.lora.targets import Embeddings

__all__ = ["place_edits", "with_vocabulary"]

_LOW_RANK = ("lora", "embedding", "dora")


def place_edits(
    edits: Sequence[Edit], ends: Embeddings
) -> tuple[tuple[tuple[Edit, tuple[str, ...]], ...], tuple[Twin, ...]]:
    """Says which tensors each edit of one adapter acts on.

    Args:
        edits: of one adapter, as the planner gives them.
        ends: of the base before any adapter.

    Returns:
        Edits with the names of their targets, replacements before changes; and tensors that the file holds for the
        head beside the same ones for the embedding that it is tied to, which do nothing of their own.
    """
    ordered = sorted(edits, key=lambda edit: edit.whole is None)
    if not ends.tied or ends.input is None or ends.head is None:
        return tuple((edit, (edit.target,)) for edit in ordered), ()
    inputs = [edit for edit in ordered if edit.target == ends.input]
    heads = [edit for edit in ordered if edit.target == ends.head]
    pairs = {head: twins for head in heads for edit in inputs if (twins := _twins(head, edit))}
    placed: list[tuple[Edit, tuple[str, ...]]] = []
    for edit in ordered:
        if edit in pairs:
            continue
        if edit not in inputs and edit not in heads:
            placed.append((edit, (edit.target,)))
        elif _is_of_both(edit, [head for head in heads if head not in pairs] if edit in inputs else None):
            trained = {other.target for other in (*inputs, *heads) if other.whole is not None and not other.shared}
            both = (ends.input, ends.head)
            placed.append((edit, both if edit.whole is None else tuple(name for name in both if name not in trained)))
        else:
            placed.append((edit, (edit.target,)))
    return tuple(placed), tuple(twin for twins in pairs.values() for twin in twins)


def _is_of_both(edit: Edit, heads: Sequence[Edit] | None) -> bool:
    """Whether an edit acts on both ends; `heads` are the head's own edits, None for one of them."""
    if edit.whole is not None:
        return edit.shared  # it was loaded into the tied parameter
    if not edit.shared or heads is None:
        return False
    rivals = _LOW_RANK if edit.kind in _LOW_RANK else (edit.kind,)
    return not any(head.kind in rivals for head in heads)


def _twins(head: Edit, edit: Edit) -> tuple[Twin, ...]:
    """Gives the tensors of an edit of the head that only repeat those of an edit of the embedding."""
    if not head.shared or not edit.shared:
        return ()
    if head.whole is not None and edit.whole is not None:
        return (Twin(head.whole, edit.whole, False, edit),)
    if head.kind == edit.kind == "tokens" and head.ids == edit.ids:
        return (Twin(head.tensors[0], edit.tensors[0], False, edit),)
    if (head.kind, edit.kind) == ("lora", "embedding") and (head.rank, head.scale) == (edit.rank, edit.scale):
        # PEFT: tuners/lora/model.py, `tied_adapter`: lora_A is lora_embedding_B transposed, lora_B lora_embedding_A
        right, left = head.tensors
        return (Twin(right, edit.tensors[1], True, edit), Twin(left, edit.tensors[0], True, edit))
    return ()


def with_vocabulary(config: Mapping[str, Any], *, untied: bool, rows: int | None) -> dict[str, Any]:
    """Gives a config.json for changed embeddings.

    Args:
        config: of the base; a model with several parts has the text model's settings in `text_config` too.
        untied: the head has values of its own now.
        rows: new number of rows of the embedding; None if it is the old one.
    """
    new = dict(config)
    text = config.get("text_config")
    if isinstance(text, Mapping):
        new["text_config"] = with_vocabulary(text, untied=untied, rows=rows)
    if untied:
        new["tie_word_embeddings"] = False
    if rows is not None and ("vocab_size" in config or not isinstance(text, Mapping)):
        new["vocab_size"] = rows
    return new

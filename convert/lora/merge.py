"""Merges adapters into a checkpoint, lazily: each tensor is read once, changed and passed on."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.lora.adapter import Adapter, open_adapter
from quantpress.convert.lora.edits import Changed, Edit, Twin, error_at
from quantpress.convert.lora.embeddings import place_edits, with_vocabulary
from quantpress.convert.lora.ledger import Adapted, Applied
from quantpress.convert.lora.merged_tensor import COMPILED_FROM
from quantpress.convert.lora.plan import Planner
from quantpress.convert.lora.targets import BaseNames, Embeddings
from quantpress.convert.lora.tokenizers import with_tokenizer
from quantpress.convert.preflight import refuse_quantized
from quantpress.quant.errors import InputError, UsageError

__all__ = ["merge_lora"]

log = logging.getLogger(__name__)

Placed = tuple[tuple[Edit, tuple[str, ...]], ...]


def merge_lora(checkpoint: Checkpoint, adapter: Adapter | Path | str, weight: float = 1.0) -> Checkpoint:
    """Gives a view of a checkpoint with an adapter merged into it; reads headers only.

    Args:
        checkpoint: the base, or a view that this function gave: adapters are applied in order.
        adapter: an open adapter, its folder or a Hub id.
        weight: factor on what the adapter adds; what it replaces is replaced whatever the weight.

    Returns:
        A checkpoint whose tensors keep their types and whose `adapted` accounts for every tensor of the adapter.

    Raises:
        InputError: the adapter cannot be opened, is of a kind that cannot be merged, or does not fit the base.
        UsageError: the weight is not a finite number.
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UsageError(f"the weight of an adapter must be a finite number, found {shown(weight)}")
    adapter = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    before = checkpoint.adapted or Adapted(checkpoint, ())
    base = before.base
    refuse_quantized(base)
    names = BaseNames(base)
    planner = Planner(adapter, weight, names)
    placed, twins = place_edits(tuple(planner.edits()), names.embeddings)
    _check_all_used(adapter, placed, twins)
    changed, copies = _change(base, before.changed, placed, names.embeddings)
    compiled = sum(state.base.size for state in changed.values()) >= COMPILED_FROM
    adapted = Adapted(
        base,
        (*before.applied, Applied(adapter, float(weight))),
        changed=changed,
        merged={name: state.merged(compiled=compiled) for name, state in changed.items()},
        edits=(*before.edits, placed),
        twins=(*before.twins, (*twins, *copies)),
    )
    _log_base(adapter, base)
    merged = _with_tensors(checkpoint, adapted, names.embeddings)
    notes = (*_notes(adapter, weight, placed), *_embedding_notes(checkpoint, merged, adapter), *planner.missing())
    adapted = replace(adapted, notes=(*before.notes, *notes))
    return replace(with_tokenizer(merged, adapter), files=(*checkpoint.files, *adapter.files), adapted=adapted)


def _check_all_used(adapter: Adapter, placed: Placed, twins: tuple[Twin, ...]) -> None:
    used = {tensor.name for edit, _ in placed for tensor in edit.tensors} | {twin.tensor.name for twin in twins}
    for tensor in adapter.tensors:
        if tensor.name not in used:
            raise error_at(tensor, "is not used by anything; the adapter is not understood")


def _change(
    base: Checkpoint, before: Mapping[str, Changed], placed: Placed, ends: Embeddings
) -> tuple[dict[str, Changed], list[Twin]]:
    """Does the edits of one adapter to the tensors as adapters before it left them."""
    changed, copies = dict(before), list[Twin]()
    if ends.tied and ends.input is not None and ends.head is not None:
        embedding = base.tensors[ends.input]
        changed.setdefault(ends.input, Changed(embedding, embedding))
        changed.setdefault(ends.head, _renamed_state(changed[ends.input], ends.head))
    for edit, targets in placed:
        _refuse_magnitude_after_bias(edit, before)
        for name in targets:
            state = changed.get(name) or Changed(base.tensors[name], base.tensors[name])
            if edit.copied and edit.whole is not None and state.edits:
                # a further adapter has a copy of the base's embedding too
                copies.append(Twin(edit.whole, state.source, False, edit))
                continue
            changed[name] = state.with_edit(edit)
    if ends.tied and ends.input is not None and ends.head is not None:
        if changed[ends.input].edits == changed[ends.head].edits:
            del changed[ends.head]
        if not changed[ends.input].edits:
            del changed[ends.input]
    return changed, copies


def _refuse_magnitude_after_bias(edit: Edit, before: Mapping[str, Changed]) -> None:
    """Refuses DoRA on top of an adapter with `lora_bias`: in PEFT's forward pass the magnitude scales that bias too."""
    bias = before.get(edit.target.removesuffix(".weight") + ".bias") if edit.kind == "dora" else None
    if bias is not None and bias.changes:
        raise error_at(
            edit.tensors[0],
            f"is DoRA on {shown(edit.target, 200)}, whose bias an adapter before it has changed (lora_bias); merge the"
            " DoRA adapter first",
        )


def _renamed_state(state: Changed, name: str) -> Changed:
    return replace(state, base=dataclasses.replace(state.base, name=name))


def _with_tensors(checkpoint: Checkpoint, adapted: Adapted, ends: Embeddings) -> Checkpoint:
    """Gives the checkpoint with merged tensors in the base's order, and a config that agrees with them."""
    changed, base = adapted.changed, adapted.base
    untied = ends.tied and ends.head is not None and ends.head in changed
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in base.tensors.items():
        if name == ends.head and ends.tied:
            if not untied and ends.input not in changed:
                tensors[name] = tensor  # a copy of the embedding, which is as it was
            continue
        tensors[name] = adapted.merged[name].lazy() if name in changed else tensor
        if name == ends.input and untied and ends.head is not None:
            tensors[ends.head] = adapted.merged[ends.head].lazy()
    rows = _vocabulary(adapted, ends)
    config = with_vocabulary(base.config, untied=untied, rows=rows) if untied or rows is not None else base.config
    files = checkpoint.tokenizer_files
    if config != base.config and "config.json" in files:
        files = {**files, "config.json": json.dumps(config, indent=2, ensure_ascii=False).encode()}
    types = {name: kind for name, kind in base.storage_types.items() if name not in changed}
    codes = {name: lazy for name, lazy in base.quantized.items() if name not in changed}
    return replace(
        checkpoint, config=config, tensors=tensors, tokenizer_files=files, storage_types=types, quantized=codes
    )


def _vocabulary(adapted: Adapted, ends: Embeddings) -> int | None:
    """Gives the new number of tokens, None if it is the old one.

    Raises:
        InputError: embedding and head have different numbers of rows now.
    """
    rows: dict[str, int] = {}
    for name in (ends.input, ends.head):
        if name is not None and (name in adapted.changed or name in adapted.base.tensors):
            state = adapted.changed.get(name)
            rows[name] = state.source.rows if state is not None else adapted.base.tensors[name].rows
    if ends.tied and ends.head not in adapted.changed:
        rows.pop(ends.head or "", None)
    if len(set(rows.values())) > 1 and any(name in adapted.changed for name in rows):
        told = " and ".join(f"{shown(name, 200)} {count}" for name, count in rows.items())
        raise InputError(
            f"{adapted.applied[-1].adapter.name}: rows differ: {told}; an adapter for a vocabulary that has grown must"
            " hold both whole (modules_to_save, or save_embedding_layers=True)"
        )
    if ends.input is None or ends.input not in adapted.changed:
        return None
    state = adapted.changed[ends.input]
    return state.source.rows if state.source.rows != state.base.rows else None


def _notes(adapter: Adapter, weight: float, placed: Placed) -> tuple[str, ...]:
    notes = list[str]()
    whole = [edit for edit, _ in placed if edit.scale is None and not edit.copied]
    if weight != 1 and whole:
        notes.append(
            f"{adapter.name}: weight {weight:g} scales what the adapter adds; {len(whole)} tensors that it replaces are"
            f" replaced whatever the weight, first {whole[0].target}"
        )
    if adapter.spare:
        notes.append(
            f"{adapter.name}: {len(adapter.spare)} tensors of the file are copies that PEFT does not use either,"
            f" first {adapter.spare[0].name}"
        )
    return tuple(notes)


def _embedding_notes(before: Checkpoint, after: Checkpoint, adapter: Adapter) -> tuple[str, ...]:
    notes = list[str]()
    added = [name for name in after.tensors if name not in before.tensors]
    if added or after.config.get("tie_word_embeddings") != before.config.get("tie_word_embeddings"):
        notes.append(
            f"{adapter.name}: embedding and head are tied in the base and the adapter changes them differently; the"
            " merged model has a head of its own and tie_word_embeddings: false"
        )
    old, new = (_vocab_size(checkpoint.config) for checkpoint in (before, after))
    if old != new:
        notes.append(f"{adapter.name}: the vocabulary has {new} rows, {old} in the base; config.json follows")
    return tuple(notes)


def _vocab_size(config: Mapping[str, Any]) -> Any:
    text = config.get("text_config")
    return config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)


def _log_base(adapter: Adapter, base: Checkpoint) -> None:
    trained = adapter.config.base_model
    if trained and Path(trained).name != Path(base.name).name:
        log.info("%s: trained on %s, merged into %s", adapter.name, shown(trained, 200), base.name)

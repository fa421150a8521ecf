"""Merges adapters into a checkpoint, lazily: each tensor is read once, changed and passed on."""

from __future__ import annotations

from pathlib import Path

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.lora.adapter import Adapter

__all__ = ["merge_lora"]


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
    raise NotImplementedError

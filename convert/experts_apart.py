"""Checkpoints whose experts are stored in one tensor, as if each were stored by itself.

Quantizers and those who read their files know experts one by one; see `ArchSpec.other_rows`.
"""

from __future__ import annotations

from dataclasses import replace

from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.preflight import Preflight

__all__ = ["experts_apart"]


def experts_apart(checkpoint: Checkpoint, checked: Preflight) -> Checkpoint:
    """Gives a checkpoint whose stacked experts are tensors of their own, under the names that single experts have.

    Stacks whose experts have no such names stay as they are.

    Args:
        checkpoint: the model.
        checked: its table.
    """
    single: dict[str, list[LazyTensor]] = {}
    for _, _, tensor in checked.bindings:
        piece = checked.pieces.get(tensor.name)
        if piece is not None and piece.expert >= 0 and not tensor.name.startswith(f"{piece.stored}:"):
            single.setdefault(piece.stored, []).append(tensor)
    if not single:
        return checkpoint
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        tensors |= {each.name: each for each in single.get(name, [tensor])}
    return replace(checkpoint, tensors=tensors)

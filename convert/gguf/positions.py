"""Tables of positions as GGUF has them: without the rows that no position reads."""

from __future__ import annotations

import dataclasses

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.preflight import Binding

__all__ = ["from_first"]


def from_first(binding: Binding, hyper: Hyperparameters) -> Binding:
    """Gives learned positions from the first that a token has, (context, hidden); anything else as it is.

    RoBERTa's begin behind the padding token's id, llama.cpp's at 0 (llama.cpp conversion/bert.py, RobertaModel).
    """
    row, layer, tensor = binding
    if row.slot != "position_embd.weight" or not hyper.position_offset:
        return binding
    return row, layer, _without(tensor, hyper.position_offset)


def _without(tensor: LazyTensor, count: int) -> LazyTensor:
    """Gives a tensor without its first rows."""
    read, wide = tensor.read_rows, tensor.wide_rows
    return dataclasses.replace(
        tensor,
        shape=(tensor.shape[0] - count, *tensor.shape[1:]),
        read_rows=lambda start, stop: read(start + count, stop + count),
        wide_rows=None if wide is None else lambda start, stop: wide(start + count, stop + count),
    )

"""A checkpoint's tensors in the decoder's own form, read one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, TensorSpec
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.quant.errors import InputError

# numpy's name of a storage type that torch cannot take from numpy -> the integers it is passed as, and torch's type
_PASSED_AS: dict[str, tuple[type[np.generic], torch.dtype]] = {
    "bfloat16": (np.uint16, torch.bfloat16),
    "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn),
    "float8_e5m2": (np.uint8, torch.float8_e5m2),
}

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

Weight = Callable[[str, int], torch.Tensor | None]
"""`(slot, layer)` -> a weight in the decoder's form, None where the model has none; layer is -1 outside layers."""


def as_torch(values: Array) -> torch.Tensor:
    """Gives the same values as a torch tensor: bfloat16 and float8 keep their bits, nothing is rounded."""
    writable = values if values.flags.writeable else values.copy()  # torch warns of memory that it must not write
    if values.dtype.name not in _PASSED_AS:
        return torch.from_numpy(writable)
    integers, dtype = _PASSED_AS[values.dtype.name]
    return torch.from_numpy(writable.view(integers)).view(dtype)


def canonical(values: torch.Tensor, row: TensorSpec, hyper: Hyperparameters) -> torch.Tensor:
    """Brings a tensor of a checkpoint into the decoder's form.

    Args:
        values: as the checkpoint has them.
        row: their row in the table.
        hyper: for the number of heads.

    Returns:
        (N, K) weights with all of q before all of k before all of v; norm weights with their offset, in float32.
    """
    if values.dtype in _FLOAT8:
        values = values.to(torch.bfloat16)  # exact, and torch can neither index nor multiply float8
    if row.layout is Layout.TRANSPOSED and values.ndim == 2:
        return values.T.contiguous()
    if row.layout is Layout.HEADS_QKV:
        by_head = values.reshape(hyper.heads, 3, hyper.head_dim, *values.shape[1:])
        return by_head.transpose(0, 1).reshape(values.shape).contiguous()
    return values.float() + row.offset if row.offset else values


@dataclass(frozen=True)
class CheckpointWeights:
    """Reads a checkpoint's tensors by the decoder's slots.

    Attributes:
        checkpoint: where from.
        spec: its family.
        hyper: its hyperparameters.
    """

    checkpoint: Checkpoint
    spec: ArchSpec
    hyper: Hyperparameters

    def __call__(self, slot: str, layer: int) -> torch.Tensor | None:
        """Gives a weight as exact as it is known, None if this model has none of that name.

        Raises:
            InputError: the table says there must be one and the checkpoint lacks it, or its shape is another.
        """
        row = self._row(slot)
        if row is None:
            return None
        tensor = self._find(row, layer)
        wanted = tuple(self.hyper.dims[dim] for dim in row.shape)
        if tensor.shape != wanted:
            raise InputError(f"{tensor.source}: tensor {tensor.name!r} has shape {tensor.shape}, wanted {wanted}")
        return canonical(as_torch(tensor.exact_rows(0, tensor.rows)), row, self.hyper)

    def _row(self, slot: str) -> TensorSpec | None:
        for row in self.spec.tensors:
            if row.slot == slot and (not row.flag or row.flag in self.hyper.flags):
                return row
        return None

    def _find(self, row: TensorSpec, layer: int) -> LazyTensor:
        if row.tied_to and self.hyper.tied:  # transformers never looks at a head that is tied
            row = next(other for other in self.spec.tensors if other.hf == row.tied_to)
        names = self.spec.names(row, layer)
        for name in names:
            if name in self.checkpoint.tensors:
                return self.checkpoint.tensors[name]
        return self.checkpoint.tensor(names[0])

"""A checkpoint's tensors in the decoder's own form, read one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from quantpress.convert.arch.fused_rows import FUSED, stored_heads
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, TensorSpec
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.head_rows import find_tensor
from quantpress.convert.pieces import resolve
from quantpress.convert.recent import Recent
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
    if row.layout in FUSED:
        by_head = values.reshape(-1, hyper.head_dim, *values.shape[1:])
        return by_head[list(stored_heads(hyper))].reshape(values.shape)
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
    _rows: dict[tuple[str, bool], TensorSpec] = field(init=False, repr=False, compare=False)
    _recent: Recent[Array] = field(default_factory=lambda: Recent(1), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Finds the row of each slot, for layers with and without experts; reads nothing."""
        rows = {(row.slot, False): row for row in self.spec.present(self.hyper) if not row.per_layer}
        for layer in {self.hyper.has_experts(one): one for one in reversed(range(self.hyper.layers))}.values():
            kind = self.hyper.has_experts(layer)
            rows.update({(row.slot, kind): row for row in self.spec.layer_rows(self.hyper, layer)})
        object.__setattr__(self, "_rows", rows)

    def __call__(self, slot: str, layer: int) -> torch.Tensor | None:
        """Gives a weight as exact as it is known, None if this model has none of that name.

        Raises:
            InputError: the table says there must be one and the checkpoint lacks it, or its shape is another.
        """
        row = self._rows.get((slot, self.hyper.has_experts(layer)))
        if row is None:
            return None
        held, stored = self._find(row, layer)
        wanted = tuple(self.hyper.dims[dim] for dim in held.shape)
        if stored.shape != wanted:
            raise InputError(f"{stored.source}: tensor {stored.name!r} has shape {stored.shape}, wanted {wanted}")
        found, tensor, _ = resolve(held, stored, self.hyper, recent=self._recent)
        return canonical(as_torch(tensor.exact_rows(0, tensor.rows)), found, self.hyper)

    def _find(self, row: TensorSpec, layer: int) -> tuple[TensorSpec, LazyTensor]:
        if row.tied_to and self.hyper.tied:  # transformers never looks at a head that is tied
            row = next(other for other in self.spec.tensors if other.hf == row.tied_to)
        held, tensor, _ = find_tensor(self.spec, row, layer, self.hyper, self.checkpoint.tensors)
        return held, self.checkpoint.tensor(self.spec.names(row, layer)[0]) if tensor is None else tensor

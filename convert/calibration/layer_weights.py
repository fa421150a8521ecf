"""A layer's tensors in the decoder's form, as exact as they are known, and the way back to the stored form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.arch.fused_rows import FUSED
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.convert.calibration.site import Coded
from quantpress.convert.checkpoint import DTYPES, Array, LazyTensor
from quantpress.convert.preflight import Preflight
from quantpress.convert.weights import as_torch, canonical

__all__ = ["LayerWeights", "ModelWeights"]

_ROWS = 4096  # rows of an embedding that are read at a time


class ModelWeights:
    """Finds a checkpoint's tensors by slot and layer; reads them in float32.

    Attributes:
        spec: the family.
        hyper: its sizes.
    """

    def __init__(self, checked: Preflight) -> None:
        """Reads nothing yet."""
        self.spec: ArchSpec = checked.spec
        self.hyper: Hyperparameters = checked.hyper
        self._found = {(row.slot, layer): (row, tensor) for row, layer, tensor in checked.bindings}

    def __call__(self, slot: str, layer: int) -> torch.Tensor | None:
        """Gives a tensor in the decoder's form, None where the model has none; see `weights.Weight`.

        Embeddings come in the type they are stored in, for of them only some rows are used; all others in float32.
        """
        found = self._found.get((slot, layer))
        if found is None:
            return None
        row, tensor = found
        values = canonical(as_torch(tensor.exact_rows(0, tensor.rows)), row, self.hyper)
        if row.role in (Role.EMBEDDING, Role.POSITION):
            return values
        # into memory of torch's own: products may differ in the last bit with the alignment of what they read
        return torch.empty(values.shape, dtype=torch.float32).copy_(values)

    def some_rows(self, slot: str, rows: NDArray[np.integer], instead: LazyTensor | None = None) -> torch.Tensor:
        """Gives some rows of an embedding in the type they are known in; reads part by part.

        Args:
            slot: of the embedding.
            rows: in rising order.
            instead: read in the place of the model's own.
        """
        tensor = instead or self._found[slot, -1][1]
        parts = []
        for start in range(0, tensor.rows, _ROWS):
            stop = min(start + _ROWS, tensor.rows)
            low, high = np.searchsorted(rows, (start, stop))
            if low < high:
                parts.append(tensor.exact_rows(start, stop)[rows[low:high] - start])
        return as_torch(np.concatenate(parts))

    def layer(self, layer: int, device: torch.device) -> LayerWeights:
        """Reads all tensors of a layer."""
        rows = {slot: pair for (slot, number), pair in self._found.items() if number == layer}
        values = {slot: self(slot, layer) for slot in rows}
        return LayerWeights(
            self.hyper,
            {slot: value.to(device) for slot, value in values.items() if value is not None},
            {slot: row for slot, (row, _) in rows.items()},
            {slot: tensor for slot, (_, tensor) in rows.items()},
        )


class LayerWeights:
    """The tensors of one layer.

    Attributes:
        values: slot -> float32 tensor in the decoder's form. Weights that are quantized are overwritten by what their
            codes stand for.
    """

    def __init__(
        self,
        hyper: Hyperparameters,
        values: dict[str, torch.Tensor],
        rows: Mapping[str, TensorSpec],
        tensors: Mapping[str, LazyTensor],
    ) -> None:
        """Takes what `ModelWeights.layer` found."""
        self.values = values
        self._hyper, self._rows, self._tensors = hyper, rows, tensors

    def copies(self, targets: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        """Gives the tensors as they are now; of those that `apply` will overwrite, copies."""
        return {slot: values.clone() if targets(self.name(slot)) else values for slot, values in self.values.items()}

    def narrow(self, slots: Iterable[str]) -> dict[str, torch.Tensor]:
        """Gives tensors as they are now, linear weights in bfloat16."""
        linear = {slot for slot, row in self._rows.items() if row.role is Role.LINEAR}
        return {slot: self.values[slot].to(torch.bfloat16) if slot in linear else self.values[slot] for slot in slots}

    def name(self, slot: str) -> str:
        """Gives the name in the checkpoint."""
        return self._tensors[slot].name

    def weight(self, slot: str) -> NDArray[np.float32]:
        """Gives (N, K) float32; shares memory with `values` where these are on the CPU."""
        array: NDArray[np.float32] = self.values[slot].cpu().numpy()
        return array

    def is_router(self, slot: str) -> bool:
        """Whether a tensor chooses experts."""
        return self._rows[slot].role is Role.ROUTER and slot.endswith(".weight")

    def plain(self) -> dict[str, Array]:
        """Gives the norms, biases and routers."""
        return {slot: self.weight(slot) for slot, row in self._rows.items() if row.role is not Role.LINEAR}

    def apply(self, quantized: Mapping[str, Coded], changed: Mapping[str, Array]) -> None:
        """Puts what codes stand for, and changed values, in the place of the tensors, so that later steps see them."""
        for slot, tensor in quantized.items():
            self.values[slot].copy_(torch.from_numpy(tensor.dequantize()))
        for slot, values in changed.items():
            self.values[slot].copy_(torch.from_numpy(np.asarray(values, np.float32)))

    def read_back(self, slot: str, values: Array) -> NDArray[np.float32]:
        """Gives what a tensor's values become when they are stored and read again.

        Args:
            slot: of a plain tensor.
            values: in the decoder's form.

        Returns:
            Rounded to the stored type, in the decoder's form.
        """
        row = self._rows[slot]
        stored = self._stored(slot, values).astype(np.float32)
        offset = np.float32(row.offset)
        return stored + offset if row.offset else stored

    def stored_codes(self, quantized: Mapping[str, Coded]) -> Iterator[tuple[str, Coded]]:
        """Gives names and codes or blocks (N, K), rows in the order of the checkpoint."""
        for slot, tensor in quantized.items():
            order = self._row_order(slot)
            yield self.name(slot), tensor if order is None else tensor.take_rows(order)

    def stored_plain(self, changed: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
        """Gives names and values as the checkpoint stores them."""
        for slot, values in changed.items():
            stored, order = self._stored(slot, values), self._row_order(slot)
            if order is not None:
                stored = stored[order]
            if self._rows[slot].layout is Layout.TRANSPOSED and stored.ndim == 2:
                stored = stored.T
            yield self.name(slot), np.ascontiguousarray(stored)

    def _stored(self, slot: str, values: Array) -> NDArray[Any]:
        wide = np.asarray(values, np.float32) - np.float32(self._rows[slot].offset)
        return wide.astype(DTYPES[self._tensors[slot].dtype])

    def _row_order(self, slot: str) -> NDArray[np.int64] | None:
        """Gives the decoder's row that each row of the checkpoint is; None where they are the same."""
        if self._rows[slot].layout not in FUSED:
            return None
        stored_rows = canonical(torch.arange(self.values[slot].shape[0]), self._rows[slot], self._hyper)
        return np.argsort(stored_rows.numpy())

"""Weights of a decoder: read when they are needed, and kept after their first use where that is wanted."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from quantpress.convert.linear import Linear
from quantpress.convert.weights import Weight
from quantpress.quant.errors import InputError

__all__ = ["KeptWeights", "Linears", "numbered", "times_rows"]

Linears = Callable[[str, int], "Linear | None"]
"""`(slot, layer)` -> what stands in the place of a weight, None where the weight itself is to be used."""

_HEAD_ROWS = 16384  # rows of the head that are converted at once, so that it never stands in memory twice


class KeptWeights:
    """Gives weights by slot and layer, in one type on one device.

    Attributes:
        resident: whether they are kept.
    """

    def __init__(
        self,
        weight: Weight,
        linears: Linears | None,
        *,
        float32: frozenset[str],
        device: torch.device,
        dtype: torch.dtype,
        resident: bool,
    ) -> None:
        """Reads nothing yet.

        Args:
            weight: gives a weight by slot and layer.
            linears: gives what stands in the place of one.
            float32: slots whose weights are float32 always.
            device: where they are to be.
            dtype: type of all others.
            resident: keep them.
        """
        self.resident = resident
        self._weight, self._linears = weight, linears
        self._float32, self._device, self._dtype = float32, device, dtype
        self._kept: dict[tuple[str, int], torch.Tensor | None] = {}
        self._kept_linears: dict[tuple[str, int], Linear | None] = {}

    def get(self, slot: str, layer: int) -> torch.Tensor | None:
        """Gives a weight, None where the model has none of that name."""
        if (slot, layer) in self._kept:
            return self._kept[slot, layer]
        weight = self._weight(slot, layer)
        if weight is not None:
            weight = weight.to(self._device, torch.float32 if slot in self._float32 else self._dtype)
        if self.resident:
            self._kept[slot, layer] = weight
        return weight

    def linear(self, slot: str, layer: int) -> Linear | None:
        """Gives what stands in the place of a weight, None where nothing does."""
        if self._linears is None:
            return None
        if (slot, layer) in self._kept_linears:
            return self._kept_linears[slot, layer]
        found = self._linears(slot, layer)
        if self.resident:
            self._kept_linears[slot, layer] = found
        return found

    def stored(self, slot: str, layer: int) -> torch.Tensor:
        """Gives an embedding or head: converted when it is kept, else as it is stored, to convert only what is used.

        Raises:
            InputError: there is none.
        """
        weight = self.get(slot, layer) if self.resident else self._weight(slot, layer)
        if weight is None:
            raise InputError(f"the model has no {slot}")
        return weight

    def forget(self, slot: str, layer: int) -> None:
        """Forgets a weight; it is read again if it is asked for."""
        self._kept.pop((slot, layer), None)
        self._kept_linears.pop((slot, layer), None)


def times_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Multiplies (..., K) by a head (V, K) that may be stored in another type or elsewhere: (..., V) float32."""
    if rows.dtype == hidden.dtype and rows.device == hidden.device:
        return F.linear(hidden, rows).float()
    logits = hidden.new_empty((*hidden.shape[:-1], rows.shape[0]), dtype=torch.float32)
    for low in range(0, rows.shape[0], _HEAD_ROWS):
        part = rows[low : low + _HEAD_ROWS].to(hidden.device, hidden.dtype)
        logits[..., low : low + _HEAD_ROWS] = F.linear(hidden, part)
    return logits


def numbered(device: torch.device) -> torch.device:
    """Gives "cuda" its number, as the tensors have it that are on it."""
    if device.type != "cuda" or device.index is not None or not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())

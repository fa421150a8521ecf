"""The form in which the kernels read a quantized matrix, and the plain unpacking that every kernel is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["PackedWeight", "check_order", "reference_codes", "reference_dequantize"]

_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False, slots=True)
class PackedWeight:
    """A matrix of N output rows and K input columns, `weight = scale * (code - zero)`, laid out for the kernels.

    Neighbours in memory are neighbours in N, so that a warp's loads are whole lines. `words` is the layout of GPTQ's
    `qweight`, read in place.

    Attributes:
        words: (ceil(K * bits / 32), N) int32; down each column one stream of bits, low bits first: code k of an output
            begins at bit k * bits. The bits past the last code are of no matter.
        scale: (G, N) float16, bfloat16 or float32.
        zero: (G, N) uint8, or None for symmetric codes, whose zero is 2^(bits - 1).
        order: (K,) int64, which input column each place along K holds; None where they stand in their own order.
        columns: K.
        bits: 2, 3, 4 or 8.
        group_size: places along K that share a scale, 1 to K; the last group may be shorter.
    """

    words: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    order: torch.Tensor | None
    columns: int
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        """Checks shapes, types and devices; reads no values.

        Raises:
            ValueError: something does not fit.
        """
        if self.bits not in (2, 3, 4, 8) or self.columns < 1 or not 1 <= self.group_size <= self.columns:
            raise ValueError(f"{self.bits} bits, {self.columns} columns in groups of {self.group_size}")
        rows = self.scale.shape[-1]
        wanted: list[tuple[str, torch.Tensor | None, tuple[torch.dtype, ...], tuple[int, ...]]] = [
            ("words", self.words, (torch.int32,), (-(-self.columns * self.bits // 32), rows)),
            ("scale", self.scale, _SCALES, (self.groups, rows)),
            ("zero", self.zero, (torch.uint8,), (self.groups, rows)),
            ("order", self.order, (torch.int64,), (self.columns,)),
        ]
        for name, tensor, dtypes, shape in wanted:
            if tensor is None:
                continue
            found: tuple[Any, ...] = (tensor.dtype, tuple(tensor.shape), tensor.device)
            if tensor.dtype not in dtypes or found[1:] != (shape, self.words.device):
                raise ValueError(f"{name} is {found}, wanted {(dtypes, shape, self.words.device)}")
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has gaps between its elements")

    @property
    def rows(self) -> int:
        """N, the outputs."""
        return int(self.scale.shape[1])

    @property
    def groups(self) -> int:
        """G, groups along K."""
        return -(-self.columns // self.group_size)

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads of the weight."""
        parts = (self.words, self.scale, self.zero, self.order)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def to(self, device: str | torch.device) -> PackedWeight:
        """Gives the same weight on a device."""
        parts = (self.words, self.scale, self.zero, self.order)
        words, scale, zero, order = (None if part is None else part.to(device) for part in parts)
        assert words is not None
        assert scale is not None
        return replace(self, words=words, scale=scale, zero=zero, order=order)


def check_order(weight: PackedWeight) -> None:
    """Checks that the places along K hold columns that exist; reads `order`, so it waits for the device.

    Raises:
        ValueError: they do not.
    """
    if weight.order is None:
        return
    low, high = int(weight.order.min()), int(weight.order.max())
    if low < 0 or high >= weight.columns:
        raise ValueError(f"order goes from {low} to {high}, wanted 0 to {weight.columns - 1}")


def reference_codes(weight: PackedWeight, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Unpacks the codes of outputs [start, stop): (K, n) uint8, places along K in the order they are stored."""
    words = weight.words[:, start:stop].to(torch.int64) & 0xFFFFFFFF
    first = torch.arange(weight.columns, device=words.device) * weight.bits
    low = words[first // 32] >> (first % 32)[:, None]
    above = words[(first // 32 + 1).clamp(max=len(words) - 1)]  # a code of 3 bits may end in the next word
    codes = low | above << (32 - first % 32)[:, None]
    return (codes & ((1 << weight.bits) - 1)).to(torch.uint8)


def reference_dequantize(
    weight: PackedWeight, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Gives outputs [start, stop) as a dense (n, K) matrix with the input columns in their own order.

    The product of scale and code - zero is computed in float64 for float64, else in float32, and rounded to `dtype`.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    group = torch.arange(weight.columns, device=weight.words.device) // weight.group_size
    codes = reference_codes(weight, start, stop).to(wide)
    middle = 1 << (weight.bits - 1) if weight.zero is None else weight.zero[:, start:stop][group].to(wide)
    values = ((codes - middle) * weight.scale[:, start:stop][group].to(wide)).to(dtype)
    if weight.order is None:
        return values.T.contiguous()
    placed = torch.empty_like(values)
    placed[weight.order] = values
    return placed.T.contiguous()

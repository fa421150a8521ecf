"""Random matrices in 4-bit levels, the formula in float64 and its bounds, shared by tests on processors and on GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quantpress.quant.bitsandbytes_levels import LEVELS

HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The greatest relative error of a rounding; for bfloat16 of a truncation, which Triton's interpreter does."""


@dataclass(frozen=True)
class Case:
    """A product: input, matrix, bias; the tensors lie between values that are not numbers."""

    x: torch.Tensor
    packed: torch.Tensor
    absmax: torch.Tensor
    levels: torch.Tensor
    bias: torch.Tensor | None
    rows: int
    columns: int
    blocksize: int

    @property
    def weight(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int, int]:
        """What the functions take of the matrix."""
        return self.packed, self.absmax, self.levels, self.rows, self.columns, self.blocksize

    def poison(self) -> torch.Tensor:
        """An output that was not written yet."""
        return torch.full((len(self.x), self.rows), torch.nan, dtype=self.x.dtype, device=self.x.device)


def case(
    rows_in: int, rows: int, columns: int, blocksize: int, dtype: torch.dtype, *, bias: bool = False,
    kind: str = "nf4", device: str = "cpu",
) -> Case:  # fmt: skip
    """A product of random values; every code comes up where there is room."""
    random = np.random.default_rng([rows_in, rows, columns, blocksize])
    size = rows * columns
    packed = random.integers(0, 256, (size + 1) // 2, dtype=np.uint8)
    absmax = random.uniform(0.01, 0.2, -(-size // blocksize)).astype(np.float32)
    x = torch.from_numpy(random.standard_normal((rows_in, columns))).to(device, dtype)
    added = torch.from_numpy(random.standard_normal(rows)).to(device, dtype) if bias else None
    return Case(
        x=between(x, torch.nan),
        packed=between(torch.from_numpy(packed).to(device), 0xAA),
        absmax=between(torch.from_numpy(absmax).to(device), torch.nan),
        levels=torch.from_numpy(LEVELS[kind].copy()).to(device),
        bias=added,
        rows=rows,
        columns=columns,
        blocksize=blocksize,
    )


def between(values: torch.Tensor, poison: float) -> torch.Tensor:
    """Puts a tensor between 64 elements of poison: who reads beyond it finds them in the result."""
    room = torch.full((values.numel() + 128,), poison, dtype=values.dtype, device=values.device)
    inner = room[64 : 64 + values.numel()].view(values.shape)
    inner.copy_(values)
    return inner


def dense(one: Case, rounding: torch.dtype | None = None) -> np.ndarray:
    """The matrix by its definition: two codes a byte, the first in the high half; level * absmax in float64.

    With a rounding: the product rounded to float32, then to that type, as bitsandbytes does.
    """
    packed = one.packed.cpu().numpy()
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: one.rows * one.columns]
    wide = np.float64 if rounding is None else np.float32
    scale = np.repeat(one.absmax.cpu().numpy().astype(wide), one.blocksize)[: codes.size]
    values = one.levels.cpu().numpy().astype(wide)[codes] * scale
    if rounding is not None:
        values = torch.from_numpy(values).to(rounding).double().numpy()
    return values.reshape(one.rows, one.columns).astype(np.float64)


def check(found: torch.Tensor, one: Case, rounding: torch.dtype | None, *, weights: float = 0.0) -> None:
    """Compares with the product in float64.

    Each product and each of K + 1 additions in float32 is off by 2^-24 of sum |x w| at most, the scale and the order of
    additions by no more than another few; the result is rounded once. `weights` is the relative rounding of weights.
    """
    matrix, x = dense(one, rounding), one.x.cpu().double().numpy()
    added = 0.0 if one.bias is None else one.bias.cpu().double().numpy()
    wanted, total = x @ matrix.T + added, np.abs(x) @ np.abs(matrix).T + np.abs(added)
    bound = total * ((one.columns + 8) * 2.0**-24 + weights) + np.abs(wanted) * HALF_STEP[one.x.dtype] + 1e-30
    difference = np.abs(found.cpu().double().numpy() - wanted)
    assert (difference <= bound).all(), f"off by {np.nanmax(difference / bound)} of the bound"

"""Inputs and formulas for the int8 kernels, shared by the tests in the interpreter and on a GPU."""

from __future__ import annotations

import numpy as np
import torch

from quantpress.kernels.launch import Launch

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
LAUNCHES = [
    Launch("tiled", 16, 32, 32, 1, 4, 1),
    Launch("tiled", 16, 64, 64, 3, 4, 2),
    Launch("tiled", 32, 16, 128, 8, 2, 3),
    Launch("tiled", 64, 128, 32, 2, 4, 2),
]


def inputs(rows_in: int, columns: int, dtype: torch.dtype, *, spread: float = 1.0) -> torch.Tensor:
    """Rows of very different sizes; one of zeros, one with its greatest magnitude below 0."""
    random = torch.Generator().manual_seed(rows_in * 1000 + columns)
    x = torch.randn(rows_in, columns, generator=random) * spread
    if rows_in > 2:
        x[1] = 0
        x[2] = -x[2].abs() * 0.01
    return x.to(dtype)


def weights(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of the whole range, scales and bias."""
    random = torch.Generator().manual_seed(rows * 1000 + columns)
    codes = torch.randint(-128, 128, (rows, columns), generator=random, dtype=torch.int8)
    return codes, torch.rand(rows, generator=random) * 0.01 + 0.001, torch.randn(rows, generator=random)


def product(
    codes: torch.Tensor, token_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The formula in numpy: sums in int64, then float32 from left to right, one rounding to `dtype` at the end."""
    sums = codes.cpu().numpy().astype(np.int64) @ weight.cpu().numpy().astype(np.int64).T
    values = sums.astype(np.float32) * token_scale.cpu().numpy()[:, None]
    values = values * scale.float().cpu().numpy()
    if bias is not None:
        values = values + bias.float().cpu().numpy()
    assert values.dtype == np.float32
    return torch.from_numpy(values).to(dtype)


def poisoned(rows_in: int, rows: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """An output that shows what is not written."""
    return torch.full((rows_in, rows), torch.nan, dtype=dtype, device=device)

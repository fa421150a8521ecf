"""Matrices to round to nearest, and the grids, shared by tests on processors and on GPUs."""

from __future__ import annotations

import numpy as np
import torch

SCALE_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def matrix(rows: int, columns: int, dtype: torch.dtype, *, device: str = "cpu") -> torch.Tensor:
    """Weights with heavy tails, a row of zeros, negative zeros, ties of magnitude, and a row of very small numbers."""
    random = np.random.default_rng([rows, columns])
    weight = (random.standard_t(5, (rows, columns)) * 0.05).astype(np.float32)
    if rows > 3:
        weight[0] = 0
        weight[1, ::3] = -0.0
        weight[2] = random.choice([-0.25, 0.25], columns)
        weight[3] *= 10.0 ** random.integers(-40, -4, columns)
    return torch.from_numpy(weight).to(device, dtype)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """The bits of floating-point numbers: zeros differ by their sign."""
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)

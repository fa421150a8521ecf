"""Runs of GPTQ on a device, shared by the tests on the processor and on a GPU; as a script they are interpreted.

TRITON_INTERPRET=1 python gptq_cuda_cases.py OUT.npz
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from quantpress.quant.gptq import GptqOptions, GptqReport
from quantpress.quant.gptq_cuda import gptq_on_device
from quantpress.quant.grid import Grid
from quantpress.quant.qtensor import QuantizedTensor

INTERPRETED = (2, 150, Grid(4, 32, symmetric=False), GptqOptions())  # two blocks, the second one shorter


def layer(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights and the Hessian, per token, of inputs that are correlated and of very different sizes."""
    rng = np.random.default_rng([rows, columns, seed])
    weight = (rng.standard_t(5, (rows, columns)) * 0.02).astype(np.float32)
    mixing = np.eye(columns) + 0.3 * rng.standard_normal((columns, columns)) / np.sqrt(columns)
    inputs = (rng.standard_normal((4 * columns, columns)) * rng.gamma(1, 1, columns)) @ mixing
    return weight, (inputs.T @ inputs / len(inputs)).astype(np.float32)


def run(
    weight: np.ndarray, hessian: np.ndarray, grid: Grid, options: GptqOptions, device: str, *, threads: int = 1
) -> tuple[QuantizedTensor, GptqReport]:
    """GPTQ of numpy arrays on a device."""
    moved = [torch.from_numpy(values).to(device) for values in (weight, hessian)]
    return gptq_on_device(moved[0], moved[1], grid, options, threads=threads)


if __name__ == "__main__":
    rows, columns, grid, options = INTERPRETED
    quantized, report = run(*layer(rows, columns), grid, options, "cpu")
    np.savez(sys.argv[1], codes=quantized.codes, zero=quantized.zeros(), scale=quantized.scale, loss=report.loss)

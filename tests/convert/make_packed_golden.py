"""Makes packed_golden.json with the packers of AutoGPTQ and AutoAWQ; run where both are unpacked and torch is there.

    python make_packed_golden.py AUTO_GPTQ_FOLDER AUTO_AWQ_FOLDER > packed_golden.json

The folders hold `auto_gptq` (wheel 0.7.1) and `awq` (sdist 0.2.9). Only the files that pack are imported.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS, COLUMNS, GROUP = 32, 64, 32


def values(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes (N, K), scales (N, G) that float16 holds, zeros (N, G) from 1 on: numbers that a formula gives."""
    row, column = np.arange(ROWS)[:, None], np.arange(COLUMNS)[None]
    codes = (row * 5 + column * 3 + row * column // 7) % (1 << bits)
    group = np.arange(COLUMNS // GROUP)[None]
    scales = (1 + (row * 3 + group * 5) % 8) / 256
    zeros = 1 + (row * 7 + group * 3) % ((1 << bits) - 1)
    return codes, scales, zeros


def _linear(bits: int) -> tuple[Any, Any, Any]:
    codes, scales, zeros = values(bits)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    weight = scales.repeat(GROUP, 1) * (codes - zeros.repeat(GROUP, 1))
    linear.weight.data = torch.tensor(weight, dtype=torch.float32)
    return linear, torch.tensor(scales, dtype=torch.float32), torch.tensor(zeros, dtype=torch.float32)


def _package(name: str, folder: Path) -> None:
    """Makes the files of a package importable without running its `__init__`."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


def main(gptq: Path, awq: Path) -> None:
    """Writes the JSON to stdout."""
    for name in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        _package(name, gptq / name.replace(".", "/"))
    for name in ("awq", "awq.utils", "awq.modules"):
        _package(name, awq / name.replace(".", "/"))
    found: dict[str, dict[str, Any]] = {}
    quant_linear = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda_old").QuantLinear
    for bits in (2, 3, 4, 8):
        linear, scales, zeros = _linear(bits)
        module = quant_linear(bits, GROUP, COLUMNS, ROWS, False, weight_dtype=torch.float32)
        module.pack(linear, scales, zeros, None)
        found[f"gptq-{bits}"] = {key: getattr(module, key).tolist() for key in ("qweight", "qzeros", "g_idx")}
    linear, scales, zeros = _linear(4)
    packed = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
    )
    found["awq-4"] = {key: getattr(packed, key).tolist() for key in ("qweight", "qzeros")}
    json.dump(found, sys.stdout, separators=(",", ":"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

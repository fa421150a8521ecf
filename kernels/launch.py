"""What a product of quantized matrices looks like to the tuner, and how a kernel is launched for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["BUCKETS", "Launch", "Problem", "bucket", "check_device", "processors"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of input rows that are tuned one by one; a number between two is run as the greater."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One product, as far as a choice of launch parameters depends on it.

    Attributes:
        rows_in: M, rows of the input.
        rows: N, outputs.
        columns: K, inputs.
        bits: of a code.
        group_size: columns that share a scale.
        dtype: "float16", "bfloat16" or "float32", of input and output.
        symmetric: whether there are no zeros.
        kind: "packed" (`PackedWeight`), "w8a8", "nf4".
    """

    rows_in: int
    rows: int
    columns: int
    bits: int
    group_size: int
    dtype: str
    symmetric: bool = True
    kind: str = "packed"


@dataclass(frozen=True, slots=True)
class Launch:
    """How a product is computed.

    Attributes:
        kernel: "gemv", "tiled", or "dense" (dequantize, then cuBLAS).
        block_m: input rows of a program (tiled).
        block_n: outputs of a program.
        block_k: places along K that a program takes at a time.
        split_k: programs that share the places along K of one block of outputs.
        warps: of 32 threads, of a program.
        stages: tiles along K that are under way at once.
    """

    kernel: str
    block_m: int = 16
    block_n: int = 64
    block_k: int = 64
    split_k: int = 1
    warps: int = 4
    stages: int = 3


def bucket(rows_in: int) -> int:
    """Gives the bucket that a number of input rows is tuned in."""
    return next((size for size in BUCKETS if rows_in <= size), BUCKETS[-1])


def check_device(kernel: Any, *tensors: torch.Tensor | None) -> None:
    """Checks that a kernel can run where the tensors are.

    Raises:
        ValueError: they are on several devices, or not on a CUDA device (and the kernel is not interpreted).
    """
    from triton.runtime.interpreter import InterpretedFunction  # what describes a launch needs no triton

    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        raise ValueError(f"tensors are on {', '.join(sorted(map(str, devices)))}: wanted one device")
    if devices.pop().type != "cuda" and not isinstance(kernel, InterpretedFunction):
        raise ValueError("the kernel runs on CUDA devices; on others set TRITON_INTERPRET=1 before it is imported")


def processors(device: torch.device) -> int:
    """Gives the multiprocessors of a device; 132 (of an H100 or H200) where there is none."""
    if device.type != "cuda":
        return int(os.environ.get("QUANTPRESS_PROCESSORS", "132"))
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

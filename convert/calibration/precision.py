"""How exactly the products of a calibration are computed: float32, or inputs rounded to bfloat16 with float32 sums.

Processors with matrix units multiply bfloat16 several times as fast. With "bf16" linears and attention run in bfloat16,
as the model itself would where it is served, on a residual in float32. In the Hessian X^T X inputs are rounded to
bfloat16, by at most 2^-9 of themselves: these errors are independent of the inputs and add at most 2^-18 / 3 of its own
value to a diagonal element, far below GPTQ's damping. Its sums are float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["PRECISIONS", "native_precision", "products"]

PRECISIONS = ("f32", "bf16")


def native_precision(device: str) -> str:
    """Gives "bf16" where the processor has units for products of bfloat16 and torch can be told to use them."""
    usable = device == "cpu" and _switch() is not None
    found = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return "bf16" if usable and found is not None and found() else "f32"


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Computes products of float32 matrices in the block with a precision, on all threads of the process.

    Args:
        precision: one of `PRECISIONS`; "bf16" changes nothing where torch cannot be told.
    """
    switch = _switch()
    if switch is None or precision == "f32":
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before


def _switch() -> Any:
    """Gives torch's setting for products on the processor; torch before 2.9 has none."""
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    return switch if hasattr(switch, "fp32_precision") else None

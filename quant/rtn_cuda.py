"""Rounding to nearest on a GPU: the bytes of `quantpress.quant.grid.round_to_nearest` for matrices that lie there.

On tensors that are not on a GPU the kernels' plain reference does the same. Not run on hardware yet: the kernels have
been interpreted and compiled (see `quantpress.kernels.rtn`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantpress.quant.errors import LayoutError, OutputError, UsageError
from quantpress.quant.grid import SCALE_TYPES, Grid
from quantpress.quant.qtensor import QuantizedTensor

if TYPE_CHECKING:
    import torch  # at run time it is loaded by the first call: importing this module stays cheap

    from quantpress.kernels.packed import PackedWeight

__all__ = ["packed_on_device", "round_to_nearest_on_device"]


def round_to_nearest_on_device(weight: torch.Tensor, grid: Grid) -> QuantizedTensor:
    """Quantizes a matrix where it lies and brings the codes to the processor.

    Args:
        weight: (N, K) float16, bfloat16 or float32, finite; worked on as float32.
        grid: what kind of grid, without a clip search.

    Raises:
        LayoutError: a scale that the stored type cannot hold, or no weights.
        OutputError: triton is not installed.
        UsageError: the grid asks for a clip search.
    """
    _check(weight, grid)
    try:
        from quantpress.kernels.rtn import reference_rtn, rtn_codes
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    inner = rtn_codes if weight.is_cuda else reference_rtn
    size = grid.group(weight.shape[1])
    codes, scale, zero = inner(
        weight.contiguous(), bits=grid.bits, group_size=size, symmetric=grid.symmetric, scale_type=_scale_type(grid)
    )
    _check_range(scale, scale.to(_scale_type(grid)), zero, grid)
    stored = np.ascontiguousarray(scale.T.cpu().numpy().astype(SCALE_TYPES[grid.scale_type]))
    zeros = None if zero is None else np.ascontiguousarray(zero.T.cpu().numpy())
    return QuantizedTensor(codes.cpu().numpy(), stored, zeros, grid.bits, size)


def packed_on_device(weight: torch.Tensor, grid: Grid) -> PackedWeight:
    """Quantizes a matrix on a GPU into the form that the products read; nothing leaves the device.

    Args:
        weight: (N, K) float16, bfloat16 or float32 on a GPU, finite.
        grid: what kind of grid, without a clip search.

    Raises:
        LayoutError: a scale that the stored type cannot hold, or no weights.
        OutputError: triton is not installed.
        UsageError: the grid asks for a clip search.
        ValueError: the matrix is not on a GPU.
    """
    _check(weight, grid)
    try:
        from quantpress.kernels.rtn import rtn
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    size = grid.group(weight.shape[1])
    packed = rtn(
        weight.contiguous(), bits=grid.bits, group_size=size, symmetric=grid.symmetric, scale_type=_scale_type(grid)
    )
    _check_range(packed.scale, packed.scale, packed.zero, grid)
    return packed


def _scale_type(grid: Grid) -> torch.dtype:
    import torch

    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[grid.scale_type]


def _check(weight: torch.Tensor, grid: Grid) -> None:
    if not weight.numel():
        raise LayoutError("a matrix that has no weights cannot be quantized")
    if grid.clip_search:
        raise UsageError("the clip search runs on the processor only: use quantpress.quant.grid.round_to_nearest")


def _check_range(scale: torch.Tensor, stored: torch.Tensor, zero: torch.Tensor | None, grid: Grid) -> None:
    import torch

    if not bool(torch.isfinite(stored).all()):
        raise LayoutError(f"scales up to {float(scale.abs().max()):.3g} are too large for {grid.scale_type}")
    steps = float(1 << (grid.bits - 1))
    top = float((1 << grid.bits) - 1)
    farthest = stored.double().abs() * (steps if zero is None else torch.maximum(zero.double(), top - zero.double()))
    if float(farthest.max()) > torch.finfo(torch.float32).max:
        raise LayoutError(f"values of codes up to {float(farthest.max()):.3g} are too large for float32")


def _missing(error: ModuleNotFoundError) -> OutputError:
    return OutputError(f"rounding on a GPU needs {error.name}: pip install 'quantpress[gpu]', or use --device cpu")

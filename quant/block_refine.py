"""Refines quantized blocks: codes and scales move, one after another, to where the outputs' error is least.

GPTQ decides each code once, without knowing what the columns after it will make of the errors. Here every code is
looked at again with all others in their places, as in Behdin et al., "QuantEase" (arXiv 2309.01885); before that, the
steps and offsets of its group move to the multiples of the block's units that cost least with these codes (a quadratic
function of both). No move makes the cost greater, tr((Q - W) H (Q - W)^T) with the damped Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.ggml.block_parts import BLOCK_GRIDS, BlockGrid, codes_of, parts, with_codes
from quantpress.quant.ggml.block_scales import SCALE_RANGES, units, with_scale_codes
from quantpress.quant.ggml.codec import dequantize
from quantpress.quant.ggml.types import ggml_type
from quantpress.quant.workers import chunks

if TYPE_CHECKING:
    import torch  # at run time it is loaded by the first call: importing this module stays cheap

__all__ = ["LANES", "SWEEPS", "refined"]

Array = NDArray[Any]

LANES = 128
"""Rows that lie side by side in the inner loops."""

SWEEPS = 4
"""Rounds over all columns; Q2_K's loss falls by 30, 9, 3 and 2 % in them, Q4_K's by 8, 2, 1 and 0.4 %."""

_COLUMNS = 64  # whose gradients are computed together: whole groups of every type


@dataclass(frozen=True, eq=False, slots=True)
class _Lanes:
    """Rows of a matrix side by side, columns in their own order.

    Attributes:
        error: (K, lanes) float32, quantized minus wanted.
        codes: (K, lanes) uint8.
        scales: (G, 2, lanes) float32 steps and offsets.
        unit: (G, 2, lanes) float32 what they are multiples of; 0 where they are to stay.
    """

    error: torch.Tensor
    codes: Array
    scales: Array
    unit: Array


def refined(
    wanted: NDArray[np.float32], data: NDArray[np.uint8], metric: torch.Tensor, added: float, kind: str, sweeps: int
) -> NDArray[np.uint8]:
    """Refines the blocks of some rows; on one thread.

    Args:
        wanted: (n, K) float32 weights, n <= `LANES`.
        data: (n, row bytes) uint8 their blocks; not changed.
        metric: (K, K) float32 Hessian.
        added: to its diagonal.
        kind: name of the type.
        sweeps: rounds over all columns.

    Returns:
        (n, row bytes) uint8.
    """
    lanes = _side_by_side(wanted, data, kind)
    for _ in range(sweeps):
        for part in chunks(wanted.shape[1], _COLUMNS):
            _sweep(lanes, part, metric, np.float32(added), BLOCK_GRIDS[kind], SCALE_RANGES.get(kind))
    return _stored(lanes, data, kind)


def _side_by_side(wanted: NDArray[np.float32], data: NDArray[np.uint8], kind: str) -> _Lanes:
    import torch

    rows, columns = wanted.shape
    step, offset, group = parts(kind, data)
    lanes = _Lanes(
        torch.zeros((columns, LANES)),  # always as many: each row takes the same path, wherever it stands
        np.zeros((columns, LANES), np.uint8),
        *np.zeros((2, columns // group, 2, LANES), np.float32),
    )
    lanes.error.numpy()[:, :rows] = (dequantize(kind, data, columns) - wanted).T
    lanes.codes[:, :rows] = codes_of(kind, data).T
    lanes.scales[:, 0, :rows], lanes.scales[:, 1, :rows] = step.T, offset.T
    if kind in SCALE_RANGES:
        found, per_block = units(kind, data), ggml_type(kind).block_size // group
        lanes.unit[:, 0, :rows] = np.repeat(found.step, per_block, axis=1).T
        lanes.unit[:, 1, :rows] = np.repeat(found.offset, per_block, axis=1).T
    return lanes


def _sweep(
    lanes: _Lanes, part: slice, metric: torch.Tensor, added: np.float32, grid: BlockGrid, limits: tuple[int, int] | None
) -> None:
    """Moves scales and codes of some whole groups."""
    from quantpress.quant.block_gptq_kernels import refine_columns, refit_group

    gradient = metric[part] @ lanes.error
    error, codes = lanes.error.numpy()[part], lanes.codes[part]
    gradient += float(added) * lanes.error[part]
    own = metric.numpy()[part, part] + added * np.eye(len(error), dtype=np.float32)
    first = part.start // grid.group
    groups = slice(first, first + len(error) // grid.group)
    if limits is not None:
        for place, (scales, unit) in enumerate(zip(lanes.scales[groups], lanes.unit[groups], strict=True)):
            refit_group(
                error, gradient.numpy(), own, grid.levels, codes, scales, unit, place * grid.group, grid.group, limits,
                grid.affine,
            )  # fmt: skip
    refine_columns(
        error, gradient.numpy(), own, lanes.scales[groups, 0], lanes.scales[groups, 1], grid.levels, codes, grid.group,
        grid.even,
    )  # fmt: skip


def _stored(lanes: _Lanes, data: NDArray[np.uint8], kind: str) -> NDArray[np.uint8]:
    rows = len(data)
    moved = with_codes(kind, data, np.ascontiguousarray(lanes.codes[:, :rows].T))
    if kind not in SCALE_RANGES:
        return moved
    divisor = np.where(lanes.unit == 0, np.float32(1), lanes.unit)
    multiples = np.rint(np.where(lanes.unit == 0, np.float32(0), lanes.scales) / divisor)[:, :, :rows]
    return with_scale_codes(kind, moved, multiples[:, 0].T.astype(np.int16), (-multiples[:, 1].T).astype(np.int16))

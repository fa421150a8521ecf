"""Codes of a quantized matrix as blocks of ggml, without rounding: what a block type holds exactly, nothing else.

With `step = code - zero`, a weight is `scale * step`. The types of 32 weights hold (layouts.py):

    Q4_0   scale and step + 8, step in [-8, 7]       Q8_0   scale and step, step in [-128, 127]
    Q5_0   scale and step + 16, step in [-16, 15]    Q4_1   scale, minimum = -scale * zero, and code in [0, 15]

The scale, and Q4_1's minimum, must be float16 numbers. A reader computes scale * step, or scale * code + minimum, in
float32, where both are exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import to_float32
from quantpress.quant.ggml import layouts
from quantpress.quant.ggml.layouts import BLOCK
from quantpress.quant.ggml.workspace import Workspace
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor

__all__ = ["FROM_CODES", "blocks_of", "holds"]

FROM_CODES = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
"""Types that codes can be written as."""

_HALF = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}


def holds(type_name: str, form: QuantizedForm) -> bool:
    """Whether a type holds every matrix of this form, whatever its codes, if its scales are float16 numbers.

    Q4_1's minimum may be beyond float16 all the same, where a scale is.
    """
    fits = form.shape[1] % BLOCK == 0 and (form.per_row or form.group_size % BLOCK == 0) and not form.ordered
    if not fits or type_name not in FROM_CODES:
        return False
    if type_name == "Q4_1":
        return form.symmetric and form.bits <= 4
    greatest = 1 << (form.bits - 1) if form.symmetric else 1 << form.bits  # steps are in [-greatest, greatest)
    return greatest <= _HALF[type_name]


def blocks_of(tensor: QuantizedTensor, type_name: str) -> NDArray[np.uint8]:
    """Gives the rows of a matrix in blocks of 32 weights, every weight exactly as it is.

    Args:
        tensor: N rows of K columns, K and the group size multiples of 32 (or one group per row).
        type_name: one of `FROM_CODES`.

    Returns:
        (N, row bytes) uint8.

    Raises:
        LayoutError: the type cannot hold a weight or a scale exactly.
    """
    _check_form(tensor, type_name)
    blocks = tensor.columns // BLOCK
    scale = _per_block(_float16(tensor.scale, "scale", type_name), tensor, blocks)
    zero = _per_block(tensor.zeros(), tensor, blocks)
    codes = np.ascontiguousarray(tensor.codes).reshape(-1, BLOCK)
    out = np.empty((len(codes), _LAYOUTS[type_name].itemsize), np.uint8)
    block: Any = out.reshape(-1).view(_LAYOUTS[type_name])
    block["scale"] = scale
    work = Workspace(len(codes))
    if type_name == "Q4_1":
        minimum = -tensor.scale.astype(np.float32) * tensor.zeros().astype(np.float32)
        block["minimum"] = _per_block(_float16(minimum, "minimum", type_name), tensor, blocks)
        _check_range(tensor.codes, 0, 15, type_name)
        work.codes[:] = codes
    else:
        _fill_steps(codes, zero, work, type_name)
    _store_codes(block, work, type_name)
    return out.reshape(tensor.rows, -1)


_LAYOUTS = {"Q4_0": layouts.Q4_0, "Q4_1": layouts.Q4_1, "Q5_0": layouts.Q5_0, "Q8_0": layouts.Q8_0}


def _check_form(tensor: QuantizedTensor, type_name: str) -> None:
    if type_name not in FROM_CODES:
        raise LayoutError(f"{type_name} holds no codes of affine quantization; {', '.join(FROM_CODES)} do")
    if tensor.g_idx is not None:
        raise LayoutError(f"{type_name} needs columns in the order of their groups; these have an order of their own")
    if tensor.columns % BLOCK or (tensor.groups > 1 and tensor.group_size % BLOCK):
        raise LayoutError(
            f"{type_name} has blocks of {BLOCK} weights; {tensor.columns} columns in groups of {tensor.group_size} do"
            " not divide into them"
        )


def _float16(values: NDArray[Any], what: str, type_name: str) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    if not np.isfinite(half).all() or not np.array_equal(to_float32(half), to_float32(values)):
        raise LayoutError(f"{type_name} keeps its {what} as float16, which cannot hold all of these exactly")
    return half


def _per_block(values: NDArray[Any], tensor: QuantizedTensor, blocks: int) -> NDArray[Any]:
    """Gives (N * blocks,) of (N, G): the value of the group that each block lies in."""
    group_of_block = np.arange(blocks) * BLOCK // tensor.group_size
    return np.ascontiguousarray(values[:, group_of_block]).reshape(-1)


def _fill_steps(codes: NDArray[np.uint8], zero: NDArray[np.uint8], work: Workspace, type_name: str) -> None:
    """Writes step + half of each weight as uint8 into `work.codes`; Q8_0's are steps as int8."""
    half = _HALF[type_name]
    steps = codes.astype(np.int16)
    steps -= zero.astype(np.int16)[:, None]
    _check_range(steps, -half, half - 1, type_name)
    if type_name != "Q8_0":
        steps += half
    np.copyto(work.codes, steps.astype(np.int8).view(np.uint8))


def _check_range(values: NDArray[Any], least: int, greatest: int, type_name: str) -> None:
    if values.size and not least <= int(values.min()) <= int(values.max()) <= greatest:
        raise LayoutError(
            f"{type_name} holds codes from {least} to {greatest}, these go from {values.min()} to {values.max()}"
        )


def _store_codes(block: Any, work: Workspace, type_name: str) -> None:
    if type_name == "Q8_0":
        block["codes"] = work.codes.reshape(-1).view("V32")
        return
    if type_name == "Q5_0":
        block["high"] = np.packbits(work.codes.reshape(-1) >> 4, bitorder="little").view("<u4")
        work.codes &= 15
    work.pack_nibbles(block["codes"])

"""libggml's search for K-quants on a GPU: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K, with and without importance.

The bytes are libggml's, not only as good as its: what it computes is a few thousand dependent float32 operations for
each sub-block of 16 or 32 weights, with comparisons whose outcome an order of additions can change. So a lane takes a
sub-block, keeps it in registers and adds from the first weight to the last, as the C code does; multiply-adds are not
fused (the library is built for processors without them), quotients and roots are rounded correctly.

Three launches, four with importance: mean squares of super-blocks, sub-blocks (nearly all the work), super-blocks,
codes. Between them go 20 bytes for each sub-block.

Machine code for sm_90 (Triton 3.9; 3.6 within ten registers): the search reads a sub-block with loads of 16 bytes and
keeps weights, importance and codes in 127 registers (Q4_K and Q5_K) or 64 to 103 (sub-blocks of 16), no stack and no
shared memory, so 16 or more warps fit a multiprocessor. A scale that is tried takes 21 instructions for each weight
(Q2_K 22 or 23, Q6_K and Q3_K with importance 13), which is what the C code's operations come to, and 16 to 37 scales
are tried: for Q4_K about 435 instructions for each weight, 770 with importance, for Q6_K 240; packing takes 50 more.
At one instruction for each lane and clock that would be some 65e9 weights a second for Q4_K on 132 multiprocessors at
1.98 GHz. These are figures of the compiler and arithmetic. The kernels have run in Triton's interpreter and were
compiled for sm_80 and sm_90; they have not been run or timed on hardware yet.

Where bytes may differ from libggml's: weights that are not finite, or so great (1e15 and more) that sums of squares
overflow and a step becomes NaN; and sub-blocks whose fitted minimum comes so close to their greatest weight that a
quotient passes 2^22, where the C code reads rounding bits of another meaning. No test has met the latter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from quantpress.kernels.kquants.blocks import mean_squares, search_minimum, search_q3, search_scale
from quantpress.kernels.kquants.codes import FROM_ONE, FROM_TWO, FROM_WORDS, pack_codes
from quantpress.kernels.kquants.super_blocks import scales_with_minimum, signed_scales
from quantpress.kernels.kquants.types import KQUANTS, SUPER, KQuant
from quantpress.kernels.launch import check_device

__all__ = ["quantize"]

_SUB_BLOCKS = 1 << 24  # that are under way at once: 20 bytes each, and offsets within them stay below 2^31
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def quantize(
    values: torch.Tensor,
    name: str,
    importance: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    block: int = 128,
) -> torch.Tensor:
    """Quantizes rows of weights, to the bytes that ggml_quantize_chunk gives.

    Args:
        values: (N, K) float32, float16 or bfloat16, contiguous, finite; K a multiple of 256.
        name: of a type in `KQUANTS`.
        importance: (K,) float32, contiguous, not negative; or None.
        out: (N, K / 256 * bytes of a block) uint8, contiguous, to be filled.
        block: sub-blocks of a program, a power of two from 32 on; each is a thread.

    Returns:
        `out`, or a new tensor of that shape.

    Raises:
        ValueError: an unknown type; shapes, types or devices that do not fit.
    """
    kind = KQUANTS.get(name)
    if kind is None:
        raise ValueError(f"{name} is not searched here: wanted one of {', '.join(KQUANTS)}")
    out = _checked(values, kind, importance, out)
    if not values.numel():
        return out
    rows = max(_SUB_BLOCKS * kind.size // values.shape[1], 1)
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        for start in range(0, len(values), rows):
            _launch(values[start : start + rows], kind, importance, out[start : start + rows], block)
    return out


def _checked(
    values: torch.Tensor, kind: KQuant, importance: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    if values.ndim != 2 or values.dtype not in _FLOATS or values.shape[1] % SUPER:
        raise ValueError(f"values are {tuple(values.shape)} {values.dtype}: wanted (N, multiple of {SUPER}) floats")
    shape = (values.shape[0], values.shape[1] // SUPER * kind.block_bytes)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=values.device)
    if out.dtype != torch.uint8 or tuple(out.shape) != shape:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}: wanted {shape} uint8")
    if importance is not None and (importance.dtype != torch.float32 or importance.shape != values.shape[1:]):
        raise ValueError(
            f"importance is {tuple(importance.shape)} {importance.dtype}: wanted ({values.shape[1]},) float32"
        )
    for what, tensor in (("values", values), ("importance", importance), ("out", out)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{what} must be contiguous")
    check_device(pack_codes, values, importance, out)
    return out


def _launch(values: torch.Tensor, kind: KQuant, importance: torch.Tensor | None, out: torch.Tensor, block: int) -> None:
    supers = values.numel() // SUPER
    count = SUPER // kind.size
    total = supers * count
    weighted = importance is not None
    work = torch.empty((5, total), dtype=torch.float32, device=values.device)
    options: dict[str, Any] = {"num_warps": min(max(block // 32, 1), 8), "enable_fp_fusion": False}
    squares = work  # not read without importance
    if weighted and kind.energy:
        squares = torch.empty(supers, dtype=torch.float32, device=values.device)
        mean_squares[(triton.cdiv(supers, block),)](values, squares, supers, kind.energy, block, **options)
    given = values if importance is None else importance  # not read without importance
    grid, grid_supers = (triton.cdiv(total, block),), (triton.cdiv(supers, block),)
    columns = values.shape[1]
    steps = kind.weighted if weighted else kind.plain
    if steps is not None:
        search_minimum[grid](
            values, given, squares, work, total, columns, kind.size, kind.top, steps.first, steps.delta, steps.last,
            steps.absolute, weighted, block, **options,
        )  # fmt: skip
        bounded = kind.name == "Q5_K" or not weighted
        scales_with_minimum[grid_supers](
            work, out, total, supers, count, kind.scale_top, bounded, weighted, kind.block_bytes, block, **options
        )
        kept = FROM_TWO
    else:
        six = kind.name == "Q6_K"
        kept = FROM_ONE
        if six or weighted:
            search_scale[grid](
                values, given, squares, work, total, columns, kind.top, not six, weighted, block, **options
            )
        else:
            search_q3[grid](values, work, total, block, **options)
            kept = FROM_WORDS
        signed_scales[grid_supers](work, out, total, supers, six, weighted, block, **options)
    lanes = 4 * block
    pack_codes[(triton.cdiv(supers * 32, lanes),)](
        values, work, out, total, supers, int(kind.name[1]), kind.size, kept.value, kind.block_bytes, lanes, **options
    )

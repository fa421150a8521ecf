"""ggml's block types on a GPU beside the K-quants: IQ4_NL, IQ4_XS, TQ1_0, TQ2_0, MXFP4; legacy types by importance.

The bytes are libggml's, for the reasons that `quantpress.kernels.kquants.quantize` gives: a lane takes a block, or a
sub-block of 32 weights, keeps it in registers and adds from the first weight to the last; multiply-adds are not fused.
IQ4 tries 16 scales, each with 15 comparisons and choices for a weight: some 600 instructions for each weight. The
ternary types and MXFP4 take the greatest weight of a block, which is the same in any order, and are bound by memory.

Compiled for sm_80 and sm_90 and run in Triton's interpreter; not run or timed on hardware yet. Bytes may differ from
libggml's for weights that are not finite, or so great that sums of squares overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
import triton

from quantpress.kernels.ggml.direct import fit_greatest, pack_fp4, pack_ternary
from quantpress.kernels.ggml.iq4 import pack_levels, scale_super_blocks, search_levels
from quantpress.kernels.ggml.legacy import mean_squares_of_rows, pack_legacy, search_legacy
from quantpress.kernels.kquants.blocks import mean_squares
from quantpress.kernels.launch import check_device

__all__ = ["TYPES", "BlockType", "quantize"]

_BLOCKS = 1 << 24  # of 32 weights that are under way at once: 8 bytes each, and offsets within them stay below 2^31
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type.

    Attributes:
        name: as ggml spells it.
        size: weights of a block.
        block_bytes: its bytes.
        weighted: whether an importance is "needed" (there is no kernel for the plain form, which the processor rounds
            as fast as it reads), "used" or "ignored".
    """

    name: str
    size: int
    block_bytes: int
    weighted: str


_TABLE: Final = (
    BlockType("Q4_0", 32, 18, "needed"),
    BlockType("Q4_1", 32, 20, "needed"),
    BlockType("Q5_0", 32, 22, "needed"),
    BlockType("Q5_1", 32, 24, "needed"),
    BlockType("IQ4_NL", 32, 18, "used"),
    BlockType("IQ4_XS", 256, 136, "used"),
    BlockType("TQ1_0", 256, 54, "ignored"),
    BlockType("TQ2_0", 256, 66, "ignored"),
    BlockType("MXFP4", 32, 17, "ignored"),
)

TYPES: Final = MappingProxyType({kind.name: kind for kind in _TABLE})
"""The types that `quantize` knows."""


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
        values: (N, K) float32, float16 or bfloat16, contiguous, finite; K a multiple of the type's block.
        name: of a type in `TYPES`.
        importance: (K,) float32, contiguous, not negative; or None.
        out: (N, K / size * bytes of a block) uint8, contiguous, to be filled.
        block: blocks (of IQ4_XS sub-blocks) of a program, a power of two from 32 on; each is a thread.

    Returns:
        `out`, or a new tensor of that shape.

    Raises:
        ValueError: an unknown type, one that lacks its importance; shapes, types or devices that do not fit.
    """
    kind = TYPES.get(name)
    if kind is None:
        raise ValueError(f"{name} is not found here: wanted one of {', '.join(TYPES)}")
    if kind.weighted == "needed" and importance is None:
        raise ValueError(f"{name} is searched with an importance only")
    if kind.weighted == "ignored":
        importance = None
    out = _checked(values, kind, importance, out)
    if not values.numel():
        return out
    rows = max(_BLOCKS * 32 // values.shape[1], 1)
    with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
        for start in range(0, len(values), rows):
            _launch(values[start : start + rows], kind, importance, out[start : start + rows], block)
    return out


def _checked(
    values: torch.Tensor, kind: BlockType, importance: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    if values.ndim != 2 or values.dtype not in _FLOATS or values.shape[1] % kind.size:
        raise ValueError(f"values are {tuple(values.shape)} {values.dtype}: wanted (N, multiple of {kind.size}) floats")
    shape = (values.shape[0], values.shape[1] // kind.size * kind.block_bytes)
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
    check_device(pack_levels, values, importance, out)
    return out


def _launch(
    values: torch.Tensor, kind: BlockType, importance: torch.Tensor | None, out: torch.Tensor, block: int
) -> None:
    options = {"num_warps": min(max(block // 32, 1), 8), "enable_fp_fusion": False}
    launch: Callable[..., None]
    if kind.name.startswith("IQ4"):
        launch = _launch_levels
    elif kind.weighted == "needed":
        launch = _launch_legacy
    else:
        launch = _launch_direct
    launch(values, kind, importance, out, block, options)


def _launch_levels(
    values: torch.Tensor, kind: BlockType, importance: torch.Tensor | None, out: torch.Tensor, block: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    total, columns, whole = values.numel() // 32, values.shape[1], kind.size == 32
    supers = total // 8
    work = torch.empty((2, total), dtype=torch.float32, device=values.device)
    squares = work  # not read without importance, nor for blocks of 32
    if importance is not None and not whole:
        squares = torch.empty(supers, dtype=torch.float32, device=values.device)
        mean_squares[(triton.cdiv(supers, block),)](values, squares, supers, 2, block, **options)
    search_levels[(triton.cdiv(total, block),)](
        values, values if importance is None else importance, squares, work, out, total, columns, whole,
        importance is not None, block, **options,
    )  # fmt: skip
    if not whole:
        scale_super_blocks[(triton.cdiv(supers, block),)](work, out, total, supers, block, **options)
    pack_levels[(triton.cdiv(total * 16, 4 * block),)](values, work, out, total, whole, 4 * block, **options)


def _launch_legacy(
    values: torch.Tensor, kind: BlockType, importance: torch.Tensor | None, out: torch.Tensor, block: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    rows, columns = values.shape
    total, bits, minimum = values.numel() // 32, int(kind.name[1]), kind.name.endswith("1")
    work = torch.empty((2, total), dtype=torch.float32, device=values.device)
    squares = torch.empty(rows, dtype=torch.float32, device=values.device)
    few = {**options, "num_warps": 1}  # rows are few and long: as many multiprocessors as there can be
    mean_squares_of_rows[(triton.cdiv(rows, 32),)](values, squares, rows, columns, 32, **few)
    search_legacy[(triton.cdiv(total, block),)](
        values, importance, squares, work, out, total, columns, bits, minimum, kind.block_bytes, block, **options
    )
    pack_legacy[(triton.cdiv(total * 16, 4 * block),)](
        values, work, out, total, bits, minimum, kind.block_bytes, 4 * block, **options
    )


def _launch_direct(
    values: torch.Tensor, kind: BlockType, _importance: torch.Tensor | None, out: torch.Tensor, block: int,
    options: dict[str, Any],
) -> None:  # fmt: skip
    total, fp4 = values.numel() // kind.size, kind.name == "MXFP4"
    work = torch.empty(total, dtype=torch.float32, device=values.device)
    together = max(block * 32 // kind.size, 4)  # blocks of a program: 32 weights for each thread
    step = None if fp4 else kind.block_bytes - 2
    fit_greatest[(triton.cdiv(total, together),)](
        values, work, out, total, kind.size, kind.block_bytes, step, together, **options
    )
    lanes = 4 * block
    if fp4:
        pack_fp4[(triton.cdiv(total * 16, lanes),)](values, work, out, total, lanes, **options)
    else:
        five = kind.name == "TQ1_0"
        grid = (triton.cdiv(total * (52 if five else 64), lanes),)
        pack_ternary[grid](values, work, out, total, five, lanes, **options)

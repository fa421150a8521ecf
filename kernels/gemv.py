"""Products of 1 to 4 input rows with a quantized matrix: every word is read once and its codes are multiplied in place.

One input row reads each weight once and multiplies it once, so the product is as fast as the memory if a multiprocessor
needs few enough instructions for a weight. An H200 copies about 16.5 bytes per clock and multiprocessor, which are 32
weights of 4 bits with their scales; 128 lanes issue one instruction each per clock, so there are 4 for a weight.

How a weight gets by with them:

- Codes are not shifted out of their word. A code at bit p of a word, put by one `lop3` over the mantissa of 2^23, is
  the float 2^23 + code * 2^p; one multiply-add with 2^-p and -(2^(23 - p) + zero) gives code - zero, exactly, and a
  second one adds its product with the input. Codes above bit 22 take one shift of the word for all of them.
- The exponent of 2^23 is computed so that the compiler does not see that it is a constant: it would move the mask of
  each code into a register, one instruction more for each weight.
- Inputs are loaded (from L1) and widened once for all the outputs that a thread holds: 4 neighbours, the 16 bytes of
  a load, times `block_n / width` parts of a block, which lie side by side in it.
- Scales are multiplied once per word, after the sum over the word, and neighbouring words are added afterwards. Weights
  are never rounded.
- Warps share the places along K of a tile (`width` outputs are 16 times the warps of a program; that few scales are
  loaded by each thread for itself, without an exchange through shared memory), and add up once, at the end. Programs
  share them too (`split_k`): each writes its sums to a slab, and the last to arrive adds the slabs in their order. Sums
  come out the same in every run with the same launch parameters. Adding into one slab by atomics would save nothing:
  it has to be zeroed, and read again to be rounded.

Compiled for sm_90 by Triton 3.9 and 3.6 as `gemv_launch` says (blocks of 128 outputs, 4 warps, bf16, groups of 128; no
stack, 1 KiB of shared memory, words in loads of 16 bytes), the inner loop takes, for each weight:

    bits, zeros, input rows   instructions   registers (3.9, 3.6)
    4, no,  1                 4.0            80, 96
    4, yes, 1                 4.4            128, 96
    2, no,  1                 3.9            63, 63
    3, no,  1                 3.8            72, 80
    8, no,  1                 5.0            64, 64
    4, no,  2                 5.8, 5.4       128, 160
    4, no,  4                 9.0, 8.5       128, 128

So one input row with 4 bits could be read at 128 / 4.0 = 32 weights per clock and multiprocessor, as fast as an H200
copies, if every slot issued; 80 % of that speed needs 4 slots of 5. With 8 bits half the slots do. 2 and 3 bits are
bound by instructions, and so are more input rows, for which `kernels/tiled.py` may be faster.
These are figures of the compiler and arithmetic; nothing here has been timed on hardware yet.
"""

from __future__ import annotations

import torch
import triton

from quantpress.kernels.gemv_kernel import gemv_kernel
from quantpress.kernels.launch import Launch, Problem, check_device
from quantpress.kernels.packed import PackedWeight, reference_dequantize
from quantpress.kernels.workspace import counters

__all__ = ["gemv", "gemv_launch", "reference_gemv"]

_UNIT = {2: (16, 1), 3: (32, 3), 4: (8, 1), 8: (4, 1)}  # bits -> codes and words of the least that is whole words
_MOST_ROWS = 4


def reference_gemv(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes what `gemv` does in float64, rounded once, to x's type."""
    result = x.double() @ reference_dequantize(weight, torch.float64).T
    return (result if bias is None else result + bias.double()).to(x.dtype)


def gemv(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, launch: Launch,
    deterministic: bool = True, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Computes x @ W^T + bias for few input rows; sums in float32, weights not rounded.

    Args:
        x: (M, K) float16, bfloat16 or float32, M <= 4, contiguous.
        weight: (N, K) quantized.
        bias: (N,) of x's type.
        launch: `block_n` (a power of two, 16 or more), `block_k` (a power of two, whole words: at least 4 places for 8
            bits, 8 for 4, 16 for 2, 32 for 3), `split_k`, `warps`, `stages` (1: the loads of a tile precede its use,
            many warps hide them; more: tiles are fetched ahead into shared memory).
        deterministic: asked for or not, the same launch gives the same bits.
        out: (M, N) of x's type, contiguous, that receives the result.

    Returns:
        (M, N) of x's type.

    Raises:
        ValueError: shapes, types, devices or launch parameters that do not fit.
    """
    del deterministic  # nothing is gained by giving it up
    rows_in, out = _check(x, weight, bias, out)
    width, units = min(16 * launch.warps, 128, launch.block_n), launch.block_k // _UNIT[weight.bits][0]
    _check_launch(launch, weight, units)
    if not out.numel():
        return out
    blocks = triton.cdiv(weight.rows, launch.block_n)
    splits = min(launch.split_k, triton.cdiv(weight.columns, launch.block_k))
    partial = counter = None
    if splits > 1:
        partial = torch.empty((splits, rows_in, weight.rows), dtype=torch.float32, device=x.device)
        counter = counters(x.device, blocks)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        gemv_kernel[(blocks, splits)](
            x, weight.words, weight.scale, weight.zero, weight.order, bias, out, partial, counter, weight.rows,
            weight.columns, rows_in, weight.bits, weight.group_size if weight.groups > 1 else 0, units,
            width, launch.block_n // width, splits, triton.next_power_of_2(splits), launch.stages,
            weight.columns % launch.block_k == 0, weight.rows % launch.block_n == 0, num_warps=launch.warps,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def gemv_launch(problem: Problem, multiprocessors: int = 132) -> Launch:
    """Gives launch parameters that arithmetic says are sensible; nothing has been measured.

    A thread holds 16 words of a tile (128 weights of 4 bits; 24 words for 3 bits, 8 for 2), and 8 where the sums of
    more rows, two registers per word and row, would leave too few programs on a multiprocessor. Of the ways to share
    the tiles along K, the one is taken with which the busiest multiprocessor is done first: programs on it times their
    tiles, but never less than 4 programs, which have 32 KB under way together (about 20 KB cover the time that memory
    takes to answer), and a tile's time for start and end of each.
    """
    unit_codes = _UNIT[problem.bits][0]
    block_n = min(128, max(16, triton.next_power_of_2(problem.rows)))
    many = problem.bits in (2, 3) or problem.rows_in > 2 or (problem.rows_in == 2 and not problem.symmetric)
    units = max(8 if many else 16, 512 // block_n)  # 4 words side by side, the 16 bytes of a load, for 128 threads
    blocks, tiles = triton.cdiv(problem.rows, block_n), triton.cdiv(problem.columns, units * unit_codes)

    def cost(split_k: int) -> int:
        programs = triton.cdiv(blocks * split_k, multiprocessors)
        return int(triton.cdiv(tiles, split_k) * max(programs, 4) + programs)

    split_k = min(range(1, min(tiles, 32) + 1), key=cost)
    return Launch("gemv", 1, block_n, units * unit_codes, split_k, warps=4, stages=1)


def _check(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor | None
) -> tuple[int, torch.Tensor]:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype}: wanted float16, bfloat16 or float32")
    if x.ndim != 2 or x.shape[1] != weight.columns or not x.is_contiguous():
        raise ValueError(f"x is {tuple(x.shape)}, strides {x.stride()}: wanted (M, {weight.columns}), contiguous")
    rows_in = x.shape[0]
    if rows_in > _MOST_ROWS:
        raise ValueError(f"x has {rows_in} rows: at most {_MOST_ROWS}")
    if bias is not None and (bias.dtype != x.dtype or tuple(bias.shape) != (weight.rows,) or bias.stride() != (1,)):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}: wanted {x.dtype} ({weight.rows},), contiguous")
    if out is None:
        out = torch.empty((rows_in, weight.rows), dtype=x.dtype, device=x.device)
    elif out.dtype != x.dtype or tuple(out.shape) != (rows_in, weight.rows) or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}: wanted {x.dtype} {(rows_in, weight.rows)}")
    check_device(gemv_kernel, x, weight.words, bias, out)
    return rows_in, out


def _check_launch(launch: Launch, weight: PackedWeight, units: int) -> None:
    unit_codes, unit_words = _UNIT[weight.bits]
    sizes = (launch.block_n, launch.block_k, launch.warps)
    if any(size < 1 or size & (size - 1) for size in sizes) or launch.block_n < 16 or launch.split_k < 1:
        raise ValueError(f"{launch}: wanted powers of two, 16 or more outputs and one split or more")
    if units < 1:
        raise ValueError(f"{launch}: codes of {weight.bits} bits are read {unit_codes} at a time")
    if units * unit_words * weight.rows >= 1 << 31:
        raise ValueError(f"{launch}: a tile spans 2^31 words of {weight.rows} outputs")

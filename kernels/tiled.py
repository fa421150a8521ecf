"""Products of several input rows with a packed matrix: tiles on tensor cores, weights made from codes in registers.

Few rows (up to `EXACT_ROWS`): weights are the first operand of the product, outputs its rows, so that tensor cores that
take 64 rows at a time waste none on inputs that do not exist; the second operand is 8 to 64 input rows wide. What is
multiplied are whole numbers; each tile's sums are multiplied by the scales. K is split between programs, which leave
their sums in slabs; the last to arrive adds them in their order. Atomic additions into one slab were left out: they
would need a slab of zeros and the same last program, and would give other bits each time.

Many rows: the weights are made in x's type and are the second operand, which lies in shared memory. (As the first
operand, in registers, Triton 3.6 waits for each instruction of the tensor cores before it issues the next.) Two
programs fit a multiprocessor: one expands codes while the other's tensor cores work.

Words and inputs are copied to shared memory 16 bytes at a time, `stages` - 1 tiles ahead; scales and zeros are read one
tile ahead. Figures of the compiler for sm_90, float16, 4 bits, groups of 128, Triton 3.9 (3.6): 16 rows in tiles of 128
outputs and 128 places with 4 warps take 154 (158) registers, 72 KiB of shared memory, and 16 HGMMA of 64x16x16 in a
loop of 426 (466) instructions for 128 weights of a thread, 3.3 (3.6) for each. At the 4.3 TB/s that an H200 copies, 26
weights come in per clock and multiprocessor, which leave 4.9. Three such programs fit, with 48 KiB of words under way.
128 rows in tiles of 128 outputs and 64 places take 225 (226) registers, 72 KiB, and 8 HGMMA of 64x128x16 in a loop of
322 (368) instructions, as many clocks to issue, where the tensor cores take 512. For sm_90 no launch of `tiled_launch`
has a stack; for sm_80 the tile of 128 times 128 needs 8 warps to have none. All this is the compiler's word and
arithmetic: the kernel has run in Triton's interpreter, with float16 and float32; it was not timed on hardware yet.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from quantpress.kernels.expand import expand, halves, raised
from quantpress.kernels.launch import Launch, Problem, check_device
from quantpress.kernels.packed import PackedWeight
from quantpress.kernels.slabs import sum_slabs
from quantpress.kernels.workspace import counters

__all__ = ["EXACT_ROWS", "tiled", "tiled_launch"]

EXACT_ROWS = 64
"""Up to so many input rows the weights are not rounded."""

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_BAND = 8  # blocks of input rows that follow each other before the next outputs: they read the same words
_PLAIN = (64, 32, 32)  # greatest tile where the sums are not for tensor cores


def tiled(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    launch: Launch,
    deterministic: bool = True,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiplies input rows with a packed matrix: x @ W.T + bias, (M, N) of x's type; sums are in float32.

    Up to `EXACT_ROWS` input rows the products of inputs and code - zero, which are whole numbers, are summed in float32
    and the sum over a tile is multiplied by the scale. With more rows the weights are rounded to x's type, as those of
    a dense model are. Groups that do not consist of whole tiles of at least 16 places (32 for 3 bits) are computed
    without tensor cores up to `EXACT_ROWS` rows.

    Args:
        x: (M, K) float16, bfloat16 or float32, contiguous.
        weight: N outputs, K places.
        bias: (N,) of x's type.
        launch: all parameters of a tile; block_k is lowered to what divides the groups.
        deterministic: nothing else is implemented: shared sums are always added in one order.
        out: (M, N) of x's type to fill.

    Raises:
        ValueError: shapes, types or devices that do not fit, or a tile that the kernel does not take.
    """
    del deterministic
    out = _check(x, weight, bias, out)
    rows_in, rows = out.shape
    if not rows_in or not rows:
        return out
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    rounded = rows_in > EXACT_ROWS
    mixed, block_m, block_n, block_k = _tile(weight, launch, plain=x.dtype == torch.float32, rounded=rounded)
    blocks_m, blocks_n = triton.cdiv(rows_in, block_m), triton.cdiv(rows, block_n)
    split_k = min(launch.split_k, triton.cdiv(weight.columns, block_k))
    slabs = arrived = None
    if split_k > 1:
        slabs = torch.empty((split_k, blocks_n * block_n, blocks_m * block_m), dtype=torch.float32, device=x.device)
        arrived = counters(x.device, blocks_m * blocks_n)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _tiles[(blocks_m * blocks_n * split_k,)](
            x, weight.words, weight.scale, weight.zero, bias, out, slabs, arrived, rows_in, rows, weight.columns,
            weight.words.shape[0], halves(weight.bits), weight.group_size, weight.bits, mixed, rounded,
            rows % block_n == 0, weight.columns % block_k == 0, split_k, block_m, block_n, block_k, _BAND,
            num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _check(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
    if x.dtype not in _TYPES or x.dim() != 2 or x.shape[1] != weight.columns or not x.is_contiguous():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, wanted contiguous floats of shape (M, {weight.columns})")
    shape = (x.shape[0], weight.rows)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
    for name, tensor, wanted in (("bias", bias, shape[1:]), ("out", out, shape)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tuple(tensor.shape) != wanted or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, wanted contiguous {x.dtype} {wanted}")
    check_device(_tiles, x, weight.words, bias, out)
    return out


def _tile(weight: PackedWeight, launch: Launch, *, plain: bool, rounded: bool) -> tuple[bool, int, int, int]:
    """Gives whether groups mix within a tile, and the tile (block_m, block_n, block_k) that is run for a launch."""
    least = 32 if weight.bits == 3 else 16
    for name, size, lowest in (("m", launch.block_m, 8), ("n", launch.block_n, 16), ("k", launch.block_k, least)):
        if size < lowest or size & (size - 1):
            raise ValueError(f"block_{name} is {size}, wanted a power of two from {lowest}")
    mixed, block_k = False, launch.block_k
    if weight.groups > 1:
        shared = math.gcd(weight.group_size, block_k)
        mixed, block_k = (False, shared) if shared >= least else (True, block_k)
    if not plain and (rounded or not mixed):
        return mixed, launch.block_m, launch.block_n, block_k
    return mixed, min(launch.block_m, _PLAIN[0]), min(launch.block_n, _PLAIN[1]), min(block_k, _PLAIN[2])


def tiled_launch(problem: Problem) -> Launch:
    """Gives launch parameters by arithmetic, for a GPU of 132 processors of 227 KiB; not measured.

    Up to two programs for a processor: one expands codes while the other's sums run. Parts have at least 4 tiles.
    """
    if problem.rows_in > EXACT_ROWS:
        # of tiles of 128 sums for a thread the one that reads least: an input has 16 bits, a code 4
        launch = Launch("tiled", 128, 128, 64, 1, 4, 3)
    else:
        block_m = max(16, triton.next_power_of_2(problem.rows_in))
        launch = Launch("tiled", block_m, 128, 128, 1, 8 if block_m == 64 else 4, 3 if block_m == 64 else 4)
    if problem.dtype == "float32":
        launch = replace(launch, block_m=min(launch.block_m, 64), block_n=_PLAIN[1], block_k=_PLAIN[2], warps=4)
    block_k = launch.block_k
    if problem.group_size < problem.columns:
        shared = math.gcd(problem.group_size, block_k)
        block_k = shared if shared >= (32 if problem.bits == 3 else 16) else block_k
    blocks = triton.cdiv(problem.rows_in, launch.block_m) * triton.cdiv(problem.rows, launch.block_n)
    # parts write and read 8 bytes for each sum: the more rows, the fewer parts are worth it
    most = min(16 if launch.block_m < 64 else 4, triton.cdiv(problem.columns, block_k) // 4)
    split_k = 1
    while split_k * 2 <= most and split_k * 2 * blocks <= 2 * 132:
        split_k *= 2
    return replace(launch, block_k=block_k, split_k=split_k)


@triton.jit  # type: ignore[untyped-decorator]
def _tiles(  # type: ignore[no-untyped-def]
    x, words, scale, zero, bias, out, slabs, arrived, rows_in, rows, columns, word_rows, masks,
    group_size: tl.constexpr, bits: tl.constexpr, mixed: tl.constexpr, rounded: tl.constexpr,
    whole_rows: tl.constexpr, whole_columns: tl.constexpr, split_k: tl.constexpr, block_m: tl.constexpr,
    block_n: tl.constexpr, block_k: tl.constexpr, band: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    blocks_m, blocks_n = tl.cdiv(rows_in, block_m), tl.cdiv(rows, block_n)
    block = tl.program_id(0) // split_k
    part = tl.program_id(0) % split_k
    # all outputs of a band of input rows before those of the next; within it input rows change first
    first_m = block // (band * blocks_n) * band
    in_band = tl.minimum(blocks_m - first_m, band)
    row_in = ((first_m + block % (band * blocks_n) % in_band) * block_m + tl.arange(0, block_m)).to(tl.int64)
    output = (block % (band * blocks_n) // in_band * block_n + tl.arange(0, block_n)).to(tl.int64)
    # input rows and outputs that do not exist read the last one: their sums are not stored
    read_row = tl.minimum(row_in, rows_in - 1)
    read_output = output if whole_rows else tl.minimum(output, rows - 1)
    tiles = tl.cdiv(columns, block_k)
    low, high = part * tiles // split_k * block_k, (part + 1) * tiles // split_k * block_k
    whole: tl.constexpr = whole_rows and whole_columns
    total = tl.zeros((block_m, block_n) if rounded else (block_n, block_m), tl.float32)
    # scales and zeros of the next tile are under way while a tile is summed
    step = tl.load(scale + low // group_size * rows + read_output)
    middle = _middle(zero, low // group_size * rows + read_output, dtype, bits)
    for start in range(low, high, block_k):
        after = tl.minimum(start + block_k, columns - 1) // group_size * rows + read_output
        next_step, next_middle = tl.load(scale + after), _middle(zero, after, dtype, bits)
        place = start + tl.arange(0, block_k)
        if mixed:
            at = (tl.minimum(place, columns - 1) // group_size)[None, :] * rows + read_output[:, None]
            weights = expand(
                words, read_output, start, rows, word_rows, masks, None, None, dtype, bits, block_n, block_k, whole
            )
            weights -= _middle(zero, at, dtype, bits)
            wide = tl.load(scale + at)
            weights *= wide if wide.dtype == weights.dtype and rounded else wide.to(tl.float32)
        else:
            weights = expand(
                words, read_output, start, rows, word_rows, masks, middle[:, None], step[:, None] if rounded else None,
                dtype, bits, block_n, block_k, whole,
            )  # fmt: skip
        if not whole_columns:
            # what the last word holds past the last place would be multiplied with 0, which infinity does not survive
            weights = tl.where((place < columns)[None, :], weights, 0.0)
        if rounded:
            inputs = _inputs(x, read_row[:, None] * columns, place[None, :], columns, whole_columns)
            total = tl.dot(inputs, tl.trans(weights.to(dtype)), total, input_precision="ieee")
        else:
            inputs = _inputs(x, read_row[None, :] * columns, place[:, None], columns, whole_columns)
            if mixed:
                total = tl.dot(weights, inputs.to(tl.float32), total, input_precision="ieee")
            else:
                total += tl.dot(weights, inputs, input_precision="ieee") * step[:, None].to(tl.float32)
        step, middle = next_step, next_middle
    if rounded:
        _finish(total, bias, out, slabs, arrived, block, part, row_in[:, None], output[None, :], rows_in, rows, split_k)
    else:
        _finish(total, bias, out, slabs, arrived, block, part, row_in[None, :], output[:, None], rows_in, rows, split_k)


@triton.jit  # type: ignore[untyped-decorator]
def _inputs(x, row, place, columns, whole: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(x + row + place) if whole else tl.load(x + row + place, mask=place < columns, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _middle(zero, at, dtype: tl.constexpr, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    middle = tl.full(at.shape, 1 << (bits - 1), tl.uint8)
    if zero is not None:
        middle = tl.load(zero + at)
    return raised(middle, dtype, bits)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    total, bias, out, slabs, arrived, block, part, row_in, output, rows_in, rows, split_k: tl.constexpr
):
    # slabs of a block lie side by side, each as its tile is
    size: tl.constexpr = total.shape[0] * total.shape[1]
    place = tl.arange(0, total.shape[0])[:, None] * total.shape[1] + tl.arange(0, total.shape[1])[None, :]
    inside = tl.full(total.shape, 1, tl.int1)
    own = slabs
    if split_k > 1:
        own = slabs + block.to(tl.int64) * (split_k * size)
    total, last = sum_slabs(total, own, arrived, block, part, place, inside, size, split_k)
    if last:
        _store(total, bias, out, row_in, output, rows_in, rows)


@triton.jit
def _store(total, bias, out, row_in, output, rows_in, rows):  # type: ignore[no-untyped-def]
    if bias is not None:
        total += tl.load(bias + output, mask=output < rows, other=0.0).to(tl.float32)
    inside = (output < rows) & (row_in < rows_in)
    tl.store(out + row_in * rows + output, total.to(out.dtype.element_ty), mask=inside)

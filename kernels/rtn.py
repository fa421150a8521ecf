"""Rounding to the nearest value of a grid on a GPU: scales and zeros of all groups, then codes in the kernels' words.

The grids and every rounding are those of `quantpress.quant.grid` (no clip search): the scale is computed in float64
and rounded once to the type it is stored in, codes come from a correctly rounded float32 quotient. Same bytes.

Two launches, because groups of any size may share a word. The first reads the matrix once along its rows; a program
takes a group of 16 rows. The second takes units of whole words (32 codes of 3 bits fill three) and writes them
transposed. Reading the matrix twice costs what its transfer to the GPU costs many times over. bfloat16 is read as
16-bit integers and widened by a shift, so that the interpreter runs it too. Compiled for sm_80 and sm_90 without
spills; not timed on hardware yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantpress.kernels.launch import check_device
from quantpress.kernels.packed import PackedWeight

__all__ = ["SCALE_ROUNDING", "reference_rtn", "rtn", "rtn_codes"]

SCALE_ROUNDING = {torch.float16: (11, -24), torch.bfloat16: (8, -133), torch.float32: (24, -149)}
"""Significand bits and the exponent of the least subnormal of the types of scales."""

_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_ROWS = 16  # of a program: what it writes along N is 64 bytes at least
_COLUMNS = 128  # of a group that a program reads at a time
_CODES = 128  # along K, of a program of the second launch


def reference_rtn(
    weight: torch.Tensor, *, bits: int, group_size: int, symmetric: bool, scale_type: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Does what `rtn_codes` does, with the same roundings, one group after the other in plain torch."""
    rows, columns = weight.shape
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
    scales, zeros = [], []
    for start in range(0, columns, group_size):
        part = weight[:, start : start + group_size].float()
        if symmetric:
            first = part.abs().max(1, keepdim=True)  # the first of equal ones
            scale = _rounded_to(-part.gather(1, first.indices).double() / half, scale_type)
            zero = torch.full_like(scale, half)
        else:
            low, high = part.amin(1, True).clamp(max=0).double(), part.amax(1, True).clamp(min=0).double()
            scale = _rounded_to((high - low) / top, scale_type)
            zero = torch.where(scale == 0, 0.0, torch.round(-low / scale.double()).clamp(0, top)).float()
        steps = torch.round(part / scale) + zero
        codes[:, start : start + group_size] = torch.where(scale == 0, zero, steps.clamp(0, top)).to(torch.uint8)
        scales.append(scale)
        zeros.append(zero)
    zero = torch.cat(zeros, 1).T.contiguous().to(torch.uint8)
    return codes, torch.cat(scales, 1).T.contiguous(), None if symmetric else zero


def _rounded_to(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds float64 to a type of scales, as float32 and without the type's upper limit; ties to even."""
    precision, least = SCALE_ROUNDING[dtype]
    exponent = (torch.frexp(value).exponent - precision).clamp(min=least).double()  # ldexp of integers is in float32
    rounded = torch.ldexp(torch.round(torch.ldexp(value, -exponent)), exponent)
    return torch.where(value == 0, 0.0, rounded).float()


def rtn(
    weight: torch.Tensor, *, bits: int, group_size: int, symmetric: bool, scale_type: torch.dtype = torch.float16
) -> PackedWeight:
    """Quantizes a matrix into the form that the kernels read.

    Args:
        weight: (N, K) float16, bfloat16 or float32, contiguous, finite, of at least one value.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, 1 to K.
        symmetric: no zero is stored.
        scale_type: float16, bfloat16 or float32; scales that it cannot hold become infinite.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    _check(weight, bits, group_size, scale_type)
    rows, columns = weight.shape
    scale, zero = _fitted(weight, bits, group_size, symmetric, scale_type)
    words = torch.empty((-(-columns * bits // 32), rows), dtype=torch.int32, device=weight.device)
    _fill(weight, scale, zero, words, bits, group_size, packed=True)
    return PackedWeight(words, scale.to(scale_type), zero, None, columns, bits, group_size)


def rtn_codes(
    weight: torch.Tensor, *, bits: int, group_size: int, symmetric: bool, scale_type: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantizes a matrix as `rtn` does, with a byte for each code.

    Returns:
        Codes (N, K) uint8; scale (G, N) float32, rounded to `scale_type` but for its upper limit; zero (G, N) uint8,
        None for symmetric grids.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    _check(weight, bits, group_size, scale_type)
    scale, zero = _fitted(weight, bits, group_size, symmetric, scale_type)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    _fill(weight, scale, zero, codes, bits, group_size, packed=False)
    return codes, scale, zero


def _check(weight: torch.Tensor, bits: int, group_size: int, scale_type: torch.dtype) -> None:
    check_device(_fit, weight)
    if weight.dtype not in _TYPES or weight.dim() != 2 or not weight.numel() or not weight.is_contiguous():
        raise ValueError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}, wanted a contiguous matrix of float16, bfloat16"
            " or float32"
        )
    if bits not in (2, 3, 4, 8) or not 1 <= group_size <= weight.shape[1] or scale_type not in SCALE_ROUNDING:
        raise ValueError(f"{bits} bits in groups of {group_size} of {weight.shape[1]} columns, scales in {scale_type}")


def _readable(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight


def _fitted(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, scale_type: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, columns = weight.shape
    groups = triton.cdiv(columns, group_size)
    scale = torch.empty((groups, rows), device=weight.device)
    zero = None if symmetric else torch.empty((groups, rows), dtype=torch.uint8, device=weight.device)
    step = min(triton.next_power_of_2(group_size), _COLUMNS)
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        _fit[(groups, triton.cdiv(rows, _ROWS))](
            _readable(weight), scale, zero, rows, columns, group_size, bits, symmetric, *SCALE_ROUNDING[scale_type],
            _ROWS, step, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return scale, zero


def _fill(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, result: torch.Tensor, bits: int,
    group_size: int, *, packed: bool,
) -> None:  # fmt: skip
    rows, columns = weight.shape
    unit = 32 if bits == 3 else 32 // bits
    with torch.cuda.device_of(weight):  # type: ignore[no-untyped-call]
        _choose[(triton.cdiv(columns, _CODES), triton.cdiv(rows, _ROWS))](
            _readable(weight), scale, zero, result, rows, columns, group_size, bits, packed, _ROWS, _CODES // unit,
            unit, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _values(weight, place, held):  # type: ignore[no-untyped-def]
    """Reads weights as float32; bfloat16 comes as int16, the upper half of a float32."""
    values = tl.load(weight + place, mask=held, other=0)
    if weight.dtype.element_ty == tl.int16:
        result = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = values.to(tl.float32)
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _rounded(value, precision: tl.constexpr, least: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounds float64 to so many significand bits and multiples of 2^least, ties to even; a zero becomes positive."""
    bits = value.to(tl.int64, bitcast=True)
    exponent = tl.maximum(((bits >> 52) & 0x7FF) - 1022 - precision, least)
    up = ((1023 - exponent) << 52).to(tl.float64, bitcast=True)
    down = ((1023 + exponent) << 52).to(tl.float64, bitcast=True)
    # 1.5 * 2^52 is so large that its last place is 1
    steps = (tl.abs(value) * up + 6755399441055744.0) - 6755399441055744.0
    sign = tl.where(value < 0, -1.0, 1.0)
    return (steps * down * sign).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _fit(  # type: ignore[no-untyped-def]
    weight, scale, zero, rows, columns, group_size, bits: tl.constexpr, symmetric: tl.constexpr,
    precision: tl.constexpr, least: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) * block_n + tl.arange(0, block_n)
    inside = row < rows
    top: tl.constexpr = (1 << bits) - 1
    half: tl.constexpr = 1 << (bits - 1)
    # symmetric: the first of the greatest magnitude, with its sign; else the least and the greatest
    low, high = tl.zeros((block_n,), tl.float32), tl.zeros((block_n,), tl.float32)
    for start in range(0, group_size, block_k):
        within = start + tl.arange(0, block_k)
        column = group * group_size + within
        held = inside[:, None] & ((within < group_size) & (column < columns))[None, :]
        values = _values(weight, row[:, None] * columns + column[None, :], held)
        if symmetric:
            greatest = tl.max(tl.abs(values), axis=1)
            positive = tl.min(tl.where(values == greatest[:, None], within[None, :], group_size), axis=1)
            negative = tl.min(tl.where(values == -greatest[:, None], within[None, :], group_size), axis=1)
            high = tl.where(greatest > tl.abs(high), tl.where(positive < negative, greatest, -greatest), high)
        else:
            low, high = tl.minimum(low, tl.min(values, axis=1)), tl.maximum(high, tl.max(values, axis=1))
    place = group.to(tl.int64) * rows + row
    if symmetric:
        step = _rounded(high.to(tl.float64) * (-1.0 / half), precision, least)
    else:
        wide = low.to(tl.float64)
        step = _rounded((high.to(tl.float64) - wide) / top, precision, least)
        steps = -wide / tl.where(step == 0, 1.0, step.to(tl.float64))
        steps = (steps + 6755399441055744.0) - 6755399441055744.0
        middle = tl.where(step == 0, 0.0, tl.minimum(tl.maximum(steps, 0.0), top))
        tl.store(zero + place, middle.to(tl.uint8), mask=inside)
    tl.store(scale + place, step, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _choose(  # type: ignore[no-untyped-def]
    weight, scale, zero, result, rows, columns, group_size, bits: tl.constexpr, packed: tl.constexpr,
    block_n: tl.constexpr, units: tl.constexpr, unit: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * block_n + tl.arange(0, block_n)
    number = tl.program_id(0) * units + tl.arange(0, units)
    code_of_unit = tl.arange(0, unit)
    column = number[:, None] * unit + code_of_unit[None, :]
    held = (row < rows)[:, None, None] & (column < columns)[None, :, :]
    place = row[:, None, None] * columns + column[None, :, :]
    values = _values(weight, place, held)
    grid = (column // group_size).to(tl.int64)[None, :, :] * rows + row[:, None, None]
    step = tl.load(scale + grid, mask=held, other=1.0)
    middle = tl.full((block_n, units, unit), 1 << (bits - 1), tl.float32)
    if zero is not None:
        middle = tl.load(zero + grid, mask=held, other=0).to(tl.float32)
    # rounds to a whole number as quantpress.kernels.gptq_block does
    steps = tl.div_rn(values, tl.where(step == 0.0, 1.0, step))
    code = tl.minimum(tl.maximum((steps + 12582912.0) - 12582912.0 + middle, 0.0), (1 << bits) - 1)
    code = tl.where(step == 0.0, middle, code).to(tl.int32)
    if packed:
        code = tl.where(held, code, 0)
        words: tl.constexpr = unit * bits // 32
        for word in tl.static_range(words):
            # a code of 3 bits may begin in one word and end in the next
            shift = code_of_unit * bits - 32 * word
            left = tl.where((shift >= 0) & (shift < 32), shift, 0)
            right = tl.where((shift < 0) & (shift > -bits), -shift, 0)
            touched = (shift > -bits) & (shift < 32)
            moved = tl.where(touched[None, None, :], (code << left[None, None, :]) >> right[None, None, :], 0)
            target = number * words + word
            kept = (row < rows)[:, None] & (target * 32 < columns * bits)[None, :]
            tl.store(result + target.to(tl.int64)[None, :] * rows + row[:, None], tl.sum(moved, axis=2), mask=kept)
    else:
        tl.store(result + place, code.to(tl.uint8), mask=held)

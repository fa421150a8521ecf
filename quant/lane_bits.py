"""Whole numbers in vectors of float32, their bits, float16, and tiles turned around; more of `lanes`.

A whole number is kept as float32, which holds those below 2^24 exactly. The functions can be called in compiled
functions only.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

from quantpress.quant.lanes import FLOATS, INTS, LANES, MAGIC, VECTOR, address_of, constant, emitted, load_at, whole

__all__ = [
    "half_bits", "half_value", "join_bits", "load_transposed", "nearest", "store_bytes_transposed", "take_bits",
]  # fmt: skip

_BYTES: Final = ir.VectorType(ir.IntType(8), LANES)


def _splat_int(builder: Any, scalar: Any) -> Any:
    first = ir.Constant(INTS, ir.Undefined)
    first = builder.insert_element(first, builder.trunc(scalar, ir.IntType(32)), ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))


def _integers(builder: Any, value: Any) -> Any:
    """nearest_int of ggml-quants.c: what the bits of value + 1.5 * 2^23 say, beyond 2^22 too; NaN gives 0."""
    bits = builder.bitcast(builder.fadd(value, constant(MAGIC)), INTS)
    return builder.sub(builder.and_(bits, whole(0x007FFFFF)), whole(0x00400000))


@emitted
def nearest(_typing: Any, vector: Any) -> Any:
    """nearest_int of libggml, for every value: `round_small` below 2^22, beyond what its bits happen to say."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.sitofp(_integers(builder, args[0]), FLOATS)

    return VECTOR(vector), emit


@emitted
def take_bits(_typing: Any, vector: Any, _shift: Any, _mask: Any) -> Any:
    """(integer >> shift) & mask of whole numbers below 2^31 in magnitude."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        number = builder.fptosi(args[0], INTS)
        shifted = builder.ashr(number, _splat_int(builder, args[1]))
        return builder.sitofp(builder.and_(shifted, _splat_int(builder, args[2])), FLOATS)

    return VECTOR(vector, types.int64, types.int64), emit


@emitted
def join_bits(_typing: Any, low: Any, high: Any, _shift: Any) -> Any:
    """(low | high << shift) & 255 of whole numbers in [0, 256)."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        one, other = (builder.fptosi(arg, INTS) for arg in args[:2])
        joined = builder.or_(one, builder.shl(other, _splat_int(builder, args[2])))
        return builder.sitofp(builder.and_(joined, whole(255)), FLOATS)

    return VECTOR(low, high, types.int64), emit


@emitted
def half_bits(_typing: Any, vector: Any) -> Any:
    """Bits of the nearest float16, ties to even, as whole numbers in [0, 65536); finite values beyond it give infinity.

    NaN gives what is no finite number either.
    """

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], INTS)
        size = builder.and_(bits, whole(0x7FFFFFFF))
        sign = builder.and_(builder.lshr(bits, whole(16)), whole(0x8000))
        odd = builder.and_(builder.lshr(size, whole(13)), whole(1))
        rounded = builder.add(builder.sub(size, whole(0x38000000 - 0x0FFF)), odd)  # exponents are biased by 112 less
        normal = builder.lshr(rounded, whole(13))
        beyond = builder.icmp_signed(">", normal, whole(0x7C00))
        normal = builder.select(beyond, whole(0x7C00), normal)
        # the last place of numbers in [0.5, 1) is that of the subnormal float16 numbers, 2^-24
        half = builder.fadd(builder.bitcast(size, FLOATS), constant(0.5))
        small = builder.sub(builder.bitcast(half, INTS), whole(0x3F000000))
        is_small = builder.icmp_signed("<", size, whole(0x38800000))
        return builder.sitofp(builder.or_(builder.select(is_small, small, normal), sign), FLOATS)

    return VECTOR(vector), emit


@emitted
def half_value(_typing: Any, bits: Any) -> Any:
    """The float32 of a finite float16, whose bits are given as `half_bits` gives them."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        number = builder.fptosi(args[0], INTS)
        size = builder.and_(number, whole(0x7FFF))
        sign = builder.shl(builder.and_(number, whole(0x8000)), whole(16))
        normal = builder.add(builder.shl(size, whole(13)), whole(0x38000000))
        small = builder.bitcast(builder.fmul(builder.sitofp(size, FLOATS), constant(2.0**-24)), INTS)
        is_small = builder.icmp_signed("<", size, whole(0x0400))
        return builder.bitcast(builder.or_(builder.select(is_small, small, normal), sign), FLOATS)

    return VECTOR(bits), emit


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen into their columns: four rounds in which vectors are interleaved with each other."""
    low = [lane // 2 + LANES * (lane % 2) for lane in range(LANES)]
    masks = [ir.Constant(INTS, [lane + shift for lane in low]) for shift in (0, LANES // 2)]
    for _ in range(4):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(one, other, mask) for one, other in pairs for mask in masks]
    return rows


@emitted
def load_transposed(_typing: Any, source: Any, starts: Any, _column: Any, target: Any, _place: Any) -> Any:
    """Turns a square of sixteen columns of sixteen rows: target[place + 16 c + r] = source[starts[r] + column + c].

    Args of compiled code: source float32, starts 16 int64, column, target float32, place; arrays are contiguous.
    """

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = []
        for lane in range(LANES):
            number = ir.Constant(ir.IntType(64), lane)
            start = builder.load(address_of(context, builder, sig.args[1], args[1], number))
            rows.append(
                load_at(builder, address_of(context, builder, sig.args[0], args[0], builder.add(start, args[2])))
            )
        for column_number, vector in enumerate(_transpose(builder, rows)):
            where = builder.add(args[4], ir.Constant(ir.IntType(64), LANES * column_number))
            address = address_of(context, builder, sig.args[3], args[3], where)
            builder.store(vector, builder.bitcast(address, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(source, starts, types.int64, target, types.int64), emit


@emitted
def store_bytes_transposed(_typing: Any, source: Any, _place: Any, target: Any, _column: Any, _width: Any) -> Any:
    """Turns a square of numbers in [0, 256) into bytes: target[width * c + column + r] = source[place + 16 r + c].

    Args of compiled code: source float32, place, target uint8, column, width; arrays are contiguous.
    """

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = []
        for lane in range(LANES):
            where = builder.add(args[1], ir.Constant(ir.IntType(64), LANES * lane))
            floats = load_at(builder, address_of(context, builder, sig.args[0], args[0], where))
            rows.append(builder.trunc(builder.fptosi(floats, INTS), _BYTES))
        for lane, vector in enumerate(_transpose(builder, rows)):
            row = builder.mul(args[4], ir.Constant(ir.IntType(64), lane))
            address = address_of(context, builder, sig.args[2], args[2], builder.add(row, args[3]))
            builder.store(vector, builder.bitcast(address, _BYTES.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64, types.int64), emit

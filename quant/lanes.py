"""Vectors of sixteen float32 for numba: one place of sixteen blocks at once, with the roundings of scalar code.

A sum over a block's weights that runs from the first to the last cannot be vectorized, because its order would change;
the same sum over sixteen blocks side by side can, and every lane has the bits that a scalar loop would have. LLVM
splits the vectors for processors with narrower registers. Nothing is fused and nothing reordered. The functions here
can be called in compiled functions only; `+ - * /` and comparisons work on vectors, comparisons give masks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = [
    "LANES", "Mask", "Vector", "absolute", "both", "either", "half_bits", "half_value", "join_bits", "load",
    "load_transposed", "nearest", "root", "round_small", "select", "set_lanes", "splat", "store",
    "store_bytes_transposed", "take_bits",
]  # fmt: skip

LANES: Final = 16
"""Values of a vector."""

Vector: TypeAlias = Any
Mask: TypeAlias = Any

_FLOATS: Final = ir.VectorType(ir.FloatType(), LANES)
_INTS: Final = ir.VectorType(ir.IntType(32), LANES)
_BITS: Final = ir.VectorType(ir.IntType(1), LANES)
_BYTES: Final = ir.VectorType(ir.IntType(8), LANES)
_MAGIC: Final = 12582912.0  # 1.5 * 2^23: sums with it have no fraction
_SHUFFLE: Final = ir.VectorType(ir.IntType(32), LANES)


class _VectorType(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="Float32x16")


class _MaskType(types.Type):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(name="Bool1x16")


_VECTOR: Final = _VectorType()
_MASK: Final = _MaskType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


@register_model(_MaskType)
class _MaskModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _BITS)


def _operator(function: Callable[..., Any], result: Any, emit: Callable[[Any, Any, Any], Any]) -> None:
    """Makes an operator work on two vectors."""

    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and not kws and all(isinstance(arg, _VectorType) for arg in args):
                return signature(result, *args)
            return None

    infer_global(function)(Template)

    @lower_builtin(function, _VectorType, _VectorType)  # type: ignore[untyped-decorator]
    def lower(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return emit(builder, *args)


for _function, _emit in (
    (operator.add, ir.IRBuilder.fadd),
    (operator.sub, ir.IRBuilder.fsub),
    (operator.mul, ir.IRBuilder.fmul),
    (operator.truediv, ir.IRBuilder.fdiv),
):
    _operator(_function, _VECTOR, _emit)


def _comparison(sign: str) -> Callable[[Any, Any, Any], Any]:
    # only "different" is true where a number is NaN
    def emit(builder: Any, left: Any, right: Any) -> Any:
        return (builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, left, right)

    return emit


for _function, _sign in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
    (operator.ne, "!="),
):
    _operator(_function, _MASK, _comparison(_sign))


def _constant(value: float) -> Any:
    return ir.Constant(_FLOATS, [ir.Constant(ir.FloatType(), value)] * LANES)


def _whole(value: int) -> Any:
    return ir.Constant(_INTS, [value] * LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(_SHUFFLE, [0] * LANES))


def _splat_int(builder: Any, scalar: Any) -> Any:
    first = ir.Constant(_INTS, ir.Undefined)
    first = builder.insert_element(first, builder.trunc(scalar, ir.IntType(32)), ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(_SHUFFLE, [0] * LANES))


def _address(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    """Address of an element of a contiguous array."""
    data = cgutils.create_struct_proxy(kind)(context, builder, value=array).data
    return builder.gep(data, [place])


def _load(builder: Any, address: Any) -> Any:
    return builder.load(builder.bitcast(address, _FLOATS.as_pointer()), align=4)


def _integers(builder: Any, value: Any) -> Any:
    """nearest_int of ggml-quants.c: what the bits of value + 1.5 * 2^23 say, beyond 2^22 too; NaN gives 0."""
    bits = builder.bitcast(builder.fadd(value, _constant(_MAGIC)), _INTS)
    return builder.sub(builder.and_(bits, _whole(0x007FFFFF)), _whole(0x00400000))


@intrinsic
def splat(_typing: Any, scalar: Any) -> Any:
    """A float32 in every lane."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return _VECTOR(types.float32), emit


@intrinsic
def load(_typing: Any, array: Any, place: Any) -> Any:
    """Sixteen values of a contiguous float32 array, from flat index `place`."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _load(builder, _address(context, builder, sig.args[0], *args))

    return _VECTOR(array, types.int64), emit


@intrinsic
def store(_typing: Any, array: Any, place: Any, vector: Any) -> Any:
    """Writes sixteen values into a contiguous float32 array, from flat index `place`."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig.args[0], *args[:2])
        builder.store(args[2], builder.bitcast(address, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), emit


@intrinsic
def select(_typing: Any, mask: Any, yes: Any, no: Any) -> Any:
    """Each lane of `yes` where the mask is set, otherwise of `no`."""
    return _VECTOR(mask, yes, no), lambda _context, builder, _sig, args: builder.select(*args)


@intrinsic
def both(_typing: Any, left: Any, right: Any) -> Any:
    """Where two masks are set."""
    return _MASK(left, right), lambda _context, builder, _sig, args: builder.and_(*args)


@intrinsic
def either(_typing: Any, left: Any, right: Any) -> Any:
    """Where one of two masks is set."""
    return _MASK(left, right), lambda _context, builder, _sig, args: builder.or_(*args)


@intrinsic
def set_lanes(_typing: Any, mask: Any) -> Any:
    """The lanes of a mask that are set, as bits of an integer: bit l is lane l."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(64))

    return types.int64(mask), emit


@intrinsic
def absolute(_typing: Any, vector: Any) -> Any:
    """Without the sign."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.and_(builder.bitcast(args[0], _INTS), _whole(0x7FFFFFFF)), _FLOATS)

    return _VECTOR(vector), emit


@intrinsic
def root(_typing: Any, vector: Any) -> Any:
    """Square root, rightly rounded."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS]), f"llvm.sqrt.v{LANES}f32"
        )
        return builder.call(function, args)

    return _VECTOR(vector), emit


@intrinsic
def round_small(_typing: Any, vector: Any) -> Any:
    """Nearest integer, ties to even, of values below 2^22 in magnitude; others come out wrong."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.fsub(builder.fadd(args[0], _constant(_MAGIC)), _constant(_MAGIC))

    return _VECTOR(vector), emit


@intrinsic
def nearest(_typing: Any, vector: Any) -> Any:
    """nearest_int of libggml, for every value: `round_small` below 2^22, beyond what its bits happen to say."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.sitofp(_integers(builder, args[0]), _FLOATS)

    return _VECTOR(vector), emit


@intrinsic
def take_bits(_typing: Any, vector: Any, shift: Any, mask: Any) -> Any:
    """(integer >> shift) & mask of whole numbers below 2^31 in magnitude."""

    def emit(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
        whole = builder.fptosi(args[0], _INTS)
        shifted = builder.ashr(whole, _splat_int(builder, args[1]))
        return builder.sitofp(builder.and_(shifted, _splat_int(builder, args[2])), _FLOATS)

    return _VECTOR(vector, types.int64, types.int64), emit


@intrinsic
def join_bits(_typing: Any, low: Any, high: Any, shift: Any) -> Any:
    """(low | high << shift) & 255 of whole numbers in [0, 256)."""

    def emit(_context: Any, builder: Any, sig: Any, args: Any) -> Any:
        one, other = (builder.fptosi(arg, _INTS) for arg in args[:2])
        joined = builder.or_(one, builder.shl(other, _splat_int(builder, args[2])))
        return builder.sitofp(builder.and_(joined, _whole(255)), _FLOATS)

    return _VECTOR(low, high, types.int64), emit


@intrinsic
def half_bits(_typing: Any, vector: Any) -> Any:
    """Bits of the nearest float16, ties to even, as whole numbers in [0, 65536); finite values beyond it give infinity.

    NaN gives what is no finite number either.
    """

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _INTS)
        size = builder.and_(bits, _whole(0x7FFFFFFF))
        sign = builder.and_(builder.lshr(bits, _whole(16)), _whole(0x8000))
        odd = builder.and_(builder.lshr(size, _whole(13)), _whole(1))
        rounded = builder.add(builder.sub(size, _whole(0x38000000 - 0x0FFF)), odd)  # exponents are biased by 112 less
        normal = builder.lshr(rounded, _whole(13))
        beyond = builder.icmp_signed(">", normal, _whole(0x7C00))
        normal = builder.select(beyond, _whole(0x7C00), normal)
        # the last place of numbers in [0.5, 1) is that of the subnormal float16 numbers, 2^-24
        half = builder.fadd(builder.bitcast(size, _FLOATS), _constant(0.5))
        small = builder.sub(builder.bitcast(half, _INTS), _whole(0x3F000000))
        is_small = builder.icmp_signed("<", size, _whole(0x38800000))
        return builder.sitofp(builder.or_(builder.select(is_small, small, normal), sign), _FLOATS)

    return _VECTOR(vector), emit


@intrinsic
def half_value(_typing: Any, bits: Any) -> Any:
    """The float32 of a finite float16 that is given by its bits, as `half_bits` gives them; other ones come out wrong."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        whole = builder.fptosi(args[0], _INTS)
        size = builder.and_(whole, _whole(0x7FFF))
        sign = builder.shl(builder.and_(whole, _whole(0x8000)), _whole(16))
        normal = builder.add(builder.shl(size, _whole(13)), _whole(0x38000000))
        small = builder.bitcast(builder.fmul(builder.sitofp(size, _FLOATS), _constant(2.0**-24)), _INTS)
        is_small = builder.icmp_signed("<", size, _whole(0x0400))
        return builder.bitcast(builder.or_(builder.select(is_small, small, normal), sign), _FLOATS)

    return _VECTOR(bits), emit


def _transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Sixteen vectors of sixteen into their columns: four rounds in which vectors are interleaved with each other."""
    low = [lane // 2 + LANES * (lane % 2) for lane in range(LANES)]
    masks = [ir.Constant(_SHUFFLE, [lane + shift for lane in low]) for shift in (0, LANES // 2)]
    for _ in range(4):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [builder.shuffle_vector(one, other, mask) for one, other in pairs for mask in masks]
    return rows


@intrinsic
def load_transposed(_typing: Any, source: Any, starts: Any, column: Any, target: Any, place: Any) -> Any:
    """Copies sixteen columns of sixteen rows and turns them: target[place + 16 * c + r] = source[starts[r] + column + c].

    Args of compiled code: source float32, starts 16 int64, column, target float32, place; arrays are contiguous.
    """

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = []
        for lane in range(LANES):
            number = ir.Constant(ir.IntType(64), lane)
            start = builder.load(_address(context, builder, sig.args[1], args[1], number))
            rows.append(_load(builder, _address(context, builder, sig.args[0], args[0], builder.add(start, args[2]))))
        for column_number, vector in enumerate(_transpose(builder, rows)):
            where = builder.add(args[4], ir.Constant(ir.IntType(64), LANES * column_number))
            address = _address(context, builder, sig.args[3], args[3], where)
            builder.store(vector, builder.bitcast(address, _FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(source, starts, types.int64, target, types.int64), emit


@intrinsic
def store_bytes_transposed(_typing: Any, source: Any, place: Any, target: Any, column: Any, width: Any) -> Any:
    """Turns sixteen rows of sixteen numbers in [0, 256) into bytes: target[width * c + column + r] is of row r, lane c.

    Args of compiled code: source float32, place of its first row, target uint8, column, width; arrays are contiguous.
    """

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        rows = []
        for lane in range(LANES):
            where = builder.add(args[1], ir.Constant(ir.IntType(64), LANES * lane))
            floats = _load(builder, _address(context, builder, sig.args[0], args[0], where))
            rows.append(builder.trunc(builder.fptosi(floats, _INTS), _BYTES))
        for lane, vector in enumerate(_transpose(builder, rows)):
            row = builder.mul(args[4], ir.Constant(ir.IntType(64), lane))
            address = _address(context, builder, sig.args[2], args[2], builder.add(row, args[3]))
            builder.store(vector, builder.bitcast(address, _BYTES.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64, types.int64), emit

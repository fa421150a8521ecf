"""Vectors of sixteen float32 for numba: one place of sixteen blocks at once, with the roundings of scalar code.

A sum over a block's weights that runs from the first to the last cannot be vectorized, because its order would change;
the same sum over sixteen blocks side by side can, and every lane has the bits that a scalar loop would have. LLVM
splits the vectors for processors with narrower registers. Nothing is fused and nothing reordered. The functions here
can be called in compiled functions only; `+ - * /` and comparisons work on vectors, comparisons give masks.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

__all__ = [
    "FLOATS", "INTS", "LANES", "MAGIC", "VECTOR", "Mask", "Vector", "absolute", "address_of", "both", "constant",
    "either", "emitted", "load", "load_at", "part", "root", "round_small", "select", "set_lanes", "splat", "store",
    "whole",
]  # fmt: skip

LANES: Final = 16
"""Values of a vector."""

Function = TypeVar("Function", bound=Callable[..., Any])
Vector: TypeAlias = Any
Mask: TypeAlias = Any

FLOATS: Final = ir.VectorType(ir.FloatType(), LANES)
INTS: Final = ir.VectorType(ir.IntType(32), LANES)
_BITS: Final = ir.VectorType(ir.IntType(1), LANES)
MAGIC: Final = 12582912.0  # 1.5 * 2^23: sums with it have no fraction


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Float32x16")


class _MaskType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Bool1x16")


VECTOR: Final = _VectorType()
_MASK: Final = _MaskType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


@register_model(_MaskType)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _BITS)


def part(function: Function) -> Function:
    """Decorates what compiled functions call: one that Python does not call, and that allocates nothing.

    It is compiled into each of them, a good deal faster than one with wrappers, reference counts and a cache.
    """
    options: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
    found: Function = njit(**options)(function)
    return found


def emitted(function: Callable[..., Any]) -> Any:
    """Decorates what gives a signature, and code that emits LLVM's; mypy takes it as a function of anything."""
    return intrinsic(function)


def _operator(function: Callable[..., Any], result: Any, emit: Callable[[Any, Any, Any], Any]) -> None:
    """Makes an operator work on two vectors."""

    class Template(AbstractTemplate):
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
    _operator(_function, VECTOR, _emit)


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


def constant(value: float) -> Any:
    """For code that emits: a vector of one value."""
    return ir.Constant(FLOATS, [ir.Constant(ir.FloatType(), value)] * LANES)


def whole(value: int) -> Any:
    """For code that emits: a vector of one integer."""
    return ir.Constant(INTS, [value] * LANES)


def _splat(builder: Any, scalar: Any) -> Any:
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(INTS, [0] * LANES))


def address_of(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    """For code that emits: the address of an element of a contiguous array."""
    data = cgutils.create_struct_proxy(kind)(context, builder, value=array).data
    return builder.gep(data, [place])


def load_at(builder: Any, address: Any) -> Any:
    """For code that emits: the vector at an address of floats."""
    return builder.load(builder.bitcast(address, FLOATS.as_pointer()), align=4)


@emitted
def splat(_typing: Any, _scalar: Any) -> Any:
    """A float32 in every lane."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return VECTOR(types.float32), emit


@emitted
def load(_typing: Any, array: Any, _place: Any) -> Any:
    """Sixteen values of a contiguous float32 array, from flat index `place`."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return load_at(builder, address_of(context, builder, sig.args[0], *args))

    return VECTOR(array, types.int64), emit


@emitted
def store(_typing: Any, array: Any, _place: Any, vector: Any) -> Any:
    """Writes sixteen values into a contiguous float32 array, from flat index `place`."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = address_of(context, builder, sig.args[0], *args[:2])
        builder.store(args[2], builder.bitcast(address, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), emit


@emitted
def select(_typing: Any, mask: Any, yes: Any, no: Any) -> Any:
    """Each lane of `yes` where the mask is set, otherwise of `no`."""
    return VECTOR(mask, yes, no), lambda _context, builder, _sig, args: builder.select(*args)


@emitted
def both(_typing: Any, left: Any, right: Any) -> Any:
    """Where two masks are set."""
    return _MASK(left, right), lambda _context, builder, _sig, args: builder.and_(*args)


@emitted
def either(_typing: Any, left: Any, right: Any) -> Any:
    """Where one of two masks is set."""
    return _MASK(left, right), lambda _context, builder, _sig, args: builder.or_(*args)


@emitted
def set_lanes(_typing: Any, mask: Any) -> Any:
    """The lanes of a mask that are set, as bits of an integer: bit l is lane l."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), ir.IntType(64))

    return types.int64(mask), emit


@emitted
def absolute(_typing: Any, vector: Any) -> Any:
    """Without the sign."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.and_(builder.bitcast(args[0], INTS), whole(0x7FFFFFFF)), FLOATS)

    return VECTOR(vector), emit


@emitted
def root(_typing: Any, vector: Any) -> Any:
    """Square root, rightly rounded."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(FLOATS, [FLOATS]), f"llvm.sqrt.v{LANES}f32"
        )
        return builder.call(function, args)

    return VECTOR(vector), emit


@emitted
def round_small(_typing: Any, vector: Any) -> Any:
    """Nearest integer, ties to even, of values below 2^22 in magnitude; others come out wrong."""

    def emit(_context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        return builder.fsub(builder.fadd(args[0], constant(MAGIC)), constant(MAGIC))

    return VECTOR(vector), emit

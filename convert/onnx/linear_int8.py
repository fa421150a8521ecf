"""Linear layers that multiply in integers: inputs rounded to 8 bits while the model runs, weights per output row.

The weight lies as (K, N) uint8 codes, the way round that MatMulInteger wants it. Unsigned on both sides, because
products of unsigned and signed bytes saturate on x86 processors without VNNI (onnxruntime, "Quantize ONNX Models",
section on data type selection). onnxruntime 1.31 makes DynamicQuantizeMatMul or MatMulIntegerToFloat of either graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantpress.convert.files import shown
from quantpress.convert.onnx.graph import Dims, GraphBuilder
from quantpress.convert.onnx.linear import LinearWeight, with_last
from quantpress.convert.onnx.nbits_rows import round_rows
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.floats import to_float32

__all__ = ["DynamicInt8", "StaticInt8", "static_grid"]

_ZERO = 128  # of symmetric codes
_STEPS = 255  # of an input's range
_LEAST_SIZE = np.asarray(2.0**-100, np.float32)  # of a token that is divided by it: a token of zeros stays one
_MULTIPLE = 4  # of a block's columns, for `round_rows`


@dataclass(frozen=True, slots=True)
class _Rounded:
    """Inputs in 8 bits: value = size * scale * (code - zero), where each token has its own size, (B, S, 1)."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value
    size: ir.Value


class DynamicInt8:
    """Inputs are rounded by their range of the moment: DynamicQuantizeLinear, MatMulInteger.

    The operator has one range for the whole tensor, all tokens of all texts of a batch and their padding. A single
    token with great values would leave nothing of all others, so each is first divided by its greatest absolute value.
    (SmolLM2-135M, whose first tokens do this: KL divergence from float32 0.03 instead of 0.55, at the same speed.) What
    is left of the dependence is that the range's ends, near -1 and 1, are those of some token of the batch.

    Linears that read the same values share what they are rounded to; an instance serves one graph.
    """

    def __init__(self) -> None:
        """Has seen no values yet."""
        self._rounded: dict[ir.Value, _Rounded] = {}

    def __call__(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value) -> ir.Value:
        """Multiplies; see `LinearKind`. Codes of a quantized source are kept if a row is one group.

        Raises:
            LayoutError: codes in groups, or more columns than sums of 32 bits can take.
        """
        name = weight.node
        stored = _store(builder, weight)
        rounded = self._round(builder, values, weight.shape[1], name)
        dims = with_last(values, weight.shape[0])

        def add(op: str, inputs: list[ir.Value], label: str, shape: Dims | None = dims, **attributes: Any) -> ir.Value:
            return builder.add(op, inputs, name=f"{name}/{label}", dtype="FLOAT", shape=shape, **attributes)

        products = builder.add(
            "MatMulInteger",
            [rounded.codes, stored.codes, rounded.zero, stored.zero_of(builder, per_row=False)],
            name=f"{name}/MatMulInteger",
            dtype="INT32",
            shape=dims,
        )
        wide = add("Cast", [products], "Cast", to=int(ir.DataType.FLOAT))
        # the two scales first: onnxruntime knows this order and makes one node of it
        scales = add("Mul", [rounded.scale, stored.scale], "Scale", [weight.shape[0]])
        result = add("Mul", [add("Mul", [wide, scales], "Mul"), rounded.size], "Size")
        return builder.cast(result, builder.compute, name=f"{name}/Narrow")

    def _round(self, builder: GraphBuilder, values: ir.Value, columns: int, name: str) -> _Rounded:
        if values in self._rounded:
            return self._rounded[values]
        dims, one = with_last(values, columns), with_last(values, 1)

        def add(op: str, inputs: list[ir.Value], shape: Dims | None, **attributes: Any) -> ir.Value:
            return builder.add(op, inputs, name=f"{name}/{op}", dtype="FLOAT", shape=shape, **attributes)

        # an expert may get no tokens, and onnxruntime 1.31 reduces nothing to a wrong shape by an axis below 0
        last = -1 if values.shape is None else len(values.shape) - 1
        wide = builder.cast(values, "FLOAT", name=f"{name}/Widen")  # DynamicQuantizeLinear takes nothing else
        greatest = add("ReduceMax", [add("Abs", [wide], dims), builder.constant([last])], one, keepdims=1)
        size = add("Max", [greatest, builder.constant(_LEAST_SIZE)], one)
        outputs = [("UINT8", dims), ("FLOAT", []), ("UINT8", [])]
        even = add("Div", [wide, size], dims)
        codes, scale, zero = builder.add_many(
            "DynamicQuantizeLinear", [even], outputs, name=f"{name}/DynamicQuantizeLinear"
        )
        self._rounded[values] = _Rounded(codes, scale, zero, size)
        return self._rounded[values]


class StaticInt8:
    """Inputs are rounded by ranges found beforehand: QuantizeLinear, DequantizeLinear on both sides, MatMul.

    Linears that read the same values share what they are rounded to; an instance serves one graph.
    """

    def __init__(self, ranges: Mapping[tuple[str, int], tuple[float, float]]) -> None:
        """Takes the least and greatest input of every linear, by slot and layer."""
        self._ranges = ranges
        self._rounded: dict[tuple[ir.Value, float, int], ir.Value] = {}

    def __call__(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value) -> ir.Value:
        """Multiplies; see `LinearKind`. Codes of a quantized source are kept if a row is one group.

        Raises:
            InputError: no range is known, or it is not finite.
            LayoutError: codes in groups, or more columns than sums of 32 bits can take.
        """
        name = weight.node
        stored = _store(builder, weight)
        rounded = self._round(builder, weight, values, name)
        matrix = builder.add(
            "DequantizeLinear",
            [stored.codes, stored.scale, stored.zero_of(builder, per_row=True)],
            name=f"{name}/DequantizeLinear",
            dtype="FLOAT",
            shape=weight.shape[::-1],
            axis=1,
        )
        dims = with_last(values, weight.shape[0])
        result = builder.add("MatMul", [rounded, matrix], name=f"{name}/MatMul", dtype="FLOAT", shape=dims)
        return builder.cast(result, builder.compute, name=f"{name}/Narrow")

    def _round(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value, name: str) -> ir.Value:
        known = self._ranges.get((weight.slot, weight.layer))
        if known is None or not np.isfinite(known).all():
            found = (
                "no range is known of its inputs" if known is None else f"its inputs go from {known[0]} to {known[1]}"
            )
            raise InputError(f"{weight.source}: {shown(weight.name)}: {found}, static int8 needs a finite one")
        scale, zero = static_grid(*known)
        key = (values, float(scale), int(zero))
        if key not in self._rounded:
            grid = [builder.constant(scale), builder.constant(zero)]
            # in float32 also where the model computes in float16: onnxruntime 1.31 has no integer product for that
            wide = builder.cast(values, "FLOAT", name=f"{name}/Widen")
            dims = with_last(values, weight.shape[1])
            rounded = builder.add("QuantizeLinear", [wide, *grid], name=f"{name}/Quantize", dtype="UINT8", shape=dims)
            self._rounded[key] = builder.add(
                "DequantizeLinear", [rounded, *grid], name=f"{name}/Dequantize", dtype="FLOAT", shape=dims
            )
        return self._rounded[key]


def static_grid(low: float, high: float) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Gives scale and zero, scalars, of 8-bit codes for a range, which is widened to include 0.

    As DynamicQuantizeLinear is defined (ONNX operators, version 11), in float64, where no range is too wide.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.asarray((high - low) / _STEPS, np.float32)
    if not scale > 0:  # nothing but zeros was seen
        return np.asarray(1, np.float32), np.asarray(0, np.uint8)
    zero = np.clip(np.rint(-low / float(scale)), 0, _STEPS)
    return scale, np.asarray(zero, np.uint8)


@dataclass(frozen=True, slots=True)
class _Stored:
    """Codes (K, N) uint8, scale (N,) float32 and zero (N,) uint8, None where it is 128 everywhere."""

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None

    def zero_of(self, builder: GraphBuilder, *, per_row: bool) -> ir.Value:
        """Gives the zero, one number or one per row."""
        if self.zero is not None:
            return self.zero
        rows = int(self.scale.shape[0]) if per_row and self.scale.shape is not None else None  # type: ignore[arg-type]
        return builder.constant(np.full(() if rows is None else rows, _ZERO, np.uint8))


def _store(builder: GraphBuilder, weight: LinearWeight) -> _Stored:
    """Stores a weight: its codes where it has them, else what it is rounded to."""
    rows, columns = weight.shape
    form = None if weight.codes is None else weight.codes.form
    if form is not None and not form.per_row:
        raise LayoutError(
            f"{weight.source}: {shown(weight.name)}: {form} has scales for groups of columns, and int8 dynamic and"
            " static have one per row; use --int8 weight-only"
        )
    greatest = _ZERO if form is None or form.symmetric else _STEPS
    if columns * greatest * _STEPS > np.iinfo(np.int32).max:
        raise LayoutError(
            f"{weight.source}: {shown(weight.name)}: sums over {columns} columns outgrow 32 bits; use"
            " --int8 weight-only"
        )
    name = weight.name.removesuffix(".weight")
    tensors = [
        StoredTensor(f"{name}.qweight", "UINT8", (columns, rows)),
        StoredTensor(f"{name}.scales", "FLOAT", (rows,)),
    ]
    zeros = form is not None and (not form.symmetric or form.bits != 8)
    if zeros:
        tensors.append(StoredTensor(f"{name}.qzeros", "UINT8", (rows,)))
    tasks = partial(_rounded, weight) if form is None else partial(_exact, weight, zeros)
    group = StoredGroup(
        tuple(tensors), tasks, f"INT{8 if form is None else form.bits}", weight.name, weight.held + 2 * rows * columns
    )
    codes, scale, *zero = builder.store(group)
    return _Stored(codes, scale, zero[0] if zero else None)


def _exact(weight: LinearWeight, zeros: bool) -> Iterator[Callable[[], Piece]]:
    def read() -> Piece:
        if weight.codes is None:
            raise TypeError(f"{weight.name} has no codes")
        tensor = weight.codes.read()
        parts: list[NDArray[Any]] = [np.ascontiguousarray(tensor.codes.T), to_float32(tensor.scale).reshape(-1)]
        return (*parts, tensor.zeros().reshape(-1)) if zeros else tuple(parts)

    yield read


def _rounded(weight: LinearWeight) -> Iterator[Callable[[], Piece]]:
    ranges = weight.row_ranges()
    whole = _Transpose(weight.shape, len(ranges))
    for start, stop in ranges:
        yield partial(_round_rows, weight, whole, start, stop)
    yield lambda: (whole.take(), np.empty(0, np.float32))


def _round_rows(weight: LinearWeight, whole: _Transpose, start: int, stop: int) -> Piece:
    rows, columns = weight.shape
    codes: NDArray[np.uint8] | None = None
    try:
        size = columns + -columns % _MULTIPLE
        packed, scale = round_rows(weight.read_rows(start, stop), 8, size, symmetric=True, compute="FLOAT")
        codes = packed[:, 0, :columns]
    except LayoutError as error:
        raise InputError(f"{weight.source}: tensor {shown(weight.name)}: {error}") from error
    finally:
        whole.put(start, stop, codes)
    return np.empty((0, rows), np.uint8), scale.reshape(-1)


@dataclass
class _Transpose:
    """Takes rows in any order and gives the columns when all are there; held once, for the file wants whole columns."""

    shape: tuple[int, int]
    parts: int
    _columns: NDArray[np.uint8] | None = field(default=None, repr=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def put(self, start: int, stop: int, rows: NDArray[np.uint8] | None) -> None:
        """Takes rows `[start, stop)`; None where they could not be made, so that nobody waits for them."""
        with self._changed:
            if self._columns is None:
                self._columns = np.empty(self.shape[::-1], np.uint8)
            columns = self._columns
        if rows is not None:
            columns[:, start:stop] = rows.T
        with self._changed:
            self.parts -= 1
            self._changed.notify_all()

    def take(self) -> NDArray[np.uint8]:
        """Waits for the rows and gives the columns, (K, N). Tasks begin in order, so all that it waits for run."""
        with self._changed:
            self._changed.wait_for(lambda: self.parts == 0)
            columns, self._columns = self._columns, None
        return np.empty(self.shape[::-1], np.uint8) if columns is None else columns

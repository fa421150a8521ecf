"""Linear layers with 4- or 8-bit weights in operators of the standard: DequantizeLinear, Transpose, MatMul.

The codes lie as (N, K), blocks along K. The other way round, (K, N), onnxruntime 1.31 makes MatMulNBits of the nodes by
itself, but with inputs rounded to 8 bits unless the session says otherwise (session.qdq_matmulnbits_accuracy_level,
default 4): results are off by half a percent and nothing in the file can change that. This way it dequantizes the whole
weight on every run, which is slow and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantpress.convert.files import shown
from quantpress.convert.onnx.exact_codes import column_order, exact_scale, with_columns
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.linear import LinearWeight, with_last
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor
from quantpress.convert.quantized import LazyQuantized
from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import to_float32
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor, group_count

__all__ = ["DequantizeLinear", "StoredCodes"]


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """A weight of N rows of K columns as DequantizeLinear takes it.

    Attributes:
        codes: (N, K) INT4 or INT8 if symmetric, their zero is 0; else UINT4 or UINT8.
        scale: (N, blocks) in the activations' type; the last block may be shorter.
        zero: (N, blocks) in the type of the codes; None if symmetric.
        block_size: columns of a block.
        order: (K,) int64 column of the weight that each stored column is; None where they are in place.
    """

    codes: ir.Value
    scale: ir.Value
    zero: ir.Value | None
    block_size: int
    order: ir.Value | None


@dataclass(frozen=True, slots=True)
class DequantizeLinear:
    """Weights that are dequantized where they are used; `LinearKind`.

    Attributes:
        bits: 4 or 8, of weights that are rounded here; those of a quantized source keep their codes, 2 and 3 bits in 4.
        block_size: columns that share a scale, of weights that are rounded here.
        symmetric: no zeros, of weights that are rounded here.
    """

    bits: int
    block_size: int
    symmetric: bool

    def __call__(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value) -> ir.Value:
        """Stores a weight and multiplies with it; see `LinearKind`."""
        return self.multiply(builder, weight, values, self.store(builder, weight))

    def store(self, builder: GraphBuilder, weight: LinearWeight) -> StoredCodes:
        """Stores a weight: its codes where it has them, else what it is rounded to.

        Raises:
            LayoutError: columns in an order that blocks cannot follow.
        """
        rows, columns = weight.shape
        order = None
        if weight.codes is None:
            scale_type = "F16" if builder.compute == "FLOAT16" else "F32"
            grid = Grid(self.bits, self.block_size, self.symmetric, scale_type)
            bits, size, symmetric = self.bits, grid.group(columns), self.symmetric
            tasks = partial(_rounded, weight, grid)
            held = weight.held
        else:
            form = weight.codes.form
            bits, size, symmetric = form.bits, min(form.group_size, columns), form.symmetric
            order = _named(weight, lambda codes: column_order(codes.read())) if form.ordered else None
            tasks = partial(_exact, weight, order, builder.numpy_type)
            held = weight.held + rows * columns * 2
        kind = f"{'' if symmetric else 'U'}INT{8 if bits == 8 else 4}"
        blocks = (rows, group_count(columns, size))
        tensors = [
            StoredTensor(f"{weight.name}_codes", kind, (rows, columns)),
            StoredTensor(f"{weight.name}_scale", builder.compute, blocks),
        ]
        if not symmetric:
            tensors.append(StoredTensor(f"{weight.name}_zero", kind, blocks))
        group = StoredGroup(tuple(tensors), tasks, f"INT{bits}{_group_name(size, columns)}", weight.name, held)
        codes, scale, *zero = builder.store(group)
        placed = None if order is None else builder.constant(order, f"{weight.name}_order")
        return StoredCodes(codes, scale, zero[0] if zero else None, size, placed)

    def multiply(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value, stored: StoredCodes) -> ir.Value:
        """Multiplies `values` (B, S, K) with a stored weight; gives (B, S, N)."""
        rows, columns = weight.shape
        name = _path(weight)
        if stored.order is not None:
            dims = with_last(values, columns)
            values = builder.add("Gather", [values, stored.order], name=f"{name}/Gather", shape=dims, axis=-1)
        matrix = _dequantize(builder, stored, [stored.codes, stored.scale, stored.zero], 1, name, [rows, columns])
        turned = builder.add("Transpose", [matrix], name=f"{name}/Transpose", shape=[columns, rows], perm=[1, 0])
        return builder.add("MatMul", [values, turned], name=f"{name}/MatMul", shape=with_last(values, rows))

    def look_up(self, builder: GraphBuilder, weight: LinearWeight, ids: ir.Value, stored: StoredCodes) -> ir.Value:
        """Gives the rows `ids` (B, S) int64 of a stored weight, (B, S, K) in the activations' type.

        Raises:
            LayoutError: codes of 4 bits, which Gather does not take in onnxruntime, or columns out of place.
        """
        if stored.codes.dtype not in (ir.DataType.UINT8, ir.DataType.INT8) or stored.order is not None:
            raise LayoutError(
                f"{weight.source}: {shown(weight.name)}: an embedding in operators of the standard has 8 bits, or is"
                " not quantized; use --token-embedding-type int8 or fp16"
            )
        parts: list[ir.Value | None] = []
        for part, label in ((stored.codes, "codes"), (stored.scale, "scale"), (stored.zero, "zero")):
            if part is None or part.dtype is None or part.shape is None:
                continue
            dims, dtype = _looked_up(ids, int(part.shape[1])), part.dtype.name  # type: ignore[arg-type]
            name = f"/embed_tokens/Gather_{label}"
            parts.append(builder.add("Gather", [part, ids], name=name, dtype=dtype, shape=dims, axis=0))
        return _dequantize(builder, stored, parts, 2, "/embed_tokens", _looked_up(ids, weight.shape[1]))


def _dequantize(
    builder: GraphBuilder, stored: StoredCodes, parts: list[ir.Value | None], axis: int, name: str,
    shape: list[int | str] | None,
) -> ir.Value:  # fmt: skip
    path = f"{name}/DequantizeLinear"
    return builder.add("DequantizeLinear", parts, name=path, shape=shape, axis=axis, block_size=stored.block_size)


def _looked_up(ids: ir.Value, last: int) -> list[int | str] | None:
    if ids.shape is None:
        return None
    return [*(size if isinstance(size, int) else str(size.value) for size in ids.shape), last]


def _rounded(weight: LinearWeight, grid: Grid) -> Iterator[Callable[[], Piece]]:
    for start, stop in _even(weight.row_ranges()):
        yield partial(_round_rows, weight, grid, start, stop)


def _even(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Moves ends to even rows: two values of 4 bits share a byte, and in rows of odd length also across their ends."""
    begun, last = 0, ranges[-1][1] if ranges else 0
    for _, stop in ranges:
        end = min(stop + stop % 2, last)
        if begun < end:
            yield begun, end
        begun = end


def _round_rows(weight: LinearWeight, grid: Grid, start: int, stop: int) -> Piece:
    rows = to_float32(weight.read_rows(start, stop))
    return _piece(_named(weight, lambda _: round_to_nearest(rows, grid)))


def _exact(
    weight: LinearWeight, order: NDArray[np.int64] | None, dtype: np.dtype[Any]
) -> Iterator[Callable[[], Piece]]:
    def read() -> Piece:
        tensor = with_columns(_named(weight, lambda codes: codes.read()), order)
        return _piece(tensor, _named(weight, lambda _: exact_scale(tensor.scale, dtype)))

    yield read


def _piece(tensor: QuantizedTensor, scale: NDArray[Any] | None = None) -> Piece:
    bits = 8 if tensor.bits == 8 else 4
    codes = tensor.codes - np.uint8(1 << (tensor.bits - 1)) if tensor.symmetric else tensor.codes
    zero = () if tensor.zero is None else (_packed(tensor.zero, bits),)
    return (_packed(codes, bits), tensor.scale if scale is None else scale, *zero)


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Puts values of 4 bits, signed or not, two to a byte, the first in the low bits (onnx: TensorProto.raw_data)."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if bits == 8:
        return flat
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] & np.uint8(15)) | flat[1::2] << np.uint8(4)


def _named(weight: LinearWeight, make: Callable[[LazyQuantized], Any]) -> Any:
    """Adds the weight's name to what is wrong with its layout."""
    try:
        return make(weight.codes)  # type: ignore[arg-type]
    except LayoutError as error:
        raise LayoutError(f"{weight.source}: {shown(weight.name)}: {error}") from error


def _group_name(size: int, columns: int) -> str:
    return "" if size >= columns else f" g{size}"


def _path(weight: LinearWeight) -> str:
    stem = weight.slot.removesuffix(".weight")
    return f"/{stem}" if weight.layer < 0 else f"/layers.{weight.layer}/{stem}"

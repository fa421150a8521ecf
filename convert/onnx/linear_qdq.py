"""Linear layers with 4- or 8-bit weights in operators of the standard: DequantizeLinear, Transpose, MatMul.

The codes lie as (N, K), blocks along K. The other way round, (K, N), onnxruntime 1.31 makes MatMulNBits of the nodes by
itself, but with inputs rounded to 8 bits unless the session says otherwise (session.qdq_matmulnbits_accuracy_level,
default 4): results are off by half a percent and nothing in the file can change that. This way it dequantizes the whole
weight on every run, which is slow and exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantpress.convert.files import shown
from quantpress.convert.onnx.exact_codes import column_order, exact_scale, with_columns
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.linear import LinearWeight, with_last
from quantpress.convert.onnx.matmul_nbits import pack_bits
from quantpress.convert.onnx.nbits_rows import round_rows
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.qtensor import QuantizedForm, group_count

__all__ = ["DequantizeLinear", "StoredCodes"]


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """A weight of N rows of K columns as DequantizeLinear takes it.

    Attributes:
        codes: (N, K) INT4 or INT8 if symmetric, their zero is 0; else UINT4 or UINT8.
        scale: (N, blocks) in the activations' type; the last block may be shorter.
        zero: (N, blocks) in the type of the codes; None if symmetric.
        block_size: columns of a block.
        order: (K,) INT32 column of the weight that each stored column is; None where they are in place.
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
        note: for `StoredGroup`.
    """

    bits: int
    block_size: int
    symmetric: bool
    note: str = ""
    _stored: dict[str, StoredCodes] = field(default_factory=dict, repr=False)

    def __call__(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value) -> ir.Value:
        """Stores a weight and multiplies with it; see `LinearKind`."""
        return self.multiply(builder, weight, values, self.store(builder, weight))

    def store(self, builder: GraphBuilder, weight: LinearWeight) -> StoredCodes:
        """Gives the weight in codes, stored when it is asked for first; a kind serves one graph."""
        if weight.name not in self._stored:
            form = QuantizedForm(weight.shape, self.bits, min(self.block_size, weight.shape[1]), self.symmetric)
            self._stored[weight.name] = self._store(builder, weight, weight.codes.form if weight.codes else form)
        return self._stored[weight.name]

    def _store(self, builder: GraphBuilder, weight: LinearWeight, form: QuantizedForm) -> StoredCodes:
        (rows, columns), name = weight.shape, weight.name.removesuffix(".weight")
        size = min(form.group_size, columns)
        kind = f"{'' if form.symmetric else 'U'}INT{8 if form.bits == 8 else 4}"
        blocks = (rows, group_count(columns, size))
        parts = {
            "codes": StoredTensor(f"{name}.qweight", kind, (rows, columns)),
            "scale": StoredTensor(f"{name}.scales", builder.compute, blocks),
        }
        if not form.symmetric:
            parts["zero"] = StoredTensor(f"{name}.qzeros", kind, blocks)
        ordered = form.ordered and not form.per_row
        if ordered:
            parts["order"] = StoredTensor(f"{name}.order", "INT32", (columns,))
        if weight.codes is None:
            tasks, held = partial(self._rounded, weight, builder.compute), weight.held
        else:
            tasks, held = partial(_exact, weight, builder.numpy_type, ordered), weight.held + rows * columns * 2
        label = f"INT{form.bits} g{size}{'' if form.symmetric else ' asym'}"
        group = StoredGroup(tuple(parts.values()), tasks, label, weight.name, held, self.note)
        found = dict(zip(parts, builder.store(group), strict=True))
        return StoredCodes(found["codes"], found["scale"], found.get("zero"), size, found.get("order"))

    def _rounded(self, weight: LinearWeight, compute: str) -> Iterator[Callable[[], Piece]]:
        for start, stop in _even(weight.row_ranges()):
            yield partial(self._round_rows, weight, compute, start, stop)

    def _round_rows(self, weight: LinearWeight, compute: str, start: int, stop: int) -> Piece:
        rows, columns = weight.read_rows(start, stop), weight.shape[1]
        try:
            packed, scale, *zeros = round_rows(
                rows, self.bits, self.block_size, symmetric=self.symmetric, compute=compute
            )
        except LayoutError as error:
            raise InputError(f"{weight.source}: tensor {shown(weight.name)}: {error}") from error
        codes = _unpacked(packed.reshape(len(rows), -1), self.bits)[:, :columns]
        zero = _unpacked(zeros[0], self.bits)[:, : scale.shape[1]] if zeros else None
        return _piece(codes, scale, zero, self.bits)

    def multiply(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value, stored: StoredCodes) -> ir.Value:
        """Multiplies `values` (B, S, K) with a stored weight; gives (B, S, N)."""
        rows, columns = weight.shape
        name = weight.node
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
            name = f"{weight.node}/Gather_{label}"
            parts.append(builder.add("Gather", [part, ids], name=name, dtype=dtype, shape=dims, axis=0))
        return _dequantize(builder, stored, parts, 2, weight.node, _looked_up(ids, weight.shape[1]))


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


def _even(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Moves ends to even rows: two values of 4 bits share a byte, and in rows of odd length also across their ends."""
    begun, last = 0, ranges[-1][1] if ranges else 0
    for _, stop in ranges:
        end = min(stop + stop % 2, last)
        if begun < end:
            yield begun, end
        begun = end


def _exact(weight: LinearWeight, dtype: np.dtype[Any], ordered: bool) -> Iterator[Callable[[], Piece]]:
    def read() -> Piece:
        if weight.codes is None:
            raise TypeError(f"{weight.name} has no codes")
        try:
            tensor = weight.codes.read()
            order = column_order(tensor)
            scale = exact_scale(tensor.scale, dtype)
        except LayoutError as error:
            raise LayoutError(f"{weight.source}: {shown(weight.name)}: {error}") from error
        piece = _piece(with_columns(tensor, order).codes, scale, tensor.zero, tensor.bits)
        if not ordered:
            return piece
        return (*piece, np.asarray(np.arange(tensor.columns) if order is None else order, np.int32))

    yield read


def _piece(codes: NDArray[np.uint8], scale: NDArray[Any], zero: NDArray[np.uint8] | None, bits: int) -> Piece:
    """Gives rows as they are stored; where there are no zeros, codes are signed and their zero is 0."""
    width = 8 if bits == 8 else 4
    if zero is None:
        return _packed(codes - np.uint8(1 << (bits - 1)), width), scale
    return _packed(codes, width), scale, _packed(zero, width)


def _packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Puts values of 4 bits two to a byte, low bits first, across the ends of rows (onnx: TensorProto.raw_data)."""
    flat = np.ascontiguousarray(values).reshape(-1)
    return flat if bits == 8 else pack_bits(flat & np.uint8(15), bits)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Undoes `pack_bits` for 4 and 8 bits."""
    if bits == 8:
        return packed
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], -1).reshape(*packed.shape[:-1], -1)

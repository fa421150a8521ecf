"""Linear layers whose weights are integer codes in blocks: onnxruntime's MatMulNBits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from quantpress.convert.files import shown
from quantpress.convert.onnx.graph import MICROSOFT, GraphBuilder
from quantpress.convert.onnx.linear import LinearWeight, with_last
from quantpress.convert.onnx.matmul_nbits import nbits_block_size
from quantpress.convert.onnx.nbits_rows import CodePieces, round_rows
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.qtensor import QuantizedForm, group_count

__all__ = ["GREATEST_BLOCK", "MatMulNBits", "NBits"]

GREATEST_BLOCK = 128  # of codes that have longer groups: CUDA's kernels go no further


@dataclass(frozen=True, slots=True)
class NBits:
    """A weight that is stored in codes.

    Attributes:
        shape: (N, K).
        bits: 2, 4 or 8.
        block_size: columns that share a scale; a row is filled up to whole blocks.
        codes: (N, blocks, block_size * bits / 8) UINT8, low bits first.
        scales: (N, blocks) in the activations' type.
        zeros: (N, ceil(blocks * bits / 8)) UINT8; None where every zero is 2^(bits - 1).
        order: (K,) INT32, what column of the input each column is multiplied with; None where they are in order.
    """

    shape: tuple[int, int]
    bits: int
    block_size: int
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    order: ir.Value | None


@dataclass(frozen=True, slots=True)
class MatMulNBits:
    """Rounds a weight to the nearest codes, or stores the codes it has.

    Attributes:
        bits: 4 or 8; a weight that has codes keeps their number of bits, 3 being stored in 4.
        block_size: columns that share a scale.
        symmetric: no zeros are stored.
        accuracy_level: as `OnnxOptions.accuracy_level`.
        note: for `StoredGroup`.
    """

    bits: int
    block_size: int
    symmetric: bool
    accuracy_level: int = 0
    note: str = ""
    _stored: dict[str, NBits] = field(default_factory=dict, repr=False)

    def __call__(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value) -> ir.Value:
        """Multiplies; see `LinearKind`."""
        stored = self.store(builder, weight)
        if stored.order is not None:
            dims = with_last(values, weight.shape[1])
            values = builder.add("Gather", [values, stored.order], name=f"{weight.node}/Order", shape=dims, axis=-1)
        return builder.add(
            "MatMulNBits",
            [values, stored.codes, stored.scales, stored.zeros],
            domain=MICROSOFT,
            name=f"{weight.node}/MatMulNBits",
            shape=with_last(values, weight.shape[0]),
            N=weight.shape[0],
            K=weight.shape[1],
            bits=stored.bits,
            block_size=stored.block_size,
            accuracy_level=self.accuracy_level,
        )

    def store(self, builder: GraphBuilder, weight: LinearWeight) -> NBits:
        """Gives the weight in codes, stored when it is asked for first; a kind serves one graph.

        Raises:
            LayoutError: codes in groups that do not divide into blocks.
        """
        if weight.name not in self._stored:
            form = QuantizedForm(weight.shape, self.bits, min(self.block_size, weight.shape[1]), self.symmetric)
            try:
                self._stored[weight.name] = self._store(builder, weight, weight.codes.form if weight.codes else form)
            except LayoutError as error:
                raise LayoutError(f"{weight.source}: {shown(weight.name)}: {error}") from error
        return self._stored[weight.name]

    def _store(self, builder: GraphBuilder, weight: LinearWeight, form: QuantizedForm) -> NBits:
        (rows, columns), bits = weight.shape, 4 if form.bits == 3 else form.bits
        size = nbits_block_size(form.group_size, columns, self._greatest)
        blocks = group_count(columns, size)
        name = weight.name.removesuffix(".weight")
        shapes = {
            "codes": StoredTensor(f"{name}.qweight", "UINT8", (rows, blocks, size * bits // 8)),
            "scales": StoredTensor(f"{name}.scales", builder.compute, (rows, blocks)),
        }
        if not form.symmetric:
            shapes["zeros"] = StoredTensor(f"{name}.qzeros", "UINT8", (rows, -(-blocks * bits // 8)))
        ordered = form.ordered and not form.per_row
        if ordered:
            shapes["order"] = StoredTensor(f"{name}.order", "INT32", (columns,))
        if weight.codes is None:
            tasks = partial(self._rounded, weight, builder.compute, size)
        else:
            tasks = partial(self._exact, weight, builder.numpy_type, ordered)
        label = f"INT{form.bits} g{size if form.group_size >= columns else form.group_size}"
        label += "" if form.symmetric else " asym"
        group = StoredGroup(tuple(shapes.values()), tasks, label, weight.name, weight.held, self.note)
        found = dict(zip(shapes, builder.store(group), strict=True))
        return NBits(weight.shape, bits, size, found["codes"], found["scales"], found.get("zeros"), found.get("order"))

    @property
    def _greatest(self) -> int:
        return max(GREATEST_BLOCK, self.block_size)

    def _rounded(self, weight: LinearWeight, compute: str, size: int) -> Iterator[Callable[[], Piece]]:
        def piece(start: int, stop: int) -> Piece:
            rows = weight.read_rows(start, stop)
            try:
                return round_rows(rows, self.bits, size, symmetric=self.symmetric, compute=compute)
            except LayoutError as error:
                raise InputError(f"{weight.source}: tensor {shown(weight.name)}: {error}") from error

        return (partial(piece, start, stop) for start, stop in weight.row_ranges())

    def _exact(self, weight: LinearWeight, dtype: np.dtype[Any], ordered: bool) -> Iterator[Callable[[], Piece]]:
        codes = CodePieces(weight, dtype, self._greatest, ordered=ordered)
        return (partial(codes.piece, start, stop) for start, stop in weight.row_ranges())

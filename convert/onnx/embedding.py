"""Rows that are looked up: token embeddings, also those whose bytes are the head's, and learned positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from quantpress.convert.files import shown
from quantpress.convert.onnx.graph import MICROSOFT, GraphBuilder
from quantpress.convert.onnx.linear import LinearWeight, with_last
from quantpress.convert.onnx.linear_nbits import NBits
from quantpress.convert.onnx.stored import StoredTensor
from quantpress.quant.errors import LayoutError

if TYPE_CHECKING:
    from quantpress.convert.onnx.linear_float import FloatLinear

__all__ = ["look_up_blocks", "look_up_floats"]


def look_up_floats(builder: GraphBuilder, kind: FloatLinear, weight: LinearWeight, index: ir.Value) -> ir.Value:
    """Gives rows of a weight that is stored in floats.

    Args:
        builder: the graph.
        kind: what stores it; one that is stored already is not stored again.
        weight: N rows of K columns.
        index: (B, S) int64.

    Returns:
        (B, S, K) in the activations' type.
    """
    table, node, dims = kind.store(builder, weight), weight.node, _looked_up(index, weight.shape[1])
    rows = builder.add("Gather", [table, index], name=f"{node}/Gather", dtype=kind.dtype, shape=dims, axis=0)
    return builder.cast(rows, builder.compute, name=f"{node}/Cast")


def look_up_blocks(builder: GraphBuilder, stored: NBits, weight: LinearWeight, index: ir.Value) -> ir.Value:
    """Gives rows of a weight that is stored for MatMulNBits, read from the same bytes.

    GatherBlockQuantized takes uint8 codes as (N, bytes of a row), low bits first, and scales and zeros just as
    MatMulNBits does; without zeros they are 2^(bits - 1) as well (onnxruntime, docs/ContribOperators.md).

    Args:
        builder: the graph.
        stored: where its codes are.
        weight: N rows of K columns.
        index: (B, S) int64.

    Returns:
        (B, S, K) in the activations' type: scale * (code - zero).

    Raises:
        LayoutError: the columns are not in order.
    """
    if stored.order is not None:
        raise LayoutError(
            f"{weight.source}: {shown(weight.name)}: rows whose columns have an order of their own (g_idx) cannot be"
            " looked up; use --token-embedding-type fp16 or fp32"
        )
    placed, node, columns = builder.placed(stored.codes), weight.node, weight.shape[1]
    rows, blocks, width = placed.tensor.shape
    table = StoredTensor(f"{placed.tensor.name}_rows", "UINT8", (rows, blocks * width))
    padded = blocks * stored.block_size
    values = builder.add(
        "GatherBlockQuantized",
        [builder.stored_as(placed, table), index, stored.scales, stored.zeros],
        domain=MICROSOFT,
        name=f"{node}/GatherBlockQuantized",
        shape=_looked_up(index, padded),
        bits=stored.bits,
        block_size=stored.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    return values if padded == columns else _first(builder, values, columns, f"{node}/Slice")


def _first(builder: GraphBuilder, values: ir.Value, columns: int, name: str) -> ir.Value:
    """Gives the first columns of (B, S, K)."""
    ends = [builder.constant(np.asarray([each], np.int64)) for each in (0, columns, -1)]
    return builder.add("Slice", [values, *ends], name=name, shape=with_last(values, columns))


def _looked_up(index: ir.Value, columns: int) -> list[int | str] | None:
    if index.shape is None:
        return None
    return [*(each if isinstance(each, int) else str(each.value) for each in index.shape), columns]

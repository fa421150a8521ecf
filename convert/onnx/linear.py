"""A linear layer's weight as the graph's builders take it, and what turns one into nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from quantpress.convert.checkpoint import Array
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.quantized import LazyQuantized

__all__ = ["LinearKind", "LinearWeight", "with_last"]


@dataclass(frozen=True, slots=True)
class LinearWeight:
    """The weight of a linear layer, of the head, or an embedding: N rows of K columns, whatever the checkpoint's order.

    Attributes:
        slot: "attn_q.weight"; "output.weight" for the head also where it is tied.
        layer: number of its layer, -1 outside.
        name: what its initializers are called after: the checkpoint's name of the weight.
        shape: (N, K).
        dtype: type in the checkpoint, a key of `DTYPES`.
        source: the file it comes from, for messages.
        read_rows: `(start, stop)` -> (n, K) rows in `dtype` or float32, C-contiguous; values are checked to be finite
            here and an error names file and tensor. Row ranges may be read from several threads.
        row_ranges: gives the ranges to read together, about a million values each; the same for any thread count.
        held: bytes that `read_rows` holds between calls (a transposed weight is read whole).
        codes: its codes where the checkpoint is quantized, N x K in the same order of rows; else None.
        router: it chooses experts, and is kept as exact as the precision allows.
    """

    slot: str
    layer: int
    name: str
    shape: tuple[int, int]
    dtype: str
    source: str
    read_rows: Callable[[int, int], Array] = field(repr=False)
    row_ranges: Callable[[], list[tuple[int, int]]] = field(repr=False)
    held: int = 0
    codes: LazyQuantized | None = field(default=None, repr=False)
    router: bool = False

    @property
    def node(self) -> str:
        """What its nodes are called after: "/layers.0/attn_q", "/output"."""
        module = self.slot.removesuffix(".weight")
        return f"/layers.{self.layer}/{module}" if self.layer >= 0 else f"/{module}"


class LinearKind(Protocol):
    """A way to store a weight and to multiply with it."""

    def __call__(self, builder: GraphBuilder, weight: LinearWeight, values: ir.Value) -> ir.Value:
        """Adds what multiplies `values` with a weight.

        Args:
            builder: the graph; takes the stored tensors too.
            weight: N rows of K columns.
            values: (B, S, K) in `builder.compute`.

        Returns:
            (B, S, N) in `builder.compute`, no bias added.

        Raises:
            LayoutError: the weight cannot be stored in this way; the message names the weight and what would do.
        """
        ...


def with_last(values: ir.Value, size: int) -> list[int | str] | None:
    """Gives the shape of a value with another last dimension; None where it is not known."""
    if values.shape is None:
        return None
    return [each if isinstance(each, int) else str(each.value) for each in values.shape[:-1]] + [size]

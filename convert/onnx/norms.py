"""Norms of the graph, alone or together with the addition that precedes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from quantpress.convert.onnx.graph import MICROSOFT, Dims, GraphBuilder

__all__ = ["Norm", "Stream", "normalize", "normalize_heads", "normalize_sum", "summed"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm and its weights.

    Attributes:
        kind: "rms" or "layer".
        eps: added to the variance.
        weight: (n,), in the type of the activations; (heads, n) where every head has its own.
        bias: like the weight, or None.
        name: where it stands, "/layers.0/attn_norm".
    """

    kind: str
    eps: float
    weight: ir.Value
    bias: ir.Value | None
    name: str


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream between two norms: `hidden`, to which `pending` has still to be added unless it is None."""

    hidden: ir.Value
    pending: ir.Value | None = None


def normalize(builder: GraphBuilder, values: ir.Value, norm: Norm, shape: Dims) -> ir.Value:
    """Normalizes the last dimension.

    Args:
        builder: the graph.
        values: (..., n).
        norm: how.
        shape: of `values`.
    """
    inputs = [values, norm.weight, norm.bias]
    if norm.kind == "layer":
        name = f"{norm.name}/LayerNormalization"
        return builder.add("LayerNormalization", inputs, name=name, shape=shape, axis=-1, epsilon=norm.eps)
    if builder.opset >= 23:
        name = f"{norm.name}/RMSNormalization"
        return builder.add("RMSNormalization", inputs, name=name, shape=shape, axis=-1, epsilon=norm.eps)
    return _by_root_mean_square(builder, values, norm, shape)


def normalize_heads(
    builder: GraphBuilder, values: ir.Value, norm: Norm, *, heads: int, head_dim: int, own: bool = False
) -> ir.Value:
    """Normalizes each head of (B, S, heads * head_dim) by itself; `own` with weights (heads, head_dim)."""
    split, joined = (0, 0, heads, head_dim), (0, 0, heads * head_dim)
    known = ("batch_size", "sequence_length")
    shape = (*known, heads, head_dim)
    apart = builder.add("Reshape", [values, builder.constant(split)], name=f"{norm.name}/Split", shape=shape)
    if own:
        ones = builder.constant(np.ones(head_dim, builder.numpy_type))
        apart = normalize(builder, apart, replace(norm, weight=ones, bias=None), shape)
        for op, other in (("Mul", norm.weight), ("Add", norm.bias)):
            if other is not None:
                apart = builder.add(op, [apart, other], name=f"{norm.name}/{op}", shape=shape)
    else:
        apart = normalize(builder, apart, norm, shape)
    return builder.add(
        "Reshape", [apart, builder.constant(joined)], name=f"{norm.name}/Join", shape=(*known, heads * head_dim)
    )


def normalize_sum(builder: GraphBuilder, stream: Stream, norm: Norm, shape: Dims) -> tuple[ir.Value, ir.Value]:
    """Adds what is pending and normalizes the sum.

    Args:
        builder: the graph.
        stream: the residual and what is to be added to it.
        norm: how to normalize.
        shape: (B, S, hidden).

    Returns:
        The normalized sum and the sum.
    """
    if stream.pending is None:
        return normalize(builder, stream.hidden, norm, shape), stream.hidden
    if builder.standard:
        total = builder.add("Add", [stream.hidden, stream.pending], name=f"{norm.name}/Add", shape=shape)
        return normalize(builder, total, norm, shape), total
    op = "SkipLayerNormalization" if norm.kind == "layer" else "SkipSimplifiedLayerNormalization"
    known = (builder.compute, shape)
    normal, _, _, total = builder.add_many(
        op,
        [stream.pending, stream.hidden, norm.weight, norm.bias],
        [known, None, None, known],
        domain=MICROSOFT,
        name=f"{norm.name}/{op}",
        epsilon=norm.eps,
    )
    return normal, total


def summed(builder: GraphBuilder, stream: Stream, shape: Dims, name: str) -> ir.Value:
    """Adds what is pending; `name` is that of the node without the operator."""
    if stream.pending is None:
        return stream.hidden
    return builder.add("Add", [stream.hidden, stream.pending], name=f"{name}/Add", shape=shape)


def _by_root_mean_square(builder: GraphBuilder, values: ir.Value, norm: Norm, shape: Dims) -> ir.Value:
    """Writes RMSNormalization in operators that were there before it; onnxruntime knows the pattern."""
    mean = (*list(shape)[:-1], 1)
    wide = builder.cast(values, "FLOAT", shape=shape)

    def step(op: str, inputs: Sequence[ir.Value], size: Dims, **attributes: Any) -> ir.Value:
        return builder.add(op, inputs, name=f"{norm.name}/{op}", dtype="FLOAT", shape=size, **attributes)

    squared = step("Pow", [wide, builder.constant(np.asarray(2, np.float32))], shape)
    variance = step("ReduceMean", [squared, builder.constant([-1])], mean, keepdims=1)
    shifted = step("Add", [variance, builder.constant(np.asarray(norm.eps, np.float32))], mean)
    scaled = step("Div", [wide, step("Sqrt", [shifted], mean)], shape)
    narrow = builder.cast(scaled, builder.compute, shape=shape)
    return builder.add("Mul", [narrow, norm.weight], name=f"{norm.name}/Mul", shape=shape)

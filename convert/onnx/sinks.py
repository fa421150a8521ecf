"""Attention sinks in operators of the standard: a key and a value of zeros, whose score is in the mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quantpress.convert.onnx.frame import Frame

__all__ = ["by_heads", "mask_with_sinks", "with_zeros"]

_BATCH, _NEW, _ALL, _MORE = "batch_size", "sequence_length", "total_sequence_length", "sequence_length_and_sink"


def by_heads(frame: Frame, values: ir.Value, heads: int, name: str) -> ir.Value:
    """Gives (B, heads, S, head_dim) from (B, S, heads * head_dim)."""
    builder, size = frame.builder, frame.hyper.head_dim
    target, apart = builder.constant((0, 0, heads, size)), (_BATCH, _NEW, heads, size)
    values = builder.add("Reshape", [values, target], name=f"{name}/Reshape", shape=apart)
    turned = (_BATCH, heads, _NEW, size)
    return builder.add("Transpose", [values], name=f"{name}/Transpose", shape=turned, perm=[0, 2, 1, 3])


def with_zeros(frame: Frame, values: ir.Value, name: str) -> ir.Value:
    """Gives keys or values (B, kv_heads, T + 1, head_dim), the last one zeros, from (B, kv_heads, T, head_dim)."""
    hyper, builder = frame.hyper, frame.builder
    shape = (_BATCH, hyper.kv_heads, _MORE, hyper.head_dim)
    return builder.add("Pad", [values, builder.constant((0, 0, 0, 0, 0, 0, 1, 0))], name=f"{name}/Pad", shape=shape)


def mask_with_sinks(frame: Frame, layer: int, seen: ir.Value) -> ir.Value:
    """Gives (B, heads, S, T + 1): what is added to scores, and in the last column the scores of the layer's sinks.

    Args:
        frame: the model.
        layer: number of a layer that has sinks.
        seen: (B, 1, S, T), or with all heads.
    """
    builder, heads = frame.builder, frame.hyper.heads
    name, each = f"/layers.{layer}/attn/sinks", (1, heads, 1, 1)
    sinks = frame.weights.vector("attn_sinks.weight", layer)
    assert sinks is not None, "the layer has sinks"
    sinks = builder.add("Reshape", [sinks, builder.constant(each)], name=f"{name}/Reshape", shape=each)
    wide, column = (_BATCH, heads, _NEW, _ALL), (_BATCH, heads, _NEW, 1)
    zeros = builder.constant(np.zeros(each, builder.numpy_type))
    mask = builder.add("Add", [seen, zeros], name=f"{name}/Add", shape=wide)
    ends = [builder.constant([end]) for end in (0, 1, 3)]
    first = builder.add("Slice", [mask, *ends], name=f"{name}/Slice", shape=column)
    first = builder.add("Mul", [first, zeros], name=f"{name}/Mul", shape=column)
    scores = builder.add("Add", [first, sinks], name=f"{name}/Add", shape=column)
    return builder.add("Concat", [mask, scores], name=f"{name}/Concat", shape=(_BATCH, heads, _NEW, _MORE), axis=3)

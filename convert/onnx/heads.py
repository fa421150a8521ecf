"""Queries, keys and values of a layer: projected, normalized, clipped and turned as far as the attention does not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.norms import normalize, normalize_heads
from quantpress.convert.onnx.rotary import turn

__all__ = ["Heads", "project"]


@dataclass(frozen=True, slots=True)
class Heads:
    """What an attention operator reads.

    Attributes:
        query: (B, S, heads * head_dim); with the keys and values behind them where `key` is None.
        key, value: (B, S, kv_heads * head_dim), or None both.
    """

    query: ir.Value
    key: ir.Value | None
    value: ir.Value | None


def project(frame: Frame, layer: int, values: ir.Value, *, packed: bool) -> Heads:
    """Adds the projections and what follows them.

    Args:
        frame: the model.
        layer: number of the layer.
        values: (B, S, hidden).
        packed: the attention takes q, k and v one after another in one tensor, if nothing else wants them apart.
    """
    traits, turned = frame.traits(layer), frame.turn(layer)
    if traits.fused_qkv:
        fused = frame.weights.linear(values, "attn_qkv.weight", layer)
        if packed and not traits.head_norms and (turned is None or turned.rows is None):
            return Heads(_clipped(frame, fused, f"/layers.{layer}/attn"), None, None)
        query, key, value = _split(frame, layer, fused)
    else:
        query, key, value = (
            frame.weights.linear(values, f"attn_{part}.weight", layer) for part in ("q", "k", "v")
        )  # fmt: skip
    query, key = (_placed(frame, layer, part, each) for part, each in (("q", query), ("k", key)))
    return Heads(query, key, _clipped(frame, value, f"/layers.{layer}/attn/v"))


def _split(frame: Frame, layer: int, fused: ir.Value) -> tuple[ir.Value, ...]:
    dims, builder = frame.hyper.dims, frame.builder
    sizes = (dims["q"], dims["kv"], dims["kv"])
    return builder.add_many(
        "Split",
        [fused, builder.constant(sizes)],
        [(builder.compute, ("batch_size", "sequence_length", size)) for size in sizes],
        name=f"/layers.{layer}/attn/Split",
        axis=-1,
    )


def _clipped(frame: Frame, values: ir.Value, name: str) -> ir.Value:
    limit, builder = frame.hyper.clip_qkv, frame.builder
    if limit is None:
        return values
    ends = [builder.constant(np.asarray(end, builder.numpy_type)) for end in (-limit, limit)]
    return builder.add("Clip", [values, *ends], name=f"{name}/Clip", shape=builder.shape_of(values))


def _placed(frame: Frame, layer: int, part: str, values: ir.Value) -> ir.Value:
    """Normalizes, clips and turns q or k; turning may be left to GroupQueryAttention."""
    hyper, builder, kind = frame.hyper, frame.builder, frame.traits(layer).head_norms
    heads = hyper.heads if part == "q" else hyper.kv_heads
    name = f"/layers.{layer}/attn/{part}"
    if kind == "whole":
        shape = ("batch_size", "sequence_length", heads * hyper.head_dim)
        values = normalize(builder, values, frame.norm(f"attn_{part}_norm", layer), shape)
    values = _clipped(frame, values, name)
    if kind in ("each", "own"):
        norm = frame.norm(f"attn_{part}_norm", layer)
        values = normalize_heads(builder, values, norm, heads=heads, head_dim=hyper.head_dim, own=kind == "own")
    turned = frame.turn(layer)
    if turned is None or turned.rows is None:
        return values
    return turn(builder, values, turned.table, turned.rows, heads=heads, head_dim=hyper.head_dim, name=name)

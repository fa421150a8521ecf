"""Queries, keys and values of attention over a latent: what convert/latent.py computes in torch, node by node."""

from __future__ import annotations

import onnx_ir as ir

from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.heads import Heads
from quantpress.convert.onnx.norms import normalize
from quantpress.convert.onnx.rotary import turn

__all__ = ["latent_heads"]

_BATCH, _NEW = "batch_size", "sequence_length"


def latent_heads(frame: Frame, layer: int, values: ir.Value) -> Heads:
    """Adds the projections; keys and values are made in full.

    Args:
        frame: the model; its positions have rows of a table.
        layer: number of the layer.
        values: (B, S, hidden).
    """
    hyper, builder, latent = frame.hyper, frame.builder, frame.hyper.latent
    assert latent is not None, "the layer's attention is over a latent"
    name, heads = f"/layers.{layer}/attn", hyper.heads
    plain, turned = _apart(
        frame, _query(frame, layer, values), (latent.plain, latent.turned), heads=heads, name=f"{name}/q"
    )
    both = frame.weights.linear(values, "attn_kv_a_mqa.weight", layer)
    low, shared = _split(frame, both, (latent.rank, latent.turned), f"{name}/kv")
    low = normalize(builder, low, frame.norm("attn_kv_a_norm", layer), (_BATCH, _NEW, latent.rank))
    key = frame.weights.linear(low, "attn_k_b.weight", layer)
    value = frame.weights.linear(low, "attn_v_b.weight", layer)
    query = _together(frame, plain, _turned(frame, layer, turned, heads, f"{name}/q"), f"{name}/q")
    shared = _turned(frame, layer, shared, 1, f"{name}/k")
    shared = builder.add(
        "Tile",
        [shared, builder.constant((1, 1, heads))],
        name=f"{name}/k/Tile",
        shape=(_BATCH, _NEW, heads * latent.turned),
    )
    return Heads(query, _together(frame, key, shared, f"{name}/k"), value)


def _query(frame: Frame, layer: int, values: ir.Value) -> ir.Value:
    if "attn_q.weight" in frame.traits(layer).slots:
        return frame.weights.linear(values, "attn_q.weight", layer)
    low = frame.weights.linear(values, "attn_q_a.weight", layer)
    shape = (_BATCH, _NEW, frame.hyper.dims["query_rank"])
    low = normalize(frame.builder, low, frame.norm("attn_q_a_norm", layer), shape)
    return frame.weights.linear(low, "attn_q_b.weight", layer)


def _turned(frame: Frame, layer: int, values: ir.Value, heads: int, name: str) -> ir.Value:
    """Turns all values of (B, S, heads * turned)."""
    place, latent = frame.turn(layer), frame.hyper.latent
    assert latent is not None, "the layer's attention is over a latent"
    assert place is not None, "positions turn a part of every head"
    assert place.rows is not None, "nothing but a row of the table turns it"
    return turn(frame.builder, values, place.table, place.rows, heads=heads, head_dim=latent.turned, name=name)


def _apart(frame: Frame, values: ir.Value, sizes: tuple[int, int], *, heads: int, name: str) -> tuple[ir.Value, ...]:
    """Gives the first and the last values of each head of (B, S, heads * sum(sizes)), (B, S, heads * size) each."""
    split = _split(frame, _reshaped(frame, values, heads, sum(sizes), f"{name}/Heads"), sizes, name, heads)
    return tuple(
        _reshaped(frame, each, 0, heads * size, f"{name}/Flat") for each, size in zip(split, sizes, strict=True)
    )


def _together(frame: Frame, first: ir.Value, last: ir.Value, name: str) -> ir.Value:
    """Undoes `_apart`."""
    latent, heads = frame.hyper.latent, frame.hyper.heads
    assert latent is not None, "the layer's attention is over a latent"
    size = latent.plain + latent.turned
    parts = [
        _reshaped(frame, each, heads, width, f"{name}/Heads")
        for each, width in ((first, latent.plain), (last, latent.turned))
    ]
    joined = frame.builder.add("Concat", parts, name=f"{name}/Concat", shape=(_BATCH, _NEW, heads, size), axis=-1)
    return _reshaped(frame, joined, 0, heads * size, f"{name}/Flat")


def _reshaped(frame: Frame, values: ir.Value, heads: int, size: int, name: str) -> ir.Value:
    """Gives (B, S, heads, size), or (B, S, size) where `heads` is 0."""
    last = (heads, size) if heads else (size,)
    target = frame.builder.constant((0, 0, *last))
    return frame.builder.add("Reshape", [values, target], name=name, shape=(_BATCH, _NEW, *last))


def _split(frame: Frame, values: ir.Value, sizes: tuple[int, int], name: str, heads: int = 0) -> tuple[ir.Value, ...]:
    known = (_BATCH, _NEW, heads) if heads else (_BATCH, _NEW)
    outputs = [(frame.builder.compute, (*known, size)) for size in sizes]
    return frame.builder.add_many(
        "Split", [values, frame.builder.constant(sizes)], outputs, name=f"{name}/Split", axis=-1
    )

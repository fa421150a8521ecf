"""Attention of one layer of the graph, with its cache.

Operators: com.microsoft.GroupQueryAttention (onnxruntime's docs/ContribOperators.md), or Attention of the standard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from quantpress.convert.arch.spec import Hyperparameters, Rope
from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.graph import MICROSOFT
from quantpress.convert.onnx.norms import normalize_heads
from quantpress.convert.onnx.rotary import switch_of, turn

__all__ = ["Cached", "attention", "is_grouped", "turns_itself"]


@dataclass(frozen=True, slots=True)
class Cached:
    """Keys and values of one layer, (B, kv_heads, tokens, head_dim)."""

    key: ir.Value
    value: ir.Value


def is_grouped(hyper: Hyperparameters, *, standard: bool) -> bool:
    """Whether GroupQueryAttention computes this model: its kernels want heads of a multiple of eight values."""
    return not standard and hyper.head_dim % 8 == 0


def turns_itself(hyper: Hyperparameters, rope: Rope) -> bool:
    """Whether GroupQueryAttention can turn q and k.

    Its kernels want heads of a multiple of sixteen values of which a multiple of sixteen is turned, and they know no
    table with a second part.
    """
    return hyper.head_dim % 16 == 0 and rope.dim % 16 == 0 and switch_of(rope, hyper.context) is None


def attention(frame: Frame, layer: int, values: ir.Value, past: Cached) -> tuple[ir.Value, Cached]:
    """Adds attention from the normalized hidden states to what the output projection reads.

    Args:
        frame: the model.
        layer: number of the layer.
        values: (B, S, hidden).
        past: keys and values of the tokens before.

    Returns:
        (B, S, heads * head_dim), and the keys and values of all tokens.
    """
    grouped = is_grouped(frame.hyper, standard=frame.builder.standard)
    turned = frame.turn(layer)
    if frame.traits.fused_qkv:
        fused = frame.weights.linear(values, "attn_qkv.weight", layer)
        if grouped and not frame.traits.head_norms and (turned is None or turned.rows is None):
            return _grouped(frame, layer, (fused, None, None), past)
        query, key, value = _split(frame, layer, fused)
    else:
        query, key, value = (
            frame.weights.linear(values, f"attn_{part}.weight", layer) for part in ("q", "k", "v")
        )  # fmt: skip
    query, key = (_placed(frame, layer, part, each) for part, each in (("q", query), ("k", key)))
    return (_grouped if grouped else _standard)(frame, layer, (query, key, value), past)


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


def _placed(frame: Frame, layer: int, part: str, values: ir.Value) -> ir.Value:
    """Normalizes and turns the heads of q or k, where this is not left to GroupQueryAttention."""
    hyper, builder = frame.hyper, frame.builder
    heads = hyper.heads if part == "q" else hyper.kv_heads
    if frame.traits.head_norms:
        norm = frame.norm(f"attn_{part}_norm", layer)
        values = normalize_heads(builder, values, norm, heads=heads, head_dim=hyper.head_dim)
    turned = frame.turn(layer)
    if turned is None or turned.rows is None:
        return values
    name = f"/layers.{layer}/attn/{part}"
    return turn(builder, values, turned.table, turned.rows, heads=heads, head_dim=hyper.head_dim, name=name)


def _grouped(
    frame: Frame, layer: int, inputs: tuple[ir.Value, ir.Value | None, ir.Value | None], past: Cached
) -> tuple[ir.Value, Cached]:
    hyper, places, turned = frame.hyper, frame.places, frame.turn(layer)
    tables: list[ir.Value] = []
    attributes = _attributes(hyper, layer)
    if turned is not None and turned.rows is None:
        tables = [turned.table.cosine, turned.table.sine]
        attributes["do_rotary"] = 1
    if frame.slides(layer) and hyper.sliding_window is not None:
        attributes["local_window_size"] = hyper.sliding_window
    result, key, value = frame.builder.add_many(
        "GroupQueryAttention",
        [*inputs, past.key, past.value, places.last, places.total, *tables],
        _outputs(frame),
        domain=MICROSOFT,
        name=f"/layers.{layer}/attn/GroupQueryAttention",
        num_heads=hyper.heads,
        kv_num_heads=hyper.kv_heads,
        **attributes,
    )
    return result, Cached(key, value)


def _standard(
    frame: Frame, layer: int, inputs: tuple[ir.Value, ir.Value, ir.Value], past: Cached
) -> tuple[ir.Value, Cached]:
    hyper, places = frame.hyper, frame.places
    seen = places.seen_near if frame.slides(layer) else places.seen
    result, key, value = frame.builder.add_many(
        "Attention",
        [*inputs, seen, past.key, past.value],
        _outputs(frame),
        name=f"/layers.{layer}/attn/Attention",
        q_num_heads=hyper.heads,
        kv_num_heads=hyper.kv_heads,
        **_attributes(hyper, layer),
    )
    return result, Cached(key, value)


def _attributes(hyper: Hyperparameters, layer: int) -> dict[str, Any]:
    """Gives the scale of the scores, and their cap if there is one."""
    scale = hyper.attention_scale / (layer + 1 if hyper.inverse_layer_scale else 1)
    return {"scale": scale} if hyper.attention_softcap is None else {"scale": scale, "softcap": hyper.attention_softcap}


def _outputs(frame: Frame) -> list[tuple[str, tuple[int | str, ...]]]:
    hyper, kind = frame.hyper, frame.builder.compute
    cached = ("batch_size", hyper.kv_heads, "total_sequence_length", hyper.head_dim)
    return [(kind, ("batch_size", "sequence_length", hyper.dims["q"])), (kind, cached), (kind, cached)]

"""Attention of one layer of the graph, with its cache.

Operators: com.microsoft.GroupQueryAttention and MultiHeadAttention (onnxruntime's docs/ContribOperators.md), or
Attention of the standard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from quantpress.convert.arch.spec import Hyperparameters, Rope
from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.graph import MICROSOFT
from quantpress.convert.onnx.heads import Heads, project
from quantpress.convert.onnx.latent import latent_heads
from quantpress.convert.onnx.rotary import switch_of
from quantpress.convert.onnx.sinks import by_heads, mask_with_sinks, with_zeros

__all__ = ["Cached", "attention", "is_grouped", "is_multi_head", "turns_itself", "value_size"]


@dataclass(frozen=True, slots=True)
class Cached:
    """Keys and values of one layer, (B, kv_heads, tokens, values per head)."""

    key: ir.Value
    value: ir.Value


def is_grouped(hyper: Hyperparameters, *, standard: bool) -> bool:
    """Whether GroupQueryAttention computes this model: its kernels want heads of a multiple of eight values."""
    return not standard and hyper.causal and hyper.latent is None and hyper.head_dim % 8 == 0


def is_multi_head(hyper: Hyperparameters, *, standard: bool) -> bool:
    """Whether MultiHeadAttention computes this model: it keeps no keys and has as many heads of them as of queries."""
    plain = hyper.attention_softcap is None and not hyper.inverse_layer_scale
    return not standard and not hyper.causal and hyper.heads == hyper.kv_heads and plain


def turns_itself(hyper: Hyperparameters, rope: Rope) -> bool:
    """Whether GroupQueryAttention can turn q and k.

    Its kernels want heads of a multiple of sixteen values of which a multiple of sixteen is turned, and they know no
    table with a second part.
    """
    return hyper.head_dim % 16 == 0 and rope.dim % 16 == 0 and switch_of(rope, hyper.context) is None


def attention(frame: Frame, layer: int, values: ir.Value, past: Cached | None) -> tuple[ir.Value, Cached | None]:
    """Adds attention from the normalized hidden states to what the output projection reads.

    Args:
        frame: the model.
        layer: number of the layer.
        values: (B, S, hidden).
        past: keys and values of the tokens before; None for a model that keeps none.

    Returns:
        (B, S, heads * head_dim), and the keys and values of all tokens.
    """
    standard = frame.builder.standard
    grouped = is_grouped(frame.hyper, standard=standard)
    if frame.traits(layer).latent:
        heads = latent_heads(frame, layer, values)
    else:
        heads = project(frame, layer, values, packed=grouped)
    if past is None:
        return (_multi_head if is_multi_head(frame.hyper, standard=standard) else _without_past)(frame, layer, heads)
    if grouped:
        return _grouped(frame, layer, heads, past)
    return (_standard_with_sinks if frame.traits(layer).sinks else _standard)(frame, layer, heads, past)


def _grouped(frame: Frame, layer: int, heads: Heads, past: Cached) -> tuple[ir.Value, Cached]:
    hyper, places, turned = frame.hyper, frame.places, frame.turn(layer)
    tables: list[ir.Value | None] = [None, None]
    attributes = _attributes(hyper, layer)
    if turned is not None and turned.rows is None:
        tables = [turned.table.cosine, turned.table.sine]
        attributes["do_rotary"] = 1
        if turned.table.interleaved:
            attributes["rotary_interleaved"] = 1
    if frame.slides(layer) and hyper.sliding_window is not None:
        attributes["local_window_size"] = hyper.sliding_window
    sinks = frame.weights.vector("attn_sinks.weight", layer)
    result, key, value = frame.builder.add_many(
        "GroupQueryAttention",
        [heads.query, heads.key, heads.value, past.key, past.value, places.last, places.total, *tables, None,
         places.distance, sinks],
        _outputs(frame),
        domain=MICROSOFT,
        name=f"/layers.{layer}/attn/GroupQueryAttention",
        num_heads=hyper.heads,
        kv_num_heads=hyper.kv_heads,
        **attributes,
    )  # fmt: skip
    return result, Cached(key, value)


def _standard(frame: Frame, layer: int, heads: Heads, past: Cached) -> tuple[ir.Value, Cached]:
    hyper, places = frame.hyper, frame.places
    result, key, value = frame.builder.add_many(
        "Attention",
        [
            heads.query,
            heads.key,
            heads.value,
            places.seen_near if frame.slides(layer) else places.seen,
            past.key,
            past.value,
        ],
        _outputs(frame),
        name=f"/layers.{layer}/attn/Attention",
        q_num_heads=hyper.heads,
        kv_num_heads=hyper.kv_heads,
        **_attributes(hyper, layer),
    )
    return result, Cached(key, value)


def _standard_with_sinks(frame: Frame, layer: int, heads: Heads, past: Cached) -> tuple[ir.Value, Cached]:
    hyper, builder, places, name = frame.hyper, frame.builder, frame.places, f"/layers.{layer}/attn"
    kept, longer = _outputs(frame)[1][1], list[ir.Value]()
    presents = list[ir.Value]()
    for part, old, new in (("k", past.key, heads.key), ("v", past.value, heads.value)):
        assert new is not None, "q, k and v are apart"
        both = [old, by_heads(frame, new, hyper.kv_heads, f"{name}/{part}")]
        presents.append(builder.add("Concat", both, name=f"{name}/{part}/Concat", shape=kept, axis=2))
        longer.append(with_zeros(frame, presents[-1], f"{name}/{part}"))
    seen = places.seen_near if frame.slides(layer) else places.seen
    assert seen is not None, "it was asked for"
    result = builder.add(
        "Attention",
        [by_heads(frame, heads.query, hyper.heads, f"{name}/q"), *longer, mask_with_sinks(frame, layer, seen)],
        name=f"{name}/Attention",
        shape=("batch_size", hyper.heads, "sequence_length", hyper.head_dim),
        **_attributes(hyper, layer),
    )
    apart = ("batch_size", "sequence_length", hyper.heads, hyper.head_dim)
    result = builder.add("Transpose", [result], name=f"{name}/Transpose", shape=apart, perm=[0, 2, 1, 3])
    flat = builder.constant((0, 0, hyper.dims["q"]))
    result = builder.add("Reshape", [result, flat], name=f"{name}/Join", shape=_outputs(frame)[0][1])
    return result, Cached(*presents)


def _multi_head(frame: Frame, layer: int, heads: Heads) -> tuple[ir.Value, None]:
    hyper, places = frame.hyper, frame.places
    result = frame.builder.add(
        "MultiHeadAttention",
        [heads.query, heads.key, heads.value, None, places.kept, places.distance],
        domain=MICROSOFT,
        name=f"/layers.{layer}/attn/MultiHeadAttention",
        shape=_outputs(frame)[0][1],
        num_heads=hyper.heads,
        scale=hyper.attention_scale,
    )
    return result, None


def _without_past(frame: Frame, layer: int, heads: Heads) -> tuple[ir.Value, None]:
    hyper = frame.hyper
    result = frame.builder.add(
        "Attention",
        [heads.query, heads.key, heads.value, frame.places.seen],
        name=f"/layers.{layer}/attn/Attention",
        shape=_outputs(frame)[0][1],
        q_num_heads=hyper.heads,
        kv_num_heads=hyper.kv_heads,
        **_attributes(hyper, layer),
    )
    return result, None


def _attributes(hyper: Hyperparameters, layer: int) -> dict[str, Any]:
    """Gives the scale of the scores, and their cap if there is one."""
    scale = hyper.attention_scale / (layer + 1 if hyper.inverse_layer_scale else 1)
    return {"scale": scale} if hyper.attention_softcap is None else {"scale": scale, "softcap": hyper.attention_softcap}


def _outputs(frame: Frame) -> list[tuple[str, tuple[int | str, ...]]]:
    hyper, kind = frame.hyper, frame.builder.compute
    key, value = (
        ("batch_size", hyper.kv_heads, "total_sequence_length", size) for size in (hyper.head_dim, value_size(hyper))
    )
    return [(kind, ("batch_size", "sequence_length", hyper.dims["attended"])), (kind, key), (kind, value)]


def value_size(hyper: Hyperparameters) -> int:
    """Gives the values per head in the cache of values."""
    return hyper.head_dim if hyper.latent is None else hyper.latent.value

"""One decoder layer of the graph: what convert/layer.py computes in torch, node by node."""

from __future__ import annotations

import onnx_ir as ir

from quantpress.convert.onnx.attention import Cached, attention
from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.graph import MICROSOFT
from quantpress.convert.onnx.norms import Stream, normalize, normalize_sum

__all__ = ["add_layer"]


def add_layer(frame: Frame, layer: int, stream: Stream, past: Cached) -> tuple[Stream, Cached]:
    """Adds a layer.

    Args:
        frame: the model.
        layer: its number, from 0.
        stream: what the layer before left.
        past: keys and values of earlier tokens.

    Returns:
        What the next layer reads, and the keys and values of all tokens.
    """
    builder, traits, hyper = frame.builder, frame.traits, frame.hyper
    normal, hidden = normalize_sum(builder, stream, frame.norm("attn_norm", layer), frame.shape)
    attended, present = attention(frame, layer, normal, past)
    attended = frame.weights.linear(attended, "attn_output.weight", layer)
    if traits.post_norms:
        attended = normalize(builder, attended, frame.norm("post_attention_norm", layer), frame.shape)
    if hyper.parallel_residual:
        normal = normalize(builder, hidden, frame.norm("ffn_norm", layer), frame.shape)
        both = [_mlp(frame, layer, normal), attended]
        return Stream(hidden, builder.add("Add", both, name=f"/layers.{layer}/Add", shape=frame.shape)), present
    normal, hidden = normalize_sum(builder, Stream(hidden, attended), frame.norm("ffn_norm", layer), frame.shape)
    passed = _mlp(frame, layer, normal)
    if traits.post_norms:
        passed = normalize(builder, passed, frame.norm("post_ffw_norm", layer), frame.shape)
    return Stream(hidden, passed), present


def _mlp(frame: Frame, layer: int, values: ir.Value) -> ir.Value:
    builder, weights = frame.builder, frame.weights
    shape, name = ("batch_size", "sequence_length", frame.hyper.intermediate), f"/layers.{layer}/mlp"
    up = weights.linear(values, "ffn_up.weight", layer)
    if not frame.traits.gate:
        return weights.linear(_activated(frame, up, name), "ffn_down.weight", layer)
    if frame.traits.gate == "separate":
        gate = weights.linear(values, "ffn_gate.weight", layer)
    else:
        outputs = [(builder.compute, shape)] * 2
        gate, up = builder.add_many("Split", [up], outputs, name=f"{name}/Split", axis=-1, num_outputs=2)
    inner = builder.add("Mul", [_activated(frame, gate, name), up], name=f"{name}/Mul", shape=shape)
    return weights.linear(inner, "ffn_down.weight", layer)


def _activated(frame: Frame, values: ir.Value, name: str) -> ir.Value:
    builder, kind = frame.builder, frame.hyper.activation
    shape = ("batch_size", "sequence_length", frame.hyper.intermediate)
    if kind == "relu":
        return builder.add("Relu", [values], name=f"{name}/Relu", shape=shape)
    if kind in ("gelu", "gelu_tanh"):
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        return builder.add("Gelu", [values], name=f"{name}/Gelu", shape=shape, approximate=approximate)
    if not builder.standard:
        return builder.add("QuickGelu", [values], domain=MICROSOFT, name=f"{name}/QuickGelu", shape=shape, alpha=1.0)
    share = builder.add("Sigmoid", [values], name=f"{name}/Sigmoid", shape=shape)
    return builder.add("Mul", [values, share], name=f"{name}/Mul", shape=shape)

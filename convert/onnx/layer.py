"""One decoder layer of the graph: what convert/layer.py computes in torch, node by node."""

from __future__ import annotations

import onnx_ir as ir

from quantpress.convert.onnx.attention import Cached, attention
from quantpress.convert.onnx.experts import experts
from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.mlp import mlp
from quantpress.convert.onnx.norms import Stream, normalize, normalize_sum, summed

__all__ = ["add_layer"]


def add_layer(frame: Frame, layer: int, stream: Stream, past: Cached | None) -> tuple[Stream, Cached | None]:
    """Adds a layer.

    Args:
        frame: the model.
        layer: its number, from 0.
        stream: what the layer before left.
        past: keys and values of earlier tokens; None for a model that keeps none.

    Returns:
        What the next layer reads, and the keys and values of all tokens.
    """
    traits, name = frame.traits(layer), f"/layers.{layer}"
    normal, hidden = _normal(frame, layer, stream, traits.attention_norm, "attn")
    attended, present = attention(frame, layer, normal, past)
    attended = frame.weights.linear(attended, "attn_output.weight", layer)
    if traits.post_norms:
        attended = normalize(frame.builder, attended, frame.norm("post_attention_norm", layer), frame.shape)
    attended = _scaled(frame, attended, name)
    if frame.hyper.parallel_residual:
        if traits.mlp_norm != traits.attention_norm:
            normal, hidden = _normal(frame, layer, Stream(hidden), traits.mlp_norm, "mlp")
        both = [_passed(frame, layer, normal), attended]
        pending = frame.builder.add("Add", both, name=f"{name}/Add", shape=frame.shape)
        return _joined(frame, layer, Stream(hidden, pending), "layer_output_norm"), present
    stream = _joined(frame, layer, Stream(hidden, attended), "attn_output_norm")
    normal, hidden = _normal(frame, layer, stream, traits.mlp_norm, "mlp")
    return _joined(frame, layer, Stream(hidden, _passed(frame, layer, normal)), "layer_output_norm"), present


def _normal(frame: Frame, layer: int, stream: Stream, norm: str, name: str) -> tuple[ir.Value, ir.Value]:
    """Gives what attention or MLP reads, and the residual; both are the same where no norm is before it."""
    if norm:
        return normalize_sum(frame.builder, stream, frame.norm(norm, layer), frame.shape)
    hidden = summed(frame.builder, stream, frame.shape, f"/layers.{layer}/{name}")
    return hidden, hidden


def _joined(frame: Frame, layer: int, stream: Stream, norm: str) -> Stream:
    """Normalizes the sum itself where the family does so."""
    if not frame.traits(layer).sum_norms:
        return stream
    return Stream(normalize_sum(frame.builder, stream, frame.norm(norm, layer), frame.shape)[0])


def _passed(frame: Frame, layer: int, values: ir.Value) -> ir.Value:
    """Gives what the MLP, or the layer's experts, add to the residual."""
    traits = frame.traits(layer)
    if traits.experts:
        passed = experts(frame, layer, values)
    else:
        passed = mlp(frame, layer, values, gate=traits.gate, size=frame.hyper.intermediate)
    if traits.post_norms:
        passed = normalize(frame.builder, passed, frame.norm("post_ffw_norm", layer), frame.shape)
    return _scaled(frame, passed, f"/layers.{layer}/mlp")


def _scaled(frame: Frame, values: ir.Value, name: str) -> ir.Value:
    scale = frame.hyper.residual_scale
    if scale == 1.0:
        return values
    return frame.builder.add("Mul", [values, frame.builder.constant(scale)], name=f"{name}/Scale", shape=frame.shape)

"""The first layer's input: rows of tokens, positions and token types, scaled, projected and normalized."""

from __future__ import annotations

import onnx_ir as ir

from quantpress.convert.onnx.frame import Frame
from quantpress.convert.onnx.norms import normalize

__all__ = ["embedded"]


def embedded(frame: Frame, slots: frozenset[str], types: ir.Value | None) -> ir.Value:
    """Adds the embedding.

    Args:
        frame: the model.
        slots: of all weights that the model has.
        types: (B, S) int64 token types; None where the model has none.

    Returns:
        (B, S, hidden).
    """
    builder, hyper, places = frame.builder, frame.hyper, frame.places
    hidden = frame.weights.embed(places.ids)
    if hyper.embedding_width:
        hidden = frame.weights.linear(hidden, "token_embd_in.weight", -1)
    if hyper.embedding_scale != 1.0:
        scale = builder.constant(hyper.embedding_scale)
        hidden = builder.add("Mul", [hidden, scale], name="/embedding/Mul", shape=frame.shape)
    if "position_embd.weight" in slots:
        hidden = _plus(frame, hidden, frame.weights.rows("position_embd.weight", _positions(frame)))
    if types is not None:
        hidden = _plus(frame, hidden, frame.weights.rows("token_types.weight", types))
    if "token_embd_norm.weight" in slots:
        hidden = normalize(builder, hidden, frame.norm("token_embd_norm", -1), frame.shape)
    return hidden


def _positions(frame: Frame) -> ir.Value:
    builder, positions = frame.builder, frame.places.positions
    assert positions is not None, "positions were asked for"
    if not frame.hyper.position_offset:
        return positions
    offset, shape = builder.constant(frame.hyper.position_offset), ("batch_size", "sequence_length")
    return builder.add("Add", [positions, offset], name="/embedding/Offset", dtype="INT64", shape=shape)


def _plus(frame: Frame, hidden: ir.Value, rows: ir.Value) -> ir.Value:
    return frame.builder.add("Add", [hidden, rows], name="/embedding/Add", shape=frame.shape)

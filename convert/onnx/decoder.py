"""The whole decoder as an ONNX graph, from token ids and attention mask to logits and the extended cache."""

from __future__ import annotations

import onnx_ir as ir

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.convert.onnx.attention import Cached, is_grouped, turns_itself
from quantpress.convert.onnx.frame import Frame, GraphWeights, Turn, ropes_of
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.layer import add_layer
from quantpress.convert.onnx.norms import Stream, normalize_sum
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.onnx.places import masked, restored, rolled, table_rows_of
from quantpress.convert.onnx.rotary import store_rotary, switch_of
from quantpress.convert.traits import traits_of
from quantpress.quant.errors import UsageError

__all__ = ["GraphWeights", "build_graph", "check_graph", "shares_cache"]

_STANDARD_ATTENTION = 23  # the first opset that has it


def shares_cache(hyper: Hyperparameters, options: OnnxOptions) -> bool:
    """Whether past and present keys and values may lie in the same memory: only GroupQueryAttention writes in place.

    This is what `past_present_share_buffer` of a genai_config.json says.
    """
    return is_grouped(hyper, standard=options.standard_ops)


def check_graph(hyper: Hyperparameters, *, standard: bool, opset: int) -> None:
    """Refuses what no operator of the opset computes.

    Raises:
        UsageError: heads of a size that needs the standard's Attention, and an opset without it.
    """
    if not is_grouped(hyper, standard=standard) and opset < _STANDARD_ATTENTION:
        raise UsageError(
            f"--opset {opset}: heads of {hyper.head_dim} values need the standard's Attention "
            f"(GroupQueryAttention wants a multiple of 8); use --opset {_STANDARD_ATTENTION}"
        )


def build_graph(builder: GraphBuilder, weights: GraphWeights, spec: ArchSpec, hyper: Hyperparameters) -> None:
    """Adds inputs, the decoder and outputs to an empty graph.

    Inputs are `input_ids` (B, S) and `attention_mask` (B, T) in int64, and for each layer N `past_key_values.N.key` and
    `.value` (B, kv_heads, T - S, head_dim) in the type of activations. Outputs are `logits` (B, S, vocab) and
    `present.N.key` and `.value` (B, kv_heads, T, head_dim).

    Args:
        builder: takes the nodes.
        weights: gives the weights; bound to the same builder.
        spec: the family.
        hyper: what config.json says.

    Raises:
        UsageError: as `check_graph`.
    """
    check_graph(hyper, standard=builder.standard, opset=builder.opset)
    ids = builder.input("input_ids", "INT64", ("batch_size", "sequence_length"))
    mask = builder.input("attention_mask", "INT64", ("batch_size", "total_sequence_length"))
    pasts = [_past(builder, hyper, layer) for layer in range(hyper.layers)]
    frame = _frame(builder, weights, spec, hyper, ids, mask)
    stream, presents = Stream(_embedded(frame, spec)), list[Cached]()
    for layer, past in enumerate(pasts):
        stream, present = add_layer(frame, layer, stream, past)
        presents.append(present)
    normal, _ = normalize_sum(builder, stream, frame.norm("output_norm", -1), frame.shape)
    logits = weights.head(restored(builder, normal, frame.places, hyper.hidden))
    logits = _capped(builder, logits, hyper)
    builder.output(logits, "logits", builder.compute, ("batch_size", "sequence_length", hyper.vocab))
    shape = ("batch_size", hyper.kv_heads, "total_sequence_length", hyper.head_dim)
    for layer, present in enumerate(presents):
        builder.output(present.key, f"present.{layer}.key", builder.compute, shape)
        builder.output(present.value, f"present.{layer}.value", builder.compute, shape)


def _past(builder: GraphBuilder, hyper: Hyperparameters, layer: int) -> Cached:
    shape = ("batch_size", hyper.kv_heads, "past_sequence_length", hyper.head_dim)
    key = builder.input(f"past_key_values.{layer}.key", builder.compute, shape)
    return Cached(key, builder.input(f"past_key_values.{layer}.value", builder.compute, shape))


def _frame(
    builder: GraphBuilder,
    weights: GraphWeights,
    spec: ArchSpec,
    hyper: Hyperparameters,
    ids: ir.Value,
    mask: ir.Value,
) -> Frame:
    ropes, traits = ropes_of(hyper), traits_of(spec, hyper)
    grouped = is_grouped(hyper, standard=builder.standard)
    inside = {key: grouped and rope is not None and turns_itself(hyper, rope) for key, rope in ropes.items()}
    counts = any(rope is not None and switch_of(rope, hyper.context) is not None for rope in ropes.values())
    if grouped:
        outside = any(rope is not None and not inside[key] for key, rope in ropes.items())
        places = rolled(builder, ids, mask, positions=outside or spec.positions == "learned", counts=counts)
    else:
        slides = hyper.sliding_layers or (False,) * hyper.layers
        window = hyper.sliding_window if any(slides) else None
        places = masked(builder, ids, mask, window=window, every=not all(slides), counts=counts)
    turns: dict[bool, Turn | None] = {}
    for key, rope in ropes.items():
        if rope is None:
            turns[key] = None
            continue
        table = store_rotary(builder, rope, hyper.context, name="local" if key else "cache")
        turns[key] = Turn(table, None if inside[key] else table_rows_of(builder, places, table))
    return Frame(builder, weights, traits, hyper, places, turns)


def _embedded(frame: Frame, spec: ArchSpec) -> ir.Value:
    builder, hyper, places = frame.builder, frame.hyper, frame.places
    hidden = frame.weights.embed(places.ids)
    if hyper.embedding_scale != 1.0:
        scale = builder.constant(hyper.embedding_scale)
        hidden = builder.add("Mul", [hidden, scale], name="/embedding/Mul", shape=frame.shape)
    if spec.positions != "learned":
        return hidden
    assert places.positions is not None, "positions were asked for"
    learned = frame.weights.positions(places.positions)
    return builder.add("Add", [hidden, learned], name="/embedding/Add", shape=frame.shape)


def _capped(builder: GraphBuilder, logits: ir.Value, hyper: Hyperparameters) -> ir.Value:
    if hyper.logit_softcap is None:
        return logits
    cap, shape = builder.constant(hyper.logit_softcap), ("batch_size", "sequence_length", hyper.vocab)
    for op in ("Div", "Tanh", "Mul"):
        inputs = [logits] if op == "Tanh" else [logits, cap]
        logits = builder.add(op, inputs, name=f"/head/{op}", shape=shape)
    return logits

"""The whole decoder as an ONNX graph, from token ids and attention mask to logits and the extended cache."""

from __future__ import annotations

import onnx_ir as ir

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.convert.onnx.attention import Cached, is_grouped, is_multi_head, turns_itself, value_size
from quantpress.convert.onnx.embedded import embedded
from quantpress.convert.onnx.frame import Frame, GraphWeights, Turn, ropes_of
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.layer import add_layer
from quantpress.convert.onnx.norms import Stream, normalize_sum, summed
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.onnx.places import Places, both_ways, masked, restored, rolled, table_rows_of
from quantpress.convert.onnx.rotary import store_rotary, switch_of
from quantpress.convert.onnx.unbuilt import refuse_unbuilt
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
        UsageError: attention that needs the standard's operator, and an opset without it.
    """
    if is_grouped(hyper, standard=standard) or is_multi_head(hyper, standard=standard) or opset >= _STANDARD_ATTENTION:
        return
    why = f"heads of {hyper.head_dim} values need the standard's Attention (GroupQueryAttention wants a multiple of 8)"
    if hyper.latent is not None or not hyper.causal:
        why = "this model's attention needs the standard's operator"
    raise UsageError(f"--opset {opset}: {why}; use --opset {_STANDARD_ATTENTION}")


def build_graph(builder: GraphBuilder, weights: GraphWeights, spec: ArchSpec, hyper: Hyperparameters) -> None:
    """Adds inputs, the decoder and outputs to an empty graph.

    Inputs are `input_ids` (B, S) and `attention_mask` (B, T) in int64, and for each layer N `past_key_values.N.key` and
    `.value` (B, kv_heads, T - S, head_dim) in the type of activations. Outputs are `logits` (B, S, vocab) and
    `present.N.key` and `.value` (B, kv_heads, T, head_dim).

    An encoder has no past, T = S; it has an input `token_type_ids` (B, S) if there are several types, and its output
    is `last_hidden_state` (B, S, hidden).

    Args:
        builder: takes the nodes.
        weights: gives the weights; bound to the same builder.
        spec: the family.
        hyper: what config.json says.

    Raises:
        UsageError: as `check_graph`.
        InputError: the model has something that is not built; it is named.
    """
    refuse_unbuilt(spec, hyper)
    check_graph(hyper, standard=builder.standard, opset=builder.opset)
    new = ("batch_size", "sequence_length")
    ids = builder.input("input_ids", "INT64", new)
    mask = builder.input("attention_mask", "INT64", ("batch_size", "total_sequence_length") if hyper.causal else new)
    types = _types(builder, hyper, ids)
    pasts = [_past(builder, hyper, layer) if hyper.causal else None for layer in range(hyper.layers)]
    slots = frozenset(row.slot for row in spec.present(hyper))
    frame = _frame(builder, weights, spec, hyper, ids, mask)
    stream, presents = Stream(embedded(frame, slots, types)), list[Cached | None]()
    for layer, past in enumerate(pasts):
        stream, present = add_layer(frame, layer, stream, past)
        presents.append(present)
    final = "output_norm.weight" in slots or "layer_output_norm.weight" not in slots
    if final:
        hidden, _ = normalize_sum(builder, stream, frame.norm("output_norm", -1), frame.shape)
    else:
        hidden = summed(builder, stream, frame.shape, "/output")
    if not hyper.causal:
        builder.output(hidden, "last_hidden_state", builder.compute, frame.shape)
        return
    logits = _logits(frame, restored(builder, hidden, frame.places, hyper.hidden))
    builder.output(logits, "logits", builder.compute, (*new, hyper.vocab))
    for layer, present in enumerate(presents):
        assert present is not None, "a decoder keeps keys and values"
        key, value = _cached(hyper, "total_sequence_length")
        builder.output(present.key, f"present.{layer}.key", builder.compute, key)
        builder.output(present.value, f"present.{layer}.value", builder.compute, value)


def _types(builder: GraphBuilder, hyper: Hyperparameters, ids: ir.Value) -> ir.Value | None:
    """Gives the type of each token, (B, S) int64; 0 where there is but one (RoBERTa), None where there is none."""
    new = ("batch_size", "sequence_length")
    if hyper.token_types > 1:
        return builder.input("token_type_ids", "INT64", new)
    if hyper.token_types == 0:
        return None
    return builder.add("Sub", [ids, ids], name="/embedding/Sub", dtype="INT64", shape=new)


def _cached(hyper: Hyperparameters, length: str) -> tuple[tuple[int | str, ...], ...]:
    return tuple(("batch_size", hyper.kv_heads, length, size) for size in (hyper.head_dim, value_size(hyper)))


def _past(builder: GraphBuilder, hyper: Hyperparameters, layer: int) -> Cached:
    key, value = _cached(hyper, "past_sequence_length")
    first = builder.input(f"past_key_values.{layer}.key", builder.compute, key)
    return Cached(first, builder.input(f"past_key_values.{layer}.value", builder.compute, value))


def _frame(
    builder: GraphBuilder,
    weights: GraphWeights,
    spec: ArchSpec,
    hyper: Hyperparameters,
    ids: ir.Value,
    mask: ir.Value,
) -> Frame:
    ropes = ropes_of(hyper)
    kinds = {hyper.has_experts(layer): traits_of(spec, hyper, layer) for layer in range(hyper.layers)}
    grouped = is_grouped(hyper, standard=builder.standard)
    inside = {key: grouped and turns_itself(hyper, rope) for key, rope in ropes.items()}
    places = _places(builder, hyper, ids, mask, positions=not all(inside.values()) or spec.learned(hyper))
    turns: dict[bool, Turn] = {}
    for key, rope in ropes.items():
        table = store_rotary(builder, rope, hyper.context, name="local" if key else "cache")
        turns[key] = Turn(table, None if inside[key] else table_rows_of(builder, places, table))
    return Frame(builder, weights, kinds, hyper, places, turns)


def _places(builder: GraphBuilder, hyper: Hyperparameters, ids: ir.Value, mask: ir.Value, *, positions: bool) -> Places:
    counts = any(switch_of(rope, hyper.context) is not None for rope in ropes_of(hyper).values())
    if is_grouped(hyper, standard=builder.standard):
        return rolled(builder, ids, mask, positions=positions, counts=counts, alibi=hyper.alibi)
    if not hyper.causal:
        multi_head = is_multi_head(hyper, standard=builder.standard)
        return both_ways(builder, ids, mask, multi_head=multi_head, counts=counts)
    slides = hyper.sliding_layers or (False,) * hyper.layers
    window = hyper.sliding_window if any(slides) else None
    return masked(builder, ids, mask, window=window, every=not all(slides), counts=counts, alibi=hyper.alibi)


def _logits(frame: Frame, hidden: ir.Value) -> ir.Value:
    builder, hyper = frame.builder, frame.hyper
    if hyper.embedding_width:
        hidden = frame.weights.linear(hidden, "output_in.weight", -1)
    logits = frame.weights.head(hidden)
    if hyper.logit_scale != 1.0:
        shape = ("batch_size", "sequence_length", hyper.vocab)
        logits = builder.add("Mul", [logits, builder.constant(hyper.logit_scale)], name="/head/Scale", shape=shape)
    return _capped(builder, logits, hyper)


def _capped(builder: GraphBuilder, logits: ir.Value, hyper: Hyperparameters) -> ir.Value:
    if hyper.logit_softcap is None:
        return logits
    cap, shape = builder.constant(hyper.logit_softcap), ("batch_size", "sequence_length", hyper.vocab)
    for op in ("Div", "Tanh", "Mul"):
        inputs = [logits] if op == "Tanh" else [logits, cap]
        logits = builder.add(op, inputs, name=f"/head/{op}", shape=shape)
    return logits

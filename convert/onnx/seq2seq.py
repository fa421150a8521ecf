"""An encoder-decoder (T5) as two ONNX graphs, named and fed as optimum and transformers.js know them.

`encoder_model.onnx` reads a text: `input_ids`, `attention_mask` -> `last_hidden_state`. `decoder_model_merged.onnx`
gives `logits` and the keys and values it has made; with `use_cache_branch` true it takes those of the text from
`past_key_values.N.encoder.*` instead of making them of `encoder_hidden_states`, and looks at the tokens before in
`past_key_values.N.decoder.*`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from quantpress.convert.arch.hyper import Hyperparameters
from quantpress.convert.onnx.graph import Dims
from quantpress.convert.onnx.norms import Stream, normalize_sum
from quantpress.convert.onnx.seq2seq_stack import Stack
from quantpress.convert.onnx.shared_graph import SharedGraph
from quantpress.convert.onnx.weights import ModelWeights

__all__ = ["DECODER_FILE", "ENCODER_FILE", "build_decoder", "build_encoder"]

ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_model_merged.onnx"

_TEXT, _ANSWER = "encoder_sequence_length", "decoder_sequence_length"
_PAST, _TOTAL = "past_decoder_sequence_length", "total_decoder_sequence_length"
_KINDS = ("key", "value")


def build_encoder(builder: SharedGraph, weights: ModelWeights, hyper: Hyperparameters) -> None:
    """Adds the encoder: `input_ids` and `attention_mask` (B, S) int64 -> `last_hidden_state` (B, S, hidden)."""
    stack = _stack(builder, weights, hyper, "enc", _TEXT)
    ids = builder.input("input_ids", "INT64", ("batch_size", _TEXT))
    mask = _unseen(builder, builder.input("attention_mask", "INT64", ("batch_size", _TEXT)))
    places = _range(builder, _size(builder, ids, 1, "/places/Shape"), _TEXT, "/places")
    apart = _apart(builder, places, places, (_TEXT, _TEXT))
    stream = Stream(weights.embed(ids))
    bias: ir.Value | None = None
    for layer in range(hyper.layers):
        bias = _biased(stack, bias, layer, apart, mask, ("batch_size", hyper.heads, _TEXT, _TEXT), _TEXT)
        values, hidden = normalize_sum(builder, stream, stack.norm("attn_norm", layer), stack.shape)
        key, value = stack.key_value(values, "attn", layer, _TEXT)
        stream = Stream(hidden, stack.attended(values, key, value, bias, "attn", layer, _TEXT))
        stream = _through_mlp(stack, stream, layer)
    final, _ = normalize_sum(builder, stream, stack.norm("output_norm", -1), stack.shape)
    builder.output(final, "last_hidden_state", builder.compute, stack.shape)


def build_decoder(builder: SharedGraph, weights: ModelWeights, hyper: Hyperparameters) -> None:
    """Adds the decoder.

    Inputs are `input_ids` (B, T) and `encoder_attention_mask` (B, S) int64, `encoder_hidden_states` (B, S, hidden);
    for each layer N `past_key_values.N.decoder.key` and `.value` (B, heads, P, head_dim), and the same with `.encoder.`
    (B, heads, S, head_dim); `use_cache_branch` (1,) bool: false, and what is past is not looked at.

    Outputs are `logits` (B, T, vocab) and `present.N...` in the place of each past.
    """
    stack = _stack(builder, weights, hyper, "dec", _ANSWER)
    mask = _unseen(builder, builder.input("encoder_attention_mask", "INT64", ("batch_size", _TEXT)))
    ids = builder.input("input_ids", "INT64", ("batch_size", _ANSWER))
    memory = builder.input("encoder_hidden_states", builder.compute, ("batch_size", _TEXT, hyper.hidden))
    pasts = [_pasts(builder, hyper, layer) for layer in range(stack.stacks.layers)]
    cached = builder.input("use_cache_branch", "BOOL", (1,))
    crossed = _crossed(stack, memory, [past[2:] for past in pasts], cached)
    looked = builder.cast(cached, "INT64", shape=(1,), name="/past/Cast")
    size = _size(builder, pasts[0][0], 2, "/past/Shape")
    count = builder.add("Mul", [size, looked], name="/past/Mul", dtype="INT64", shape=(1,))
    own = [_kept(builder, past[:2], count, hyper) for past in pasts]
    new = _size(builder, ids, 1, "/places/Shape")
    query = builder.add(
        "Add", [_range(builder, new, _ANSWER, "/places"), count], name="/places/Add", dtype="INT64", shape=(_ANSWER,)
    )
    total = builder.add("Add", [count, new], name="/total/Add", dtype="INT64", shape=(1,))
    apart = _apart(builder, query, _range(builder, total, _TOTAL, "/total"), (_ANSWER, _TOTAL))
    stream, bias, presents = Stream(weights.embed(ids)), None, list[tuple[ir.Value, ...]]()
    later = _later(builder, apart)
    for layer, (key, value) in enumerate(crossed):
        bias = _biased(stack, bias, layer, apart, later, (1, hyper.heads, _ANSWER, _TOTAL), _TOTAL)
        values, hidden = normalize_sum(builder, stream, stack.norm("attn_norm", layer), stack.shape)
        extended = _extended(stack, values, own[layer], layer)
        stream = Stream(hidden, stack.attended(values, *extended, bias, "attn", layer, _TOTAL))
        values, hidden = normalize_sum(builder, stream, stack.norm("cross_attn_norm", layer), stack.shape)
        stream = Stream(hidden, stack.attended(values, key, value, mask, "cross_attn", layer, _TEXT))
        stream = _through_mlp(stack, stream, layer)
        presents.append((*extended, key, value))
    final, _ = normalize_sum(builder, stream, stack.norm("output_norm", -1), stack.shape)
    if hyper.logit_scale != 1.0:
        scale = builder.constant(hyper.logit_scale)
        final = builder.add("Mul", [final, scale], name="/head/Mul", shape=stack.shape)
    builder.output(weights.head(final), "logits", builder.compute, ("batch_size", _ANSWER, hyper.vocab))
    for layer, present in enumerate(presents):
        for name, each in zip(_cache_names(layer), present, strict=True):
            shape = ("batch_size", hyper.heads, _TOTAL if ".decoder." in name else _TEXT, hyper.head_dim)
            builder.output(each, f"present.{name}", builder.compute, shape)


def _stack(builder: SharedGraph, weights: ModelWeights, hyper: Hyperparameters, name: str, length: str) -> Stack:
    assert hyper.seq2seq is not None, "the family is one of encoder-decoders"
    return Stack(builder, weights, hyper, hyper.seq2seq, name, length)


def _through_mlp(stack: Stack, stream: Stream, layer: int) -> Stream:
    values, hidden = normalize_sum(stack.builder, stream, stack.norm("ffn_norm", layer), stack.shape)
    return Stream(hidden, stack.passed(values, layer))


def _biased(
    stack: Stack, before: ir.Value | None, layer: int, apart: ir.Value, unseen: ir.Value, shape: Dims, seen: str
) -> ir.Value:
    """Gives what a layer adds to scores, for distances and what is not seen: that of the one before if all share it."""
    if before is not None and "own_distances" not in stack.hyper.flags:
        return before
    name = f"/layers.{layer}/{stack.slot('unseen')}"
    found = stack.by_distance(layer, apart, seen)
    return stack.builder.add("Add", [found, unseen], name=name, shape=shape)


def _cache_names(layer: int) -> list[str]:
    return [f"{layer}.{stack}.{kind}" for stack in ("decoder", "encoder") for kind in _KINDS]


def _pasts(builder: SharedGraph, hyper: Hyperparameters, layer: int) -> list[ir.Value]:
    return [
        builder.input(
            f"past_key_values.{name}",
            builder.compute,
            ("batch_size", hyper.heads, _PAST if ".decoder." in name else f"{_TEXT}_out", hyper.head_dim),
        )
        for name in _cache_names(layer)
    ]


def _crossed(
    stack: Stack, memory: ir.Value, pasts: Sequence[Sequence[ir.Value]], cached: ir.Value
) -> list[tuple[ir.Value, ir.Value]]:
    """Gives keys and values of the encoder's text for each layer: made once, and taken from the cache afterwards."""
    builder, hyper = stack.builder, stack.hyper
    shape = ("batch_size", hyper.heads, _TEXT, hyper.head_dim)

    def taken() -> list[ir.Value]:
        return [builder.add("Identity", [each], name="/cross/Identity", shape=shape) for past in pasts for each in past]

    def made() -> list[ir.Value]:
        pairs = [stack.key_value(memory, "cross_attn", layer, _TEXT) for layer in range(stack.stacks.layers)]
        return [each for pair in pairs for each in pair]

    outputs = [(f"/cross/{layer}.{kind}", builder.compute, shape) for layer in range(len(pasts)) for kind in _KINDS]
    found = builder.choose(cached, taken, made, outputs, name="/cross/If")
    return [(found[2 * layer], found[2 * layer + 1]) for layer in range(len(pasts))]


def _kept(
    builder: SharedGraph, past: Sequence[ir.Value], count: ir.Value, hyper: Hyperparameters
) -> tuple[ir.Value, ir.Value]:
    """Gives the first `count` (1,) of keys and values of the answer's tokens so far."""
    shape = ("batch_size", hyper.heads, _PAST, hyper.head_dim)
    bounds = [builder.constant([0]), count, builder.constant([2])]
    key, value = (builder.add("Slice", [each, *bounds], name="/past/Slice", shape=shape) for each in past)
    return key, value


def _extended(stack: Stack, values: ir.Value, own: tuple[ir.Value, ir.Value], layer: int) -> tuple[ir.Value, ir.Value]:
    """Gives keys and values of all tokens of the answer."""
    shape = ("batch_size", stack.hyper.heads, _TOTAL, stack.hyper.head_dim)
    new = stack.key_value(values, "attn", layer, _ANSWER)
    name = f"/layers.{layer}/{stack.slot('attn')}/Concat"
    key, value = (
        stack.builder.add("Concat", [before, after], name=name, shape=shape, axis=2)
        for before, after in zip(own, new, strict=True)
    )
    return key, value


def _size(builder: SharedGraph, values: ir.Value, axis: int, name: str) -> ir.Value:
    """Gives the size of a dimension, (1,) int64."""
    return builder.add("Shape", [values], name=name, dtype="INT64", shape=(1,), start=axis, end=axis + 1)


def _range(builder: SharedGraph, count: ir.Value, length: str, name: str) -> ir.Value:
    """Gives 0, 1, ... up to `count` (1,), which has the name `length`."""
    whole = builder.add("Squeeze", [count], name=f"{name}/Squeeze", dtype="INT64", shape=())
    inputs = [builder.constant(0), whole, builder.constant(1)]
    return builder.add("Range", inputs, name=f"{name}/Range", dtype="INT64", shape=(length,))


def _apart(builder: SharedGraph, query: ir.Value, key: ir.Value, shape: Dims) -> ir.Value:
    """Gives key's place minus query's, (T, S) int64, of places (T,) and (S,)."""
    column = builder.add(
        "Unsqueeze", [query, builder.constant([1])], name="/places/Unsqueeze", dtype="INT64", shape=(shape[0], 1)
    )
    return builder.add("Sub", [key, column], name="/places/Sub", dtype="INT64", shape=shape)


def _least(builder: SharedGraph, where: ir.Value, shape: Dims, name: str) -> ir.Value:
    """Gives the least number of the activations' type where a bool is true, and 0 elsewhere."""
    least = builder.constant(np.asarray(np.finfo(builder.numpy_type).min, builder.numpy_type))
    number = builder.cast(where, builder.compute, shape=shape, name=f"{name}/Cast")
    return builder.add("Mul", [number, least], name=f"{name}/Mul", shape=shape)


def _unseen(builder: SharedGraph, mask: ir.Value) -> ir.Value:
    """Gives what is added to the scores of padding, (B, 1, 1, S), for a mask (B, S) of ones and zeros."""
    shape = ("batch_size", 1, 1, _TEXT)
    padding = builder.add(
        "Equal", [mask, builder.constant(0)], name="/mask/Equal", dtype="BOOL", shape=("batch_size", _TEXT)
    )
    found = builder.add(
        "Unsqueeze", [padding, builder.constant([1, 2])], name="/mask/Unsqueeze", dtype="BOOL", shape=shape
    )
    return _least(builder, found, shape, "/mask")


def _later(builder: SharedGraph, apart: ir.Value) -> ir.Value:
    """Gives what is added to the scores of later tokens, (T, S)."""
    shape = (_ANSWER, _TOTAL)
    found = builder.add("Greater", [apart, builder.constant(0)], name="/later/Greater", dtype="BOOL", shape=shape)
    return _least(builder, found, shape, "/later")

"""Cosines and sines of rotary positions as tables of an ONNX model, made without torch.

Source: transformers' modeling_rope_utils.py: the formulas of each kind, in float32 and in that order of operations, as
in convert/rope.py. Powers, cosines and sines are computed in float64 and rounded once, so that the bytes do not depend
on the processor; they differ from torch's by the last bit of a float32 at most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quantpress.convert.arch.rotary import attention_factor
from quantpress.convert.arch.spec import Rope
from quantpress.convert.onnx.graph import MICROSOFT, GraphBuilder
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor

__all__ = ["RotaryTable", "frequencies", "store_rotary", "switch_of", "table_rows", "turn"]

_CHUNK = 1 << 20  # values of a table that are made at once


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """A stored table: row p turns by the angles of position p.

    Attributes:
        cosine, sine: (rows, dim / 2) in the type of the activations.
        dim: values per head that are turned.
        switch: longest text of the table's first part, where texts beyond it turn otherwise (longrope): row
            `switch + p` then belongs to position p. None where the table has one part.
        interleaved: as `Rope.interleaved`.
    """

    cosine: ir.Value
    sine: ir.Value
    dim: int
    switch: int | None
    interleaved: bool = False


def switch_of(rope: Rope, context: int) -> int | None:
    """Gives the longest text that turns by a longrope's short factors, None where no other can come."""
    if rope.kind != "longrope":
        return None
    original = int(rope.parameters["original_max_position_embeddings"])
    return original if original < context else None


def store_rotary(builder: GraphBuilder, rope: Rope, context: int, *, name: str) -> RotaryTable:
    """Gives a table its place in the data file; its rows are made when the file is written.

    Args:
        builder: the graph.
        rope: settings of the layers that use it.
        context: longest text, `max_position_embeddings`; positions beyond it have no row.
        name: ends the names of the two initializers.
    """
    switch = switch_of(rope, context)
    shape = ((switch or 0) + context, rope.dim // 2)
    tensors = tuple(StoredTensor(f"{part}_{name}", builder.compute, shape) for part in ("cos", "sin"))
    kind = builder.numpy_type

    def tasks() -> Iterator[Callable[[], Piece]]:
        step = max(1, _CHUNK // shape[1])
        for start in range(0, shape[0], step):
            yield functools.partial(_piece, rope, context, start, min(start + step, shape[0]), kind)

    label = "F16" if builder.compute == "FLOAT16" else "F32"
    cosine, sine = builder.store(StoredGroup(tensors, tasks, label))
    return RotaryTable(cosine, sine, rope.dim, switch, rope.interleaved)


def table_rows(rope: Rope, context: int, start: int, stop: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gives rows of a table.

    Args:
        rope: its settings.
        context: `max_position_embeddings`.
        start: first row.
        stop: row after the last one.

    Returns:
        Cosines and sines, (stop - start, dim / 2), with YaRN's and LongRoPE's magnitude.
    """
    switch = switch_of(rope, context) or 0
    rows = np.arange(start, stop)
    long = rows >= switch if switch else np.zeros(len(rows), bool)
    positions = np.where(long, rows - switch, rows).astype(np.float32)[:, None]
    turns = positions * frequencies(rope, context)
    if long.any():
        turns = np.where(long[:, None], positions * frequencies(rope, context, long=True), turns)
    magnitude = np.float32(attention_factor(rope, context))
    wide = turns.astype(np.float64)
    return np.cos(wide).astype(np.float32) * magnitude, np.sin(wide).astype(np.float32) * magnitude


def frequencies(rope: Rope, context: int, *, long: bool = False) -> NDArray[np.float32]:
    """Gives the angle per token of each pair of turned values, (dim / 2,), for texts of at most `context` tokens.

    Args:
        rope: settings of the layer.
        context: `max_position_embeddings`.
        long: of a longrope's texts beyond its training length.
    """
    theta, parameters = rope.theta, rope.parameters
    if rope.kind == "dynamic":  # what it is up to `context`: the plain one, but for a rounding
        stretch = (parameters["factor"] * context / context) - (parameters["factor"] - 1)
        theta = theta * stretch ** (rope.dim / (rope.dim - 2))
    one = np.float32(1)
    exponents = np.arange(0, rope.dim, 2).astype(np.float32) / np.float32(rope.dim)
    powers = (np.float64(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)
    if rope.kind == "longrope":
        factors = parameters["long_factor" if long else "short_factor"]
        return one / (np.asarray(factors, np.float32) * powers)
    plain = one / powers
    if rope.kind == "linear":
        return plain / np.float32(parameters["factor"])
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    return _yarn(rope, powers, context) if rope.kind == "yarn" else plain


def turn(
    builder: GraphBuilder, values: ir.Value, table: RotaryTable, rows: ir.Value, *, heads: int, head_dim: int, name: str
) -> ir.Value:
    """Turns the first values of each head.

    Args:
        builder: the graph.
        values: (B, S, heads * head_dim).
        table: cosines and sines.
        rows: (B, S) int64, the row of the table for each token.
        heads: number of heads.
        head_dim: values of a head.
        name: of the node, without the operator.

    Returns:
        Shape and type of `values`.
    """
    shape, node = ("batch_size", "sequence_length", heads * head_dim), f"{name}/RotaryEmbedding"
    partly: dict[str, Any] = {"rotary_embedding_dim": table.dim} if table.dim < head_dim else {}
    order: dict[str, Any] = {"interleaved": 1} if table.interleaved else {}
    if builder.standard:
        inputs = [values, table.cosine, table.sine, rows]
        return builder.add("RotaryEmbedding", inputs, name=node, shape=shape, num_heads=heads, **partly, **order)
    if partly:  # onnxruntime wants both or neither
        partly["num_heads"] = heads
    inputs = [values, rows, table.cosine, table.sine]
    return builder.add("RotaryEmbedding", inputs, domain=MICROSOFT, name=node, shape=shape, **partly, **order)


def _piece(rope: Rope, context: int, start: int, stop: int, kind: np.dtype[np.floating]) -> Piece:
    return tuple(part.astype(kind, copy=False) for part in table_rows(rope, context, start, stop))


def _llama3(rope: Rope, plain: NDArray[np.float32]) -> NDArray[np.float32]:
    parameters = rope.parameters
    factor, low, high = (float(parameters[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = parameters["original_max_position_embeddings"]
    wavelength = np.float32(2 * math.pi) / plain
    slowed = np.where(wavelength > np.float32(original / low), plain / np.float32(factor), plain)
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    ramp = (np.float32(1) - smooth) * slowed / np.float32(factor) + smooth * slowed
    between = (wavelength >= np.float32(original / high)) & (wavelength <= np.float32(original / low))
    return np.where(between, ramp, slowed)


def _yarn(rope: Rope, powers: NDArray[np.float32], context: int) -> NDArray[np.float32]:
    parameters, dim = rope.parameters, rope.dim
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or context / original

    def boundary(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(rope.theta))

    start, end = boundary(parameters.get("beta_fast") or 32), boundary(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        start, end = math.floor(start), math.ceil(end)
    start, end = max(start, 0), min(end, dim - 1)
    span = end - start if end != start else 0.001  # as in the reference: keeps a step from dividing by zero
    one = np.float32(1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(start)) / np.float32(span), 0, 1)
    kept = one - ramp
    mixed: NDArray[np.float32] = one / (np.float32(factor) * powers) * (one - kept) + one / powers * kept
    return mixed

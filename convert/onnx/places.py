"""What follows from the attention mask, once for all layers: where each token stands, and what it may see.

GroupQueryAttention wants the tokens of each row without gaps from the left. Padding may stand on either side of them
or, when a padded batch goes on, between old and new ones. So the newest tokens of each row are rolled to the left
before the embedding and back before the head; behind them, positions go on from the number of earlier tokens. The
standard's Attention takes a mask instead, and nothing is moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.rotary import RotaryTable

__all__ = ["Places", "both_ways", "masked", "restored", "rolled", "table_rows_of"]

_BATCH, _NEW, _ALL = "batch_size", "sequence_length", "total_sequence_length"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens stand.

    Attributes:
        ids: (B, S) int64, what to embed.
        positions: (B, S) int64, None where nothing asks for them.
        valid: (B, 1) int64 tokens of each row that are no padding, old and new; None where nothing asks for them.
        last: (B,) int32 where the last of the S new tokens stands in the cache; with `total` what GroupQueryAttention
            asks for; None where it is not used.
        total: (1,) int32 width of the attention mask.
        back: (B, S, 1) int64, where each token went; None where none moved.
        seen: (B, 1, S, T), 0 where a token may be seen and very low elsewhere; None where GroupQueryAttention knows.
        seen_near: the same within the sliding window; None where no layer has one. With ALiBi both have what it takes
            from scores added, (B, heads, S, T).
        distance: what ALiBi takes from scores where an operator knows itself what may be seen, (B, heads, S, T) and 0
            at a token's own place; None where no model has it.
        kept: (B, T) int32, 0 for padding; None where MultiHeadAttention is not used.
    """

    ids: ir.Value
    positions: ir.Value | None = None
    valid: ir.Value | None = None
    last: ir.Value | None = None
    total: ir.Value | None = None
    back: ir.Value | None = None
    seen: ir.Value | None = None
    seen_near: ir.Value | None = None
    distance: ir.Value | None = None
    kept: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Numbers of columns, (1,) int64 each: of the mask, of the new tokens, of the earlier ones."""

    total: ir.Value
    new: ir.Value
    before: ir.Value


def rolled(
    builder: GraphBuilder,
    ids: ir.Value,
    mask: ir.Value,
    *,
    positions: bool,
    counts: bool,
    alibi: tuple[float, ...] = (),
) -> Places:
    """Gives the places of tokens without gaps between the new ones of a row.

    Args:
        builder: the graph.
        ids: (B, S) int64, the newest tokens.
        mask: (B, T) int64, 0 for padding.
        positions: whether anything asks for `Places.positions`.
        counts: whether anything asks for `Places.valid`.
        alibi: as `Hyperparameters.alibi`.
    """
    sizes = _sizes(builder, ids, mask)
    # in float, for which ArgMax runs on graphics processors too
    window = builder.cast(_newest(builder, mask, sizes), "FLOAT", name="/places/Cast")
    first = _add(builder, "ArgMax", [window], (_BATCH, 1), axis=1, keepdims=1)
    columns = _range(builder, sizes.new, _NEW)
    forward = _modulo(builder, _add(builder, "Add", [columns, first], (_BATCH, _NEW)), sizes.new)
    backward = _modulo(builder, _add(builder, "Sub", [columns, first], (_BATCH, _NEW)), sizes.new)
    start = [mask, builder.constant([0]), sizes.before, builder.constant([1])]
    earlier = _sum(builder, _add(builder, "Slice", start, (_BATCH, "earlier_sequence_length")))
    # new tokens that are padding count too: they come after the others, which do not see them, and the next step
    # writes over them
    last = _add(builder, "Sub", [sizes.new, builder.constant([1])], (1,))
    last = _add(builder, "Add", [earlier, last], (_BATCH, 1))
    last = _add(builder, "Squeeze", [last, builder.constant([1])], (_BATCH,))
    standing = _add(builder, "Add", [columns, earlier], (_BATCH, _NEW)) if positions or alibi else None
    distance = None
    if alibi and standing is not None:
        distance = _distance(builder, standing, _range(builder, sizes.total, _ALL), alibi)
    return Places(
        ids=_add(builder, "GatherElements", [ids, forward], (_BATCH, _NEW), axis=1),
        positions=standing if positions else None,
        valid=_sum(builder, mask) if counts else None,
        last=builder.cast(last, "INT32", name="/places/Cast"),
        total=builder.cast(sizes.total, "INT32", name="/places/Cast"),
        back=_add(builder, "Unsqueeze", [backward, builder.constant([2])], (_BATCH, _NEW, 1)),
        distance=distance,
    )


def masked(
    builder: GraphBuilder,
    ids: ir.Value,
    mask: ir.Value,
    *,
    window: int | None,
    every: bool,
    counts: bool,
    alibi: tuple[float, ...] = (),
) -> Places:
    """Gives the places of tokens that stay where they are, and what each may see.

    Args:
        builder: the graph.
        ids: (B, S) int64, the newest tokens.
        mask: (B, T) int64, 0 for padding.
        window: tokens that a layer with a sliding window sees, None if there is no such layer.
        every: whether there is a layer that sees all.
        counts: whether anything asks for `Places.valid`.
        alibi: as `Hyperparameters.alibi`.
    """
    sizes = _sizes(builder, ids, mask)
    standing = _standing(builder, mask)
    positions = _newest(builder, standing, sizes)
    columns = _range(builder, sizes.total, _ALL)
    query = _add(builder, "Slice", [columns, sizes.before, sizes.total, builder.constant([0])], (_NEW,))
    query = _add(builder, "Unsqueeze", [query, builder.constant([1])], (_NEW, 1))
    causal = _add(builder, "LessOrEqual", [columns, query], (_NEW, _ALL), dtype="BOOL")
    real = builder.cast(_axis(builder, mask, 1, (_BATCH, 1, _ALL)), "BOOL", name="/places/Cast")
    visible = _add(builder, "And", [causal, real], (_BATCH, _NEW, _ALL), dtype="BOOL")
    distance = _distance(builder, positions, standing, alibi) if alibi else None
    near = None
    if window is not None:
        reach = _add(builder, "Add", [_axis(builder, standing, 1, (_BATCH, 1, _ALL)), builder.constant(window)],
                     (_BATCH, 1, _ALL))  # fmt: skip
        inside = _add(builder, "Less", [_axis(builder, positions, 2, (_BATCH, _NEW, 1)), reach], (_BATCH, _NEW, _ALL),
                      dtype="BOOL")  # fmt: skip
        both = _add(builder, "And", [visible, inside], (_BATCH, _NEW, _ALL), dtype="BOOL")
        near = _bias(builder, both, (_BATCH, 1, _NEW, _ALL), distance)
    seen = _bias(builder, visible, (_BATCH, 1, _NEW, _ALL), distance) if every else None
    return Places(ids, positions, _sum(builder, mask) if counts else None, seen=seen, seen_near=near)


def both_ways(builder: GraphBuilder, ids: ir.Value, mask: ir.Value, *, multi_head: bool, counts: bool) -> Places:
    """Gives the places of tokens that see each other wherever they stand, S = T.

    Args:
        builder: the graph.
        ids: (B, S) int64.
        mask: (B, S) int64, 0 for padding.
        multi_head: MultiHeadAttention asks what is no padding, not Attention.
        counts: whether anything asks for `Places.valid`.
    """
    kept = builder.cast(mask, "INT32", name="/places/Cast") if multi_head else None
    seen = None
    if not multi_head:
        real = builder.cast(_axis(builder, mask, 1, (_BATCH, 1, _NEW)), "BOOL", name="/places/Cast")
        # onnxruntime 1.31 wants a row of the mask for each query: what all see, or (never) columns below 0
        columns = _range(builder, _add(builder, "Shape", [ids], (1,), start=1), _NEW)
        rows = _add(builder, "Unsqueeze", [columns, builder.constant([1])], (_NEW, 1))
        never = _add(builder, "Less", [rows, builder.constant(0)], (_NEW, 1), dtype="BOOL")
        real = _add(builder, "Or", [real, never], (_BATCH, _NEW, _NEW), dtype="BOOL")
        seen = _bias(builder, real, (_BATCH, 1, _NEW, _NEW), None)
    valid = _sum(builder, mask) if counts else None
    return Places(ids, _standing(builder, mask, _NEW), valid, seen=seen, kept=kept)


def restored(builder: GraphBuilder, values: ir.Value, places: Places, hidden: int) -> ir.Value:
    """Puts the tokens' (B, S, hidden) values where the tokens stood."""
    if places.back is None:
        return values
    shape = (_BATCH, _NEW, hidden)
    return builder.add("GatherND", [values, places.back], name="/places/GatherND", shape=shape, batch_dims=1)


def table_rows_of(builder: GraphBuilder, places: Places, table: RotaryTable) -> ir.Value:
    """Gives the row of a rotary table for each token, (B, S) int64."""
    assert places.positions is not None, "they were asked for"
    if table.switch is None:
        return places.positions
    assert places.valid is not None, "they were asked for"
    long = _add(builder, "Greater", [places.valid, builder.constant(table.switch)], (_BATCH, 1), dtype="BOOL")
    offset = _add(builder, "Where", [long, builder.constant(table.switch), builder.constant(0)], (_BATCH, 1))
    return _add(builder, "Add", [places.positions, offset], (_BATCH, _NEW))


def _sizes(builder: GraphBuilder, ids: ir.Value, mask: ir.Value) -> _Sizes:
    total = _add(builder, "Shape", [mask], (1,), start=1)
    new = _add(builder, "Shape", [ids], (1,), start=1)
    return _Sizes(total, new, _add(builder, "Sub", [total, new], (1,)))


def _newest(builder: GraphBuilder, values: ir.Value, sizes: _Sizes) -> ir.Value:
    return _add(builder, "Slice", [values, sizes.before, sizes.total, builder.constant([1])], (_BATCH, _NEW))


def _range(builder: GraphBuilder, count: ir.Value, length: str) -> ir.Value:
    end = _add(builder, "Squeeze", [count], ())
    return _add(builder, "Range", [builder.constant(0), end, builder.constant(1)], (length,))


def _modulo(builder: GraphBuilder, values: ir.Value, count: ir.Value) -> ir.Value:
    return _add(builder, "Mod", [values, count], (_BATCH, _NEW))  # of whole numbers: the sign is the divisor's


def _sum(builder: GraphBuilder, values: ir.Value) -> ir.Value:
    return _add(builder, "ReduceSum", [values, builder.constant([1])], (_BATCH, 1), keepdims=1)


def _axis(builder: GraphBuilder, values: ir.Value, axis: int, shape: tuple[int | str, ...]) -> ir.Value:
    return _add(builder, "Unsqueeze", [values, builder.constant([axis])], shape)


def _standing(builder: GraphBuilder, mask: ir.Value, length: str = _ALL) -> ir.Value:
    """Gives the position of every token, (B, T) int64: how many are before it that are no padding."""
    counted = _add(builder, "CumSum", [mask, builder.constant(1)], (_BATCH, length))
    counted = _add(builder, "Sub", [counted, builder.constant(1)], (_BATCH, length))
    return _add(builder, "Max", [counted, builder.constant(0)], (_BATCH, length))


def _distance(builder: GraphBuilder, queries: ir.Value, keys: ir.Value, alibi: tuple[float, ...]) -> ir.Value:
    """Gives what ALiBi takes from scores, (B, heads, S, T).

    Args:
        builder: the graph.
        queries: (B, S) int64 positions.
        keys: (B, T) or (T,) int64 positions.
        alibi: as `Hyperparameters.alibi`.
    """
    shape = (_BATCH, 1, _NEW, _ALL)
    query = _add(builder, "Unsqueeze", [queries, builder.constant([1, 3])], (_BATCH, 1, _NEW, 1))
    if keys.shape is not None and len(keys.shape) > 1:
        keys = _add(builder, "Unsqueeze", [keys, builder.constant([1, 2])], (_BATCH, 1, 1, _ALL))
    apart = _add(builder, "Abs", [_add(builder, "Sub", [query, keys], shape)], shape)
    wide = builder.cast(apart, "FLOAT", name="/places/Cast")
    slopes = -np.asarray(alibi, np.float32).reshape(1, -1, 1, 1)
    found = _add(builder, "Mul", [wide, builder.constant(slopes)], (_BATCH, len(alibi), _NEW, _ALL), dtype="FLOAT")
    return builder.cast(found, builder.compute, name="/places/Cast")


def _bias(
    builder: GraphBuilder, visible: ir.Value, shape: tuple[int | str, ...], distance: ir.Value | None
) -> ir.Value:
    """Gives 0 where a token may be seen and very low elsewhere, in `shape`, (B, 1, S, T), and the distance added."""
    # half of the lowest number: adding a score must not reach -inf, for a row of nothing but that has no softmax
    low = np.asarray(np.finfo(builder.numpy_type).min / 2, builder.numpy_type)
    zero = builder.constant(np.zeros((), builder.numpy_type))
    flat = (shape[0], *shape[2:])
    bias = builder.add("Where", [visible, zero, builder.constant(low)], name="/places/Where", shape=flat)
    bias = builder.add("Unsqueeze", [bias, builder.constant([1])], name="/places/Unsqueeze", shape=shape)
    if distance is None:
        return bias
    return builder.add("Add", [bias, distance], name="/places/Add", shape=builder.shape_of(distance))


def _add(
    builder: GraphBuilder,
    op: str,
    inputs: list[ir.Value],
    shape: tuple[int | str, ...],
    *,
    dtype: str = "INT64",
    **attributes: Any,
) -> ir.Value:
    return builder.add(op, inputs, name=f"/places/{op}", dtype=dtype, shape=shape, **attributes)

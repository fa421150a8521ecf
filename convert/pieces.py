"""Tensors that a checkpoint keeps in one with others: an expert of a stack, q of a fused projection.

A row of a table that stands for a piece is resolved into a row of its own and a tensor that reads only its values, so
that whatever comes after sees plain rows of (N, K), or (K, N) where the family stores its weights so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from quantpress.convert.arch.fused_rows import FUSED, stored_heads
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, TensorSpec
from quantpress.convert.checkpoint import DTYPES, Array, LazyTensor
from quantpress.convert.recent import Recent
from quantpress.convert.row_order import IN_PLACE, ReadRows, RowOrder
from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import to_float32

if TYPE_CHECKING:
    from quantpress.convert.quantized import LazyQuantized
    from quantpress.quant.qtensor import QuantizedTensor

__all__ = ["Piece", "find_stored", "is_piece", "piece_codes", "piece_row", "resolve", "single_name", "stacked"]

_STACKS = (Layout.STACKED, Layout.STACKED_TRANSPOSED)
_HALVES: Mapping[str, str] = MappingProxyType({"ffn2": "ffn", "expert_ffn2": "expert_ffn", "shared_ffn2": "shared_ffn"})
_BLOCK = 128  # rows of a half that are read together
_SHORTEST = 1e-12  # a row is divided by no less (torch.nn.functional.normalize)


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a tensor of its own lies in a stored one.

    Attributes:
        stored: name of the tensor in the checkpoint.
        expert: number in its first dimension; -1 if it is no stack.
        order: rows, counted in (N, K), of what is left then.
    """

    stored: str
    expert: int
    order: RowOrder


def find_stored(
    spec: ArchSpec, row: TensorSpec, layer: int, tensors: Mapping[str, LazyTensor]
) -> tuple[TensorSpec, list[str]]:
    """Finds what a checkpoint has for a row.

    Returns:
        The row, or the one of `ArchSpec.other_rows` that the checkpoint has in its place; and the names found, more
        than one where a tensor is there twice, none where it is missing.
    """
    found = _names_of(spec, row, layer, tensors)
    if found:
        return row, found
    for other in spec.others(row):
        if found := _names_of(spec, other, layer, tensors):
            return other, found
    return row, []


def _names_of(spec: ArchSpec, row: TensorSpec, layer: int, tensors: Mapping[str, LazyTensor]) -> list[str]:
    return [name for name in dict.fromkeys(spec.names(row, layer)) if name in tensors]


def single_name(spec: ArchSpec, row: TensorSpec, layer: int) -> str:
    """Gives what checkpoints that store each expert by itself call the tensor of a row; "" if there are none."""
    for known in (row, *spec.others(row)):
        if known.expert >= 0 and not is_piece(known):
            return known.hf.format(layer=layer)
    return ""


def resolve(
    row: TensorSpec, tensor: LazyTensor, hyper: Hyperparameters, *, recent: Recent[Array], name: str = ""
) -> tuple[TensorSpec, LazyTensor, Piece | None]:
    """Gives the row and the tensor of a piece; both as they are where the row is all of the tensor.

    Args:
        row: of one expert where the tensor is a stack.
        tensor: as it is stored.
        hyper: the sizes.
        recent: keeps the experts of stacks that cannot be read by rows; one for all pieces of a checkpoint.
        name: what to call the piece; by default the tensor's name with the expert and the part behind it.
    """
    if row.layout is Layout.UNIT_ROWS:
        return replace(row, layout=Layout.PLAIN), _unit_rows(tensor), None
    if not is_piece(row):
        return row, tensor, None
    plain, order = piece_row(row, hyper)
    view, expert, label = tensor, -1, tensor.name
    if row.layout in _STACKS:
        view, expert = _of_stack(tensor, row.expert, recent), row.expert
        label = f"{label}:{expert}"
    if row.part:
        label = f"{label}:{row.part.partition('_')[0]}"
        shape = tuple(hyper.dims[dim] for dim in plain.shape)
        view = _picked(view, order, shape, columns=plain.layout is Layout.TRANSPOSED)
    label = name or label
    return replace(plain, hf=label), replace(view, name=label), Piece(tensor.name, expert, order)


def is_piece(row: TensorSpec) -> bool:
    """Whether other rows stand in the same tensor of a checkpoint."""
    return row.layout in _STACKS or bool(row.part)


def piece_row(row: TensorSpec, hyper: Hyperparameters) -> tuple[TensorSpec, RowOrder]:
    """Gives the row of a piece, plain or transposed, and which rows of its (N, K) it is; `hf` is that of the whole."""
    shape, layout, order = row.shape, row.layout, IN_PLACE
    if layout in _STACKS:
        shape = shape[1:]
        layout = Layout.TRANSPOSED if layout is Layout.STACKED_TRANSPOSED and len(shape) == 2 else Layout.PLAIN
    if row.part:
        order, shape = _part(row, shape, layout, hyper)
        layout = Layout.PLAIN if layout in FUSED else layout
    return replace(row, shape=shape, layout=layout, part=""), order


def stacked(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Gives tensors of the same shape and type, one for each expert, as one: (E, N, K).

    It is named after the first one; `inner` gives each of them back.
    """
    first = tensors[0]

    def read_rows(start: int, stop: int) -> Array:
        return np.stack([tensor.read() for tensor in tensors[start:stop]])

    def wide_rows(start: int, stop: int) -> Array:
        return np.stack([to_float32(tensor.exact_rows(0, tensor.rows)) for tensor in tensors[start:stop]])

    wide = wide_rows if any(tensor.wide_rows for tensor in tensors) else None
    shape = (len(tensors), *first.shape)
    return LazyTensor(first.name, shape, first.dtype, first.source, read_rows, wide, tensors.__getitem__)


def piece_codes(quantized: Mapping[str, LazyQuantized], pieces: Mapping[str, Piece]) -> Mapping[str, LazyQuantized]:
    """Adds the codes of pieces of quantized matrices, under the names of the pieces.

    Args:
        quantized: `Checkpoint.quantized`.
        pieces: `Preflight.pieces`.
    """
    cut = {
        name: _cut(name, quantized[piece.stored], piece.order)
        for name, piece in pieces.items()
        if piece.stored in quantized and piece.expert < 0
    }
    return {**quantized, **cut} if cut else quantized


def _cut(name: str, whole: LazyQuantized, order: RowOrder) -> LazyQuantized:
    def read() -> QuantizedTensor:
        codes = whole.read()

        def take(values: Array) -> Array:
            return order.read(lambda start, stop: values[start:stop], 0, rows)

        zero = None if codes.zero is None else take(codes.zero)
        return replace(codes, codes=take(codes.codes), scale=take(codes.scale), zero=zero)

    rows = order.block * len(order.blocks)
    form = replace(whole.form, shape=(rows, whole.form.shape[1]))
    return replace(whole, name=name, form=form, read=read, streams=None)


def _heads(hyper: Hyperparameters, part: str, *, fused: bool) -> RowOrder:
    """Gives where the heads of q, k or v lie in rows of all three."""
    stored = stored_heads(hyper) if fused else tuple(range(hyper.heads + 2 * hyper.kv_heads))
    starts = {"q": 0, "k": hyper.heads, "v": hyper.heads + hyper.kv_heads}
    count = hyper.heads if part == "q" else hyper.kv_heads
    return RowOrder(hyper.head_dim, stored[starts[part] : starts[part] + count])


def _part(
    row: TensorSpec, shape: tuple[str, ...], layout: Layout, hyper: Hyperparameters
) -> tuple[RowOrder, tuple[str, ...]]:
    """Gives the rows of a part, and its shape, of a tensor whose shape is without experts."""
    axis = 1 if layout is Layout.TRANSPOSED and len(shape) == 2 else 0
    if row.part in ("q", "k", "v"):
        order, symbol = _heads(hyper, row.part, fused=layout in FUSED), "q" if row.part == "q" else "kv"
    elif row.part in ("plain", "value"):
        order, symbol = _of_heads(hyper, row.part), "plain_rows" if row.part == "plain" else "attended"
    else:
        half, _, step = row.part.partition("_")
        symbol = _HALVES.get(shape[axis], "")
        if not symbol or half not in ("gate", "up"):
            raise LayoutError(f"{row.hf}: {row.part!r} is no part of rows of {shape[axis]}")
        count = hyper.dims[symbol]
        order = _half(count, second=half == "up") if not step else _alternate(count, odd=step == "odd")
    return order, (*shape[:axis], symbol, *shape[axis + 1 :])


def _of_heads(hyper: Hyperparameters, part: str) -> RowOrder:
    """Gives where each head's rows of the key or of the value lie (`Latent`)."""
    latent = hyper.latent
    if latent is None:
        raise LayoutError(f"{part!r}: the model has no latent")
    block = math.gcd(latent.plain, latent.value)
    key, both = latent.plain // block, (latent.plain + latent.value) // block
    places = range(key) if part == "plain" else range(key, both)
    return RowOrder(block, tuple(head * both + place for head in range(hyper.heads) for place in places))


def _half(count: int, *, second: bool) -> RowOrder:
    block = math.gcd(count, _BLOCK)
    blocks = count // block
    return RowOrder(block, tuple(range(blocks, 2 * blocks) if second else range(blocks)))


def _alternate(count: int, *, odd: bool) -> RowOrder:
    return RowOrder(1, tuple(range(int(odd), 2 * count, 2)))


def _of_stack(tensor: LazyTensor, expert: int, recent: Recent[Array]) -> LazyTensor:
    """Gives one of the tensors that a stack holds."""
    if tensor.inner is not None and tensor.wide_rows is None:
        return tensor.inner(expert)

    def reader(read: ReadRows, kind: str) -> ReadRows:
        def rows(start: int, stop: int) -> Array:
            # such a stack cannot be read by rows: an expert is kept while chunks of it are asked for
            whole = recent.get((tensor, expert, kind), lambda: read(expert, expert + 1)[0])
            return whole[start:stop]

        return rows

    wide = None if tensor.wide_rows is None else reader(tensor.wide_rows, "wide")
    return LazyTensor(tensor.name, tensor.shape[1:], tensor.dtype, tensor.source, reader(tensor.read_rows, ""), wide)


def _picked(tensor: LazyTensor, order: RowOrder, shape: tuple[int, ...], *, columns: bool) -> LazyTensor:
    """Gives a tensor of some rows, or of some columns, of another."""

    def reader(read: ReadRows) -> ReadRows:
        if not columns:
            return partial(order.read, read)

        def rows(start: int, stop: int) -> Array:
            turned = np.ascontiguousarray(read(start, stop).T)
            chosen = order.read(lambda first, last: turned[first:last], 0, shape[1])
            return np.ascontiguousarray(chosen.T)

        return rows

    wide = None if tensor.wide_rows is None else reader(tensor.wide_rows)
    return LazyTensor(tensor.name, shape, tensor.dtype, tensor.source, reader(tensor.read_rows), wide)


def _unit_rows(tensor: LazyTensor) -> LazyTensor:
    """Gives a matrix whose rows have the length 1 (torch.nn.functional.normalize)."""

    def wide_rows(start: int, stop: int) -> Array:
        rows = to_float32(tensor.exact_rows(start, stop))
        length = np.sqrt(np.einsum("nk,nk->n", rows, rows, dtype=np.float64))
        unit: Array = rows / np.maximum(length, _SHORTEST)[:, None].astype(np.float32)
        return unit

    def read_rows(start: int, stop: int) -> Array:
        return wide_rows(start, stop).astype(DTYPES[tensor.dtype])

    return LazyTensor(tensor.name, tensor.shape, tensor.dtype, tensor.source, read_rows, wide_rows)

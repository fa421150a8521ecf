"""All experts of a layer as the two stacks that onnxruntime's MoE and QMoE take.

The rows of the first stack are those of gate and up by turns; the pieces are made expert by expert, so that no more
than a chunk of them is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from quantpress.convert.checkpoint import Array
from quantpress.convert.files import shown
from quantpress.convert.onnx.float_rows import LABELS, as_stored
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.linear import LinearKind, LinearWeight
from quantpress.convert.onnx.linear_float import FloatLinear
from quantpress.convert.onnx.linear_nbits import GREATEST_BLOCK, MatMulNBits
from quantpress.convert.onnx.matmul_nbits import nbits_block_size
from quantpress.convert.onnx.nbits_rows import CodePieces, round_rows
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor
from quantpress.quant.errors import InputError, LayoutError

__all__ = ["ExpertStacks", "Half", "half_rows", "stack_biases", "stack_experts"]

_FUSED_BITS = 4  # QMoE multiplies codes of 8 bits with rounded inputs only

Half = tuple[LinearWeight, int]
"""A weight and the first of its rows that count: up of one that has gate and up one after another begins in the
middle."""


@dataclass(frozen=True, slots=True)
class ExpertStacks:
    """The weights of all experts.

    Attributes:
        up, down: (experts, 2 * inner, hidden) and (experts, hidden, inner) floats in the activations' type, or codes
            (experts, rows, columns / 2) UINT8.
        up_scales, down_scales: (experts, rows, blocks); None of floats.
        up_zeros, down_zeros: (experts, rows, ceil(blocks / 2)) UINT8; None where every zero is 8.
        up_bias, down_bias: (experts, rows) in the activations' type; None where there are none.
        block_size: columns that share a scale; 0 of floats.
        accuracy_level: as `OnnxOptions.accuracy_level`.
    """

    up: ir.Value
    down: ir.Value
    up_scales: ir.Value | None = None
    down_scales: ir.Value | None = None
    up_zeros: ir.Value | None = None
    down_zeros: ir.Value | None = None
    up_bias: ir.Value | None = None
    down_bias: ir.Value | None = None
    block_size: int = 0
    accuracy_level: int = 0


@dataclass(frozen=True, slots=True)
class _Blocks:
    """How codes are stored: columns of a block, and whether there are zeros."""

    size: int
    symmetric: bool


def stack_experts(
    builder: GraphBuilder,
    kind_of: Callable[[LinearWeight], LinearKind],
    ups: Sequence[tuple[Half, ...]],
    downs: Sequence[tuple[Half, ...]],
    name: str,
) -> ExpertStacks | None:
    """Stores the experts of a layer in two stacks.

    Args:
        builder: the graph.
        kind_of: gives the way of storing a weight.
        ups: gate and up of each expert.
        downs: the one weight of each expert.
        name: what the initializers are called after.

    Returns:
        None where no operator takes them so: they are not all stored alike, their codes are not of 4 bits or their
        groups do not divide the columns.
    """
    every = [half[0] for expert in (*ups, *downs) for half in expert]
    kinds = {id(kind): kind for kind in map(kind_of, every)}
    if len(kinds) != 1:
        return None
    (kind,) = kinds.values()
    parts = ((ups, f"{name}.gate_up_proj"), (downs, f"{name}.down_proj"))
    if isinstance(kind, FloatLinear):
        up, down = (builder.store(_float_group(halves, each, kind))[0] for halves, each in parts)
        up, down = (builder.cast(each, builder.compute, name=f"/{name}/Weight") for each in (up, down))
        return ExpertStacks(up, down)
    blocks = _blocks(kind, every) if isinstance(kind, MatMulNBits) else None
    if blocks is None or not isinstance(kind, MatMulNBits):
        return None
    found = [_named(builder.store(_nbits_group(builder, halves, each, kind, blocks)), blocks) for halves, each in parts]
    (up, up_scales, up_zeros), (down, down_scales, down_zeros) = found
    level = kind.accuracy_level
    return ExpertStacks(
        up, down, up_scales, down_scales, up_zeros, down_zeros, block_size=blocks.size, accuracy_level=level
    )


def stack_biases(
    builder: GraphBuilder, experts: Sequence[Sequence[Callable[[], Array]]], width: int, name: str
) -> ir.Value:
    """Stores the biases of all experts as (experts, width).

    Args:
        builder: the graph.
        experts: what reads the biases of each expert, of gate and up by turns.
        width: values of an expert.
        name: of the initializer.
    """

    def piece(readers: Sequence[Callable[[], Array]]) -> Piece:
        values = np.stack([read() for read in readers], axis=1).reshape(-1)
        return (as_stored(values, builder.compute, name),)

    def tasks() -> Iterator[Callable[[], Piece]]:
        return (partial(piece, readers) for readers in experts)

    tensor = StoredTensor(name, builder.compute, (len(experts), width))
    return builder.store(StoredGroup((tensor,), tasks, LABELS[builder.compute], name))[0]


def _named(values: tuple[ir.Value, ...], blocks: _Blocks) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    return values[0], values[1], None if blocks.symmetric else values[2]


def _blocks(kind: MatMulNBits, weights: Sequence[LinearWeight]) -> _Blocks | None:
    """Gives what all weights are stored in; None if that is not one size of blocks that divides their columns."""
    found = set[_Blocks]()
    for weight in weights:
        form = None if weight.codes is None else weight.codes.form
        if form is None:
            bits, group, symmetric = kind.bits, kind.block_size, kind.symmetric
        elif form.ordered:
            return None
        else:
            bits, group, symmetric = form.bits, form.group_size, form.symmetric
        if bits != _FUSED_BITS or group > weight.shape[1]:
            return None
        try:
            size = nbits_block_size(group, weight.shape[1], max(GREATEST_BLOCK, kind.block_size))
        except LayoutError:
            return None
        if weight.shape[1] % size:
            return None
        found.add(_Blocks(size, symmetric))
    return found.pop() if len(found) == 1 else None


def half_rows(expert: tuple[Half, ...]) -> int:
    """Gives the rows of each half of an expert."""
    weight, first = expert[-1]
    return weight.shape[0] - first


def _shape(experts: Sequence[tuple[Half, ...]]) -> tuple[int, int, int]:
    return len(experts), len(experts[0]) * half_rows(experts[0]), experts[0][0][0].shape[1]


def _ranges(expert: tuple[Half, ...]) -> Iterator[tuple[int, int]]:
    rows = half_rows(expert)
    for start, stop in expert[0][0].row_ranges():
        if start < rows:
            yield start, min(stop, rows)


def _by_turns(pieces: Sequence[Piece]) -> Piece:
    """Gives the rows of several pieces by turns."""
    if len(pieces) == 1:
        return pieces[0]
    return tuple(
        np.ascontiguousarray(np.stack(parts, axis=1)).reshape(-1, *parts[0].shape[1:])
        for parts in zip(*pieces, strict=True)
    )


def _float_group(experts: Sequence[tuple[Half, ...]], name: str, kind: FloatLinear) -> StoredGroup:
    def piece(expert: tuple[Half, ...], start: int, stop: int) -> Piece:
        return _by_turns([(_floats(half, start, stop, kind.dtype),) for half in expert])

    def tasks() -> Iterator[Callable[[], Piece]]:
        return (partial(piece, expert, *part) for expert in experts for part in _ranges(expert))

    tensor = StoredTensor(name, kind.dtype, _shape(experts))
    return StoredGroup((tensor,), tasks, LABELS[kind.dtype], name, _held(experts), kind.note)


def _floats(half: Half, start: int, stop: int, dtype: str) -> Array:
    weight, first = half
    rows = weight.read_rows(first + start, first + stop)
    return as_stored(rows, dtype, f"{weight.source}: tensor {shown(weight.name)}")


def _nbits_group(
    builder: GraphBuilder, experts: Sequence[tuple[Half, ...]], name: str, kind: MatMulNBits, blocks: _Blocks
) -> StoredGroup:
    count, rows, columns = _shape(experts)
    size, width = blocks.size, columns // blocks.size
    tensors = [
        StoredTensor(f"{name}.qweight", "UINT8", (count, rows, columns * _FUSED_BITS // 8)),
        StoredTensor(f"{name}.scales", builder.compute, (count, rows, width)),
    ]
    if not blocks.symmetric:
        tensors.append(StoredTensor(f"{name}.qzeros", "UINT8", (count, rows, -(-width * _FUSED_BITS // 8))))

    def rounded(half: Half, start: int, stop: int) -> Piece:
        weight, first = half
        values = weight.read_rows(first + start, first + stop)
        try:
            return round_rows(values, _FUSED_BITS, size, symmetric=blocks.symmetric, compute=builder.compute)
        except LayoutError as error:
            raise InputError(f"{weight.source}: tensor {shown(weight.name)}: {error}") from error

    def exact(codes: CodePieces, half: Half, start: int, stop: int) -> Piece:
        return codes.piece(half[1] + start, half[1] + stop)

    def tasks() -> Iterator[Callable[[], Piece]]:
        for expert in experts:
            readers = [
                partial(rounded, half)
                if half[0].codes is None
                else partial(exact, CodePieces(half[0], builder.numpy_type, size, ordered=False), half)
                for half in expert
            ]
            for start, stop in _ranges(expert):
                yield partial(_read_by_turns, readers, start, stop)

    return StoredGroup(tuple(tensors), tasks, _label(experts, blocks), name, _held(experts), kind.note)


def _read_by_turns(readers: Sequence[Callable[[int, int], Piece]], start: int, stop: int) -> Piece:
    return _by_turns([read(start, stop) for read in readers])


def _label(experts: Sequence[tuple[Half, ...]], blocks: _Blocks) -> str:
    codes = experts[0][0][0].codes
    size = blocks.size if codes is None else codes.form.group_size
    return f"INT{_FUSED_BITS} g{size}" + ("" if blocks.symmetric else " asym")


def _held(experts: Sequence[tuple[Half, ...]]) -> int:
    return max(sum(half[0].held for half in expert) for expert in experts)

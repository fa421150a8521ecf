"""The way back from GGUF's stacks of experts and separate projections to the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.gguf.table import TensorInfo
from quantpress.convert.recent import Recent
from quantpress.convert.row_order import RowOrder
from quantpress.quant.errors import InputError

__all__ = ["Placed", "joined", "of_expert"]


def of_expert(info: TensorInfo, expert: int, count: int) -> TensorInfo:
    """Gives the place of one expert in a stack.

    Args:
        info: of the stack.
        expert: its number.
        count: experts of a layer.

    Raises:
        InputError: the tensor holds another number of them.
    """
    if not info.shape or info.shape[0] != count:
        raise InputError(f"tensor {shown(info.name)} has shape {info.shape}, wanted {count} experts")
    nbytes = info.nbytes // count
    return replace(info, shape=info.shape[1:], nbytes=nbytes, offset=info.offset + expert * nbytes)


@dataclass(frozen=True, slots=True)
class Placed:
    """A piece of a tensor of the checkpoint.

    Attributes:
        tensor: its values, (N, K), or (K, N) where `columns`.
        order: which rows of the whole these are; one that does not move is all of them.
        expert: number in the first dimension of the whole; -1 if that is no stack.
        columns: the order is one of columns.
    """

    tensor: LazyTensor
    order: RowOrder
    expert: int
    columns: bool


def joined(name: str, shape: tuple[int, ...], pieces: Sequence[Placed], recent: Recent[Array]) -> LazyTensor:
    """Puts pieces together to the tensor that a checkpoint holds; at most one expert of it stands in memory.

    Args:
        name: of the tensor.
        shape: of the tensor.
        pieces: all of it.
        recent: keeps what was put together last.
    """
    first = pieces[0].tensor
    if pieces[0].expert < 0:
        return _one(name, shape, pieces, recent)
    experts: dict[int, list[Placed]] = {}
    for piece in pieces:
        experts.setdefault(piece.expert, []).append(piece)
    each = [_one(name, shape[1:], experts[expert], recent, expert) for expert in range(shape[0])]

    def read_rows(start: int, stop: int) -> Array:
        return np.stack([tensor.read() for tensor in each[start:stop]])

    inner = each.__getitem__ if len(shape) > 2 else None
    return LazyTensor(name, shape, first.dtype, first.source, read_rows, inner=inner)


def _one(
    name: str, shape: tuple[int, ...], pieces: Sequence[Placed], recent: Recent[Array], expert: int = -1
) -> LazyTensor:
    first = pieces[0].tensor
    whole = partial(recent.get, (name, expert), partial(_filled, shape, pieces))

    def read_rows(start: int, stop: int) -> Array:
        found: Array = whole()[start:stop]
        return found

    return LazyTensor(name, shape, first.dtype, first.source, read_rows)


def _filled(shape: tuple[int, ...], pieces: Sequence[Placed]) -> Array:
    values = [piece.tensor.read() for piece in pieces]
    whole = np.empty(shape, values[0].dtype)
    for piece, found in zip(pieces, values, strict=True):
        rows = whole.T if piece.columns else whole
        rows[_numbers(piece.order, len(rows))] = found.T if piece.columns else found
    return whole


def _numbers(order: RowOrder, rows: int) -> Array:
    """Gives where the rows of a piece stand in the whole."""
    return order.read(lambda start, stop: np.arange(start, stop), 0, order.block * len(order.blocks) or rows)

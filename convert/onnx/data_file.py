"""Writes the data file of an ONNX model front to back, while threads make the bytes of its tensors.

The first tensor of a group is written as its pieces come. The others are small beside it (scales and zeros beside
codes); their pieces wait in memory until it is whole. Every tensor begins where the graph says it does, and between
them are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from quantpress.convert.checkpoint import Array
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor, in_order

__all__ = ["Groups", "Output", "Place", "write_data"]

Progress = Callable[[str, int, int], None]


class Output(Protocol):
    """A file that is written front to back: `HashedOutput`."""

    nbytes: int

    def write(self, data: bytes | memoryview, /) -> None:
        """Writes bytes, which are not changed afterwards."""
        ...


class Place(Protocol):
    """A tensor and where it begins: `graph.Placed`, which only what loads onnx-ir can name."""

    tensor: StoredTensor
    offset: int


Groups = Sequence[tuple[StoredGroup, Sequence[Place]]]


def write_data(
    output: Output,
    groups: Groups,
    *,
    threads: int,
    progress: Progress = lambda _phase, _done, _total: None,
) -> None:
    """Writes the tensors of all groups, each group read once.

    Args:
        output: an empty file.
        groups: with the places of their tensors, in ascending order of the offsets.
        threads: that make the pieces; the bytes do not depend on it.
        progress: told the bytes of tensors that are written.

    Raises:
        ValueError: a tensor gets other bytes than were planned for it, or the places do not ascend.
        QuantpressError: what the tasks of a group raise.
    """
    writer = _Writer(output, sum(group.nbytes for group, _ in groups), progress)
    pieces = in_order(_tasks(groups), threads=threads, window=2 * threads + 2)
    current: int | None = None
    waiting: list[list[Array]] = []
    for number, piece in pieces:
        if number != current:
            writer.finish(waiting)
            writer.begin(groups[number][1])
            current, waiting = number, [[] for _ in groups[number][1][1:]]
        if piece is None:
            continue
        first, *others = _checked(groups[number][0], piece)
        writer.write(first)
        for kept, part in zip(waiting, others, strict=True):
            kept.append(part)
    writer.finish(waiting)


def _tasks(groups: Groups) -> Iterator[Callable[[], tuple[int, Piece | None]]]:
    """Gives the tasks of every group with its number; the first of each only says that the group begins."""
    for number, (group, _) in enumerate(groups):
        yield partial(_numbered, number, None)
        for task in group.tasks():
            yield partial(_numbered, number, task)


def _numbered(number: int, task: Callable[[], Piece] | None) -> tuple[int, Piece | None]:
    return number, None if task is None else task()


def _checked(group: StoredGroup, piece: Piece) -> Piece:
    if len(piece) != len(group.tensors):
        raise ValueError(f"{group.tensors[0].name}: a piece of {len(piece)} arrays for {len(group.tensors)} tensors")
    return piece


class _Writer:
    """Where the file stands: which tensor of a group is being written, and how much of it there is."""

    def __init__(self, output: Output, total: int, progress: Progress) -> None:
        self._output, self._total, self._progress = output, total, progress
        self._places: Sequence[Place] = ()
        self._current = 0
        self._filled = 0
        self._done = 0

    def begin(self, places: Sequence[Place]) -> None:
        """Begins a group."""
        self._places, self._current = places, 0
        self._seek()

    def write(self, values: Array) -> None:
        """Writes the next bytes of the tensor that is being written."""
        if values.nbytes:
            self._output.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        self._filled += values.nbytes
        self._done += values.nbytes
        self._progress("write", self._done, self._total)

    def finish(self, others: Sequence[Sequence[Array]]) -> None:
        """Ends a group with the pieces of all its tensors but the first."""
        if not self._places:
            return
        self._end()
        for parts in others:
            self._current += 1
            self._seek()
            for part in parts:
                self.write(part)
            self._end()

    def _seek(self) -> None:
        """Fills with zeros up to where the tensor begins."""
        place = self._places[self._current]
        gap = place.offset - self._output.nbytes
        if gap < 0:
            raise ValueError(f"tensor {place.tensor.name!r} begins at {place.offset}, inside the one before it")
        if gap:
            self._output.write(bytes(gap))
        self._filled = 0

    def _end(self) -> None:
        tensor = self._places[self._current].tensor
        if self._filled != tensor.nbytes:
            raise ValueError(f"tensor {tensor.name!r} got {self._filled} bytes where {tensor.nbytes} were planned")

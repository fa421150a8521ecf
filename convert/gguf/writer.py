"""Writes GGUF files front to back: the whole header first, then tensor after tensor, hashed on the way to the disk."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from quantpress.convert.atomic import atomic_file, require_space
from quantpress.convert.checkpoint import Array
from quantpress.convert.gguf.container import ALIGNMENT, ALIGNMENT_KEY, MetadataValue, align, encode_header

_HASHES_BEHIND = 8  # chunks that wait to be hashed, at most
_SYNC_BYTES = 256 << 20  # after so many the disk is told to begin, so that the sync at the end finds little to do
_sync_data = getattr(os, "fdatasync", os.fsync)  # without the file's times, which only the sync at the end needs


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a tensor in a file.

    Attributes:
        name: in GGUF.
        shape: outermost dimension first.
        type_id: ggml's number of the type.
        nbytes: bytes of its data.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int


@dataclass(frozen=True)
class FilePlan:
    """Everything about one GGUF file but its data; a split model is several of these.

    Attributes:
        metadata: pairs in the order of the file.
        slots: tensors in the order of the file.
    """

    metadata: Mapping[str, MetadataValue]
    slots: Sequence[Slot]

    @property
    def alignment(self) -> int:
        """Bytes that the place of every tensor is a multiple of."""
        return int(self.metadata.get(ALIGNMENT_KEY, ("uint32", ALIGNMENT))[1])

    def header(self) -> bytes:
        """Gives the bytes before the data.

        Raises:
            LayoutError: something does not fit the format.
        """
        table = [(slot.name, slot.shape, slot.type_id, slot.nbytes) for slot in self.slots]
        return encode_header(self.metadata, table)

    def nbytes(self) -> int:
        """Gives the size of the file."""
        return len(self.header()) + sum(align(slot.nbytes, self.alignment) for slot in self.slots)


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: its SHA-256 in hexadecimal and its bytes."""

    sha256: str
    nbytes: int


class _HashedOutput:
    """Hashes what is written here on one thread and syncs it on another; both release the interpreter's lock."""

    def __init__(self, file: BinaryIO, hasher: ThreadPoolExecutor, syncer: ThreadPoolExecutor) -> None:
        self._file, self._pool, self._syncer = file, hasher, syncer
        self._digest = hashlib.sha256()
        self._behind: deque[Future[None]] = deque()
        self._sync: Future[None] | None = None
        self._synced = 0
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Writes bytes; `data` must not change afterwards."""
        view = memoryview(data)
        self._behind.append(self._pool.submit(self._digest.update, view))
        self._file.write(view)
        self.nbytes += view.nbytes
        if len(self._behind) > _HASHES_BEHIND:
            self._behind.popleft().result()
        if self.nbytes - self._synced >= _SYNC_BYTES and (self._sync is None or self._sync.done()):
            self._wait_for_sync()
            self._sync = self._syncer.submit(_sync_data, self._file.fileno())
            self._synced = self.nbytes

    def _wait_for_sync(self) -> None:
        """Ends the sync that was begun; a disk that failed says so once only, so its error must not be lost."""
        if self._sync is not None:
            self._sync.result()

    def finish(self) -> Written:
        """Waits for the hash and the sync."""
        while self._behind:
            self._behind.popleft().result()
        self._wait_for_sync()
        return Written(self._digest.hexdigest(), self.nbytes)


def write_container(path: Path | str, plan: FilePlan, chunks: Iterable[tuple[int, Array]], *, force: bool) -> Written:
    """Writes a GGUF file atomically.

    Args:
        path: the output.
        plan: header and table.
        chunks: number of the slot and the next bytes of it as a C-contiguous array, slot after slot.
        force: replace an existing file.

    Raises:
        UsageError, BusyError, OutputError: see `atomic_file`.
        ValueError: the chunks are not what the plan promised.
    """
    header = plan.header()
    require_space(path, len(header) + sum(align(slot.nbytes, plan.alignment) for slot in plan.slots))
    with (
        atomic_file(path, force=force) as file,
        ThreadPoolExecutor(1, "quantpress-hash") as hasher,
        ThreadPoolExecutor(1, "quantpress-sync") as syncer,
    ):
        output = _HashedOutput(file, hasher, syncer)
        output.write(header)
        _write_data(output, plan, chunks)
        return output.finish()


def _write_data(output: _HashedOutput, plan: FilePlan, chunks: Iterable[tuple[int, Array]]) -> None:
    current, filled = 0, 0
    for number, data in chunks:
        while current < number:
            _end_slot(output, plan, current, filled)
            current, filled = current + 1, 0
        filled += data.nbytes
        output.write(data.reshape(-1).view("u1").data)
    while current < len(plan.slots):
        _end_slot(output, plan, current, filled)
        current, filled = current + 1, 0


def _end_slot(output: _HashedOutput, plan: FilePlan, number: int, filled: int) -> None:
    slot = plan.slots[number]
    if filled != slot.nbytes:
        raise ValueError(f"tensor {slot.name!r} got {filled} bytes where {slot.nbytes} were planned")
    padding = align(filled, plan.alignment) - filled
    if padding:
        output.write(bytes(padding))

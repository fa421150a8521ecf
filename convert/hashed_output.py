"""Hashes a file on one thread and syncs it on another while it is written, so that neither costs a pass of its own."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

__all__ = ["HashedOutput", "Written", "hashed_output"]

_BEHIND = 32 << 20  # bytes that wait to be hashed, at most
_SYNC_BYTES = 256 << 20  # after so many the disk is told to begin, so that the sync at the end finds little to do
_sync_data = getattr(os, "fdatasync", os.fsync)  # without the file's times, which only the sync at the end needs


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: its SHA-256 in hexadecimal and its bytes."""

    sha256: str
    nbytes: int


class HashedOutput:
    """A file to write front to back; hashing and syncing release the interpreter's lock."""

    def __init__(self, file: BinaryIO, hasher: ThreadPoolExecutor, syncer: ThreadPoolExecutor) -> None:
        self._file, self._pool, self._syncer = file, hasher, syncer
        self._digest = hashlib.sha256()
        self._behind: deque[tuple[Future[None], int]] = deque()
        self._waiting = 0
        self._sync: Future[None] | None = None
        self._synced = 0
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Writes bytes; `data` must not change afterwards."""
        view = memoryview(data)
        self._behind.append((self._pool.submit(self._digest.update, view), view.nbytes))
        self._waiting += view.nbytes
        self._file.write(view)
        self.nbytes += view.nbytes
        while self._waiting > _BEHIND:
            self._wait_for_hash()
        if self.nbytes - self._synced >= _SYNC_BYTES and (self._sync is None or self._sync.done()):
            self._wait_for_sync()
            self._sync = self._syncer.submit(_sync_data, self._file.fileno())
            self._synced = self.nbytes

    def _wait_for_hash(self) -> None:
        future, nbytes = self._behind.popleft()
        future.result()
        self._waiting -= nbytes

    def _wait_for_sync(self) -> None:
        """Ends the sync that was begun; a disk that failed says so once only, so its error must not be lost."""
        if self._sync is not None:
            self._sync.result()

    def finish(self) -> Written:
        """Waits for the hash and the sync."""
        while self._behind:
            self._wait_for_hash()
        self._wait_for_sync()
        return Written(self._digest.hexdigest(), self.nbytes)


@contextlib.contextmanager
def hashed_output(file: BinaryIO) -> Iterator[HashedOutput]:
    """Gives a `HashedOutput` with threads of its own; call `finish` inside the block."""
    with ThreadPoolExecutor(1, "quantpress-hash") as hasher, ThreadPoolExecutor(1, "quantpress-sync") as syncer:
        yield HashedOutput(file, hasher, syncer)

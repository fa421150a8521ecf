"""Hashes of files together with what tells that a file is still the same, so that it need not be read again."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass
from pathlib import Path

from quantpress.pipelines.hashing import hash_file
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.quant.errors import InputError

__all__ = ["Hashed", "Stamp", "hash_files", "hash_stamped"]

# A file that is written twice within one tick of the disk's clock has the same times after both; FAT's ticks are the
# longest, two seconds. git guards its index in the same way (Documentation/technical/racy-git).
SETTLED = 2_000_000_000  # nanoseconds
HASH_THREADS = 2
_TELL = 0.5  # seconds between two calls of `progress` while a large file is read


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes with a file's contents: size in bytes, times in nanoseconds, and which file it is."""

    nbytes: int
    modified: int
    changed: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path | str) -> Stamp:
        """Takes the stamp of a file, links followed.

        Raises:
            InputError: it is not there, or no regular file.
        """
        try:
            status = os.stat(path)  # noqa: PTH116 - `path` may be a plain string
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read for its hash: {getattr(error, 'strerror', error)}") from error
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: a regular file is expected here")
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)

    def plain(self) -> list[int]:
        """Gives the stamp as JSON holds it."""
        return list(astuple(self))


@dataclass(frozen=True, slots=True)
class Hashed:
    """A file's hash.

    Attributes:
        sha256: hexadecimal.
        stamp: of the file, before and after it was read.
        settled: whether any later change of the file changes the stamp.
    """

    sha256: str
    stamp: Stamp
    settled: bool


def now() -> int:
    """Gives the time in nanoseconds, on the clock of file times."""
    return time.time_ns()


def hash_stamped(
    path: Path, stop: threading.Event | None = None, on_read: Callable[[int], object] | None = None
) -> Hashed:
    """Reads a file.

    Args:
        path: the file.
        stop: ends the work when it is set.
        on_read: called with the bytes of each block.

    Raises:
        InputError: it cannot be read, or changed meanwhile.
        StoppedError: `stop` was set.
    """
    stamp, start = Stamp.of(path), now()
    sha256, _ = hash_file(path, stop, on_read)
    if Stamp.of(path) != stamp:
        raise InputError(f"{path}: the file changed while it was read for its hash; wait until it is whole")
    return Hashed(sha256, stamp, start - max(stamp.modified, stamp.changed) >= SETTLED)


def hash_files(
    paths: Sequence[Path], progress: Progress = no_progress, phase: str = "hash files"
) -> Iterator[tuple[Path, Hashed | InputError]]:
    """Reads files, two at a time, and gives their hashes in order; a reader that goes away ends the work.

    Args:
        paths: the files.
        progress: told the bytes, on the reader's thread; what it raises ends the work.
        phase: what `progress` is told.

    Yields:
        Path and hash, or the error for what cannot be read.
    """
    stop, counts = threading.Event(), dict.fromkeys(paths, 0)
    total = sum(_size(path) for path in paths)

    def read(path: Path) -> Hashed:
        def count(nbytes: int) -> None:
            counts[path] += nbytes  # one thread alone writes it

        return hash_stamped(path, stop, count)

    with ThreadPoolExecutor(HASH_THREADS, "quantpress-hash") as pool:
        waiting: list[tuple[Path, Future[Hashed]]] = [(path, pool.submit(read, path)) for path in counts]
        try:
            for path, future in waiting:
                while not wait([future], _TELL).done:
                    progress(phase, min(sum(counts.values()), total), total)
                yield path, _result(future)
                progress(phase, min(sum(counts.values()), total), total)
        finally:
            stop.set()
            for _, future in waiting:
                future.cancel()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):
        return 0  # whoever reads it says why


def _result(future: Future[Hashed]) -> Hashed | InputError:
    try:
        return future.result()
    except InputError as error:
        return error

"""Remembers the hashes of input files from run to run, so that a key costs no pass over the weights."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from quantpress.convert.lock import locked
from quantpress.pipelines.cache.layout import Layout
from quantpress.pipelines.cache.sealed import read_sealed, replace_sealed
from quantpress.pipelines.cache.stamped_hash import Hashed, Stamp, hash_files, hash_stamped
from quantpress.pipelines.hashing import BackgroundHashes
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.quant.errors import BusyError, InputError, OutputError

__all__ = ["InputHashes", "RememberedHashes"]

_MOST = 50_000  # files that are remembered; those that were read last


class InputHashes:
    """SHA-256 and size of input files. A file that has the path, size, times and inode it had is not read again.

    Several threads and runs may use the same folder. A memory that cannot be read or written only costs time.
    """

    def __init__(self, cache_folder: Path | str) -> None:
        """Reads what is remembered.

        Raises:
            UsageError: the folder is no cache (see `Layout.of`).
        """
        self._layout = Layout.of(cache_folder)
        self._lock = threading.Lock()
        self._known = _read(self._layout.input_hashes)
        self._new: dict[str, tuple[list[int], str]] = {}

    def hashes(self, paths: Iterable[Path], progress: Progress = no_progress) -> dict[Path, tuple[str, int]]:
        """Gives SHA-256 and size of files; what is not remembered is read, two files at a time.

        Args:
            paths: the files; links are followed.
            progress: told how many bytes are done, of those that must be read; what it raises ends the work.

        Raises:
            InputError: a file cannot be read, or changes while it is.
        """
        found = {path: self.recall(path) for path in paths}
        missing = [path for path, known in found.items() if known is None]
        for path, hashed in hash_files(missing, progress, "hash inputs"):
            if isinstance(hashed, InputError):
                raise hashed
            found[path] = self.keep(path, hashed)
        self.save()
        return {path: known for path, known in found.items() if known is not None}

    def background(self) -> RememberedHashes:
        """Gives what `press(hashes=...)` takes: it hashes nothing that is remembered."""
        return RememberedHashes(self)

    def recall(self, path: Path) -> tuple[str, int] | None:
        """Gives SHA-256 and size of a file that is remembered, else None.

        Raises:
            InputError: there is no such file.
        """
        stamp = Stamp.of(path)
        with self._lock:
            known = self._known.get(os.path.abspath(path))  # noqa: PTH100 - links stay: the inode tells where they lead
        return (known[1], stamp.nbytes) if known is not None and known[0] == stamp.plain() else None

    def keep(self, path: Path, hashed: Hashed) -> tuple[str, int]:
        """Remembers the hash of a file, if any change of it can be seen; gives hash and size."""
        if hashed.settled:
            with self._lock:
                name = os.path.abspath(path)  # noqa: PTH100
                self._known[name] = self._new[name] = (hashed.stamp.plain(), hashed.sha256)
        return hashed.sha256, hashed.stamp.nbytes

    def save(self) -> None:
        """Writes what is new to the disk; where it cannot be written, the next run reads the files again."""
        with self._lock:
            new, self._new = self._new, {}
        if not new:
            return
        path = self._layout.input_hashes
        with contextlib.suppress(OutputError, BusyError):
            self._layout.create()
            with locked(path.with_name(f".quantpress-{path.name}.lock"), path, 5.0):
                known = _read(path)
                for name, value in new.items():
                    known.pop(name, None)  # so that it comes last
                    known[name] = value
                rows = [[name, *value] for name, value in known.items()]
                replace_sealed(path, {"files": rows[-_MOST:]})


class RememberedHashes(BackgroundHashes):
    """Hashes files on a thread of its own, but for those that are remembered."""

    def __init__(self, memory: InputHashes) -> None:
        super().__init__()
        self._memory = memory

    def _hash(self, path: Path) -> tuple[str, int] | InputError:
        try:
            return self._memory.recall(path) or self._memory.keep(path, hash_stamped(path, self._stop))
        except InputError as error:
            return error

    def __enter__(self) -> RememberedHashes:
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._memory.save()


def _read(path: Path) -> dict[str, tuple[list[int], str]]:
    """Reads what is remembered; nothing where the file is missing or damaged."""
    try:
        value: Any = read_sealed(path)
        return {str(name): (list(stamp), str(sha256)) for name, stamp, sha256 in value["files"]}
    except (InputError, KeyError, TypeError, ValueError):
        return {}

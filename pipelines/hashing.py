"""Hashes files beside other work, so that a sidecar costs no extra pass over the disk in time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from quantpress.convert.checkpoint import SourceFile
from quantpress.quant.errors import InputError

_BLOCK = 1 << 20  # bytes read at a time: fits the processor's second cache, so the hash reads it from there


class StoppedError(Exception):
    """Hashing was given up because the work beside it failed."""


def hash_file(path: Path, stop: threading.Event | None = None) -> tuple[str, int]:
    """Gives SHA-256 (hexadecimal) and size of a file.

    Raises:
        InputError: it cannot be read.
        StoppedError: `stop` was set.
    """
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
                size += count
                if stop is not None and stop.is_set():
                    raise StoppedError
    except OSError as error:
        raise InputError(f"{path}: cannot be read for its hash: {error.strerror}") from error
    return digest.hexdigest(), size


def hash_files(paths: Iterable[Path]) -> dict[Path, tuple[str, int]]:
    """Gives SHA-256 and size of each file."""
    return {path: hash_file(path) for path in paths}


class BackgroundHashes:
    """Hashes the files of a source on a thread of its own while the block runs."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = [file.path for file in files]
        self._stop = threading.Event()
        self._hashes: dict[Path, tuple[str, int]] = {}
        self._error: InputError | None = None
        self._thread = threading.Thread(target=self._work, name="quantpress-input-hash", daemon=True)

    def _work(self) -> None:
        try:
            for path in self._files:
                self._hashes[path] = hash_file(path, self._stop)
        except InputError as error:
            self._error = error
        except StoppedError:
            return

    def __enter__(self) -> BackgroundHashes:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        self._thread.join()

    def results(self) -> dict[Path, tuple[str, int]]:
        """Waits for the thread and gives SHA-256 and size of every file.

        Raises:
            InputError: a file could not be read.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return dict(self._hashes)

"""Hashes files beside other work, so that a sidecar costs no extra pass over the disk in time."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

from quantpress.convert.files import open_regular
from quantpress.quant.errors import InputError

# Bytes read at a time. After each block the thread waits for the interpreter's lock, up to a switch interval while
# others import; small blocks would be hashed at a fifth of the speed then.
_BLOCK = 16 << 20


class StoppedError(Exception):
    """Hashing was given up because the work beside it failed."""


def hash_file(
    path: Path, stop: threading.Event | None = None, on_read: Callable[[int], object] | None = None
) -> tuple[str, int]:
    """Gives SHA-256 (hexadecimal) and size of a file.

    Args:
        path: the file.
        stop: looked at after each block.
        on_read: called with the bytes of each block.

    Raises:
        InputError: it cannot be read.
        StoppedError: `stop` was set.
    """
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    try:
        with open_regular(path) as file:  # never waits for a pipe's other end
            while count := file.readinto(buffer):  # type: ignore[attr-defined]
                digest.update(view[:count])
                size += count
                if on_read is not None:
                    on_read(count)
                if stop is not None and stop.is_set():
                    raise StoppedError
    except OSError as error:
        raise InputError(f"{path}: cannot be read for its hash: {error.strerror}") from error
    return digest.hexdigest(), size


class BackgroundHashes:
    """Hashes files on a thread of its own while the block runs; they may be named before it is known who needs them."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Path | None] = SimpleQueue()
        self._stop = threading.Event()
        self._hashes: dict[Path, tuple[str, int] | InputError] = {}
        self._named: set[Path] = set()
        self._thread = threading.Thread(target=self._work, name="quantpress-input-hash", daemon=True)

    def _work(self) -> None:
        with contextlib.suppress(StoppedError):
            while (path := self._queue.get()) is not None:
                self._hashes[path] = self._hash(path)

    def _hash(self, path: Path) -> tuple[str, int] | InputError:
        try:
            return hash_file(path, self._stop)
        except InputError as error:
            return error

    def add(self, paths: Iterable[Path]) -> None:
        """Names files to hash; one that was named before is hashed once."""
        for path in paths:
            if path not in self._named:
                self._named.add(path)
                self._queue.put(path)

    def __enter__(self) -> BackgroundHashes:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stop.set()
        self._queue.put(None)
        self._thread.join()

    def results(self, paths: Sequence[Path]) -> dict[Path, tuple[str, int]]:
        """Waits for the thread, after which no file can be named, and gives SHA-256 and size of these files.

        Raises:
            InputError: one of them could not be read.
        """
        self._queue.put(None)
        self._thread.join()
        found: dict[Path, tuple[str, int]] = {}
        for path in paths:
            result = self._hashes[path]
            if isinstance(result, InputError):
                raise result
            found[path] = result
        return found


def likely_weights(model: str) -> list[Path]:
    """Gives the files that opening a model will most likely read, found by their names alone."""
    path = Path(model)
    if path.suffix == ".gguf":
        parts = re.fullmatch(r"(.*)-\d{5}(-of-\d{5}\.gguf)", path.name)
        pattern = glob.escape(path.name) if parts is None else f"{glob.escape(parts[1])}-?????{parts[2]}"
        return sorted(file for file in path.parent.glob(pattern) if file.is_file())
    return sorted(file for file in path.glob("*.safetensors") if file.is_file()) if path.is_dir() else []

"""Moves files to or from a store on threads of their own, while the caller's thread tells the progress.

Progress is told on the caller's thread only, so what it raises (cancellation, Ctrl-C) ends the transfers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantpress.pipelines.batch.stores import failures
from quantpress.pipelines.progress import Progress

__all__ = ["Moved", "Transfer", "counting", "run_transfers"]

_PAUSES = (1.0, 5.0)  # seconds before the second and the third attempt
_TELL_SECONDS = 0.2
_LEAVE_SECONDS = 2.0  # to wait for a thread that is told to stop; one that waits for a dead server is left behind

Moved = Callable[[int], None]
"""Told how many more bytes have been moved; raises where the transfer is to stop."""


class _StoppedError(Exception):
    """Another transfer failed or the caller gave up."""


class _TooMuchError(ValueError):
    """The other side sends more than it said."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One file.

    Attributes:
        move: does the work; called again after a failure that may pass.
        limit: bytes that it may move; more is an error of the other side. None where nobody knows.
    """

    move: Callable[[Moved], None]
    limit: int | None = None


class _Counter:
    """Counts bytes of all transfers, and stops them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.stop = threading.Event()
        self.done = 0

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes

    def pause(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise _StoppedError


def run_transfers(
    transfers: Sequence[Transfer], *, threads: int, phase: str, total: int, progress: Progress, before: int = 0
) -> None:
    """Runs transfers, in order as threads are free; the first error stops all of them.

    Args:
        transfers: what is to be moved.
        threads: how many at a time.
        phase: what the progress is called.
        total: bytes of everything, with those of `before`.
        progress: told on the caller's thread.
        before: bytes that were moved in an earlier run.

    Raises:
        Exception: the first that a transfer raised after its last attempt.
    """
    counter, waiting, ended = _Counter(), queue.SimpleQueue[Transfer](), queue.SimpleQueue[BaseException | None]()
    for transfer in transfers:
        waiting.put(transfer)
    workers = [
        threading.Thread(target=_work, args=(waiting, ended, counter), name="quantpress-transfer", daemon=True)
        for _ in range(min(threads, len(transfers)))
    ]
    try:
        progress(phase, before, total)
        for worker in workers:
            worker.start()
        left = len(transfers)
        while left:
            left -= _wait(ended)
            progress(phase, min(total, before + counter.done), total)
        progress(phase, total, total)
    finally:
        counter.stop.set()
        deadline = time.monotonic() + _LEAVE_SECONDS
        for worker in workers:
            if worker.ident is not None:
                worker.join(max(0.0, deadline - time.monotonic()))


def _wait(ended: queue.SimpleQueue[BaseException | None]) -> int:
    """Waits a moment for a transfer to end and gives 1 if one did."""
    try:
        error = ended.get(timeout=_TELL_SECONDS)
    except queue.Empty:
        return 0
    if error is not None:
        raise error
    return 1


def _work(
    waiting: queue.SimpleQueue[Transfer], ended: queue.SimpleQueue[BaseException | None], counter: _Counter
) -> None:
    while not counter.stop.is_set():
        try:
            transfer = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            _attempt(transfer, counter)
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            ended.put(error)
            return
        ended.put(None)


class _Share:
    """Counts the bytes of one attempt."""

    def __init__(self, counter: _Counter, limit: int | None) -> None:
        self._counter, self._limit = counter, limit
        self._moved = 0

    def __call__(self, nbytes: int) -> None:
        """Counts more bytes."""
        if self._counter.stop.is_set():
            raise _StoppedError
        self._moved += nbytes
        self._counter.add(nbytes)
        if self._limit is not None and self._moved > self._limit:
            raise _TooMuchError(f"more than the {self._limit} bytes that were announced came")

    def take_back(self) -> None:
        """Forgets what was counted."""
        self._counter.add(-self._moved)


def _attempt(transfer: Transfer, counter: _Counter) -> None:
    """Moves one file; what may be trouble of the moment is tried again."""
    for pause in (*_PAUSES, None):
        share = _Share(counter, transfer.limit)
        try:
            return transfer.move(share)
        except (FileNotFoundError, PermissionError, _TooMuchError):
            raise
        except failures():
            if pause is None:
                raise
            share.take_back()
            counter.pause(pause)
    return None


def counting(moved: Moved) -> Any:
    """Gives what fsspec calls while it moves one file; its `value` is the bytes moved so far."""
    from fsspec.callbacks import Callback

    class Counting(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            moved(inc)

        def absolute_update(self, value: int) -> None:
            self.relative_update(value - self.value)

    return Counting()

"""Lets a caller of the library stop long work from another thread."""

from __future__ import annotations

import threading

from quantpress.pipelines.progress import Progress
from quantpress.quant.errors import CancelledError

__all__ = ["cancellable"]


def cancellable(progress: Progress, cancel: threading.Event | None) -> Progress:
    """Makes a progress display that stops the work which calls it once an event is set.

    Work tells its progress on the thread of its caller, between two windows, layers or blocks of a file. So the error
    passes through everything that closes files, ends threads and removes what is half written, as Ctrl-C does.

    Args:
        progress: told how far the work has come.
        cancel: None leaves the display as it is.

    Raises:
        CancelledError: the event is set already; the display raises it too.
    """
    if cancel is None:
        return progress
    stop = cancel

    def check() -> None:
        if stop.is_set():
            raise CancelledError("cancelled by the caller; what long work has finished is kept for the next call")

    def told(phase: str, done: int, total: int) -> None:
        check()
        progress(phase, done, total)

    check()
    return told

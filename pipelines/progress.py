"""Shows how far long work has come: a bar on a terminal, plain lines elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

PLAIN_INTERVAL = 5.0  # seconds between two plain lines of one phase, so that a log of hours stays readable


class Progress(Protocol):
    """What a stage calls while it works; the library takes any function of this form."""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Says that `done` of `total` units (bytes, windows) of `phase` are finished."""


def no_progress(phase: str, done: int, total: int) -> None:
    """Ignores everything."""
    del phase, done, total


class PlainProgress:
    """One line per phase and every few seconds, as text or as JSON."""

    def __init__(self, stream: TextIO, *, as_json: bool = False) -> None:
        self._stream, self._as_json = stream, as_json
        self._phase, self._last = "", 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Writes a line when the phase is new, finished, or the last line is old."""
        now = time.monotonic()
        finished = done >= total
        if phase == self._phase and not finished and now - self._last < PLAIN_INTERVAL:
            return
        self._phase, self._last = phase, now
        if self._as_json:
            line = json.dumps({"event": "progress", "phase": phase, "done": done, "total": total})
        else:
            line = f"{phase}: {100 * done / total if total else 100.0:.0f} %"
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError:  # the disk of a log is full: hours of work do not end for that
            return


class BarProgress:
    """A rich bar per phase."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Moves the phase's bar."""
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
            self._bars.start()
        self._bars.update(self._tasks[phase], completed=done, total=total)

    def stop(self) -> None:
        """Leaves the finished bars on the screen and gives the terminal back."""
        self._bars.stop()


@contextlib.contextmanager
def terminal_progress(*, quiet: bool, log_format: str) -> Iterator[Progress]:
    """Chooses the display that fits standard error."""
    if quiet:
        yield no_progress
    elif log_format == "json" or not sys.stderr.isatty():
        yield PlainProgress(sys.stderr, as_json=log_format == "json")
    else:
        bars = BarProgress()
        try:
            yield bars
        finally:
            bars.stop()

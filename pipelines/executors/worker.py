"""A worker process: does the tasks that come through a pipe, one after another, and tells what happens.

Its life hangs on its parent's: it ends at once when that pipe ends, and on Linux the system kills it with the thread
that started it, even where Python code cannot run at that moment.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import TextIOWrapper
from queue import SimpleQueue
from types import FrameType
from typing import Any, BinaryIO, NoReturn, cast

from quantpress.pipelines.batch.tasks import Event, Task, TaskResult
from quantpress.pipelines.executors.attempt import attempt, find_perform, resident_bytes
from quantpress.pipelines.executors.frames import READY, decode, encode, read_frame, write_frame
from quantpress.pipelines.progress import Progress
from quantpress.quant.errors import UsageError

__all__ = ["Hello", "main"]

_PROGRESS_INTERVAL = 0.1  # seconds; a file that is written in small chunks tells its progress thousands of times
_TERMINATED = 143  # exit code after SIGTERM, as of the program (INTERFACE: exit codes)
_PR_SET_PDEATHSIG = 1  # prctl.h


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker is told first.

    Attributes:
        parent: process id of who started it.
        perform: what does the tasks, "module:function".
        threads: worker threads of each task.
        level: least level of log messages that are sent on.
    """

    parent: int
    perform: str
    threads: int
    level: int


class _Terminated(BaseException):
    """SIGTERM arrived; everything that is open is closed and removed on the way out."""


class _Channel:
    """The stream of events; of several threads, and cut where the worker is told to end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._lock = stream, threading.RLock()
        self._open = True

    def send(self, event: Event) -> None:
        """Sends an event; ends the process where nobody reads any more."""
        frame = encode(event)
        with self._lock:
            if not self._open:
                return
            try:
                write_frame(self._stream, frame)
            except OSError:
                os._exit(1)

    def cut(self) -> None:
        """Sends nothing any more: a signal may have come in the middle of a frame."""
        self._open = False

    def check(self) -> None:
        """Raises again what a signal has raised where Python drops errors, as in callbacks of an import's locks."""
        if not self._open:
            raise _Terminated


class _Logs(logging.Handler):
    """Turns log messages into events of the task that runs."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__()
        self._channel = channel
        self.task = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a message; one of a library that cannot be put together is left to `logging` to complain of."""
        try:
            message = self.format(record)
        except (TypeError, ValueError):
            self.handleError(record)
            return
        self._channel.send(Event("log", self.task, level=record.levelname, message=message))


def main(requests: BinaryIO) -> NoReturn:
    """Works until it is told to stop; its standard output is a pipe of its parent, as `requests` is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who decides
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not land between two frames
    cast(TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)  # what is printed is told when it is printed
    faulthandler.enable(all_threads=False)
    first = read_frame(requests)
    if first is None:
        os._exit(1)
    hello: Hello = decode(first)
    _die_with(hello.parent)
    channel = _Channel(replies)
    signal.signal(signal.SIGTERM, _terminator(channel))
    # As the program has it: less collecting of what is no garbage, less waiting of threads for each other.
    gc.set_threshold(100_000, 50, 100)
    sys.setswitchinterval(0.0005)
    replies.write(READY)
    replies.flush()
    try:
        _work(hello, channel, requests)
    except _Terminated:
        os._exit(_TERMINATED)
    os._exit(0)  # nothing is left to do; libraries' own tear-down takes time and has crashed


def _die_with(parent: int) -> None:
    """Asks the system to kill this process when its parent ends, and ends if that has happened already."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.name != "nt" and os.getppid() != parent:
        os._exit(1)


def _terminator(channel: _Channel) -> Callable[[int, FrameType | None], NoReturn]:
    def terminate(signum: int, frame: FrameType | None) -> NoReturn:
        del frame
        signal.signal(signum, signal.SIG_IGN)  # a second one must not stop the cleaning up
        channel.cut()
        raise _Terminated

    return terminate


def _listen(requests: BinaryIO, frames: SimpleQueue[bytes | None]) -> None:
    """Hands on what comes; an input that ends without an empty frame means that the parent is gone."""
    while (frame := read_frame(requests)) is not None:
        frames.put(frame or None)
        if not frame:
            return
    os._exit(1)


def _work(hello: Hello, channel: _Channel, requests: BinaryIO) -> None:
    frames: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(requests, frames), name="quantpress-requests", daemon=True).start()
    logs = _Logs(channel)
    logs.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=hello.level, handlers=[logs], force=True)
    logging.captureWarnings(True)
    while (frame := frames.get()) is not None:
        _one(frame, hello, channel, logs)
        channel.check()
        gc.collect()
        _trim()


def _one(frame: bytes, hello: Hello, channel: _Channel, logs: _Logs) -> None:
    """Does one task; its work is pickled apart, for it may name what cannot be imported here."""
    task, pickled = decode(frame)
    logs.task = task.id

    def perform(task: Task, progress: Progress, threads: int) -> TaskResult:
        return find_perform(hello.perform)(replace(task, work=_unpickled(pickled)), progress, threads)

    result = attempt(perform, task, _Told(channel, task.id), hello.threads)
    try:
        channel.send(Event("finished", task.id, result=result))
    except ValueError as error:
        problem = f"internal error: the result cannot be sent to another process: {error}"
        failed = replace(result, state="failed", error=problem, exit_code=1, output=None)
        channel.send(Event("finished", task.id, result=failed))


def _unpickled(pickled: bytes) -> Any:
    try:
        return decode(pickled)
    except (AttributeError, ImportError) as error:
        raise UsageError(
            f"the task cannot be read in a worker process: {error}; stages must be in a module that can be imported"
        ) from error


class _Told:
    """Progress as events, not more often than somebody can look."""

    def __init__(self, channel: _Channel, task: str) -> None:
        self._channel, self._task = channel, task
        self._phase, self._last = "", 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Sends what is new: another phase, its end, or the last was some time ago."""
        self._channel.check()
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._last < _PROGRESS_INTERVAL:
            return
        self._phase, self._last = phase, now
        self._channel.send(Event("progress", self._task, phase, done, total, memory=resident_bytes()))


def _trim() -> None:
    """Gives freed memory back while the worker waits; only glibc can be told."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)

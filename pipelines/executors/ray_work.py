"""What runs on the nodes of a Ray cluster: one task, told as a stream of events; and a look at what a node has.

Nothing here imports Ray. A task works on a thread of its own, so that the one that Ray knows can hand on its events and
hears when it is to be cancelled.
"""

from __future__ import annotations

import gc
import logging
import os
import platform
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue

from quantpress.pipelines.batch.tasks import Event, Task, TaskResult
from quantpress.pipelines.executors.attempt import attempt, find_perform, resident_bytes
from quantpress.pipelines.executors.frames import decode, encode
from quantpress.pipelines.progress import Progress
from quantpress.pipelines.sidecar import environment
from quantpress.quant.errors import CancelledError, OutputError, UsageError

__all__ = ["Request", "Seen", "look", "work"]

_PROGRESS_INTERVAL = 0.2  # seconds; every event is a message over the network
_WAKE_SECONDS = 0.2  # Ray's cancellation is heard between two waits
_STOP_SECONDS = 5.0  # that a cancelled task has to remove what it has begun


@dataclass(frozen=True, slots=True)
class Request:
    """One task to do.

    Attributes:
        task: without its work.
        work: pickled apart, for it may name what cannot be imported on a node.
        perform: what does it, "module:function".
        threads: worker threads.
        level: least level of log messages that are sent on.
        token: a file in the cache folder, which every node must see; "" where there is none.
        paths: folders that the batch imports from, used after the node's own.
        named: whether an error says which node it comes from.
    """

    task: Task
    work: bytes
    perform: str
    threads: int
    level: int
    token: str
    paths: tuple[str, ...]
    named: bool


@dataclass(frozen=True, slots=True)
class Seen:
    """What a node says of itself.

    Attributes:
        host: its name.
        reply: a file that it has written beside the token; "" where it sees no token or may not write.
        python: version of Python.
        packages: versions of the packages that numbers depend on.
    """

    host: str
    reply: str
    python: str
    packages: dict[str, str]


def look(token: str) -> Seen:
    """Looks at a node: whether it sees the cache folder, and what is installed."""
    reply = ""
    if token and Path(token).is_file():
        path = Path(f"{token}-{secrets.token_hex(4)}")
        try:
            path.write_bytes(b"")
            reply = str(path)
        except OSError:
            reply = ""
    return Seen(socket.gethostname(), reply, platform.python_version(), environment("cpu")["packages"])


def work(pickled: bytes) -> Iterator[bytes]:
    """Does one task.

    Args:
        pickled: a `Request`.

    Yields:
        Pickled events; "started" first, "finished" last.
    """
    request: Request = decode(pickled)
    events: SimpleQueue[Event | None] = SimpleQueue()
    stop = threading.Event()
    yield encode(Event("started", request.task.id))
    thread = threading.Thread(target=_run, args=(request, events, stop), name="quantpress-task", daemon=True)
    thread.start()
    try:
        while (event := _next(events)) is not None:
            yield _encoded(event)
    finally:
        stop.set()
        thread.join(_STOP_SECONDS)
        if thread.is_alive():
            os._exit(1)  # it would go on beside the next task of this process
    gc.collect()


def _next(events: SimpleQueue[Event | None]) -> Event | None:
    while True:
        with suppress(Empty):
            return events.get(timeout=_WAKE_SECONDS)


def _encoded(event: Event) -> bytes:
    try:
        return encode(event)
    except ValueError as error:
        if event.result is None:
            raise
        problem = f"internal error: the result cannot be sent to another process: {error}"
        result = replace(event.result, state="failed", error=problem, exit_code=1, output=None)
        return encode(replace(event, result=result))


def _run(request: Request, events: SimpleQueue[Event | None], stop: threading.Event) -> None:
    """Does the task, on its own thread."""
    sys.path.extend(path for path in request.paths if path not in sys.path)
    task = request.task

    def perform(task: Task, progress: Progress, threads: int) -> TaskResult:
        if request.token and not Path(request.token).is_file():
            folder = Path(request.token).parent
            raise OutputError(f"{folder}: the cache folder is not there on {socket.gethostname()}; use a shared disk")
        return find_perform(request.perform)(replace(task, work=_unpickled(request.work)), progress, threads)

    try:
        with _logs(request, events):
            result = attempt(perform, task, _Told(events, task.id, stop), request.threads)
        if request.named and result.error:
            result = replace(result, error=f"{result.error} (on {socket.gethostname()})")
        events.put(Event("finished", task.id, result=result))
    finally:
        events.put(None)


def _unpickled(pickled: bytes) -> object:
    found: object
    try:
        found = decode(pickled)
    except (AttributeError, ImportError) as error:
        raise UsageError(
            f"the task cannot be read on {socket.gethostname()}: {error}; what stages come from must be installed there"
        ) from error
    return found


class _Told:
    """Progress as events, not more often than somebody can look; where a task is cancelled it ends."""

    def __init__(self, events: SimpleQueue[Event | None], task: str, stop: threading.Event) -> None:
        self._events, self._task, self._stop = events, task, stop
        self._phase, self._last = "", 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Sends what is new: another phase, its end, or the last was some time ago."""
        if self._stop.is_set():
            raise CancelledError("cancelled; what was finished is kept")
        now = time.monotonic()
        if phase == self._phase and done < total and now - self._last < _PROGRESS_INTERVAL:
            return
        self._phase, self._last = phase, now
        self._events.put(Event("progress", self._task, phase, done, total, memory=resident_bytes()))


class _Logs(logging.Handler):
    """Turns log messages into events."""

    def __init__(self, events: SimpleQueue[Event | None], task: str) -> None:
        super().__init__()
        self._events, self._task = events, task

    def emit(self, record: logging.LogRecord) -> None:
        """Sends a message; one of a library that cannot be put together is left to `logging` to complain of."""
        try:
            message = record.getMessage()
        except (TypeError, ValueError):
            self.handleError(record)
            return
        self._events.put(Event("log", self._task, level=record.levelname, message=message))


@contextmanager
def _logs(request: Request, events: SimpleQueue[Event | None]) -> Iterator[None]:
    """Sends log messages of every library while the block runs."""
    root, handler = logging.getLogger(), _Logs(events, request.task.id)
    level = root.level
    root.addHandler(handler)
    root.setLevel(request.level)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)

"""The process that talks to Ray, between the one that runs a batch and the cluster.

Ray prints to standard output, sets signal handlers and environment variables, and leaves processes behind when its
driver is killed. Here all of that stays in a process of its own, which shuts Ray down in any case where it still can:
also when the process that it works for is gone.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from io import TextIOWrapper
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, NoReturn, cast

from quantpress.pipelines.batch.tasks import Event, Task, TaskResult
from quantpress.pipelines.executors.frames import READY, decode, encode, read_frame, write_frame
from quantpress.pipelines.executors.ray_cluster import Cluster, RayHello, connected
from quantpress.pipelines.executors.ray_work import Request, work
from quantpress.quant.errors import OutputError, QuantpressError

__all__ = ["END", "KILL", "Connected", "main"]

END = b"end"
"""What the bridge is told when nothing runs any more."""

KILL = b"kill"
"""What it is told to stop everything at once."""

_WAIT_SECONDS = 0.1  # for events, between two looks at what is asked
_STOP_SECONDS = 7.0  # that cancelled tasks have; on the nodes it is less
_MANY = 1000  # events that are told before what is asked is looked at


@dataclass(frozen=True, slots=True)
class Connected:
    """What the bridge says first.

    Attributes:
        error: why the cluster cannot be used; "" where it can.
        exit_code: of the error.
        threads, nodes, address: as `Cluster` has them.
    """

    error: str = ""
    exit_code: int = 0
    threads: int = 0
    nodes: int = 0
    address: str = ""


@dataclass(slots=True)
class _Running:
    """A task that Ray has.

    Attributes:
        stream: Ray's generator of references to events.
        task: without its work.
        work: pickled.
        again: whether this is its second try.
        finished: whether its result was told.
    """

    stream: Any
    task: Task
    work: bytes
    again: bool
    finished: bool = False


def main() -> NoReturn:
    """Works until it is told to end, or until nobody is there any more to tell it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who decides
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Ray prints must not land between two frames
    cast(TextIOWrapper, sys.stdout).reconfigure(line_buffering=True)
    first = read_frame(sys.stdin.buffer)
    if first is None:
        os._exit(1)
    replies.write(READY)
    replies.flush()
    asked: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), name="quantpress-requests", daemon=True).start()
    hello: RayHello = decode(first)
    try:
        with connected(hello) as cluster:
            _send(replies, Connected(threads=cluster.threads, nodes=cluster.nodes, address=cluster.address))
            _Bridge(hello, cluster, replies).serve(asked)
    except QuantpressError as error:
        _send(replies, Connected(str(error), error.exit_code))
    os._exit(0)


def _listen(asked: SimpleQueue[bytes]) -> None:
    """Hands on what comes; an end of the input means that the parent is gone."""
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        asked.put(frame)
    asked.put(KILL)


def _send(replies: BinaryIO, value: Connected | Event) -> None:
    """Tells the parent; that it is gone is heard from the other pipe."""
    try:
        write_frame(replies, encode(value))
    except OSError:
        return


class _Bridge:
    """Tasks that Ray has, and their events."""

    def __init__(self, hello: RayHello, cluster: Cluster, replies: BinaryIO) -> None:
        self._hello, self._cluster, self._ray, self._replies = hello, cluster, cluster.ray, replies
        self._function = cluster.ray.remote(work)
        self._running: list[_Running] = []

    def serve(self, asked: SimpleQueue[bytes]) -> None:
        """Does what is asked until the end."""
        while True:
            try:
                frame = asked.get(timeout=0 if self._running else _WAIT_SECONDS)
            except Empty:
                self._hear(_WAIT_SECONDS)
                continue
            if frame == END:
                return
            if frame == KILL:
                self._cancel()
                return
            task, pickled = decode(frame)
            self._start(task, pickled)

    def _start(self, task: Task, pickled: bytes, *, again: bool = False, alone: bool = False) -> None:
        hello, cluster = self._hello, self._cluster
        request = Request(
            task=task,
            work=pickled,
            perform=hello.perform,
            threads=cluster.threads,
            level=hello.level,
            token=cluster.token,
            paths=hello.paths,
            named=cluster.nodes > 1,
        )
        options = cluster.options(task, alone=alone)
        stream = self._function.options(**options).remote(encode(request))
        self._running.append(_Running(stream, task, pickled, again))

    def _hear(self, timeout: float) -> None:
        """Tells events, waiting at most `timeout` seconds for the first one."""
        for _ in range(_MANY):
            streams = [each.stream for each in self._running]
            if not streams:
                return
            ready, _ = self._ray.wait(streams, num_returns=1, timeout=timeout)
            if not ready:
                return
            self._step(next(each for each in self._running if each.stream is ready[0]))
            timeout = 0

    def _step(self, running: _Running) -> None:
        """Takes the next event of one task."""
        exceptions = self._ray.exceptions
        try:
            event: Event = decode(self._ray.get(next(running.stream)))
        except StopIteration:
            self._forget(running, "its worker process ended without a result")
        except exceptions.RayTaskError as error:
            self._forget(running, f"internal error: {_last_line(error)}", lost=False)
        except exceptions.OutOfMemoryError:
            self._forget(running, "its worker process was killed by Ray, for memory ran out", memory=True)
        except exceptions.RayError as error:
            self._forget(running, f"its worker process was lost: {_first_sentence(error)}")
        else:
            running.finished = running.finished or event.kind == "finished"
            if event.kind != "started" or not running.again:
                _send(self._replies, event)

    def _forget(self, running: _Running, how: str, *, lost: bool = True, memory: bool = False) -> None:
        """Takes a task that has ended off the list; one that was lost is started once more."""
        self._running.remove(running)
        task = running.task
        if running.finished:
            return
        if lost and not running.again:
            message = f"{task.title} is tried once more: {how}"
            _send(self._replies, Event("retried", task.id, level="WARNING", message=message))
            self._start(task, running.work, again=True, alone=memory)
            return
        if memory and task.estimate.memory:
            how += f", {task.estimate.memory / 1e9:.1f} GB were expected"
        error = f"{how}; this was its second try" if lost else how
        code = OutputError.exit_code if memory else QuantpressError.exit_code
        result = TaskResult(task.id, "failed", error=error, exit_code=code)
        _send(self._replies, Event("finished", task.id, result=result))

    def _cancel(self) -> None:
        """Stops all tasks: those that can remove what they have begun, then by force; tells what had finished."""
        deadline = time.monotonic() + _STOP_SECONDS
        for running in self._running:
            self._ray.cancel(running.stream, force=False)
        while self._running and time.monotonic() < deadline:
            self._drain(deadline - time.monotonic())
        for running in self._running:
            self._ray.cancel(running.stream, force=True)

    def _drain(self, timeout: float) -> None:
        """Takes one event of a task that is being cancelled; only a result that is whole is told."""
        ready, _ = self._ray.wait([each.stream for each in self._running], num_returns=1, timeout=timeout)
        for running in [each for each in self._running if ready and each.stream is ready[0]]:
            try:
                event: Event = decode(self._ray.get(next(running.stream)))
            except (StopIteration, self._ray.exceptions.RayError):
                self._running.remove(running)
                continue
            if event.kind == "finished":
                _send(self._replies, event)


def _words(lines: Iterable[str]) -> str:
    return " ".join(" ".join(lines).split())[:300]


def _last_line(error: Exception) -> str:
    """Ray puts the traceback of the other side first, and the error last."""
    return _words(str(error).strip().splitlines()[-1:]) or type(error).__name__


def _first_sentence(error: Exception) -> str:
    return _words(str(error).strip().splitlines()[:1]).partition(". ")[0] or type(error).__name__


if __name__ == "__main__":
    main()

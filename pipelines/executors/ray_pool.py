"""Runs tasks on a Ray cluster: the one that RAY_ADDRESS names, or one that is started on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import BinaryIO, cast

from quantpress.pipelines.batch.tasks import Event, Task, TaskResult
from quantpress.pipelines.executors.attempt import PERFORM
from quantpress.pipelines.executors.frames import decode, encode, read_frame, skip_to_ready, write_frame
from quantpress.pipelines.executors.ray_bridge import END, KILL, Connected
from quantpress.pipelines.executors.ray_cluster import RayHello
from quantpress.pipelines.sidecar import environment
from quantpress.quant.errors import OutputError, UsageError

__all__ = ["RayPool"]

# As of local workers: the working folder may hold files of strangers with names of modules.
_BOOT = (
    "import sys; sys.path = [p for p in sys.path if p]; import json; "
    "sys.path = json.loads(sys.stdin.buffer.readline()); "
    "from quantpress.pipelines.executors.ray_bridge import main; main()"
)
_CONNECT_SECONDS = 180.0  # Ray's own processes take 5 to 20 seconds to start; a cluster may need time to answer
_STOP_SECONDS = 25.0  # for tasks to remove what they have begun, and for Ray's processes to end
_POLL = 0.2
_TAIL_LINES = 20  # of what Ray prints, kept for the case that the bridge dies
_LINE_BYTES = 2000


class RayPool:
    """Tasks on a Ray cluster.

    A cluster's nodes must have the same versions installed, and see inputs, outputs and the cache folder at the same
    paths. Ray decides which node takes a task, by processors, memory and GPUs; a task whose worker or node is lost is
    started once more.

    Attributes:
        workers: tasks at once, at most; None for as many as the cluster has room for.
        threads: of each task.
        nodes: how many the cluster had at the start.
        address: of the cluster, for another pool.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        cache: Path | None = None,
        address: str | None = None,
        cores: int | None = None,
        memory: int | None = None,
        threads: int | None = None,
        perform: str = PERFORM,
    ) -> None:
        """Connects to the cluster or starts one, and checks its nodes; this takes some seconds.

        Args:
            workers: see above.
            cache: the cache folder, which all nodes must see.
            address: of the cluster; None for RAY_ADDRESS. Where neither is given, or it is "local", a Ray is started
                on this machine and ended with the pool.
            cores: processors of a Ray that is started here; None for all.
            memory: bytes of memory of a Ray that is started here; None for what is free.
            threads: worker threads of each task; None for the processors divided by `workers`, or four.
            perform: what does a task, "module:function".

        Raises:
            OutputError: Ray is not installed or cannot be reached, or a node cannot do the work.
            UsageError: an address of Ray Client.
        """
        hello = _hello(workers or None, cache, address, cores, memory, threads, perform)
        self.workers = hello.workers
        self._where = f"the Ray cluster at {hello.address}" if hello.address else "a Ray on this machine"
        self._running: dict[str, Task] = {}
        self._said: deque[Event] = deque()
        self._heard: SimpleQueue[Event | Connected | None] = SimpleQueue()
        self._printed: deque[str] = deque(maxlen=_TAIL_LINES)
        self._process = _started()
        self._threads = [
            threading.Thread(target=work, name="quantpress-ray", daemon=True) for work in (self._hear, self._hear_print)
        ]
        first = self._greeted(hello)
        self.threads, self.nodes, self.address = first.threads, first.nodes, first.address

    @property
    def pid(self) -> int:
        """Process id of the process that talks to Ray."""
        return self._process.pid

    def _greeted(self, hello: RayHello) -> Connected:
        """Says what is wanted and waits for the cluster; ends the process where that fails."""
        for thread in self._threads:
            thread.start()
        try:
            self._write(json.dumps(sys.path).encode() + b"\n", framed=False)
            self._write(encode(hello))
            return self._connected()
        except BaseException:
            self.close(kill=True)
            raise

    def _connected(self) -> Connected:
        deadline = time.monotonic() + _CONNECT_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(Empty):
                first = self._heard.get(timeout=_POLL)
                if not isinstance(first, Connected):
                    raise OutputError(f"{self._where} cannot be used: {self._last_words()}")
                if first.error:
                    raise OutputError(first.error)
                return first
        raise OutputError(f"{self._where} has not answered for {_CONNECT_SECONDS:.0f} seconds: {self._last_words()}")

    def has_room(self, task: Task) -> bool:
        """Whether fewer than `workers` tasks are started; without a limit tasks wait at Ray, which may add nodes."""
        del task
        return self.workers is None or len(self._running) < self.workers

    def start(self, task: Task) -> None:
        """Hands a task to Ray; "started" is told when a node begins with it."""
        try:
            frame = encode((replace(task, work=None), encode(task.work)))
        except ValueError as error:
            problem = f"the task cannot be sent to another process: {error}"
            self._said.append(Event("finished", task.id, result=TaskResult(task.id, "failed", problem, exit_code=2)))
            return
        self._running[task.id] = task
        self._write(frame)

    def events(self, timeout: float) -> Sequence[Event]:
        """Gives what has happened, waiting at most `timeout` seconds for the first event."""
        with contextlib.suppress(Empty):
            self._take(self._heard.get(timeout=0 if self._said else max(timeout, 0)))
            while True:
                self._take(self._heard.get_nowait())
        events = list(self._said)
        self._said.clear()
        return events

    def _take(self, event: Event | Connected | None) -> None:
        if isinstance(event, Event):
            if event.kind == "finished":
                self._running.pop(event.task, None)
            self._said.append(event)
            return
        for name in self._running:  # the process that talks to Ray is gone
            result = TaskResult(name, "failed", f"the connection to Ray was lost: {self._last_words()}", exit_code=1)
            self._said.append(Event("finished", name, result=result))
        self._running.clear()

    def close(self, *, kill: bool) -> None:
        """Leaves the cluster, or ends the one that was started here; with `kill` tasks have seconds to clean up."""
        if self._process.returncode is not None:
            return
        self._running.clear()  # nobody waits for them any more
        try:
            self._write(KILL if kill else END)
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # Ray ends its processes then
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_SECONDS / 5)
        finally:
            if self._process.poll() is None:
                _kill(self._process)
            self._process.wait()
            for thread in self._threads:
                thread.join(_STOP_SECONDS)
            for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
                with contextlib.suppress(OSError, ValueError):
                    cast(BinaryIO, stream).close()

    def _write(self, data: bytes, *, framed: bool = True) -> None:
        """Sends bytes; that the other process is gone is heard from the other pipe."""
        stream = cast(BinaryIO, self._process.stdin)
        with contextlib.suppress(OSError, ValueError):
            if framed:
                write_frame(stream, data)
            else:
                stream.write(data)
                stream.flush()

    def _hear(self) -> None:
        """Hands on what the other process says, on a thread of its own, and None once it is gone."""
        stream = cast(BinaryIO, self._process.stdout)
        try:
            if skip_to_ready(stream):
                while (frame := read_frame(stream)) is not None:
                    self._heard.put(decode(frame))
        finally:
            self._heard.put(None)

    def _hear_print(self) -> None:
        """Keeps the last lines that Ray prints, on a thread of its own."""
        stream = cast(BinaryIO, self._process.stderr)
        while line := stream.readline(_LINE_BYTES):
            text = "".join(sign if sign.isprintable() else " " for sign in line.decode("utf-8", "replace")).strip()
            if text:
                self._printed.append(text)

    def _last_words(self) -> str:
        return self._printed[-1][:300] if self._printed else "it said nothing"


def _hello(
    workers: int | None,
    cache: Path | None,
    address: str | None,
    cores: int | None,
    memory: int | None,
    threads: int | None,
    perform: str,
) -> RayHello:
    """Fills in what depends on this program and its environment.

    Raises:
        OutputError: Ray is not installed.
        UsageError: an address of Ray Client.
    """
    if importlib.util.find_spec("ray") is None:
        raise OutputError("the ray executor needs Ray: pip install 'quantpress[ray]'")
    wanted = address if address is not None else os.environ.get("RAY_ADDRESS", "")
    if wanted.startswith("ray://"):
        raise UsageError(
            f"{wanted}: Ray Client cannot hand on what tasks tell; run this on a machine of the cluster with the"
            " address of its head (HOST:6379 or auto), or by `ray job submit`"
        )
    return RayHello(
        address="" if wanted == "local" else wanted,
        workers=workers,
        cores=cores,
        memory=memory,
        threads=threads,
        perform=perform,
        level=logging.getLogger("quantpress").getEffectiveLevel(),
        cache=str(cache.absolute()) if cache is not None else "",
        paths=tuple(sys.path),
        python=platform.python_version(),
        packages=environment("cpu")["packages"],
    )


def _started() -> subprocess.Popen[bytes]:
    """Starts the process that talks to Ray; it has its own session, so that Ctrl-C is for this process.

    It starts in the root folder: Ray lets workers import from the folder in which its driver was started.
    """
    if not sys.executable:
        raise OutputError("Ray needs the path of the Python program, which sys.executable does not say here")
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(Path.cwd().anchor),
            start_new_session=True,
        )
    except OSError as error:
        raise OutputError(f"cannot start a process for Ray: {error.strerror or error}") from error


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)

"""The driver's end of one worker process: starts it, hears it, and says what is known when it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from queue import SimpleQueue
from typing import BinaryIO, cast

from quantpress.pipelines.batch.tasks import Event, Task
from quantpress.pipelines.executors.frames import decode, encode, read_frame, skip_to_ready, write_frame
from quantpress.pipelines.executors.worker import Hello
from quantpress.quant.errors import OutputError, UsageError

__all__ = ["Heard", "WorkerProcess"]

# The working folder, which Python puts first, may hold files of strangers (a downloaded model) with names of modules.
# So the worker imports from where this process does, and from nowhere else.
# What it or its children read from standard input must not be what this process says, so that pipe goes elsewhere.
_BOOT = (
    "import sys; sys.path = [p for p in sys.path if p]; import json, os; "
    "requests = os.fdopen(os.dup(0), 'rb'); os.dup2(os.open(os.devnull, os.O_RDONLY), 0); "
    "sys.path = json.loads(requests.readline()); "
    "from quantpress.pipelines.executors.worker import main; main(requests)"
)
_TAIL_LINES = 40  # of what libraries print, kept for the case that the worker dies
_LINE_BYTES = 2000  # what is longer counts as several lines
_SAID_LINES = 4  # of them, in an error message
_WAIT_SECONDS = 1.0
_SIGKILL = 9


class WorkerProcess:
    """One worker; every method is called on the scheduler's thread.

    Attributes:
        gpu: what it sees of the GPUs: an id for CUDA_VISIBLE_DEVICES, "" for all of them; None if it is for tasks that
            need none.
        task: what it does, None while it is idle.
    """

    def __init__(
        self, hello: Hello, heard: SimpleQueue[Heard], environment: Mapping[str, str], gpu: str | None
    ) -> None:
        """Starts the process.

        Args:
            hello: what it is told first.
            heard: where its events go, and None once it is gone.
            environment: all of its environment variables.
            gpu: see above.

        Raises:
            OutputError: no process can be started.
        """
        self.gpu = gpu
        self.task: Task | None = None
        self._heard, self._level = heard, hello.level
        self._printed: deque[str] = deque(maxlen=_TAIL_LINES)
        if not sys.executable:
            raise OutputError("workers need the path of the Python program, which sys.executable does not say here")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C in the terminal is for this process, which stops its workers
            )
        except OSError as error:
            raise OutputError(f"cannot start a worker process: {error.strerror or error}") from error
        self._threads = [
            threading.Thread(target=work, name=f"quantpress-worker-{self.pid}", daemon=True)
            for work in (self._hear, self._hear_printed)
        ]
        for thread in self._threads:
            thread.start()
        self._write(json.dumps([str(path) for path in sys.path]).encode() + b"\n", framed=False)
        self._write(encode(hello))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def start(self, task: Task) -> None:
        """Sends a task.

        Raises:
            UsageError: it cannot be sent to another process.
        """
        try:
            frame = encode((replace(task, work=None), encode(task.work)))
        except ValueError as error:
            raise UsageError(f"the task cannot be sent to a worker process: {error}") from error
        self.task = task
        self._write(frame)

    def _write(self, data: bytes, *, framed: bool = True) -> None:
        """Sends bytes; that a worker is gone is heard from the other pipe."""
        stream = cast(BinaryIO, self._process.stdin)
        with contextlib.suppress(OSError, ValueError):
            if framed:
                write_frame(stream, data)
            else:
                stream.write(data)

    def _hear(self) -> None:
        """Hands on events, on a thread of its own, until the worker is gone."""
        with cast(BinaryIO, self._process.stdout) as stream:
            try:
                if skip_to_ready(stream):
                    while (frame := read_frame(stream)) is not None:
                        self._heard.put((self, decode(frame)))
            finally:
                self._heard.put((self, None))

    def _hear_printed(self) -> None:
        """Keeps the last lines that libraries print, on a thread of its own; as log events where those are wanted."""
        with cast(BinaryIO, self._process.stderr) as stream:
            while line := stream.readline(_LINE_BYTES):
                text = "".join(sign if sign.isprintable() else " " for sign in line.decode("utf-8", "replace")).strip()
                task = self.task
                if text:
                    self._printed.append(text)
                if text and task is not None and self._level <= logging.INFO:
                    self._heard.put((self, Event("log", task.id, level="INFO", message=text)))

    def death(self) -> tuple[str, bool]:
        """Says how a worker ended that was lost and waited for, and whether memory has probably run out."""
        code = self._process.returncode
        if code == -_SIGKILL:
            return "its worker process was killed (SIGKILL), probably because memory ran out", True
        how = f"ended with code {code}" if code >= 0 else f"died of {_signal_name(-code)}"
        return f"its worker process {how}{self._last_words()}", False

    def _last_words(self) -> str:
        lines = list(self._printed)
        fatal = [place for place, line in enumerate(lines) if line.startswith("Fatal Python error")]
        said = lines[fatal[-1] :][:_SAID_LINES] if fatal else lines[-_SAID_LINES:]
        return f"; its last words: {' | '.join(said)}" if said else ""

    def ask_to_end(self) -> None:
        """Tells an idle worker to end."""
        self._write(b"")
        with contextlib.suppress(OSError):
            cast(BinaryIO, self._process.stdin).close()

    def terminate(self) -> None:
        """Stops what it does, as SIGTERM stops a command."""
        if sys.platform == "win32":
            self._process.terminate()
        elif self._process.returncode is None:  # Popen would look for its end, and its group could not be killed then
            os.kill(self.pid, signal.SIGTERM)

    def wait(self, deadline: float) -> None:
        """Waits until it has ended, until `deadline` (time.monotonic); then kills it and whatever it has started."""
        if self._process.returncode is not None:
            return
        try:
            self._threads[0].join(max(0.0, deadline - time.monotonic()))  # ends with the process
        finally:
            self._kill()
            self._process.wait()
        self._threads[0].join()
        self._threads[1].join(_WAIT_SECONDS)  # a process that has left the group may hold this pipe
        with contextlib.suppress(OSError):
            cast(BinaryIO, self._process.stdin).close()

    def _kill(self) -> None:
        """Kills the process group, which is there as long as its first process has not been waited for."""
        if sys.platform == "win32":
            self._process.kill()
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # of a zombie alone, on some systems
            os.killpg(self.pid, signal.SIGKILL)


Heard = tuple[WorkerProcess, Event | None]
"""Who said what; None: it is gone."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

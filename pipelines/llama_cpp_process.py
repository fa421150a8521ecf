"""The parent's end of a llama.cpp worker: frames, time limits, and what to say when the worker dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from quantpress.quant.errors import OutputError

__all__ = ["RefusedError", "WorkerDiedError", "WorkerProcess"]

_SCRIPT = Path(__file__).with_name("llama_cpp_worker.py")
_STOP_SECONDS = 2.0  # an idle worker ends in milliseconds once its input is closed
_LOG_TAIL_NBYTES = 16384
_LOG_TAIL_LINES = 4
_LOG_TAIL_CHARS = 700
_ENVIRONMENT = {
    "GGML_NO_BACKTRACE": "1",  # a debugger attached by an abort helps nobody here
    # Threads that spin at barriers starve each other when the machine is busy otherwise: five windows of a 6M model
    # took 26 s to 46 s so and 2 s with threads that sleep (two threads, two CPUs, load 7); no difference when idle.
    "OMP_WAIT_POLICY": "passive",
}
_MAX_HEADER_NBYTES = 1 << 20  # headers hold a few numbers and one error text


class RefusedError(Exception):
    """llama.cpp answered no, and lives."""


class WorkerDiedError(Exception):
    """The process ended or was stopped because nothing came for too long.

    Attributes:
        out_of_memory: true when the system killed it, which says nothing about the model.
    """

    def __init__(self, message: str, *, out_of_memory: bool) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


def _reap(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Leave neither a running process nor a zombie, nor an open pipe."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, log):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


class WorkerProcess:
    """One running worker; used from one thread at a time."""

    def __init__(self) -> None:
        environment = _ENVIRONMENT | os.environ
        log = tempfile.TemporaryFile(prefix="quantpress-llama-cpp-")  # noqa: SIM115 (closed by _reap)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env=environment,
            )
        except OSError as error:
            log.close()
            raise OutputError(f"cannot start a process for llama.cpp: {error}") from error
        self._log = log
        self._expired = False
        self._stop = weakref.finalize(self, _reap, self._process, log)  # also runs at interpreter exit

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid

    def request(
        self, header: dict[str, Any], payload: bytes = b"", *, seconds: float, rows: memoryview | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Ask one thing and wait for its answer.

        Args:
            header: ``op`` and its arguments.
            payload: raw bytes that belong to it.
            seconds: longest time without any sign of progress; every reply starts it anew.
            rows: writable buffer for streamed rows; it must be filled exactly.

        Returns:
            header and raw bytes of the final reply.

        Raises:
            RefusedError: llama.cpp said no; the worker still answers.
            WorkerDiedError: it crashed, was killed, or showed no progress for ``seconds``; it is gone now.
        """
        if not self._stop.alive:
            raise WorkerDiedError("llama.cpp was closed or has died before", out_of_memory=False)
        try:
            self._send(header, payload)
            return self._receive(seconds, rows)
        except (BrokenPipeError, EOFError, ValueError) as error:
            raise self._post_mortem(header["op"], seconds) from error
        except RefusedError:
            raise
        except BaseException:
            self._stop()  # interrupted between two frames: what comes next could not be understood
            raise

    def _send(self, header: dict[str, Any], payload: bytes) -> None:
        stream = self._process.stdin
        text = json.dumps(header | {"nbytes": len(payload)}).encode("ascii")
        left = memoryview(struct.pack("<I", len(text)) + text + payload)
        while stream is not None and left.nbytes:
            left = left[stream.write(left) :]

    def _receive(self, seconds: float, rows: memoryview | None) -> tuple[dict[str, Any], bytes]:
        filled = 0
        while True:
            with self._deadline(seconds):
                header = self._read_header()
                nbytes = int(header["nbytes"])
                if "rows" not in header:
                    raw = bytearray(nbytes)
                    self._fill(memoryview(raw))
                    break
                target = rows[filled : filled + nbytes] if rows is not None else memoryview(b"")
                if target.nbytes != nbytes:
                    raise ValueError("more rows than were asked for")
                self._fill(target)
                filled += nbytes
        if not header["ok"]:
            raise RefusedError(header["error"])
        if rows is not None and filled != rows.nbytes:
            raise ValueError("fewer rows than were asked for")
        return header, bytes(raw)

    def _read_header(self) -> dict[str, Any]:
        prefix = bytearray(4)
        self._fill(memoryview(prefix))
        (nbytes,) = struct.unpack("<I", prefix)
        if nbytes > _MAX_HEADER_NBYTES:
            raise ValueError("not a frame")
        text = bytearray(nbytes)
        self._fill(memoryview(text))
        header: dict[str, Any] = json.loads(text)
        return header

    def _fill(self, view: memoryview) -> None:
        stream = self._process.stdout
        while stream is not None and view.nbytes:
            count = stream.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise EOFError
            view = view[count:]

    @contextlib.contextmanager
    def _deadline(self, seconds: float) -> Iterator[None]:
        """Kill the worker when the block takes longer; its end then shows as end of file. Works on every system."""
        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self._expired = True
        self._process.kill()

    def _post_mortem(self, operation: str, seconds: float) -> WorkerDiedError:
        self._process.kill()  # it may still live if what it wrote made no sense
        code = self._process.wait()
        log = self.log_tail()
        self._stop()
        if self._expired:
            how = f"gave no sign of progress for {seconds:.0f} s and was stopped"
        elif code < 0:
            how = f"died from {_signal_name(-code)}"
        else:
            how = f"ended with code {code}"
        killed = code == -getattr(signal, "SIGKILL", 9) and not self._expired
        hint = " (killed from outside, often because memory ran out)" if killed else ""
        message = f"llama.cpp {how} during '{operation}'{hint}{log}"
        return WorkerDiedError(message, out_of_memory=killed)

    def log_tail(self) -> str:
        """The last lines that the library wrote, on one line; "" if it wrote none."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _LOG_TAIL_NBYTES))
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines()]
        lines = [line for line in lines if line.strip(".")]
        text = " | ".join(lines[-_LOG_TAIL_LINES:])
        return f"; its last words: {text[-_LOG_TAIL_CHARS:]}" if text else ""

    def close(self) -> None:
        """End the worker: ask by closing its input, then kill. Twice is harmless."""
        if not self._stop.alive:
            return
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        self._stop()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

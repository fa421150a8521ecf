"""What workers of the tests do; `Task.work` says what. Workers import it, so it needs nothing but quantpress."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from quantpress.pipelines.batch.tasks import Task, TaskResult
from quantpress.pipelines.machine import peak_rss
from quantpress.pipelines.progress import Progress
from quantpress.quant.errors import InputError


def perform(task: Task, progress: Progress, threads: int) -> TaskResult:
    """Does ("what", arguments...)."""
    what, *arguments = task.work if isinstance(task.work, tuple) else (task.work,)
    output = globals()[f"_{what}"](progress, *arguments) if what else None
    if what == "threads":
        output = threads
    return TaskResult(task.id, "done", output=output)


def _threads(progress: Progress) -> None:
    pass


def _fail(progress: Progress, message: str) -> None:
    raise InputError(message)


def _bug(progress: Progress) -> None:
    raise RuntimeError("two\nlines")


def _steps(progress: Progress, count: int, seconds: float = 0.0) -> None:
    for step in range(count):
        progress("work", step + 1, count)
        time.sleep(seconds)


def _hold(progress: Progress, file: str, seconds: float) -> None:
    Path(file).touch()
    time.sleep(seconds)
    Path(file).unlink()


def _die(progress: Progress, number: int, marker: str = "") -> list[str]:
    """Dies of a signal; with a marker only the first time, then gives the files beside the marker."""
    if marker and Path(marker).exists():
        return sorted(path.name for path in Path(marker).parent.iterdir())
    if marker:
        Path(marker).touch()
    if number == signal.SIGSEGV:
        ctypes.string_at(0)
    os.kill(os.getpid(), number)
    time.sleep(30)
    return []


def _leave(progress: Progress, code: int) -> None:
    os._exit(code)


def _pid(progress: Progress) -> int:
    return os.getpid()


def _env(progress: Progress, name: str) -> str | None:
    return os.environ.get(name)


def _talk(progress: Progress) -> None:
    logging.getLogger("quantpress.test").warning("a warning of %d words", 4)
    logging.getLogger("quantpress.test").info("an information")
    warnings.warn("a python warning", UserWarning, stacklevel=1)
    print("printed text")  # noqa: T201
    os.write(1, b"written to descriptor 1\n")
    os.write(2, b"an \x1b[31mescape\xff to descriptor 2\n")


def _peaks(progress: Progress, nbytes: int) -> int:
    data = bytearray(nbytes)
    del data
    return peak_rss()


def _unsendable(progress: Progress) -> Any:
    return lambda: None


def _together(progress: Progress, folder: str, name: str, count: int) -> int:
    """Waits until so many run at once; gives the greatest number that was seen."""
    here = Path(folder, name)
    here.touch()
    most, deadline = 0, time.monotonic() + 10
    while most < count and time.monotonic() < deadline:
        most = max(most, sum(1 for _ in Path(folder).iterdir()))
        time.sleep(0.01)
    time.sleep(0.1)
    most = max(most, sum(1 for _ in Path(folder).iterdir()))
    here.unlink()
    return most


def _cleanly(progress: Progress, folder: str) -> None:
    """Works for long; removes its file on the way out as commands do."""
    file = Path(folder, f"{os.getpid()}.tmp")
    file.touch()
    try:
        for step in range(600):
            progress("work", step, 600)
            time.sleep(0.05)
    finally:
        time.sleep(0.3)
        file.unlink()


def _deaf(progress: Progress, folder: str) -> None:
    """Works for long and does not hear SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(folder, f"{os.getpid()}.tmp").touch()
    time.sleep(60)


def _frozen(progress: Progress, folder: str) -> None:
    """Holds the interpreter's lock in C code, so that no thread of Python can run."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=subprocess.DEVNULL)
    Path(folder, f"{os.getpid()}.tmp").write_text(str(child.pid))
    ctypes.PyDLL(None).sleep(60)


def _undying(progress: Progress, folder: str) -> None:
    """Is not killed by the system with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
    Path(folder, f"{os.getpid()}.tmp").touch()
    time.sleep(60)


def _listening(progress: Progress) -> str:
    """What a child process that reads its standard input gets."""
    return subprocess.run([sys.executable, "-c", "input()"], capture_output=True, text=True, timeout=20).stderr


def _dropping(progress: Progress, folder: str) -> None:
    """Loses the first thing that a signal raises, as Python does in callbacks; cleans up when it is stopped."""
    file = Path(folder, f"{os.getpid()}.tmp")
    file.touch()
    try:
        time.sleep(60)
    except BaseException:  # noqa: BLE001
        file.with_suffix(".dropped").touch()
    try:
        for step in range(600):
            time.sleep(0.1)
            progress("work", step, 600)
    finally:
        file.unlink()

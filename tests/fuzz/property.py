"""What must hold for any bytes: a typed refusal in one line or a success, quickly, in little memory, and nothing done.

A violation names its kind and the place in the product, so that the same fault found twice is one fault.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.quant.errors import InputError, UsageError
from tests.fuzz.target import Target

__all__ = ["MAX_NBYTES", "MAX_SECONDS", "Outcome", "Violation", "check", "prepared"]

MAX_SECONDS = 2.0  # of this process's processor time
MAX_NBYTES = 256 << 20  # more memory in use than before
MAX_MESSAGE = 1000  # characters
_REAL_FILES = (str(Path(sys.prefix)), str(Path(sys.base_prefix)), str(Path(__file__).resolve().parents[2]))
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = ("subprocess.", "socket.", "shutil.", "tempfile.", "ftplib.", "http.", "urllib.", "smtplib.", "pty.")
_FORBIDDEN_EVENTS = {
    "os." + name
    for name in (
        "chmod", "chown", "exec", "fork", "forkpty", "kill", "killpg", "link", "mkdir", "posix_spawn", "putenv",
        "remove", "removexattr", "rename", "rmdir", "setxattr", "spawn", "startfile", "symlink", "system", "truncate",
        "unsetenv", "utime", "chdir", "fchdir",
    )
} | {"code.__new__", "marshal.load", "marshal.loads", "builtins.input"}  # fmt: skip


class _Forbidden(BaseException):
    """Stops what a parser must not do; no `except Exception` of the parser catches it."""


class _TooLong(BaseException):
    """Stops a parser that has had its time."""


@dataclass(frozen=True)
class Outcome:
    """How one input ended.

    Attributes:
        accepted: it was parsed; otherwise it was refused as it should be.
        seconds: processor time.
        nbytes: more memory than before, at the most.
        message: of the refusal.
    """

    accepted: bool
    seconds: float
    nbytes: int
    message: str = ""


class Violation(AssertionError):
    """The property does not hold.

    Attributes:
        kind: in one word, `time`.
        key: tells faults apart: the kind and where it happened.
    """

    def __init__(self, kind: str, text: str, place: str = "") -> None:
        super().__init__(f"{kind}: {text}" + (f" at {place}" if place else ""))
        self.kind, self.key = kind, f"{kind} {place or text}"


class _Watch:
    """Hears of every file that is opened for writing, every program, socket and piece of code, while it is on."""

    def __init__(self) -> None:
        self.on, self.installed = False, False
        self.found: list[tuple[str, str]] = []

    def start(self) -> None:
        """Listens from now on; a hook cannot be taken away, so there is one for a process."""
        if not self.installed:
            sys.addaudithook(self._hear)
            self.installed = True
        self.found.clear()
        self.on = True

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        bad = (
            (event == "open" and _opens_to_write(*args[:3]))
            or event in _FORBIDDEN_EVENTS
            or event.startswith(_FORBIDDEN)
            or (event in ("exec", "compile") and not _is_file_of_ours(event, args) and not _is_annotation())
        )
        if bad and not _is_import():
            self.on = False
            text = f"{event} {ascii(args)[:200]}"
            self.found.append((text, _place(traceback.extract_stack())))
            raise _Forbidden(text)


_WATCH = _Watch()


def _opens_to_write(path: Any, mode: Any, flags: Any) -> bool:
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and bool(flags & _WRITES)


def _is_file_of_ours(event: str, args: tuple[Any, ...]) -> bool:
    """Whether code comes from a file of a package, and not from a text that was put together."""
    name = getattr(args[0], "co_filename", "") if event == "exec" else args[1]
    name = os.fsdecode(name) if isinstance(name, (bytes, str)) else ""
    return name.startswith(("<frozen ", *_REAL_FILES))


def _is_annotation() -> bool:
    """Whether the text is an annotation of a class or a function, which `typing` evaluates."""
    return sys._getframe(2).f_code.co_filename == typing.__file__


def _is_import() -> bool:
    """Whether a module is being loaded for the first time, which reads code and may keep it compiled."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Stops Python code that takes more processor time; code in C ends by itself, or its process is ended."""

    def stop(number: int, frame: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _peak(reset: bool = False) -> int:
    """Gives the most bytes in use since the last reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        with open("/proc/self/status", "rb") as file:  # noqa: PTH123 - a thousand times a second
            text = file.read()
        return int(text.split(b"VmHWM:")[1].split()[0]) << 10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _place(stack: Any) -> str:
    """Gives the innermost frames outside the fuzzer, `reader.py:open`; lines move, names stay."""
    frames = [frame for frame in stack if Path(frame.filename).parent != Path(__file__).parent]
    ours = [frame for frame in frames if "/convert/" in frame.filename or "/quant/" in frame.filename]
    chosen = dict.fromkeys(f"{Path(frame.filename).name}:{frame.name}" for frame in (*ours[-1:], *frames[-1:]))
    return " > ".join(chosen)


def prepared(target: Target, folder: Path) -> Path:
    """Makes the good rest of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    target.prepare(folder)
    (folder / target.file).parent.mkdir(parents=True, exist_ok=True)
    return folder


def check(target: Target, folder: Path, data: bytes) -> Outcome:
    """Parses made-up bytes.

    Args:
        target: the parser.
        folder: what `prepared` made.
        data: written to the target's file, and left there: where the process dies, that is the input.

    Raises:
        Violation: the property does not hold.
    """
    (folder / target.file).write_bytes(data)
    names = _listing(folder)
    before, start = _peak(reset=True), time.process_time()
    message, error = _parse(lambda: target.parse(folder))
    seconds, nbytes = time.process_time() - start, _peak() - before
    if _WATCH.found:
        raise Violation("forbidden", *_WATCH.found[0])
    place = _place(traceback.extract_tb(error.__traceback__)) if error is not None else ""
    if isinstance(error, _TooLong) or seconds > MAX_SECONDS:
        raise Violation("time", f"more than {MAX_SECONDS} s", place)
    if error is not None and not isinstance(error, (InputError, UsageError)):
        raise Violation(type(error).__name__, ascii(str(error))[:300], place) from error
    if nbytes > MAX_NBYTES:
        raise Violation("memory", f"{nbytes >> 20} MB more than before", place)
    if error is not None and not (message.isprintable() and 0 < len(message) < MAX_MESSAGE):
        raise Violation("message", f"{len(message)} characters, {ascii(message)[:300]}", place)
    if _listing(folder) != names or (folder / target.file).read_bytes() != data:
        raise Violation("written", "the folder is not as it was")
    return Outcome(error is None, seconds, nbytes, message)


def _parse(parse: Callable[[], object]) -> tuple[str, BaseException | None]:
    """Gives the message and the error."""
    _WATCH.start()
    try:
        with _bounded(1.5 * MAX_SECONDS):
            parse()
        _WATCH.on = False
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - what escapes is what is looked for
        _WATCH.on = False
        return str(error), error
    return "", None


def _listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_size) for path in folder.rglob("*") if path.is_file())

"""Runs command lines in processes that are forked from one that has imported everything and computed nothing."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.faults import shim

TIMEOUT = 120  # seconds; a run takes one or two
_LIMITS = {"fsize": resource.RLIMIT_FSIZE, "nofile": resource.RLIMIT_NOFILE, "as": resource.RLIMIT_AS}


@dataclass(frozen=True)
class Surroundings:
    """What a run finds around it.

    Attributes:
        spoil: what goes wrong on the disk.
        limits: of the process, as `_LIMITS` names them; of "as" what is added to what is in use.
        stdout: "file", "full" or "closed".
        stderr: likewise.
    """

    spoil: shim.Spoil = field(default_factory=shim.Spoil)
    limits: tuple[tuple[str, int], ...] = ()
    stdout: str = "file"
    stderr: str = "file"


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code, or the signal's number below 0, and what it said."""

    code: int
    said: str
    seconds: float
    cpu: float
    steps: tuple[str, ...] = ()
    traceback: str = ""
    hung: bool = False


class Started:
    """A run that goes on."""

    def __init__(self, folder: Path, arguments: Sequence[str], around: Surroundings, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(folder, arguments, around, logs)

    def send(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Waits for the end; a run that does not end is killed."""
        hung, deadline = False, self._began + TIMEOUT
        while True:
            pid, status, used = os.wait4(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline and not hung:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        steps, trace = self.logs / "steps", self.logs / "traceback"
        return Ended(
            os.waitstatus_to_exitcode(status),
            "".join((self.logs / name).read_text(errors="replace") for name in ("stdout", "stderr")),
            time.monotonic() - self._began,
            used.ru_utime + used.ru_stime,
            tuple(steps.read_text().split()) if steps.exists() else (),
            trace.read_text() if trace.exists() else "",
            hung,
        )


def run(folder: Path, arguments: Sequence[str], logs: Path, around: Surroundings = Surroundings()) -> Ended:
    """Runs a command line to its end."""
    return Started(folder, arguments, around, logs).wait()


def in_child(work: Callable[[], None], log: Path) -> None:
    """Does what computes in a process of its own, so that this one may still fork."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the child ends here
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("what the faults need could not be made: " + log.read_text())


def preload(names: Path) -> None:
    """Imports what the runs before have imported, from the list they wrote."""
    for name in names.read_text().split():
        if name.partition(".")[0] in ("quantpress", "torch", "numpy", "numba", "onnx_ir", "onnx", "tokenizers", "yaml"):
            try:
                importlib.import_module(name)
            except Exception:  # noqa: BLE001 - modules that make themselves and cannot be imported by name
                continue


def _child(folder: Path, arguments: Sequence[str], around: Surroundings, logs: Path) -> NoReturn:
    code = 70
    try:
        _redirect(around, logs)
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        watched = shim.Shim(folder, around.spoil, _act)
        _exit = os._exit

        def leave(code: int) -> NoReturn:
            _note(logs, watched)
            _exit(code)

        os._exit = leave
        for name, value in around.limits:
            most = value + (_mapped() if name == "as" else 0)
            resource.setrlimit(_LIMITS[name], (most, resource.getrlimit(_LIMITS[name])[1]))
        shim.arm(watched)
        sys.argv = ["quantpress", *arguments]
        from quantpress.pipelines.cli import main

        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:  # noqa: BLE001 - a traceback is what the program would show
            code = 1
            if sys.stderr is not None:
                traceback.print_exc()
            (logs / "traceback").write_bytes(traceback.format_exc().encode())
    finally:
        os._exit(code)


def _note(logs: Path, watched: shim.Shim) -> None:
    for limit in _LIMITS.values():
        resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
    descriptor = shim._OS_OPEN(logs / "steps", os.O_WRONLY | os.O_CREAT, 0o666)
    shim._WRITE(descriptor, " ".join(watched.steps).encode())
    if os.environ.get("QUANTPRESS_FAULTS_MODULES"):
        descriptor = shim._OS_OPEN(logs / "modules", os.O_WRONLY | os.O_CREAT, 0o666)
        shim._WRITE(descriptor, "\n".join(sys.modules).encode())


def _mapped() -> int:
    """Bytes of addresses that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _redirect(around: Surroundings, logs: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    streams: Any = ((1, "stdout", around.stdout), (2, "stderr", around.stderr))
    for number, name, kind in streams:
        place = "/dev/full" if kind == "full" else logs / name
        (logs / name).touch()
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, name, open(number, "w", buffering=1 if number == 2 else -1, encoding="utf-8", closefd=False))  # noqa: SIM115
        if kind == "closed":
            os.close(number)
            setattr(sys, name, None)


def _act(what: str, folder: Path) -> None:
    """What somebody else does to the folders of a run while it goes on; by a program, for this process is watched."""
    import subprocess

    program = {
        "gone": "rm -rf out",
        "moved": "mv out gone",
        "link": "mv out gone; mkdir other; ln -s other out",
        "truncated": "truncate -s -4096 model/model.safetensors",
        "changed": "printf abcd | dd of=model/model.safetensors bs=1 seek=500000 conv=notrunc",
        "deleted": "rm model/model.safetensors",
        "replaced": "cp other.safetensors new; mv new model/model.safetensors",
        "text": "echo more >> text.txt",
    }[what]
    subprocess.run(["sh", "-c", program], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

"""Runs command lines in children of a process that has imported the program once: `python -m tests.hostile.server`.

A request is a line of JSON on standard input: `arguments`, `folder`, `seconds`. The answer is a line of JSON: how the
child ended, its processor seconds, and the memory that it took above what the parent holds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "Server"]

WALL = 120.0  # seconds after which a child hangs; a busy machine is slow, and a first run compiles
_IMPORTS = (
    "convert", "inspect", "merge", "quantize", "verify", "perplexity", "imatrix", "run",
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command line ended.

    Attributes:
        code: exit code; below 0 a signal, None where it hung.
        out, err: standard output and error.
        seconds: processor time.
        megabytes: memory above what the parent held.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    megabytes: float


class Server:
    """The process that forks, from outside."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.server"], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def run(self, arguments: Sequence[str], folder: Path) -> Ended:
        """Runs one command line in a folder."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"arguments": list(arguments), "folder": str(folder)}), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        if self._process.stdout is not None:
            self._process.stdout.close()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that is imported may write between answers
    _import()
    held = _resident()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_forked(request["arguments"], request["folder"], held)), file=answers, flush=True)


def _import() -> None:
    """Imports what commands import before they look at their input."""
    import importlib

    for name in _IMPORTS:
        importlib.import_module(f"quantpress.pipelines.commands.{name}")
    for name in ("convert.gguf.export", "convert.gguf.vocab", "convert.onnx.export", "convert.onnx.read",
                 "convert.lora.merge", "convert.torch_bin", "pipelines.library", "pipelines.verification",
                 "pipelines.batch.run", "pipelines.gguf_stage", "pipelines.onnx_stage"):  # fmt: skip
        importlib.import_module(f"quantpress.{name}")
    import tokenizers  # noqa: F401


def _resident() -> float:
    """Gives the megabytes that a child has from its start; files that are mapped it maps again when it reads them.

    What a child is said to take is thus too much rather than too little.
    """
    _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
    return (int(resident) - int(shared)) * resource.getpagesize() / 1e6


def _forked(arguments: Sequence[str], folder: str, held: float) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as logs:
        streams = [Path(logs) / name for name in ("out", "err")]
        pid = os.fork()
        if pid == 0:
            _child(arguments, folder, streams)
        used, status, hung, deadline = None, 0, False, time.monotonic() + WALL
        while used is None:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                used = usage
            elif time.monotonic() > deadline and not hung:
                hung = True
                os.kill(pid, signal.SIGKILL)
            else:
                time.sleep(0.002)
        out, err = (path.read_text(errors="replace") for path in streams)
        return {
            "code": None if hung else os.waitstatus_to_exitcode(status),
            "out": out,
            "err": err,
            "seconds": used.ru_utime + used.ru_stime,
            "megabytes": used.ru_maxrss * 1024 / 1e6 - held,
        }


def _child(arguments: Sequence[str], folder: str, streams: Sequence[Path]) -> None:
    code = 70
    try:
        for number, path in enumerate(streams, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        from quantpress.pipelines.cli import run

        code = run(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent wants to read it
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()

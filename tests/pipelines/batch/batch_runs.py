"""Runs of a small batch as a program, for the tests of what happens when they are stopped, starved and repeated."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PIPELINE = """\
version: 1
cache: cache
defaults: {context: 32, chunks: 2, max_kld: 9, max_ppl_change: 9, min_top1: 0}
jobs:
  - name: int4
    model: MODEL
    stages:
      - gptq: {bits: 4, group_size: 32, samples: 8, sequence_length: 32}
      - safetensors: {format: gptq, output: out/gptq}
      - onnx: {output: out/onnx}
      - gguf: {outtype: Q4_0, output: out/tiny-Q4_0.gguf}
  - name: whole
    model: MODEL
    stages:
      - gguf: {outtype: Q8_0, output: out/tiny-Q8_0.gguf}
"""
OUTPUTS = {"gptq", "onnx", "tiny-Q4_0.gguf", "tiny-Q8_0.gguf"}


def write_pipeline(folder: Path, model: Path, text: str = PIPELINE, name: str = "batch.yaml") -> Path:
    """Writes a pipeline file whose model is `model`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text.replace("MODEL", json.dumps(str(model))))
    return path


def command(file: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "quantpress", "--log-format", "json", "run", str(file), "--workers", "1", *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        events: every line of standard error, with the time at which it came.
    """

    code: int
    out: str
    events: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def result(self) -> dict[str, Any]:
        """What `--json` printed."""
        record: dict[str, Any] = json.loads(self.out)
        return record

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Events of a kind."""
        return [event for _, event in self.events if event["event"] == kind]

    @property
    def said(self) -> str:
        """All that was said, for messages of tests."""
        return "\n".join(json.dumps(event) for _, event in self.events) + self.out


class Running:
    """A run that goes on; `heard` is called with every event, on a thread of its own."""

    def __init__(self, arguments: Sequence[str], heard: Callable[[int, dict[str, Any]], None] | None = None) -> None:
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self._began = time.monotonic()
        self.process = subprocess.Popen(arguments, env=environment(), **pipes)
        self.events: list[tuple[float, dict[str, Any]]] = []
        self._heard = heard
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                except ValueError:
                    event = {"event": "text", "message": line}
                self.events.append((time.monotonic() - self._began, event))
                if self._heard is not None:
                    self._heard(len(self.events) - 1, event)

    def wait(self, timeout: float = 180) -> Ended:
        """Waits for the end."""
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            out = stream.read()
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return Ended(code, out, self.events, time.monotonic() - self._began)


def run(file: Path, *flags: str) -> Ended:
    """Runs a pipeline file to its end."""
    return Running(command(file, *flags)).wait()


def contents(out: Path) -> dict[str, bytes]:
    """Every file of the outputs; of sidecars what may not differ between runs."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name.endswith("quantpress.json"):
                record = json.loads(data)
                assert record.pop("timings")
                data = json.dumps(record).encode()
            found[path.relative_to(out).as_posix()] = data
    return found


def only_whole(out: Path, whole: Mapping[str, bytes]) -> bool:
    """Whether every output that is there is the one it should be; unfinished work is told by its name."""
    found = contents(out) if out.exists() else {}
    finished = {name for name in found if not any(part.startswith(".quantpress-") for part in Path(name).parts)}
    return all(found[name] == whole.get(name) for name in finished)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def gone(pids: Sequence[int], seconds: float) -> bool:
    """Whether all processes end in so many seconds."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def stopped_at(file: Path, place: int, delay: float, how: signal.Signals, *, worker: bool = False) -> Iterator[Running]:
    """Starts a run and sends a signal `delay` seconds after its event number `place`; to its workers once they work."""
    reached = threading.Event()

    def seen(number: int, event: dict[str, Any]) -> None:
        if number >= place and (not worker or event["event"] == "started"):
            reached.set()

    running = Running(command(file), seen)
    deadline = time.monotonic() + 120
    while not reached.is_set() and running.process.poll() is None and time.monotonic() < deadline:
        reached.wait(0.02)
    time.sleep(delay)
    mine = children(running.process.pid)
    for pid in mine if worker else [running.process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
    try:
        yield running
    finally:
        running.process.kill()
        assert gone(mine, 10)

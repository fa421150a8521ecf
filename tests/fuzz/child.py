"""One target in a process of its own: `python -m tests.fuzz.child NAME ENGINE SECONDS SEED FOLDER`.

Writes what it has seen so far to FOLDER/report.json again and again, since libFuzzer ends the process when time is up.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

__all__ = ["main"]

_MODULES = ("quantpress.convert", "quantpress.quant", "quantpress.pipelines.batch")
_EVERY = 0.5  # seconds between two reports
_MOST_KEPT = 20  # inputs of different faults
_ADDRESSES = 8 << 30  # bytes of memory that may be asked for beyond what is there, used or not


class _Counts:
    """Tries inputs, and keeps count."""

    def __init__(self, target: Any, engine: str, folder: Path) -> None:
        from tests.fuzz.property import prepared

        self._target, self._folder = target, folder
        self._model = prepared(target, folder / "model")
        self._written, self._start = 0.0, time.monotonic()
        self._cold = True
        self.report: dict[str, Any] = {
            "target": target.name, "engine": engine, "seconds": 0.0, "inputs": 0, "accepted": 0, "refused": 0,
            "slowest_cpu_seconds": 0.0, "most_nbytes": 0, "violations": [], "again": 0,
        }  # fmt: skip

    def warm(self) -> None:
        """Imports what is imported late, which takes time and memory that no input is to blame for."""
        from tests.fuzz.property import Violation, check

        for data in self._target.seeds().values():
            try:
                check(self._target, self._model, data)
            except Violation:
                continue
        self._start = time.monotonic()

    def attempt(self, data: bytes) -> None:
        """Tries one input."""
        from tests.fuzz.property import Violation, check

        report = self.report
        report["inputs"] += 1
        try:
            outcome = check(self._target, self._model, data)
        except Violation as violation:
            self._keep(violation, data)
        else:
            report["accepted" if outcome.accepted else "refused"] += 1
            report["slowest_cpu_seconds"] = max(report["slowest_cpu_seconds"], round(outcome.seconds, 4))
            report["most_nbytes"] = max(report["most_nbytes"], outcome.nbytes)
        if time.monotonic() > self._written + _EVERY:
            self.write()

    def _keep(self, violation: Any, data: bytes) -> None:
        found = self.report["violations"]
        if any(one["key"] == violation.key for one in found) or len(found) == _MOST_KEPT:
            self.report["again"] += 1
            return
        name = f"found-{len(found)}"
        (self._folder / name).write_bytes(data)
        found.append({"key": violation.key, "text": str(violation), "input": name})
        self.write()

    def write(self) -> None:
        """Writes the report; in one step, since the process may be ended at any time."""
        self._written = time.monotonic()
        self.report["seconds"] = round(self._written - self._start, 1)
        part = self._folder / "report.part"
        part.write_text(json.dumps(self.report))
        part.replace(self._folder / "report.json")


def main(name: str, engine: str, seconds: str, seed: str, folder: str) -> None:
    """Runs the engine until the time is over."""
    warnings.simplefilter("error")  # a warning is a second line beside the message
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=list(_MODULES), enable_loader_override=False):
            target = _target(name)
    else:
        target = _target(name)
    from tests.fuzz.engines import run_engine

    counts = _Counts(target, engine, Path(folder))
    counts.warm()
    counts.write()
    _limit_addresses()
    run_engine(engine, target, counts.attempt, seconds=float(seconds), seed=int(seed), folder=Path(folder))
    counts.write()


def _target(name: str) -> Any:
    from tests.fuzz.known import targets

    return targets()[name]


def _limit_addresses() -> None:
    """What asks for far more memory than there is gets a MemoryError, and not the whole machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESSES, hard))


if __name__ == "__main__":
    main(*sys.argv[1:])

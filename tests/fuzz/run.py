"""Gives made-up bytes to every parser: `python -m tests.fuzz.run [NAME ...] --seconds 60 --report FILE.json`.

Each target runs in a process of its own. What breaks the property is kept, and one line says how to see it again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.fuzz.engines import ENGINES, best_engine
from tests.fuzz.known import targets
from tests.fuzz.property import Violation, check, prepared

__all__ = ["main"]

_SLACK = 240  # seconds of imports, seeds and one input that hangs in C, on a busy machine
_ROOT = Path(__file__).resolve().parents[2]
_COLUMNS = ("target", "engine", "seconds", "inputs", "accepted", "refused", "slowest", "most MB", "violations")


def main(arguments: Sequence[str] | None = None) -> int:
    """Gives 0 where the property held for every input, otherwise 1."""
    options = _options(arguments)
    known = targets()
    unknown = [name for name in options.name if name not in known]
    if unknown:
        _say(f"no target {unknown[0]}; there are {', '.join(known)}")
        return 2
    names = options.name or list(known)
    if options.input:
        return _again(names, Path(options.input))
    engine = options.engine or best_engine()
    if engine != "atheris" and not options.engine:
        _say("atheris is not installed (pip install 'quantpress[fuzz]'): our own engine, which sees no coverage")
    found = Path(options.found)
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(_run, name, engine, options.seconds, options.seed, found) for name in names]
        _say(_line(_COLUMNS))
        reports = []
        for job in jobs:
            reports.append(job.result())
            _say(_line(_row(reports[-1])))
    broken = _tell(reports)
    if options.report:
        Path(options.report).write_text(json.dumps({"seed": options.seed, "targets": reports}, indent=1) + "\n")
    return 1 if broken else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("name", nargs="*", help="targets; all by default")
    parser.add_argument("--seconds", type=float, default=60, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, help="atheris where it is installed, otherwise our own")
    parser.add_argument("--report", help="a JSON file to write")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--input", help="one file to give to the target, and nothing else")
    parser.add_argument("--found", default="build/fuzz", help="folder for inputs that broke the property")
    return parser.parse_args(arguments)


def _again(names: Sequence[str], file: Path) -> int:
    """Tries one input; twice, since the first time imports are counted too."""
    if len(names) != 1:
        _say("--input wants the name of one target")
        return 2
    target = targets()[names[0]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = prepared(target, Path(temporary))
        for last in (False, True):
            try:
                outcome = check(target, folder, file.read_bytes())
            except Violation as violation:
                if last:
                    _say(str(violation))
                    return 1
    word = "accepted" if outcome.accepted else f"refused: {outcome.message}"
    _say(f"{word}\n{outcome.seconds:.4f} s, {outcome.nbytes >> 10} KB")
    return 0


def _run(name: str, engine: str, seconds: float, seed: int, found: Path) -> dict[str, Any]:
    """Runs one target in a process, and looks at how that ended."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "tests.fuzz.child", name, engine, str(seconds), str(seed), temporary]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
        with (folder / "output").open("wb") as output:
            try:
                code = subprocess.run(
                    command, cwd=_ROOT, env=environment, stdout=output, stderr=output, timeout=seconds + _SLACK
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
        report = _read(folder, name, engine)
        if code != 0:
            report["violations"].append(_died(name, code, folder))
        for violation in report["violations"]:
            violation["input"] = _kept(folder, name, violation["input"], found)
        return report


def _read(folder: Path, name: str, engine: str) -> dict[str, Any]:
    file = folder / "report.json"
    if file.is_file():
        report: dict[str, Any] = json.loads(file.read_text())
        return report
    return {
        "target": name, "engine": engine, "seconds": 0.0, "inputs": 0, "accepted": 0, "refused": 0,
        "slowest_cpu_seconds": 0.0, "most_nbytes": 0, "violations": [], "again": 0,
    }  # fmt: skip


def _died(name: str, code: int | None, folder: Path) -> dict[str, Any]:
    """The input at which the process ended is the one that still lies in the model's folder."""
    how = "did not come back" if code is None else f"ended with {code}"
    tail = (folder / "output").read_bytes()[-1500:].decode("utf-8", "replace")
    return {"key": how, "text": f"process: {how}; {tail}", "input": f"model/{targets()[name].file}"}


def _kept(folder: Path, name: str, file: str, found: Path) -> str:
    """Copies an input to where it stays."""
    found.mkdir(parents=True, exist_ok=True)
    source = folder / file
    place = found / f"{name}-{Path(file).name}"
    place.write_bytes(source.read_bytes() if source.is_file() else b"")
    return str(place)


def _row(report: dict[str, Any]) -> tuple[str, ...]:
    keys = ("target", "engine", "seconds", "inputs", "accepted", "refused")
    slowest, most = f"{report['slowest_cpu_seconds']:.3f} s", f"{report['most_nbytes'] / 2**20:.1f}"
    return (*(str(report[key]) for key in keys), slowest, most, str(len(report["violations"])))


def _line(cells: Sequence[str]) -> str:
    first = f"{cells[0]:<24}{cells[1]:<12}"
    return first + "".join(f"{cell:>11}" for cell in cells[2:])


def _tell(reports: Sequence[dict[str, Any]]) -> int:
    """Says what broke the property and how to see it again; gives how many."""
    count = 0
    for report in reports:
        for violation in report["violations"]:
            count += 1
            _say(f"\n{report['target']}: {violation['text']}")
            _say(f"  python -m tests.fuzz.run {report['target']} --input {violation['input']}")
    inputs = sum(report["inputs"] for report in reports)
    _say(f"\n{len(reports)} targets, {inputs} inputs, {count} violations")
    return count


if __name__ == "__main__":
    sys.exit(main())

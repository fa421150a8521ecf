"""Runs that go wrong leave nothing wrong, and the harness that says so notices when that is not true.

`python -m tests.faults.run` is what works here; every fault that it says is broken has an id with which it comes again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.plan import KINDS
from tests.faults.planted import PLANTED

FAULTS = int(os.environ.get("QUANTPRESS_FAULTS", "20"))  # a second of a processor each; `make smoke` does 100
ROOT = Path(__file__).resolve().parents[2]


def run(report: Path, *flags: str) -> tuple[int, list[dict[str, Any]], str]:
    """Runs the harness and gives its exit code, its records and what it printed."""
    command = [sys.executable, "-m", "tests.faults.run", "--report", os.fspath(report), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(report.read_text()), done.stdout + done.stderr


@pytest.mark.slow
def test_whatever_goes_wrong_every_promise_holds(tmp_path: Path) -> None:
    code, records, said = run(tmp_path / "report.json", "--faults", str(FAULTS), "--seed", "0")
    assert code == 0, said
    assert len(records) == FAULTS
    if FAULTS >= 100:  # the first hundred of this seed have every kind
        assert {record["kind"] for record in records} == set(KINDS)
        ended = {record["code"] for record in records if not record["skipped"]}
        assert ended >= {0, 5, -9, 130, 143}, "faults that do nothing"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PLANTED))
def test_a_planted_breach_is_noticed(name: str, tmp_path: Path) -> None:
    breach = PLANTED[name]
    flags = ("--kind", breach.kind, "--command", breach.command, "--faults", "6", "--plant", name)
    code, records, said = run(tmp_path / "report.json", *flags)
    assert code == 1, said
    assert any(record["wrong"] for record in records)

"""Runs a command as a whole process and gives what the operating system accounted for it."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished run: seconds, seconds, bytes."""

    wall: float
    cpu: float
    peak_bytes: int


def measure(command: list[str]) -> Sample:
    """Runs a command to its end; a command that fails ends the benchmark with its output.

    What an earlier command left to be written to the disk is written first: it must not be this one's cost.
    """
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/")
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{output.decode(errors='replace')}")
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)

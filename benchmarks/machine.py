"""Says where figures come from: the commit and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def git_commit() -> str:
    """Gives the commit that is checked out, with a mark when files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def machine() -> dict[str, str]:
    """Describes processor, cores, Python and system."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    cores = str(len(os.sched_getaffinity(0)))
    cpu = names[0] if names else platform.processor()
    return {"cpu": cpu, "cores": cores, "python": platform.python_version(), "system": platform.platform()}

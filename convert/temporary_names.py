"""What lies beside an output while it is made: its lock, temporary names, and what long runs must not lose."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

__all__ = ["leftovers", "lock_file", "temporary_name", "work_folder"]

_MAX_STEM = 120  # bytes of the target's name that a temporary name repeats; names may have 255


def lock_file(target: Path) -> Path:
    """Gives the place of an output's lock."""
    return target.parent / f".quantpress-{_stem(target.name)}.lock"


def work_folder(target: Path) -> Path:
    """Gives the place beside an output for what a long run must not lose when it is killed."""
    return target.parent / f".quantpress-{_stem(target.name)}.work"


def temporary_name(target: Path) -> Path:
    """Gives a new place beside an output, of which anybody can tell which output and which run it belongs to."""
    return target.parent / f".quantpress-{_stem(target.name)}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


def leftovers(target: Path) -> list[Path]:
    """Gives the temporary names of an output; who holds its lock knows that the runs that made them are dead."""
    pattern = re.compile(rf"\.quantpress-{re.escape(_stem(target.name))}-\d+-[0-9a-f]{{8}}\.tmp")
    if not target.parent.is_dir():
        return []
    return [entry for entry in target.parent.iterdir() if pattern.fullmatch(entry.name)]


def _stem(name: str) -> str:
    encoded = os.fsencode(name)
    return name if len(encoded) <= _MAX_STEM else hashlib.sha256(encoded).hexdigest()[:32]

"""Every target there is, by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from tests.fuzz.target import Target

__all__ = ["targets"]


def targets() -> Mapping[str, Target]:
    """Gives name -> target of all modules `*_targets.py` beside this one."""
    found: dict[str, Target] = {}
    for path in sorted(Path(__file__).parent.glob("*_targets.py")):
        for target in importlib.import_module(f"tests.fuzz.{path.stem}").TARGETS:
            assert found.setdefault(target.name, target) is target, f"two targets are named {target.name}"
    return found

"""All hostile files: the cases of every module `*_cases.py` here."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.hostile.case import Case

__all__ = ["every_case"]


def every_case() -> tuple[Case, ...]:
    """Gives all cases, by module."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*_cases.py"))
    modules = [importlib.import_module(f"tests.hostile.{name}") for name in names]
    return tuple(case for module in modules for case in module.CASES)

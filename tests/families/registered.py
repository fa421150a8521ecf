"""All cases, from the modules beside this one."""

from __future__ import annotations

import importlib
import pkgutil

import tests.families
from tests.families.cases import Case

__all__ = ["ALL", "SHORT"]

_MACHINERY = ("adapters", "cases", "page", "registered")


def _found() -> tuple[Case, ...]:
    names = sorted(each.name for each in pkgutil.iter_modules(tests.families.__path__) if each.name not in _MACHINERY)
    modules = [importlib.import_module(f"tests.families.{name}") for name in names]
    return tuple(case for module in modules for case in getattr(module, "CASES", ()))


ALL = _found()
SHORT = tuple(case for case in ALL if not case.long)

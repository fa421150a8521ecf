"""numba's decorator as it is used here: without the interpreter's lock, kept on the disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

__all__ = ["compiled"]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(*fastmath: str, parallel: bool = False) -> Callable[[Function], Function]:
    """Compiles a function when it is first called; later processes load it.

    Args:
        fastmath: LLVM's fast-math flags that are allowed, such as "contract" and "reassoc".
        parallel: let `prange` loops run on all threads.
    """

    def decorate(function: Function) -> Function:
        options: dict[str, Any] = {"nogil": True, "fastmath": set(fastmath), "parallel": parallel}
        try:
            result: Function = njit(cache=True, **options)(function)
        except RuntimeError:  # no folder can be written, neither beside the source nor in the user's cache
            result = njit(**options)(function)
        return result

    return decorate

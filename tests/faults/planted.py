"""Breaches that are planted in the product, so that tests can see that the faults find them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def _no_rename() -> None:
    """Files are written under their final name."""
    from quantpress.convert import atomic

    @contextlib.contextmanager
    def temporary_beside(target: Path) -> Iterator[Path]:
        yield target

    atomic.temporary_beside = temporary_beside


def _leaves() -> None:
    """What was begun stays."""
    from quantpress.convert import atomic

    def remove(path: Path) -> None:
        del path

    atomic.remove = remove


def _swallowing() -> None:
    """A write that failed is taken for one that was done."""
    from quantpress.convert import atomic

    real = atomic._FailsOnce.write

    def write(self: Any, data: Any, /) -> int:
        try:
            return real(self, data)
        except OSError:
            return memoryview(data).nbytes

    atomic._FailsOnce.write = write  # type: ignore[method-assign]


def _trusting() -> None:
    """The files of a cache entry are taken as they are."""
    from quantpress.pipelines.cache import store

    def check_files(*entry: Any, **options: Any) -> None:
        del entry, options

    store.check_files = check_files  # by the name that its only caller knows


@dataclasses.dataclass(frozen=True)
class Planted:
    """A breach, and faults that must find it."""

    plant: Callable[[], None]
    kind: str
    command: str


PLANTED = {
    "no-rename": Planted(_no_rename, "kill", "gguf"),
    "leaves": Planted(_leaves, "short", "gguf"),
    "swallowing": Planted(_swallowing, "short", "gguf"),
    "trusting": Planted(_trusting, "cache", "batch"),
}

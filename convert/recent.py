"""Keeps the few results that were asked for last, and computes each of them once even if several threads ask."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Recent"]

T = TypeVar("T")


class _Slot(Generic[T]):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: list[T] = []


class Recent(Generic[T]):
    """The last `size` results by key; older ones are forgotten and computed again when they are asked for."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._slots: dict[Hashable, _Slot[T]] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Gives the result for a key, from `make` if it is not at hand; other threads wait for it and share it."""
        with self._lock:
            slot = self._slots.pop(key, None) or _Slot[T]()
            self._slots[key] = slot  # now the youngest
            while len(self._slots) > self._size:
                del self._slots[next(iter(self._slots))]
        with slot.lock:
            if not slot.value:
                slot.value.append(make())
            return slot.value[0]

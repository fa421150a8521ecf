"""Small matrices of an adapter, read when first needed, kept in float64 and dropped when their tensor is done."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeAlias, TypeVar
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.quant.float64 import widen_to_float64

__all__ = ["Factor", "FactorSource", "Kept", "as_factor", "to_float64"]

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """A value that is made once, by one thread, and can be dropped and made again."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._lock = Lock()
        self._value: Value | None = None

    def get(self) -> Value:
        """Gives the value; other threads wait for the one that makes it."""
        with self._lock:
            if self._value is None:
                self._value = self._make()
            return self._value

    def drop(self) -> None:
        """Forgets the value; who holds it keeps it."""
        with self._lock:
            self._value = None


class Factor:
    """One matrix of an adapter that several deltas may share; it is dropped when all of them are done with it.

    Args:
        source: the matrix, any float type.
    """

    def __init__(self, source: Array | LazyTensor) -> None:
        self.shape: tuple[int, ...] = tuple(source.shape)
        self._source = source
        self._kept: Kept[NDArray[np.float64]] = Kept(self._load)
        self._lock = Lock()
        self._users: WeakSet[object] = WeakSet()
        self._done: WeakSet[object] = WeakSet()

    def register(self, user: object) -> None:
        """Remembers who will ask for the values."""
        self._users.add(user)

    def values(self) -> NDArray[np.float64]:
        """Gives the matrix in float64."""
        return self._kept.get()

    def release(self, user: object) -> None:
        """Says that a user needs the values no more; the last one drops them."""
        with self._lock:
            self._done.add(user)
            if self._done >= self._users:
                self._kept.drop()

    def _load(self) -> NDArray[np.float64]:
        source = self._source
        return to_float64(source.read() if isinstance(source, LazyTensor) else source)


FactorSource: TypeAlias = Array | LazyTensor | Factor


def as_factor(source: FactorSource) -> Factor:
    """Gives a factor itself, or a new one of a matrix."""
    return source if isinstance(source, Factor) else Factor(source)


def to_float64(array: Array) -> NDArray[np.float64]:
    """Gives any float array in float64, in C order.

    Raises:
        InputError: the dtype is not a float type.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    out = np.empty(flat.size, np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        widen_to_float64(flat, out, np.empty(flat.size // 2 + 1))
    return out.reshape(array.shape)

"""What adapters add to weights, in float64, a few lines of the stored tensor at a time.

A delta works on lines (see blocks.py). A line is the same to the last bit whatever lines it is asked for with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.lora.blocks import lines_of
from quantpress.convert.lora.factors import FactorSource, Kept, as_factor
from quantpress.convert.lora.product import Product

__all__ = [
    "Delta",
    "Hadamard",
    "Kronecker",
    "LowRank",
    "Part",
    "Stacked",
    "Vector",
    "expert_deltas",
    "rows_of",
    "svd_low_rank",
]

Float64 = NDArray[np.float64]


class Delta(Protocol):
    """Something to add to a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored tensor's."""

    def lines(self, start: int, stop: int, out: Float64) -> Float64 | None:
        """Fills `out` (stop - start, width) with lines [start, stop).

        Returns:
            Their squared norms, (stop - start,), where these are known without summing; else None.
        """

    def release(self) -> None:
        """Drops what was loaded; it is loaded again when needed."""


def rows_of(delta: Delta, start: int, stop: int) -> Float64:
    """Gives rows [start, stop) of the first dimension, (stop - start, ...) float64."""
    each = lines_of(delta.shape)[0] // max(delta.shape[0], 1)
    return _lines(delta, start * each, stop * each).reshape(stop - start, *delta.shape[1:])


class LowRank:
    """LoRA: `scale * b @ a`, stored (N, K); or its transpose, stored (K, N).

    PEFT: tuners/lora/layer.py, Linear.get_delta_weight and Embedding.get_delta_weight. An embedding's stored weight
    (V, H) with `lora_embedding_A` (r, V) and `lora_embedding_B` (H, r) is the transposed form.

    Args:
        a: (r, K).
        b: (N, r).
        scale: with the user's weight.
        transposed: the stored tensor is (K, N).
        diagonal: (r,) or (r, 1): a factor for each direction.
        expert: (number, count): a is (count * r, K), b is (N, r * count) with the experts of a direction side by side,
            and this is the delta of one of them.
    """

    def __init__(
        self,
        a: FactorSource,
        b: FactorSource,
        scale: float,
        transposed: bool = False,
        *,
        diagonal: FactorSource | None = None,
        expert: tuple[int, int] | None = None,
    ) -> None:
        self._a, self._b = as_factor(a), as_factor(b)
        self._diagonal = None if diagonal is None else as_factor(diagonal)
        self._factors = tuple(factor for factor in (self._a, self._b, self._diagonal) if factor)
        self._scale = scale
        self._transposed = transposed
        self._expert = expert
        shape = self._b.shape[0], self._a.shape[1]
        self.shape: tuple[int, ...] = shape[::-1] if transposed else shape
        self._product = Kept(self._load)
        for factor in self._factors:
            factor.register(self)

    def lines(self, start: int, stop: int, out: Float64) -> Float64 | None:
        """Fills `out` with lines [start, stop); gives their squared norms."""
        product, squares = self._product.get()
        product.lines(start, stop, out)
        return None if squares is None else squares[start:stop]

    def release(self) -> None:
        """Drops what was loaded."""
        self._product.drop()
        for factor in self._factors:
            factor.release(self)

    def _load(self) -> tuple[Product, Float64 | None]:
        a, b = self._a.values(), self._b.values()
        if self._expert:
            number, count = self._expert
            a, b = a.reshape(count, -1, a.shape[1])[number], b.reshape(len(b), -1, count)[:, :, number]
        if self._diagonal:
            a = a * self._diagonal.values().reshape(-1, 1)
        left, right = (a.T, b.T) if self._transposed else (b, a)
        if left.size < right.size:
            left = left * self._scale
        else:
            right = right * self._scale
        product = Product(left, right)
        return product, product.squares()


def svd_low_rank(
    a: FactorSource, b: FactorSource, e: FactorSource, scale: float, ranknum: float, transposed: bool = False
) -> LowRank:
    """Gives AdaLoRA's delta, `b @ (a * e) * scale / (ranknum + 1e-5)`.

    PEFT: tuners/adalora/layer.py, SVDLinear.get_delta_weight; `scale` is alpha there, not alpha / r.

    Args:
        a: (r, K).
        b: (N, r).
        e: (r, 1), the singular values.
        scale: with the user's weight.
        ranknum: the rank that the adapter was made with.
        transposed: the stored tensor is (K, N).
    """
    return LowRank(a, b, scale / (ranknum + 1e-5), transposed, diagonal=e)


def expert_deltas(
    a: FactorSource, b: FactorSource, scale: float, experts: int, transposed: bool = False
) -> tuple[LowRank, ...]:
    """Gives the delta of each expert out of PEFT's stacked factors (tuners/lora/layer.py, ParamWrapper).

    Args:
        a: (experts * r, in), expert after expert.
        b: (out, r * experts), the experts of a direction side by side.
        scale: with the user's weight.
        experts: how many.
        transposed: an expert is stored (in, out) instead of (out, in).
    """
    shared_a, shared_b = as_factor(a), as_factor(b)
    return tuple(LowRank(shared_a, shared_b, scale, transposed, expert=(number, experts)) for number in range(experts))


class Hadamard:
    """LoHa: `scale * (w1_a @ w1_b) * (w2_a @ w2_b)`, element by element (PEFT: tuners/loha/layer.py, make_weight).

    Args:
        w1_a, w2_a: (N, r).
        w1_b, w2_b: (r, K).
        scale: with the user's weight.
    """

    def __init__(
        self, w1_a: FactorSource, w1_b: FactorSource, w2_a: FactorSource, w2_b: FactorSource, scale: float
    ) -> None:
        self._one = LowRank(w1_b, w1_a, scale)
        self._other = LowRank(w2_b, w2_a, 1.0)
        self.shape = self._one.shape

    def lines(self, start: int, stop: int, out: Float64) -> None:
        """Fills `out` with lines [start, stop)."""
        self._one.lines(start, stop, out)
        other = np.empty_like(out)
        self._other.lines(start, stop, other)
        np.multiply(out, other, out=out)

    def release(self) -> None:
        """Drops what was loaded."""
        self._one.release()
        self._other.release()


class Kronecker:
    """LoKr: `scale * kron(w1, w2)` (PEFT: tuners/lokr/layer.py, LoKrLayer.get_delta_weight).

    Args:
        w1: (N1, K1), or a pair (N1, r) and (r, K1) whose product it is.
        w2: (N2, K2), or such a pair; N = N1 * N2, K = K1 * K2.
        scale: with the user's weight.
    """

    def __init__(
        self,
        w1: FactorSource | tuple[FactorSource, FactorSource],
        w2: FactorSource | tuple[FactorSource, FactorSource],
        scale: float,
    ) -> None:
        self._outer = LowRank(w1[1], w1[0], scale) if isinstance(w1, tuple) else _Dense(w1, scale)
        self._inner = LowRank(w2[1], w2[0], 1.0) if isinstance(w2, tuple) else _Dense(w2, 1.0)
        (height, width), (inner_height, inner_width) = self._outer.shape, self._inner.shape
        self.shape: tuple[int, ...] = height * inner_height, width * inner_width

    def lines(self, start: int, stop: int, out: Float64) -> None:
        """Fills `out` with lines [start, stop)."""
        line, first = np.arange(start, stop), start // self._inner.shape[0]
        height, width = self._inner.shape
        outer = _lines(self._outer, first, -(-stop // height))[line // height - first]
        if len(line) < height and start % height < stop % height:
            inner = _lines(self._inner, start % height, stop % height)
        else:
            inner = _lines(self._inner, 0, height)[line % height]
        np.multiply(outer[:, :, None], inner[:, None, :], out=out.reshape(len(line), outer.shape[1], width))

    def release(self) -> None:
        """Drops what was loaded."""
        self._outer.release()
        self._inner.release()


class _Dense:
    """A matrix or a vector that is stored as it is."""

    def __init__(self, values: FactorSource, scale: float) -> None:
        self._values = as_factor(values)
        self._values.register(self)
        self._scale = scale
        self.shape = self._values.shape

    def lines(self, start: int, stop: int, out: Float64) -> None:
        """Fills `out` with lines [start, stop)."""
        np.multiply(self._values.values().reshape(lines_of(self.shape))[start:stop], self._scale, out=out)

    def release(self) -> None:
        """Drops what was loaded."""
        self._values.release(self)


def _lines(delta: Delta, start: int, stop: int) -> Float64:
    out = np.empty((stop - start, lines_of(delta.shape)[1]))
    delta.lines(start, stop, out)
    return out


class Vector(_Dense):
    """A bias: `scale * values` (N,)."""


class Stacked:
    """Matrices of equal shape one after the other: (E, N, K) of E deltas (N, K)."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self._deltas = tuple(deltas)
        self.shape = (len(self._deltas), *self._deltas[0].shape)

    def lines(self, start: int, stop: int, out: Float64) -> None:
        """Fills `out` with lines [start, stop)."""
        each = self.shape[1]
        for number in range(start // each, -(-stop // each)):
            first, last = max(start, number * each), min(stop, (number + 1) * each)
            self._deltas[number].lines(first - number * each, last - number * each, out[first - start : last - start])

    def release(self) -> None:
        """Drops what was loaded."""
        for delta in self._deltas:
            delta.release()


class Part:
    """A slice [start, stop) of a delta along one axis, for weights that one file holds fused and another apart."""

    def __init__(self, delta: Delta, start: int, stop: int, axis: int = 0) -> None:
        self._delta = delta
        self._start, self._stop, self._axis = start, stop, axis % len(delta.shape)
        self.shape = (*delta.shape[: self._axis], stop - start, *delta.shape[self._axis + 1 :])

    def lines(self, start: int, stop: int, out: Float64) -> None:
        """Fills `out` with lines [start, stop)."""
        _, width = lines_of(self._delta.shape)
        if self._axis == len(self.shape) - 1 and self._axis > 0:
            whole = np.empty((stop - start, width))
            self._delta.lines(start, stop, whole)
            np.copyto(out, whole[:, self._start : self._stop])
            return
        # Lines below one step of the axis, here and in the whole.
        below = math.prod(self.shape[self._axis + 1 : -1]) if len(self.shape) > 1 else 1
        here, there = below * self.shape[self._axis], below * self._delta.shape[self._axis]
        for group in range(start // here, -(-stop // here)):
            first, last = max(start, group * here), min(stop, (group + 1) * here)
            shift = group * (there - here) + self._start * below
            self._delta.lines(first + shift, last + shift, out[first - start : last - start])

    def release(self) -> None:
        """Drops what was loaded."""
        self._delta.release()

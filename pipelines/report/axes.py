"""Axes of charts: where values lie, and ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Axis", "fitting_axis"]

_LEAST = 1e-290  # what is below has no place on a logarithmic axis: it is drawn at the low end
_WIDE = 8.0  # largest over smallest value from which an axis is logarithmic
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
_IN_DECADE = {1: (1.0, 2.0, 5.0), 2: (1.0, 3.0), 3: (1.0,)}  # ticks in each decade, by the number of decades


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from values to the range [0, 1].

    Attributes:
        low, high: values at 0 and at 1, finite and different.
        log: whether equal ratios are equal distances; both ends are positive then.
        ticks: round values inside.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Gives where a value lies; what is outside lies at the end."""
        if self.log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


def fitting_axis(values: Sequence[float], *, log: bool | None = None) -> Axis:
    """Gives an axis on which all values have room.

    Args:
        values: at least one, finite; for a logarithmic axis those that are not positive lie at its low end.
        log: whether to divide by ratios; None where the values are far apart.
    """
    positive = [value for value in values if value > _LEAST]
    if log is None:
        log = len(positive) == len(values) and max(positive) > _WIDE * min(positive)
    if log and positive:
        return _log_axis(min(positive), max(positive))
    return _linear_axis(min(values), max(values))


def _linear_axis(least: float, most: float) -> Axis:
    room = 0.08 * (most - least) or 0.1 * abs(most) or 1.0
    low = least - room if least < 0 or least > room else 0.0
    high = most + room
    step = _step((high - low) / 5)
    first = math.ceil(low / step)
    ticks = [step * number for number in range(first, math.floor(high / step) + 1)]
    return Axis(low, high, False, tuple(ticks))


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * step for step in _STEPS if power * step >= rough * 0.999)


def _log_axis(least: float, most: float) -> Axis:
    room = max(1.15, (most / least) ** 0.08)
    low, high = max(least / room, 1e-300), min(most * room, 1e300)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = _IN_DECADE.get(last - first, (1.0,))
    every = max(1, round((last - first) / 6))
    powers = [power for power in range(first, last + 1) if (power - first) % every == 0]
    ticks = [mark * 10.0**power for power in powers for mark in marks]
    return Axis(low, high, True, tuple(tick for tick in ticks if low <= tick <= high))

"""Takes what a pass shows of the inputs of several places, slice by slice, to the statistics of each.

All tokens of a slice are measured where they were computed. What few of them bring to an expert is collected until
there is enough for fast products; where that is depends on the tokens alone, and so does the order of every sum.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch

from quantpress.convert.calibration.hessian import Measured, Statistics
from quantpress.convert.calibration.inputs import Inputs, inputs_of
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.layer import Layer, State
from quantpress.convert.traits import Place

__all__ = ["Seen", "Taker", "Watch"]

_TOGETHER = 512  # tokens of an expert that are measured at once

Seen = list["Measured | Inputs"]
"""What a slice shows, of one place after the other."""


@dataclass(frozen=True, eq=False, slots=True)
class Watch:
    """Places of a step, or another input of all tokens, and what is to be known of each.

    Attributes:
        look: gives the inputs from the layers and what the step before has left of each stream.
        statistics: of one after the other.
        routed: whether each is of tokens that a router chooses.
    """

    look: Callable[[Sequence[Layer], Sequence[State]], Sequence[Inputs]]
    statistics: tuple[Statistics, ...]
    routed: tuple[bool, ...]

    @classmethod
    def of(cls, places: Sequence[Place], statistics: Sequence[Statistics]) -> Watch:
        """Watches places of one step."""

        def look(layers: Sequence[Layer], states: Sequence[State]) -> Sequence[Inputs]:
            return list(inputs_of(places[0].step, places, layers, states))

        return cls(look, tuple(statistics), tuple(place.expert >= 0 for place in places))

    @classmethod
    def hidden(cls, of: Callable[[torch.Tensor], torch.Tensor], statistics: Statistics) -> Watch:
        """Watches what is made of the residual, for all tokens."""
        return cls(lambda _layers, states: [(of(states[0]["hidden"]).flatten(0, 1), None)], (statistics,), (False,))

    def seen(self, layers: Sequence[Layer], states: Sequence[State]) -> Seen:
        """Looks at a slice; for any thread."""
        found = zip(self.statistics, self.routed, self.look(layers, states), strict=True)
        return [inputs if routed else statistics.measure(*inputs) for statistics, routed, inputs in found]


@dataclass(eq=False, slots=True)
class _Gathered:
    """What the tokens of an expert bring, until it is measured."""

    parts: list[Inputs] = field(default_factory=list)
    tokens: int = 0

    def take(self, inputs: Inputs) -> None:
        if len(inputs[0]):
            self.parts.append(inputs)
            self.tokens += len(inputs[0])

    def all(self) -> list[Inputs]:
        """Gives it, and begins anew."""
        parts, self.parts, self.tokens = self.parts, [], 0
        return parts


class Taker:
    """Takes what slices show, in the order of the tokens."""

    def __init__(self, watch: Watch, workers: Workers) -> None:
        """Waits for the first."""
        self._watch, self._workers = watch, workers
        self._submit = partial(workers.submit, "hessian")
        self._gathered = [_Gathered() for _ in watch.statistics]
        self._running: deque[tuple[Statistics, Future[Measured]]] = deque()

    def take(self, seen: Seen) -> None:
        """Takes the next slice."""
        for statistics, gathered, found in zip(self._watch.statistics, self._gathered, seen, strict=True):
            if isinstance(found, Measured):
                statistics.add(found, self._submit)
                continue
            gathered.take(found)
            if gathered.tokens >= _TOGETHER:
                self._measure(statistics, gathered)
        self._drain(self._workers.threads + 1)

    def finish(self) -> None:
        """Takes what is left, and waits until all is summed."""
        for statistics, gathered in zip(self._watch.statistics, self._gathered, strict=True):
            if gathered.tokens:
                self._measure(statistics, gathered)
        self._drain(0)
        for statistics in self._watch.statistics:
            statistics.wait()

    def _measure(self, statistics: Statistics, gathered: _Gathered) -> None:
        task = partial(_measured, statistics, gathered.all())
        self._running.append((statistics, self._workers.submit("hessian", task)))
        self._drain(self._workers.threads + 1)

    def _drain(self, left: int) -> None:
        while len(self._running) > left:
            statistics, future = self._running.popleft()
            statistics.add(future.result(), self._submit)


def _measured(statistics: Statistics, parts: Sequence[Inputs]) -> Measured:
    sources = [source for _, source in parts if source is not None]
    return statistics.measure(torch.cat([values for values, _ in parts]), torch.cat(sources) if sources else None)

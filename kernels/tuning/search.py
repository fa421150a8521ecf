"""Finds the fastest launch of a product among candidates, measuring few of them.

From a launch that arithmetic chooses the search goes to the best of its neighbours, and on from there, until none is
faster; neighbours are one or two steps of one parameter away, or one step of two. Every launch is compiled and measured
once; the few fastest are measured again, longer, and that decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

from quantpress.kernels.launch import Launch
from quantpress.kernels.tuning.timing import Timing, timing

__all__ = ["Found", "Refused", "neighbours", "search"]

_FINALISTS = 4
_QUICK, _LONG = 5, 25  # samples of a launch in the search, and of a finalist


class Refused(Exception):  # noqa: N818 - it says what became of a candidate, and ends nothing
    """A launch does not compile, does not fit the device or gives a wrong result; the message says which."""


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a search.

    Attributes:
        launch: the fastest.
        timing: of it.
        measured: launches that were measured.
        refused: launch and reason of those that could not run or were wrong.
    """

    launch: Launch
    timing: Timing
    measured: int
    refused: tuple[tuple[Launch, str], ...]


def search(
    starts: Sequence[Launch],
    allowed: Sequence[Launch],
    seconds: Callable[[Launch, int], Sequence[float]],
    prepare: Callable[[Sequence[Launch]], None] | None = None,
) -> Found:
    """Searches.

    Args:
        starts: where to begin, one after the other; they need not be among those allowed.
        allowed: candidates.
        seconds: measures a launch that many times; raises `Refused`.
        prepare: is told which launches will be measured next, to compile them side by side.

    Raises:
        Refused: no launch that was tried can run.
    """
    trials = _Trials(seconds, prepare)
    for start in starts:
        # what arithmetic chose may not run: then any candidate of its kernel may begin
        at = trials.fastest([start]) or trials.fastest([each for each in allowed if each.kernel == start.kernel])
        while at:
            best = at[0]
            at = trials.fastest([best, *neighbours(best, allowed)])
            if at[0] == best:
                break
    if not trials.taken:
        raise Refused("; ".join(dict.fromkeys(trials.refused.values())) or "no launch to try")
    best_first = trials.fastest(list(trials.taken))
    finals = {launch: timing(seconds(launch, _LONG)) for launch in best_first[:_FINALISTS]}
    launch = min(finals, key=lambda each: finals[each].median)
    return Found(launch, finals[launch], len(trials.taken), tuple(trials.refused.items()))


class _Trials:
    """Launches that were measured or refused, each once."""

    def __init__(
        self, seconds: Callable[[Launch, int], Sequence[float]], prepare: Callable[[Sequence[Launch]], None] | None
    ) -> None:
        self._seconds, self._prepare = seconds, prepare
        self.taken: dict[Launch, Timing] = {}
        self.refused: dict[Launch, str] = {}

    def fastest(self, launches: Sequence[Launch]) -> list[Launch]:
        """Measures those that are new; gives all that run, the fastest first."""
        new = [each for each in dict.fromkeys(launches) if each not in self.taken and each not in self.refused]
        if self._prepare is not None:
            self._prepare(new)
        for launch in new:
            try:
                self.taken[launch] = timing(self._seconds(launch, _QUICK))
            except Refused as error:  # noqa: PERF203 - beside a measurement its cost is nothing
                self.refused[launch] = str(error)
        return sorted((each for each in launches if each in self.taken), key=lambda each: self.taken[each].median)


def neighbours(launch: Launch, allowed: Sequence[Launch]) -> list[Launch]:
    """Gives the candidates that differ from a launch by one or two steps of one parameter, or by one each of two."""
    own, all_values = astuple(launch), list(zip(*map(astuple, allowed), strict=True))
    places = [
        {value: place for place, value in enumerate(sorted({*values, mine}))}
        for values, mine in zip(all_values, own, strict=True)
    ]
    found = []
    for other in allowed:
        steps = [abs(place[a] - place[b]) for place, a, b in zip(places, own, astuple(other), strict=True)]
        moved = [step for step in steps if step]
        if other.kernel == launch.kernel and moved in ([1], [2], [1, 1]):
            found.append(other)
    return found

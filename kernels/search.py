"""Finds the fastest launch of a product among candidates, measuring few of them.

From a launch that arithmetic chooses the search goes to the best of its neighbours, and on from there, until none is
faster; neighbours are one or two steps of one parameter away, or one step of two. Every launch is compiled and measured
once; the few fastest are measured again, longer, and that decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

from quantpress.kernels.launch import Launch
from quantpress.kernels.timing import Timing, timing

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
    taken: dict[Launch, Timing] = {}
    refused: dict[Launch, str] = {}

    def measure(launches: Sequence[Launch]) -> list[Launch]:
        new = [launch for launch in dict.fromkeys(launches) if launch not in taken and launch not in refused]
        if prepare is not None:
            prepare(new)
        for launch in new:
            try:
                taken[launch] = timing(seconds(launch, _QUICK))
            except Refused as error:  # noqa: PERF203 - beside a measurement its cost is nothing
                refused[launch] = str(error)
        return sorted((launch for launch in launches if launch in taken), key=lambda launch: taken[launch].median)

    for start in starts:
        # what arithmetic chose may not run: then any candidate of its kernel may begin
        at = measure([start]) or measure([launch for launch in allowed if launch.kernel == start.kernel])
        while at:
            best = at[0]
            at = measure([best, *neighbours(best, allowed)])
            if at[0] == best:
                break
    if not taken:
        raise Refused("; ".join(dict.fromkeys(refused.values())) or "no launch to try")
    best_first = sorted(taken, key=lambda launch: taken[launch].median)
    finals = {launch: timing(seconds(launch, _LONG)) for launch in best_first[:_FINALISTS]}
    launch = min(finals, key=lambda each: finals[each].median)
    return Found(launch, finals[launch], len(taken), tuple(refused.items()))


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

"""Mistakes in a pipeline file: where each one is, and one error that names them all in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from quantpress.quant.errors import UsageError

__all__ = ["Mark", "Problem", "Problems", "nearest"]

_MOST = 10  # mistakes that one message names
_MANY = 200  # mistakes that are remembered
_CUTOFF = 0.55  # of difflib's ratio: "outypte" is near "outtype" (0.86), "out" is not (0.6 of its 3 letters match)
_MAX_COMPARED = 200  # characters of a name that is compared with others


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """Where something stands.

    Attributes:
        source: the file as it was given, or the flag that set the value.
        line, column: counted from 1; 0 for what a flag has set.
    """

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        """Gives the place as compilers write it."""
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake.

    Attributes:
        mark: where.
        message: what was found and what was wanted.
        missing: whether the file is right in itself and only an input is not there.
    """

    mark: Mark
    message: str
    missing: bool = False


@dataclass(slots=True)
class Problems:
    """Mistakes that have been found so far; the same one in many jobs of a matrix counts once."""

    found: list[Problem] = field(default_factory=list)
    _seen: set[tuple[Mark, str]] = field(default_factory=set)

    def add(self, mark: Mark, message: str, *, missing: bool = False) -> None:
        """Remembers a mistake."""
        if (mark, message) not in self._seen and len(self.found) < _MANY:
            self._seen.add((mark, message))
            self.found.append(Problem(mark, message, missing))

    def take(self, others: Problems) -> None:
        """Takes over the mistakes of a file that others hold among what is only missing."""
        wrong = [problem for problem in others.found if not problem.missing]
        others.found[:] = [problem for problem in others.found if problem.missing]
        for problem in wrong:
            self.add(problem.mark, problem.message)

    def raise_any(self) -> None:
        """Raises what has been found, in the order of the file.

        Raises:
            UsageError: naming them.
        """
        if self.found:
            raise UsageError(self.text())

    def text(self) -> str:
        """Gives what has been found in one line, in the order of the file; empty where nothing was."""
        found = sorted(self.found, key=lambda problem: problem.mark)
        more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
        return "; ".join(_texts(found[:_MOST])) + more


def _texts(found: Sequence[Problem]) -> Iterable[str]:
    """Gives the mistakes' texts; the file's name stands before the first one only."""
    before = ""
    for problem in found:
        mark = problem.mark
        again = mark.line and mark.source == before
        place = f"{mark.line}:{mark.column}" if again else str(mark)
        before = mark.source
        yield f"{place}: {problem.message}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Gives `; did you mean "outtype"?` where a known name is near, else nothing."""
    names = {_plain(each): each for each in known if len(each) <= _MAX_COMPARED}
    found = difflib.get_close_matches(_plain(name[:_MAX_COMPARED]), list(names), n=1, cutoff=_CUTOFF)
    return f'; did you mean "{names[found[0]]}"?' if found else ""


def _plain(name: str) -> str:
    """Gives a name as it is compared: `max-kld` and `maxKld` are both near `max_kld`."""
    return re.sub(r"[^a-z0-9/.]", "", name.lower()) or name

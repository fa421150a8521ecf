"""Walks the tree of a regular expression with sets of places, so that its work is bounded (see patterns.py).

A set of places in a text is an integer: bit p stands for the place before character p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Protocol

from quantpress.quant.errors import InputError

__all__ = ["Anchor", "Branch", "Budget", "Chain", "Look", "Node", "Repeat", "Set", "Subject", "Text"]

MAX_STEPS = 2_500_000  # about 2 seconds; the longest pattern in use needs 200 steps a module


@dataclass(slots=True)
class Budget:
    """What the patterns of one configuration may cost.

    Attributes:
        name: the file and key, for messages.
        length: characters of patterns that were compiled.
        steps: visits of nodes of their trees.
    """

    name: str
    length: int = 0
    steps: int = 0

    def spend(self, steps: int = 1) -> None:
        """Counts work.

        Raises:
            InputError: more than any adapter needs was done.
        """
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise InputError(f"{self.name}: the patterns take too long to match; list the module names instead")


class Subject:
    """A text with the places of its characters: bit p stands for the place before character p."""

    def __init__(self, text: str, budget: Budget) -> None:
        self.text = text
        self.chars: dict[str, int] = {}
        for place, char in enumerate(text):
            self.chars[char] = self.chars.get(char, 0) | 1 << place
        self._sets: dict[int, int] = {}
        self._budget = budget
        self._price = 1 + len(text) // 64  # words of an integer that stands for a set of places
        budget.spend(len(text))

    def spend(self, steps: int = 1) -> None:
        """Counts work on sets of places of this text."""
        self._budget.spend(steps * self._price)

    def places(self, node: Set) -> int:
        """Gives the places of all characters of a set."""
        if (mask := self._sets.get(id(node))) is None:
            self.spend(len(self.chars))
            mask = reduce(or_, (places for char, places in self.chars.items() if node.test(char)), 0)
            self._sets[id(node)] = mask
        return mask


class Node(Protocol):
    """A part of a pattern."""

    def ends(self, starts: int, subject: Subject) -> int:
        """Gives the places where a match can end that starts at one of `starts`."""
        ...


@dataclass(frozen=True, slots=True)
class Text:
    """Characters in a row."""

    chars: str

    def ends(self, starts: int, subject: Subject) -> int:
        """See `Node`."""
        for char in self.chars:
            subject.spend()
            starts = (starts & subject.chars.get(char, 0)) << 1
            if not starts:
                break
        return starts


@dataclass(frozen=True, slots=True)
class Set:
    """One character that a test accepts."""

    test: Callable[[str], bool]

    def ends(self, starts: int, subject: Subject) -> int:
        """See `Node`."""
        subject.spend()
        return (starts & subject.places(self)) << 1

    def runs(self, starts: int, subject: Subject) -> int:
        """Gives the places that any number of characters of the set lead to, all at once."""
        subject.spend()
        allowed = subject.places(self)
        inside = starts & allowed
        # A carry runs from the first start in each run of characters to the place behind the run.
        return starts | inside | (allowed + inside) ^ allowed


@dataclass(frozen=True, slots=True)
class Chain:
    """One part behind the other."""

    nodes: tuple[Node, ...]

    def ends(self, starts: int, subject: Subject) -> int:
        """See `Node`."""
        for node in self.nodes:
            if not starts:
                break
            starts = node.ends(starts, subject)
        return starts


@dataclass(frozen=True, slots=True)
class Branch:
    """One part or another."""

    options: tuple[Node, ...]

    def ends(self, starts: int, subject: Subject) -> int:
        """See `Node`."""
        return reduce(or_, (option.ends(starts, subject) for option in self.options), 0)


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part `low` to `high` times; greedy or not makes no difference to what can match."""

    low: int
    high: int
    body: Node

    def ends(self, starts: int, subject: Subject) -> int:
        """See `Node`."""
        # A place either stays (an empty pass) or moves on, so the set stops changing after len(text) + 1 passes.
        for _ in range(self.low):
            subject.spend()
            before, starts = starts, self.body.ends(starts, subject)
            if starts in (0, before):
                break
        left = self.high - self.low
        if isinstance(self.body, Set) and left >= len(subject.text):
            return self.body.runs(starts, subject)
        reached = frontier = starts
        while frontier and left > 0:
            subject.spend()
            frontier = self.body.ends(frontier, subject) & ~reached
            reached |= frontier
            left -= 1
        return reached


@dataclass(frozen=True, slots=True)
class Anchor:
    """A condition on a place."""

    holds: Callable[[str, int], bool]

    def ends(self, starts: int, subject: Subject) -> int:
        """See `Node`."""
        return sum(1 << place for place in _bits(starts, subject) if self.holds(subject.text, place))


@dataclass(frozen=True, slots=True)
class Look:
    """A condition on what stands behind a place, or before it."""

    body: Node
    behind: int | None  # width of a look behind; None: a look ahead
    negated: bool

    def ends(self, starts: int, subject: Subject) -> int:
        """See `Node`."""
        return sum(1 << place for place in _bits(starts, subject) if self._holds(place, subject) != self.negated)

    def _holds(self, place: int, subject: Subject) -> bool:
        if self.behind is None:
            return self.body.ends(1 << place, subject) != 0
        start = place - self.behind
        return start >= 0 and self.body.ends(1 << start, subject) >> place & 1 == 1


def _bits(places: int, subject: Subject) -> list[int]:
    subject.spend(places.bit_length())
    return [place for place in range(places.bit_length()) if places >> place & 1]

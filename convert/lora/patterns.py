r"""Matches the regular expressions of an adapter_config.json, which strangers wrote, in bounded time.

PEFT hands them to Python's `re`, which backtracks: a pattern such as `(a+)+b` or a long row of `.*` makes it run for
years. Here Python's own parser reads the pattern, so its syntax is the same, and the tree is walked with sets of
positions instead of one position at a time (Thompson, "Regular expression search algorithm", CACM 1968), held as the
bits of an integer. The answer is that of `re` for everything but backreferences, atomic groups and possessive
repeats, which are refused. Work is counted, and a pattern that needs too much is refused too.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, Protocol

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["Budget", "Pattern", "compile_pattern", "is_plain"]

MAX_LENGTH = 100_000  # characters of one pattern, and of all patterns of one budget together
_MAX_NESTING = 100  # open parentheses
_MAX_STEPS = 20_000_000  # about 2 seconds; the longest pattern in use needs 200 steps a module

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")


def is_plain(pattern: str) -> bool:
    """Whether a pattern is letters, digits, `_`, `-` and dots only, where nothing but a dot means more than itself."""
    return _PLAIN.fullmatch(pattern) is not None


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
        if self.steps > _MAX_STEPS:
            raise InputError(f"{self.name}: the patterns take too long to match; list the module names instead")


@dataclass(slots=True)
class _Subject:
    """A text with the places of its characters: bit p stands for the place before character p."""

    text: str
    budget: Budget
    masks: dict[int, int] = field(default_factory=dict)

    def places(self, node: _Chars) -> int:
        if (mask := self.masks.get(id(node))) is None:
            self.budget.spend(len(self.text))
            mask = sum(1 << place for place, char in enumerate(self.text) if node.test(char))
            self.masks[id(node)] = mask
        return mask


class _Node(Protocol):
    def ends(self, starts: int, subject: _Subject) -> int:
        """Gives the places where a match can end that starts at one of `starts`."""
        ...


@dataclass(frozen=True, slots=True)
class _Chars:
    test: Callable[[str], bool]

    def ends(self, starts: int, subject: _Subject) -> int:
        subject.budget.spend()
        return (starts & subject.places(self)) << 1


@dataclass(frozen=True, slots=True)
class _Sequence:
    nodes: tuple[_Node, ...]

    def ends(self, starts: int, subject: _Subject) -> int:
        for node in self.nodes:
            if not starts:
                break
            starts = node.ends(starts, subject)
        return starts


@dataclass(frozen=True, slots=True)
class _Branch:
    options: tuple[_Node, ...]

    def ends(self, starts: int, subject: _Subject) -> int:
        return reduce(or_, (option.ends(starts, subject) for option in self.options), 0)


@dataclass(frozen=True, slots=True)
class _Repeat:
    low: int
    high: int
    body: _Node

    def ends(self, starts: int, subject: _Subject) -> int:
        # A place either stays (an empty pass) or moves on, so the set stops changing after len(text) + 1 passes.
        for _ in range(self.low):
            subject.budget.spend()
            before, starts = starts, self.body.ends(starts, subject)
            if starts in (0, before):
                break
        reached, frontier, left = starts, starts, self.high - self.low
        while frontier and left > 0:
            subject.budget.spend()
            frontier = self.body.ends(frontier, subject) & ~reached
            reached |= frontier
            left -= 1
        return reached


@dataclass(frozen=True, slots=True)
class _Anchor:
    holds: Callable[[str, int], bool]

    def ends(self, starts: int, subject: _Subject) -> int:
        return sum(1 << place for place in _bits(starts, subject) if self.holds(subject.text, place))


@dataclass(frozen=True, slots=True)
class _Look:
    body: _Node
    behind: int | None  # width of a look behind; None: a look ahead
    negated: bool

    def ends(self, starts: int, subject: _Subject) -> int:
        return sum(1 << place for place in _bits(starts, subject) if self._holds(place, subject) != self.negated)

    def _holds(self, place: int, subject: _Subject) -> bool:
        if self.behind is None:
            return self.body.ends(1 << place, subject) != 0
        start = place - self.behind
        return start >= 0 and self.body.ends(1 << start, subject) >> place & 1 == 1


def _bits(places: int, subject: _Subject) -> list[int]:
    subject.budget.spend(places.bit_length())
    return [place for place in range(places.bit_length()) if places >> place & 1]


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled pattern; both methods answer as those of `re.Pattern`."""

    root: _Node
    budget: Budget

    def match(self, text: str) -> bool:
        """Whether some beginning of the text matches."""
        return self.root.ends(1, _Subject(text, self.budget)) != 0

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches."""
        return self.root.ends(1, _Subject(text, self.budget)) >> len(text) & 1 == 1


def compile_pattern(pattern: str, budget: Budget) -> Pattern:
    """Reads a regular expression.

    Raises:
        InputError: it is none, it is too long or nested too deep, or it uses what is not supported.
    """
    budget.length += len(pattern)
    if budget.length > MAX_LENGTH:
        raise InputError(f"{budget.name}: more than {MAX_LENGTH} characters of patterns; list the module names instead")
    _check_nesting(pattern, budget)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what `re` finds doubtful it still matches
            tree = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{budget.name}: {shown(pattern)} is not a regular expression: {error}") from error
    return Pattern(_build_sequence(tree, tree.state.flags, f"{budget.name}: {shown(pattern)}"), budget)


def _check_nesting(pattern: str, budget: Budget) -> None:
    depth = 0
    for char in pattern:
        depth += (char == "(") - (char == ")")
        if depth > _MAX_NESTING:
            raise InputError(f"{budget.name}: a pattern is nested deeper than {_MAX_NESTING} levels")


def _build_sequence(items: Sequence[tuple[Any, Any]], flags: int, where: str) -> _Node:
    nodes = tuple(_build(str(code), argument, flags, where) for code, argument in items)
    return nodes[0] if len(nodes) == 1 else _Sequence(nodes)


def _build(code: str, argument: Any, flags: int, where: str) -> _Node:
    if code in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
        return _Chars(_char_test(code, argument, flags, where))
    if code == "AT":
        return _Anchor(_anchor(str(argument)))
    if code == "BRANCH":
        return _Branch(tuple(_build_sequence(option, flags, where) for option in argument[1]))
    if code == "SUBPATTERN":
        _, added, removed, items = argument
        return _build_sequence(items, (flags | added) & ~removed, where)
    if code in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, items = argument
        return _Repeat(int(low), int(high), _build_sequence(items, flags, where))
    if code in ("ASSERT", "ASSERT_NOT"):
        direction, items = argument
        width = items.getwidth()[0] if direction < 0 else None
        return _Look(_build_sequence(items, flags, where), width, code == "ASSERT_NOT")
    raise InputError(f"{where} uses {code.lower().replace('_', ' ')}, which is not supported in patterns")


def _anchor(code: str) -> Callable[[str, int], bool]:
    def is_word(text: str, place: int) -> bool:
        return 0 <= place < len(text) and _category("CATEGORY_WORD")(text[place])

    def at_boundary(text: str, place: int) -> bool:
        return is_word(text, place - 1) != is_word(text, place)

    # Paths of modules hold no line breaks, so MULTILINE changes nothing.
    return {
        "AT_BEGINNING": lambda _, place: place == 0,
        "AT_BEGINNING_STRING": lambda _, place: place == 0,
        "AT_END": lambda text, place: place == len(text) or text[place:] == "\n",
        "AT_END_STRING": lambda text, place: place == len(text),
        "AT_BOUNDARY": at_boundary,
        "AT_NON_BOUNDARY": lambda text, place: not at_boundary(text, place) and text != "",
    }[code]


def _category(code: str) -> Callable[[str], bool]:
    name = code.removeprefix("CATEGORY_").removeprefix("NOT_")
    test: Callable[[str], bool] = {
        "DIGIT": str.isdecimal,
        "SPACE": str.isspace,
        "WORD": lambda char: char.isalnum() or char == "_",
    }[name]
    return test if code == f"CATEGORY_{name}" else lambda char: not test(char)


def _char_test(code: str, argument: Any, flags: int, where: str) -> Callable[[str], bool]:
    if code == "ANY":
        return lambda char: bool(flags & re.DOTALL) or char != "\n"
    items = [(str(kind), value) for kind, value in argument] if code == "IN" else [("LITERAL", argument)]
    negated = code == "NOT_LITERAL" or (bool(items) and items[0][0] == "NEGATE")
    tests = [_item_test(kind, value) for kind, value in items if kind != "NEGATE"]
    if flags & re.ASCII:
        raise InputError(f"{where} uses the flag a, which is not supported in patterns")
    if not flags & re.IGNORECASE:
        return lambda char: any(test(char) for test in tests) != negated
    return lambda char: any(test(case) for test in tests for case in _cases(char)) != negated


def _cases(char: str) -> set[str]:
    return {case for case in (char, char.lower(), char.upper()) if len(case) == 1}


def _item_test(kind: str, value: Any) -> Callable[[str], bool]:
    if kind == "LITERAL":
        return lambda char: ord(char) == value
    if kind == "RANGE":
        low, high = value
        return lambda char: low <= ord(char) <= high
    return _category(str(value))

r"""Matches the regular expressions of an adapter_config.json, which strangers wrote, in bounded time.

PEFT hands them to Python's `re`, which backtracks: a pattern such as `(a+)+b` or a long row of `.*` makes it run for
years. Here Python's own parser reads the pattern, so its syntax is the same, and the tree is walked with sets of
places instead of one place at a time (Thompson, "Regular expression search algorithm", CACM 1968). The answer is that
of `re` for everything but backreferences, conditions, atomic groups and possessive repeats, which are refused. Work is
counted, and a pattern that needs too much is refused too.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantpress.convert.files import shown
from quantpress.convert.lora.pattern_nodes import Anchor, Branch, Budget, Chain, Look, Node, Repeat, Set, Subject, Text
from quantpress.quant.errors import InputError

__all__ = ["MAX_LENGTH", "Budget", "Pattern", "compile_pattern", "is_plain"]

MAX_LENGTH = 100_000  # characters of one pattern, and of all patterns of one budget together
_MAX_NESTING = 100  # open parentheses

_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_PLAIN = re.compile(r"[A-Za-z0-9_.\-]+")


def is_plain(pattern: str) -> bool:
    """Whether a pattern is letters, digits, `_`, `-` and dots only, where nothing but a dot means more than itself."""
    return _PLAIN.fullmatch(pattern) is not None


@dataclass(frozen=True, slots=True)
class Pattern:
    """A compiled pattern; both methods answer as those of `re.Pattern`."""

    root: Node
    budget: Budget

    def match(self, text: str) -> bool:
        """Whether some beginning of the text matches."""
        return self.root.ends(1, Subject(text, self.budget)) != 0

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches."""
        return self.root.ends(1, Subject(text, self.budget)) >> len(text) & 1 == 1


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


def _build_sequence(items: Sequence[tuple[Any, Any]], flags: int, where: str) -> Node:
    nodes: list[Node] = []
    for code, argument in items:
        node = _build(str(code), argument, flags, where)
        if isinstance(node, Text) and nodes and isinstance(last := nodes[-1], Text):
            nodes[-1] = Text(last.chars + node.chars)
        else:
            nodes.append(node)
    return nodes[0] if len(nodes) == 1 else Chain(tuple(nodes))


def _build(code: str, argument: Any, flags: int, where: str) -> Node:
    if code == "LITERAL" and not flags & re.IGNORECASE:
        return Text(chr(argument))
    if code in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
        return Set(_char_test(code, argument, flags, where))
    if code == "AT":
        return Anchor(_anchor(str(argument)))
    if code == "BRANCH":
        return Branch(tuple(_build_sequence(option, flags, where) for option in argument[1]))
    if code == "SUBPATTERN":
        _, added, removed, items = argument
        return _build_sequence(items, (flags | added) & ~removed, where)
    if code in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, items = argument
        return Repeat(int(low), int(high), _build_sequence(items, flags, where))
    if code in ("ASSERT", "ASSERT_NOT"):
        direction, items = argument
        width = items.getwidth()[0] if direction < 0 else None
        return Look(_build_sequence(items, flags, where), width, code == "ASSERT_NOT")
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

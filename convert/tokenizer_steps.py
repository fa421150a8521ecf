"""What a tokenizer.json makes the library do with a text: bounded before any text is cut.

A normalizer that puts two blanks for one, forty times over, is a kilobyte of file and a terabyte of memory. The library
has no limit of its own, and cannot be stopped while it works.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["check_steps", "growth_of"]

_STEPS = {  # part of the file -> where a sequence has its steps
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors",
    "decoder": "decoders",
}  # fmt: skip
_MAX_GROWTH = 256  # characters for one; a normalizer of a published model has 3 at most
_MAX_PREPENDED = 1024  # characters
_MAX_PATTERN = 100_000  # characters of a regular expression; the longest that is known has 2,000
_MAX_DEPTH = 64  # of its groups; compiling takes a time that is exponential in it
_MAX_TEMPLATE = 64  # pieces; each may be the whole text
_ASSERTION = re.compile(r"\^|\$|\(\?|\\[bBAzZGK]")  # may match between characters
_PROBE = "\ue000"  # a character of private use, that a pattern matches if it matches nothing


def check_steps(tokenizer_json: Mapping[str, Any], where: str) -> None:
    """Refuses steps that are no objects, that make a text far longer, or whose patterns cannot be compiled in time.

    The library reads steps that are lists, by the order of their fields; nobody else does.

    Args:
        tokenizer_json: the document.
        where: the file, for messages.

    Raises:
        InputError: a step is refused.
    """
    for part in _STEPS:
        growth, prepended = 1.0, 0
        for step in _steps(tokenizer_json, part, where):
            pattern = _checked_pattern(step, f"{where}: {part} {shown(step.get('type'))}")
            if step.get("type") == "Replace" and isinstance(step.get("content"), str):
                growth *= growth_of(pattern, step["content"])
            if step.get("type") == "Prepend" and isinstance(step.get("prepend"), str):
                prepended += len(step["prepend"])
            if growth > _MAX_GROWTH or prepended > _MAX_PREPENDED:
                raise InputError(
                    f"{where}: the {part} may write more than {_MAX_GROWTH} characters for one, "
                    f"or {_MAX_PREPENDED} before a text; no text is cut with it"
                )
            _check_template(step, f"{where}: {part}")


def _steps(tokenizer_json: Mapping[str, Any], part: str, where: str) -> Iterator[Mapping[str, Any]]:
    waiting = [tokenizer_json.get(part)]
    while waiting:
        step = waiting.pop()
        if step is None:
            continue
        if not isinstance(step, dict):
            raise InputError(f"{where}: not a tokenizer: {part} is {shown(step)}, wanted an object")
        yield step
        inner = step.get(_STEPS[part])
        waiting += inner if isinstance(inner, list) else []


def _checked_pattern(step: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Gives a step's pattern, `{"String": ...}` or `{"Regex": ...}`, or nothing."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict):
        return {}
    regex = pattern.get("Regex")
    if isinstance(regex, str) and (len(regex) > _MAX_PATTERN or _depth(regex) > _MAX_DEPTH):
        raise InputError(
            f"{where}: a pattern of {len(regex)} characters with groups {_depth(regex)} deep; at most {_MAX_PATTERN} "
            f"and {_MAX_DEPTH} are compiled"
        )
    return pattern


def _depth(regex: str) -> int:
    """Gives how deep groups lie; parentheses in a class count too, so it may be too much."""
    depth = most = 0
    for mark in re.findall(r"\\.|[()]", regex, re.DOTALL):
        depth = depth + 1 if mark == "(" else max(0, depth - (mark == ")"))
        most = max(most, depth)
    return most


def growth_of(pattern: Mapping[str, Any], content: str) -> float:
    """Gives how many characters at most a replacement leaves of one."""
    text, regex = pattern.get("String"), pattern.get("Regex")
    if isinstance(text, str) and text:
        return max(1.0, len(content) / len(text))
    if isinstance(regex, str) and not _may_match_nothing(regex):
        return max(1, len(content))
    return len(content) + 1


def _may_match_nothing(regex: str) -> bool:
    from tokenizers import Regex, normalizers

    if _ASSERTION.search(regex):
        return True
    try:
        return bool(normalizers.Replace(Regex(regex), "x").normalize_str(_PROBE) != _PROBE)
    except Exception:  # noqa: BLE001 - the library raises nothing narrower; it says why when it reads the file
        return True


def _check_template(step: Mapping[str, Any], where: str) -> None:
    for name in ("single", "pair"):
        pieces = step.get(name)
        if isinstance(pieces, list) and len(pieces) > _MAX_TEMPLATE:
            raise InputError(f"{where}: a template of {len(pieces)} pieces, at most {_MAX_TEMPLATE} are possible")

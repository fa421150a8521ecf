"""Fills `${name}` in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from quantpress.convert.files import shown
from quantpress.pipelines.batch.problems import Problems, nearest
from quantpress.pipelines.batch.yaml_file import Node, Scalar
from quantpress.quant.errors import UsageError

__all__ = ["NAME", "evaluated", "filled", "text_of", "used_names"]

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_USE = re.compile(r"(\$?)\$\{([^}]*)(\}?)")
_WHOLE = re.compile(r"\$\{([^}]*)\}")
_MAX_TEXT = 65_536  # characters of a text with its variables filled in


def filled(node: Node, values: Mapping[str, Node], problems: Problems) -> Node:
    """Gives a value with every variable in it filled in; keys stay as they are.

    A text that is one variable and nothing else takes its value as it is: a number stays a number. `$${` stands for
    `${`.

    Args:
        node: the value.
        values: of the variables: scalars and lists of scalars.
        problems: gets what cannot be filled in.
    """
    if isinstance(node.value, str):
        return _filled_text(node, node.value, values, problems) if "${" in node.value else node
    if isinstance(node.value, list):
        return dataclasses.replace(node, value=[filled(each, values, problems) for each in node.value])
    if isinstance(node.value, dict):
        return dataclasses.replace(
            node, value={key: filled(each, values, problems) for key, each in node.value.items()}
        )
    return node


def _filled_text(node: Node, text: str, values: Mapping[str, Node], problems: Problems) -> Node:
    if whole := _WHOLE.fullmatch(text):
        name = whole[1].strip()
        if name in values:
            return dataclasses.replace(values[name], mark=node.mark)

    def replace(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        name = match[2].strip()
        if not match[3]:
            raise UsageError(f"{shown(text)}: the }} after ${{{shown(name)[1:-1]} is missing")
        if name not in values:
            raise UsageError(_unknown(name, values))
        if isinstance(values[name].value, list):
            raise UsageError(f"${{{name}}} is a list, which cannot stand inside a text")
        return text_of(values[name])

    try:
        result = _USE.sub(replace, text)
    except UsageError as error:
        problems.add(node.mark, str(error))
        return node
    if len(result) > _MAX_TEXT:
        problems.add(node.mark, f"{shown(text)}: more than {_MAX_TEXT} characters with its variables filled in")
        return node
    return dataclasses.replace(node, value=result)


def _unknown(name: str, values: Mapping[str, Node]) -> str:
    known = f"; known are {', '.join(values)}" if values else "; declare it under `variables` or in the job's `matrix`"
    literal = "; for ${ itself write $${" if not NAME.fullmatch(name) else ""
    return f"${{{shown(name)[1:-1]}}}: no such variable{nearest(name, values) or known}{literal}"


def used_names(node: Node) -> frozenset[str]:
    """Gives the names of the variables that a text uses."""
    if not isinstance(node.value, str):
        return frozenset()
    return frozenset(match[2].strip() for match in _USE.finditer(node.value) if not match[1])


def text_of(node: Node) -> str:
    """Gives a value as it stands inside a text."""
    if isinstance(node.value, list):
        return ",".join(text_of(each) for each in node.value)
    return _scalar_text(node.value) if not isinstance(node.value, dict) else ""


def _scalar_text(value: Scalar) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def evaluated(variables: Node | None, problems: Problems) -> dict[str, Node]:
    """Gives the values of the file's variables; each may use those that stand above it."""
    found: dict[str, Node] = {}
    if variables is None:
        return found
    for name, node in variables.items().items():
        if not NAME.fullmatch(name):
            problems.add(variables.key_mark(name), f"{shown(name)}: a variable's name is letters, digits, _ and -")
            continue
        found[name] = filled(node, found, problems)
    return found

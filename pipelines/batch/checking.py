"""Checks values against pydantic models, and says what is wrong in words of the file, with line and column."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from quantpress.convert.files import shown
from quantpress.pipelines.batch.problems import Mark, Problems, nearest
from quantpress.pipelines.batch.yaml_file import Node

__all__ = ["check", "found_text"]

_KINDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "none_required": "null",
    "string_too_short": "a text that is not empty",
    "too_short": "a list that is not empty",
}
_YAML_1_1 = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def check(
    model: type[BaseModel], node: Node, problems: Problems, *, where: str = "", known: Sequence[str] | None = None
) -> Mapping[str, Any] | None:
    """Checks a mapping.

    Args:
        model: its fields and their types.
        node: what the file has.
        problems: gets what is wrong.
        where: what the mapping belongs to, for messages: "gguf."
        known: names of the keys, where they are not all of the model's.

    Returns:
        The values that were given, by key; None where something is wrong.
    """
    if not isinstance(node.value, dict):
        problems.add(node.mark, f"{where.rstrip('.') or 'the file'}: wanted a mapping, found {found_text(node)}")
        return None
    try:
        checked = model.model_validate(node.plain())
    except ValidationError as error:
        names = known if known is not None else _names(model)
        for path, group in _grouped(error, node).items():
            mark, message = _explained(path, group, node, where, names)
            problems.add(mark, message)
        return None
    return {info.alias or name: getattr(checked, name) for name, info in _given(model, checked)}


def _given(model: type[BaseModel], checked: BaseModel) -> Iterable[tuple[str, Any]]:
    return ((name, info) for name, info in model.model_fields.items() if name in checked.model_fields_set)


def _names(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


_Path = tuple[str | int, ...]


def _grouped(error: ValidationError, node: Node) -> dict[_Path, list[Any]]:
    """Sorts errors by the place in the file that they speak of; those of the members of a union come together."""
    groups: dict[_Path, list[Any]] = {}
    for each in error.errors(include_url=False, include_context=True, include_input=False):
        path: list[str | int] = []
        here = node
        for step in each["loc"]:
            child = _child(here, step)
            if child is not None or (each["type"] == "missing" and step == each["loc"][-1]):
                path.append(step)  # else it names a member of a union
                here = child or here
        groups.setdefault(tuple(path), []).append(each)
    inner = {path[:depth] for path in groups for depth in range(len(path))}
    return {path: group for path, group in groups.items() if path not in inner}


def _child(node: Node | None, step: str | int) -> Node | None:
    if node is None:
        return None
    if isinstance(node.value, list):
        return node.value[step] if isinstance(step, int) and step < len(node.value) else None
    return node.get(step) if isinstance(step, str) else None


def _explained(path: _Path, group: Sequence[Any], node: Node, where: str, names: Sequence[str]) -> tuple[Mark, str]:
    """Gives place and text of what is wrong at a path."""
    label = where + _label(path)
    kinds = {each["type"] for each in group}
    parent = node
    for step in path[:-1]:
        parent = _child(parent, step) or parent
    if "missing" in kinds:
        near = f"; {_near_miss(str(path[-1]), parent, names)}" if _near_miss(str(path[-1]), parent, names) else ""
        return parent.mark, f"{where.rstrip('.') + ': ' if where else ''}{path[-1]} is missing{near}"
    if "extra_forbidden" in kinds:
        key = str(path[-1])
        of = f" of {where.rstrip('.')}" if where else ""
        near = nearest(key, names) if len(path) == 1 else ""
        return parent.key_mark(key), f"unknown key {shown(key)}{of}{near or f'; known are {_listed(names)}'}"
    here = _child(parent, path[-1]) if path else node
    found = here or parent
    return found.mark, f"{label}: wanted {_wanted(group)}, found {found_text(found)}{_hint(group, found)}"


def _near_miss(key: str, parent: Node, names: Sequence[str]) -> str:
    """Names the key that was probably meant to be a missing one."""
    others = [each for each in parent.items() if each not in names]
    return next((f"is {shown(each)} it?" for each in others if nearest(each, [key])), "")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _label(path: _Path) -> str:
    text = ""
    for step in path:
        text += f"[{step + 1}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text


def _wanted(group: Sequence[Any]) -> str:
    """Says what would be right."""
    words: list[str] = []
    for each in group:
        context = each.get("ctx", {})
        kind = each["type"]
        if kind in _KINDS:
            words.append(_KINDS[kind])
        elif kind in ("literal_error", "enum"):
            words.append(_choices(context["expected"]))
        elif kind in ("greater_than_equal", "less_than_equal"):
            limit = context.get("ge", context.get("le"))
            words.append(f"{'at least' if 'ge' in context else 'at most'} {limit:g}")
        elif kind == "string_pattern_mismatch":
            words.append("a size as in 8G")
        elif kind == "string_too_long":
            words.append(f"at most {context['max_length']} characters")
        else:
            words.append(each["msg"])
    once = list(dict.fromkeys(words))
    return " or ".join(once) if len(once) < 4 else f"{', '.join(once[:-1])} or {once[-1]}"


def _choices(expected: str) -> str:
    words = _words(expected)
    return " or ".join(words) if len(words) < 3 else f"one of {', '.join(words)}"


def found_text(node: Node) -> str:
    """Describes a value for a message."""
    value = node.value
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"the text {shown(value, 60)}" if isinstance(value, str) else str(value)


def _hint(group: Sequence[Any], node: Node) -> str:
    """Says how to write what was probably meant."""
    kinds, value = {each["type"] for each in group}, node.value
    if "list_type" in kinds and not isinstance(value, dict | list):
        return f"; write [{value[:40]}]" if isinstance(value, str) else "; write it as a list, in [ ]"
    if kinds == {"string_type"} and isinstance(value, bool | int | float):
        return "; write it in quotation marks"
    if not isinstance(value, str):
        return ""
    if "bool_type" in kinds and value.lower() in _YAML_1_1:
        return f"; write {_YAML_1_1[value.lower()]}"
    choices = [word for each in group if each["type"] == "literal_error" for word in _words(each["ctx"]["expected"])]
    if kinds & {"int_type", "float_type", "bool_type"} or value in choices:
        plain = re.sub(r"^([+-]?)0+(?=[0-9])", r"\1", value.replace("_", ""))
        if plain.lstrip("+-").replace(".", "", 1).isdigit() or plain in ("true", "false"):
            return f"; write {plain}, without quotation marks"
    return nearest(value, choices)


def _words(expected: str) -> list[str]:
    """Gives the choices of a literal in one spelling each; pydantic lists them as `'a', 'b' or 'c'`."""
    words = [word.strip("'") for part in expected.split(", ") for word in part.split(" or ")]
    return list({word.lower(): word for word in reversed(words)}.values())[::-1]

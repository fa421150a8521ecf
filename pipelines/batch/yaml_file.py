"""Reads YAML that may come from strangers into plain values that know their line and column.

Types are those of YAML 1.2's core schema, as editors and the JSON Schema have them: `no`, `on` and `12:30` are texts.
What YAML offers beyond JSON's values, anchors and merge keys is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    StreamEndEvent,
)

from quantpress.convert.files import read_bounded, shown
from quantpress.pipelines.batch.problems import Mark
from quantpress.quant.errors import UsageError

__all__ = ["MAX_BYTES", "Node", "Scalar", "parse_yaml", "read_yaml"]

MAX_BYTES = 1_000_000  # of a file; a pipeline of a hundred jobs has 30 KB
MAX_NODES = 200_000  # values, after every alias has been written out
MAX_DEPTH = 32  # lists and mappings inside each other; a pipeline file needs 7
_MAX_DIGITS = 18  # of an integer, enough for bytes and seeds

Scalar = str | int | float | bool | None

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_ENDLESS = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_MERGE = "<<"


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its place.

    Attributes:
        value: a scalar, a list of nodes, or a mapping of texts to nodes.
        mark: where it stands.
        keys: where the keys of a mapping stand.
        size: number of values in it, itself included.
    """

    value: Scalar | list[Node] | dict[str, Node]
    mark: Mark
    keys: Mapping[str, Mark] = field(default_factory=dict)
    size: int = 1

    def plain(self) -> Any:
        """Gives the value without its places."""
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return self.value

    def items(self) -> dict[str, Node]:
        """Gives the entries of a mapping, of anything else none."""
        return self.value if isinstance(self.value, dict) else {}

    def get(self, key: str) -> Node | None:
        """Gives the value of a key, or None."""
        return self.items().get(key)

    def key_mark(self, key: str) -> Mark:
        """Says where a key stands."""
        return self.keys.get(key, self.mark)


def read_yaml(path: Path) -> Node:
    """Reads a file.

    Raises:
        InputError: it cannot be opened, is no regular file or is too large.
        UsageError: `FILE:LINE:COLUMN: what`: it is not UTF-8, not YAML, or more than a pipeline file may hold.
    """
    return parse_yaml(read_bounded(path, MAX_BYTES), str(path))


def parse_yaml(data: bytes, name: str) -> Node:
    """Parses one YAML document.

    Args:
        data: UTF-8, with or without a byte order mark.
        name: of the file, for messages.

    Raises:
        UsageError: see `read_yaml`.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        _refuse(Mark(name, before.count(b"\n") + 1, error.start - before.rfind(b"\n")), "not UTF-8; save it as UTF-8")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        return _Builder(name, _events(loader)).document()
    except yaml.reader.ReaderError as error:
        read = text[: error.position]
        mark = Mark(name, read.count("\n") + 1, len(read) - read.rfind("\n"))
        _refuse(mark, f"character {shown(chr(error.character))} is not allowed in YAML")
    except yaml.MarkedYAMLError as error:
        _refuse(_mark(name, error.problem_mark or error.context_mark), _explained(error))
    except (ValueError, OverflowError):  # PyYAML turns "\\UFFFFFFFF" into a character, which it is not
        _refuse(_mark(name, loader and loader.get_mark()), "an escape in a text names no character")


def _events(loader: yaml.SafeLoader) -> Iterator[Event]:
    while loader.check_event():
        yield loader.get_event()  # type: ignore[no-untyped-call]


def _mark(name: str, mark: Any) -> Mark:
    return Mark(name, mark.line + 1, mark.column + 1) if mark is not None else Mark(name, 1, 1)


def _refuse(mark: Mark, message: str) -> NoReturn:
    raise UsageError(f"{mark}: {message}")


def _explained(error: yaml.MarkedYAMLError) -> str:
    """Says in one line why a text is not YAML."""
    problem = error.problem or "it cannot be read"
    hint = ""
    if "'\\t'" in problem:
        hint = "; indent with blanks, not with tabs"
    elif "mapping values are not allowed here" in problem:
        hint = '; a text with ": " in it needs quotation marks, and keys of one mapping the same indentation'
    elif error.context and "flow mapping" in error.context:
        hint = "; is a } or a comma missing, or a ${name} without quotation marks?"
    return f"not YAML: {problem}{hint}"


class _Builder:
    """Builds values from the parser's events, so that bounds hold before anything is large."""

    def __init__(self, name: str, events: Iterator[Event]) -> None:
        self._name, self._events = name, events
        self._anchors: dict[str, Node | None] = {}  # None while its value is not finished

    def document(self) -> Node:
        """Builds the only document."""
        next(self._events)
        event = next(self._events)
        if not isinstance(event, DocumentStartEvent):
            _refuse(Mark(self._name, 1, 1), "the file is empty; a pipeline file starts with `version: 1`")
        first = next(self._events)
        assert isinstance(first, NodeEvent)
        node = self._node(first, 0)
        next(self._events)
        if not isinstance(event := next(self._events), StreamEndEvent):
            _refuse(_mark(self._name, event.start_mark), "a second document starts here; one file holds one")
        return node

    def _node(self, event: NodeEvent, depth: int) -> Node:
        mark = _mark(self._name, event.start_mark)
        if isinstance(event, AliasEvent):
            return self._alias(event.anchor or "", mark)
        assert isinstance(event, ScalarEvent | CollectionStartEvent)
        if event.tag is not None:
            _refuse(mark, f"tag {shown(event.tag)}: tags are not read; write the value plainly, texts in quotes")
        if depth >= MAX_DEPTH:
            _refuse(mark, f"lists and mappings are nested deeper than {MAX_DEPTH}")
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        if isinstance(event, ScalarEvent):
            node = Node(_scalar(event, mark), mark)
        elif isinstance(event, MappingStartEvent):
            node = self._mapping(mark, depth)
        else:
            node = self._sequence(mark, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, anchor: str, mark: Mark) -> Node:
        if anchor not in self._anchors:
            _refuse(mark, f"*{shown(anchor)[1:-1]}: no such anchor before this line")
        node = self._anchors[anchor]
        if node is None:
            _refuse(mark, f"*{shown(anchor)[1:-1]}: the value would hold itself")
        return node

    def _children(self, depth: int, mark: Mark) -> Iterator[tuple[NodeEvent, Node]]:
        """Builds what is in a list or a mapping."""
        size = 1
        while isinstance(event := next(self._events), NodeEvent):
            node = self._node(event, depth + 1)
            size += node.size
            if size > MAX_NODES:
                _refuse(mark, f"the file holds more than {MAX_NODES} values once its aliases are written out")
            yield event, node

    def _sequence(self, mark: Mark, depth: int) -> Node:
        nodes = [node for _, node in self._children(depth, mark)]
        return Node(nodes, mark, size=1 + sum(node.size for node in nodes))

    def _mapping(self, mark: Mark, depth: int) -> Node:
        entries: dict[str, Node] = {}
        keys: dict[str, Mark] = {}
        merged: list[Node] = []
        children = self._children(depth, mark)
        for event, key_node in children:
            if not isinstance(event, ScalarEvent):
                _refuse(
                    key_node.mark, "a key must be a plain text; a ${name} that starts a value needs quotation marks"
                )
            key = _joined(event.value, key_node.mark)
            _, node = next(children)
            if key == _MERGE and event.implicit[0]:
                merged += node.value if isinstance(node.value, list) else [node]
            elif key in entries:
                first = keys[key]
                _refuse(key_node.mark, f"key {shown(key)} is here twice; the first one is in line {first.line}")
            else:
                entries[key], keys[key] = node, key_node.mark
        for other in merged:
            if not isinstance(other.value, dict):
                _refuse(other.mark, "<< takes an alias of a mapping, as in `<<: *name`")
            entries |= {key: node for key, node in other.value.items() if key not in entries}
            keys = {**other.keys, **keys}
        return Node(entries, mark, keys, 1 + sum(node.size + 1 for node in entries.values()))


def _scalar(event: ScalarEvent, mark: Mark) -> Scalar:
    """Gives the value of a scalar by YAML 1.2's core schema (specification 10.3.2)."""
    text: str = event.value
    if not event.implicit[0]:
        return _joined(text, mark)
    if text in _NULL:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text) or _HEX.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            _refuse(mark, f"{text[:40]}: at most {_MAX_DIGITS} digits are read")
        return int(text, 0) if text.startswith("0") else int(text)
    if _FLOAT.fullmatch(text):
        if len(text) > 40 or not math.isfinite(value := float(text)):
            _refuse(mark, f"{text[:40]}: not a finite number of at most 40 characters")
        return value
    if _ENDLESS.fullmatch(text):
        _refuse(mark, f"{text}: not a finite number; a text needs quotation marks")
    return text


def _joined(text: str, mark: Mark) -> str:
    """Makes characters of surrogate pairs, as JSON has them, which YAML is to hold; PyYAML leaves them as halves."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        _refuse(mark, "half of a surrogate pair, which no text may hold")

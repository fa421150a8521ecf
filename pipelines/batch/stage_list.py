"""Describes the installed stages, for people and for programs."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from quantpress.pipelines.batch.docstrings import summary
from quantpress.pipelines.batch.registry import kind_of, package_of, stage_classes
from quantpress.pipelines.batch.stage_options import Option, options_of
from quantpress.pipelines.stage import Stage

__all__ = ["DescribedOption", "DescribedStage", "described_stages"]

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path"}


@dataclass(frozen=True, slots=True)
class DescribedOption:
    """An option as a pipeline file has it.

    Attributes:
        name: its key.
        type: in words: "whole number", "list of texts".
        required: whether it must be given.
        default: plain value; None where the stage finds one, or where the option is required.
        choices: what it may be; empty for any.
        description: in words.
    """

    name: str
    type: str
    required: bool
    default: Any
    choices: Sequence[str | int]
    description: str


@dataclass(frozen=True, slots=True)
class DescribedStage:
    """A stage that can be named in a pipeline file.

    Attributes:
        name: its key.
        kind: "lazy", "preparing", "building" or "verify".
        version: raised with every change of what it writes.
        package: where it comes from: "quantpress", or name and version.
        description: in words.
        options: in order.
    """

    name: str
    kind: str
    version: int
    package: str
    description: str
    options: tuple[DescribedOption, ...]

    def to_json(self) -> dict[str, Any]:
        """For `quantpress stages --json`."""
        return dataclasses.asdict(self)


def described_stages(stages: Mapping[str, type[Stage]] | None = None) -> tuple[DescribedStage, ...]:
    """Describes stages; all that are installed, if none are given."""
    return tuple(_described(stage) for stage in (stages or stage_classes()).values())


def _described(stage: type[Stage]) -> DescribedStage:
    options = tuple(_option(option) for option in options_of(stage).options.values())
    return DescribedStage(stage.name, kind_of(stage), stage.version, package_of(stage), summary(stage), options)


def _option(option: Option) -> DescribedOption:
    default = option.default
    plain = list(default) if isinstance(default, tuple) else str(default) if isinstance(default, Path) else default
    return DescribedOption(
        option.name, _type_words(option.hint), option.required, plain, tuple(option.rule.choices), option.description
    )


def _type_words(hint: Any) -> str:
    """Says in words what a pipeline file holds for a type."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        parts = [each for each in arguments if each is not type(None)]
        return "path or Hub id" if set(parts) == {Path, str} else " or ".join(map(_type_words, parts))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        return "mapping of texts" if arguments[0] == tuple[str, str] else f"list of {_type_words(arguments[0])}s"
    return getattr(hint, "__name__", str(hint))

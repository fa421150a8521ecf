"""The options of a stage as pydantic sees them, made from the fields of its dataclass.

A dataclass knows tuples and paths; YAML has lists and texts. So each field's type is turned into the plain type that
a file may hold, values of that type are checked strictly, and then made into what the dataclass wants.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.errors import PydanticUserError

from quantpress.pipelines.batch.docstrings import attribute_docs
from quantpress.pipelines.batch.option_rules import Rule, rule_of
from quantpress.pipelines.batch.registry import BUILT_IN
from quantpress.pipelines.stage import Stage
from quantpress.quant.errors import UsageError

__all__ = ["Option", "StageOptions", "options_of"]

_SCALARS = frozenset({str, int, float, bool, type(None)})
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a stage.

    Attributes:
        name: of the field.
        hint: type of the field.
        plain: type that a pipeline file holds, with its bounds, as pydantic wants it.
        required: whether it has no default.
        default: where it has one.
        description: from the class's docstring.
        rule: what else is known of its values.
    """

    name: str
    hint: Any
    plain: Any
    required: bool
    default: Any
    description: str
    rule: Rule


@dataclass(frozen=True, slots=True)
class StageOptions:
    """All options of a stage.

    Attributes:
        stage: the class.
        options: by name.
        model: checks a mapping of them.
    """

    stage: type[Stage]
    options: Mapping[str, Option]
    model: type[BaseModel]

    def values(self, checked: Mapping[str, Any], to_path: Callable[[str, str, bool], Path | str]) -> dict[str, Any]:
        """Makes what the dataclass wants of values that were checked.

        Args:
            checked: by name.
            to_path: makes a path of an option's name, its text, and whether the field takes texts too (a Hub id).
        """
        return {
            name: _typed(value, self.options[name].hint, functools.partial(to_path, name))
            for name, value in checked.items()
        }


_KNOWN: dict[type[Stage], StageOptions] = {}


def options_of(stage: type[Stage]) -> StageOptions:
    """Gives the options of a stage; what is made of a class is kept.

    Raises:
        UsageError: the types of a third-party stage cannot be read.
    """
    if stage in _KNOWN:
        return _KNOWN[stage]
    try:
        hints = typing.get_type_hints(stage)
    except NameError as error:
        raise UsageError(
            f'stage "{stage.name}": the type of an option is not known where the class stands: {error}'
        ) from error
    docs = attribute_docs(stage)
    options: dict[str, Option] = {}
    for field in dataclasses.fields(stage):
        rule = rule_of(stage.name, field.name, built_in=stage.name in BUILT_IN)
        if rule.hidden or not field.init:
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = None if required else _default(field)
        hint = hints[field.name]
        plain = _ruled(plain_type(hint), rule)
        options[field.name] = Option(field.name, hint, plain, required, default, docs.get(field.name, ""), rule)
    _KNOWN[stage] = StageOptions(stage, options, _model(stage, options))
    return _KNOWN[stage]


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _model(stage: type[Stage], options: Mapping[str, Option]) -> type[BaseModel]:
    """Makes the model; its fields are aliases, so that an option may be called as a method of pydantic is."""
    fields: dict[str, Any] = {}
    for number, option in enumerate(options.values()):
        default = ... if option.required else _plain_value(option.default, option.plain)
        described: Any = Field(default, alias=option.name, description=option.description or None, title=option.name)
        fields[f"option_{number}"] = (option.plain, described)
    try:
        model: type[BaseModel] = create_model(stage.name, __config__=_STRICT, **fields)
    except PydanticUserError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f'stage "{stage.name}": an option has a type that no file can hold: {reason}') from error
    return model


def plain_type(hint: Any) -> Any:
    """Gives the type of what a file holds for a field of a dataclass."""
    if hint is Path:
        return Annotated[str, Field(min_length=1, json_schema_extra={"format": "path"})]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if set(arguments) == {Path, str}:
            return plain_type(Path)
        return Union[tuple(plain_type(each) for each in arguments)]  # noqa: UP007 - made of a list that is not known here
    if origin is Annotated:
        return Annotated[(plain_type(arguments[0]), *arguments[1:])]
    if origin is tuple and len(arguments) == 2 and arguments[1] is ...:
        if arguments[0] == tuple[str, str]:
            return dict[str, str]
        return list[plain_type(arguments[0])]  # type: ignore[misc]
    if origin in (Mapping, dict, typing.get_origin(typing.Mapping[str, int])):
        return dict[str, plain_type(arguments[1])]  # type: ignore[misc]
    return hint


def _ruled(plain: Any, rule: Rule) -> Any:
    """Adds bounds and choices to a type, or to that part of a union that is no None."""
    if typing.get_origin(plain) is Union:
        arguments = typing.get_args(plain)
        parts = [each if each is type(None) else _ruled(each, rule) for each in arguments]
        return Union[tuple(parts)]  # noqa: UP007 - made of a list that is not known here
    if rule.choices and plain in (str, int):
        return Literal[tuple(rule.spellings)]
    if plain in (int, float) and (rule.at_least is not None or rule.at_most is not None):
        kind = int if plain is int else float
        low = None if rule.at_least is None else kind(rule.at_least)
        return Annotated[plain, Field(ge=low, le=None if rule.at_most is None else kind(rule.at_most))]
    return plain


def _plain_value(value: Any, plain: Any) -> Any:
    """Gives a default as a file would hold it, for the JSON Schema."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return dict(value) if plain == dict[str, str] else [_plain_value(each, None) for each in value]
    return value


def _typed(value: Any, hint: Any, to_path: Callable[[str, bool], Path | str]) -> Any:
    """Makes lists tuples and texts paths where the field wants them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None or (isinstance(value, str) and hint is str):
        return value
    if hint is Path or (origin in (Union, types.UnionType) and Path in arguments and isinstance(value, str)):
        return to_path(value, str in arguments)
    if origin in (Union, types.UnionType):
        fitting = [each for each in arguments if each is not type(None)]
        return _typed(value, fitting[0], to_path) if len(fitting) == 1 else value
    if origin is tuple and isinstance(value, Mapping):
        return tuple(value.items())
    if origin is tuple:
        return tuple(_typed(each, arguments[0], to_path) for each in value)
    if isinstance(value, Mapping) and len(arguments) == 2:
        return {key: _typed(each, arguments[1], to_path) for key, each in value.items()}
    return value

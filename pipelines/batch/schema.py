"""JSON Schema of pipeline files, with the options of every installed stage, so that editors complete and check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.pipelines.batch.docstrings import summary
from quantpress.pipelines.batch.document import Frame, JobFrame
from quantpress.pipelines.batch.registry import kind_of, stage_classes
from quantpress.pipelines.batch.stage_options import StageOptions, options_of
from quantpress.pipelines.stage import Stage

__all__ = ["pipeline_schema"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_VARIABLE = {"type": "string", "pattern": r"\$\{[^}]*\}", "description": "a variable; alone it keeps its type"}
_KINDS = {
    "lazy": "changes the model for the stages that follow; writes nothing",
    "preparing": "changes the model for the stages that follow; its work is kept in the cache",
    "building": "writes an output",
    "verify": "proves the outputs before it",
}
_AS_WRITTEN = ("version", "variables", "defaults", "jobs", "exclude", "stages")  # keys that are no variables' places


def pipeline_schema(stages: Mapping[str, type[Stage]] | None = None) -> dict[str, Any]:
    """Gives the schema, draft 2020-12.

    Args:
        stages: those that may be named; all that are installed, if not given.
    """
    found = {name: options_of(stage) for name, stage in (stages or stage_classes()).items()}
    schema = Frame.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = schema.pop("$defs")
    definitions |= {f"stage_{name}": _stage(options) for name, options in found.items()}
    definitions["stage"] = _entry(found)
    job = definitions[JobFrame.__name__]
    job["properties"]["stages"]["items"] = {"$ref": "#/$defs/stage"}
    for definition in (schema, *definitions.values()):
        _without_titles(definition)
        for name, value in definition.get("properties", {}).items():
            if name not in _AS_WRITTEN:
                definition["properties"][name] = _inside(value) if name == "matrix" else _or_variable(value)
    definitions["variable"] = _VARIABLE
    return {
        "$schema": _DIALECT,
        "title": "quantpress pipeline",
        "description": schema.pop("description", ""),
        **schema,
        "$defs": dict(sorted(definitions.items())),
    }


def _stage(options: StageOptions) -> dict[str, Any]:
    """Gives the schema of a stage's options."""
    schema = options.model.model_json_schema(by_alias=True)
    if "$defs" in schema:  # of a third-party stage's own types; they are looked for from the top of the document
        schema = _inlined(schema, schema.pop("$defs"))
    schema["description"] = f"{summary(options.stage)} (This stage {_KINDS[kind_of(options.stage)]}.)"
    return schema


def _entry(stages: Mapping[str, StageOptions]) -> dict[str, Any]:
    """Gives the schema of an entry of `stages`: one key, or the name alone where nothing must be given."""
    bare = [name for name, options in stages.items() if not any(each.required for each in options.options.values())]
    properties = {}
    for name in stages:
        reference = {"$ref": f"#/$defs/stage_{name}"}
        properties[name] = {"anyOf": [reference, {"type": "null"}]} if name in bare else reference
    one = {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"anyOf": [one, {"type": "string", "enum": bare}], "description": "one stage: `name: {options}`"}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Puts definitions where they are named."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(name := schema.get("$ref"), str):
        return _inlined(definitions[name.rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items()}


def _or_variable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Lets a `${variable}` stand for a value that is no free text, and for each entry of a list."""
    kept = {key: schema[key] for key in ("description", "default", "title") if key in schema}
    rest = {key: value for key, value in schema.items() if key not in kept}
    options = rest.get("anyOf", [rest]) if set(rest) <= {"anyOf"} else [rest]
    options = [_inside(option) for option in options]
    if not any(_takes_any_text(option) for option in options):
        options.append({"$ref": "#/$defs/variable"})
    return {**(options[0] if len(options) == 1 else {"anyOf": options}), **kept}


def _inside(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Does the same for what is in a list or a mapping."""
    found = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), Mapping) and "$ref" not in found[key] and found[key]:
            found[key] = _or_variable(found[key])
    return found


def _takes_any_text(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "string" and not {"enum", "const", "pattern"} & set(schema)


def _without_titles(schema: Any) -> None:
    """Takes the titles away that pydantic makes of names: editors show the names themselves."""
    if isinstance(schema, list):
        for each in schema:
            _without_titles(each)
    elif isinstance(schema, dict):
        if isinstance(schema.get("title"), str):
            del schema["title"]
        for each in schema.values():
            _without_titles(each)

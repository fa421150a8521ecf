"""The JSON Schema of pipeline files, checked by jsonschema: what it lets through is what is read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from quantpress.pipelines.batch.load import load_batch
from quantpress.pipelines.batch.registry import BUILT_IN, stage_classes
from quantpress.pipelines.batch.schema import pipeline_schema
from quantpress.pipelines.batch.stage_list import described_stages
from quantpress.quant.errors import UsageError

jsonschema = pytest.importorskip("jsonschema")

FILE: dict[str, Any] = {
    "version": 1,
    "cache": "c",
    "variables": {"bits": 4, "types": ["Q8_0"], "none": None},
    "defaults": {"device": "cpu", "max_memory": "8G", "max_kld": 1, "threads": "${bits}"},
    "jobs": [
        {
            "name": "a-${t}",
            "matrix": {"t": ["Q8_0", "q4_0"], "on": [True]},
            "exclude": [{"t": "q4_0", "on": True}],
            "model": "org/name",
            "max_memory": 5,
            "stages": [
                {"merge_lora": {"adapter": "org/tone", "weight": 1}},
                {"gguf": {"output": "${t}.gguf", "outtype": "${t}", "tensor_types": {"a": "f16"}}},
                {"verify": None},
                {"quantize": {"output": "q", "bits": "${bits}", "skip": ["a"], "override": ["a=bits:8"], "drift": 0.5}},
                "verify",
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = pipeline_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def reads(tmp_path: Path, document: Any) -> bool:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    try:
        load_batch(path)
    except UsageError:
        return False
    return True


def changed(*path: Any, value: Any = None, drop: bool = False) -> Any:
    document = copy.deepcopy(FILE)
    here: Any = document
    for step in path[:-1]:
        here = here[step]
    if drop:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return document


GGUF = ("jobs", 0, "stages", 1, "gguf")
QUANTIZE = ("jobs", 0, "stages", 3, "quantize")
MEASURED = {"base": "fp16", "fp16_kld": 1}
CHANGES: dict[str, tuple[Callable[[], Any], bool]] = {
    "as it is": (lambda: FILE, True),
    "no variables": (lambda: changed("variables", value=None), False),  # they are used
    "a default of null": (lambda: changed("defaults", "max_kld"), True),
    "a free text": (lambda: changed("jobs", 0, "text", value=None), True),
    "a list of a variable": (lambda: changed(*QUANTIZE, "skip", value="${types}"), True),
    "an entry of a variable": (lambda: changed(*QUANTIZE, "skip", value=["${bits}x"]), True),
    "choices in other letters": (lambda: changed(*GGUF, "outtype", value="Q8_0"), True),
    "part of a choice": (lambda: changed(*GGUF, "outtype", value="Q${bits}_0"), True),
    "another version": (lambda: changed("version", value=2), False),
    "no jobs": (lambda: changed("jobs", value=[]), False),
    "no model": (lambda: changed("jobs", 0, "model", drop=True), False),
    "no output": (lambda: changed(*GGUF, "output", drop=True), False),
    "an unknown key": (lambda: changed("dflts", value={}), False),
    "an unknown key of a job": (lambda: changed("jobs", 0, "modle", value="x"), False),
    "an unknown key of the defaults": (lambda: changed("defaults", "dvice", value="cpu"), False),
    "an unknown option": (lambda: changed(*GGUF, "pur", value=True), False),
    "an unknown stage": (lambda: changed("jobs", 0, "stages", 1, value={"ggfu": {"output": "x"}}), False),
    "two stages in one": (lambda: changed("jobs", 0, "stages", 2, value={"verify": None, "rtn": None}), False),
    "a stage that needs options": (lambda: changed("jobs", 0, "stages", 1, value="gguf"), False),
    "a wrong choice": (lambda: changed(*GGUF, "outtype", value="Q9"), False),
    "a text for a number": (lambda: changed(*QUANTIZE, "bits", value="4"), False),
    "a number for a text": (lambda: changed(*GGUF, "model_name", value=4), False),
    "a number out of bounds": (lambda: changed(*QUANTIZE, "samples", value=0), False),
    "a text for true": (lambda: changed(*GGUF, "pure", value="yes"), False),
    "an empty output": (lambda: changed(*GGUF, "output", value=""), False),
    "an empty axis": (lambda: changed("jobs", 0, "matrix", "t", value=[]), False),
    "a wrong size": (lambda: changed("jobs", 0, "max_memory", value="8Q"), False),
    "measured figures": (lambda: changed("jobs", 0, "stages", 0, value={"qlora_base": MEASURED}), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_the_schema_lets_through_what_is_read_and_nothing_else(validator: Any, tmp_path: Path, name: str) -> None:
    make, good = CHANGES[name]
    document = make()
    if name == "no variables":  # the schema does not know which are used
        assert validator.is_valid(document)
    else:
        assert [error.message for error in validator.iter_errors(document)][:1] == [] if good else True
        assert validator.is_valid(document) is good
    assert reads(tmp_path, document) is good


def test_every_option_of_every_stage_is_in_the_schema_with_its_description_and_default(validator: Any) -> None:
    definitions = validator.schema["$defs"]
    entries = definitions["stage"]["anyOf"][0]["properties"]
    for stage in described_stages():
        options = definitions[f"stage_{stage.name}"]
        assert options["additionalProperties"] is False
        assert list(options["properties"]) == [option.name for option in stage.options]
        assert options.get("required", []) == [option.name for option in stage.options if option.required]
        assert stage.name in entries
        for option in stage.options:
            assert option.description
            assert "None" not in option.description  # a file has null
            assert options["properties"][option.name]["description"] == option.description
            if not option.required:
                default = options["properties"][option.name]["default"]
                assert default == option.default or (default, option.default) == ({}, [])


def test_defaults_of_the_schema_are_what_the_schema_lets_through(validator: Any) -> None:
    for name, definition in validator.schema["$defs"].items():
        for key, value in definition.get("properties", {}).items():
            if "default" in value:
                inner = {"$ref": f"#/$defs/{name}/properties/{key}", "$defs": validator.schema["$defs"]}
                assert jsonschema.Draft202012Validator(inner).is_valid(value["default"]), (name, key)


def test_every_stage_has_a_module_a_summary_and_a_rule_for_no_option_that_it_lacks() -> None:
    from quantpress.pipelines.batch.option_rules import _OWN

    classes = stage_classes()
    assert set(BUILT_IN) <= set(classes)
    for stage in described_stages(classes):
        assert stage.description
        assert "Options of" not in stage.description
        assert not stage.description.startswith("`")
    fields = {(name, field) for name, stage in classes.items() for field in stage.__dataclass_fields__}
    assert set(_OWN) <= fields

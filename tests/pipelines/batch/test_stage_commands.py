"""`quantpress stages` and `quantpress schema`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from quantpress.pipelines.batch.registry import BUILT_IN
from quantpress.pipelines.batch.schema import pipeline_schema
from quantpress.pipelines.cli import run


@pytest.fixture(autouse=True)
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def test_stages_lists_every_stage_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stages"]) == 0
    out = capsys.readouterr().out
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert {row[1].strip() for row in rows} >= set(BUILT_IN)
    kinds = {row[1].strip(): row[2].strip() for row in rows}
    assert (kinds["merge_lora"], kinds["gptq"], kinds["gguf"], kinds["verify"]) == (
        "lazy", "preparing", "building", "verify",
    )  # fmt: skip


def test_stages_tells_of_one_stage_all_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stages", "merge_lora", "gguf"]) == 0
    out = capsys.readouterr().out
    assert "must be given" in out
    assert "factor on what the adapter adds" in out
    assert '"auto"' in out
    assert run(["stages", "ggfu"]) == 2
    assert 'error: no stage is called "ggfu"; did you mean "gguf"?' in capsys.readouterr().err


def test_stages_as_json_has_types_defaults_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stages", "quantize", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)
    assert (stage["name"], stage["kind"], stage["package"]) == ("quantize", "building", "quantpress")
    options = {option.pop("name"): option for option in stage["options"]}
    assert options["output"] | {"description": ""} == {
        "type": "path", "required": True, "default": None, "choices": [], "description": "",
    }  # fmt: skip
    assert (options["bits"]["choices"], options["samples"]["default"]) == ([2, 3, 4, 8], 128)
    assert (options["skip"]["type"], options["skip"]["default"]) == ("list of texts", [])


def test_schema_prints_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(pipeline_schema()))


def test_other_commands_do_not_load_what_pipelines_need() -> None:
    code = """
import sys
from quantpress.pipelines.cli import run
run(["convert", "--help"]), run(["stages", "--help"]), run(["schema", "--help"])
print(sorted({"pydantic", "yaml", "torch", "numpy", "jinja2", "ray", "fsspec"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_reading_a_pipeline_file_loads_neither_torch_nor_transformers(tmp_path: object) -> None:
    code = """
import pathlib, sys, tempfile
from quantpress.pipelines.batch.load import load_batch
path = pathlib.Path(tempfile.mkdtemp()) / "p.yaml"
stages = "[gptq, onnx: {output: a}, gguf: {output: b}, safetensors: {output: c}, quantize: {output: d}, verify]"
path.write_text("version: 1\\njobs:\\n- {name: a, model: org/name, stages: " + stages + "}\\n")
assert len(load_batch(path).jobs[0].stages) == 6
print(sorted({"torch", "transformers", "numba", "scipy", "ray", "jinja2", "onnx"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

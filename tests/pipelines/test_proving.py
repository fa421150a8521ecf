"""A second verdict on an output that stands, without building it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.proving import prove_again
from quantpress.pipelines.reference import Reference
from quantpress.pipelines.runner import press
from quantpress.pipelines.safetensors_stage import Safetensors
from quantpress.pipelines.sidecar import rounded, sidecar_path
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import InputError
from tests.tiny import tiny_checkpoint

JUDGE = JudgeOptions(threads=1, chunks=2, context=32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("proving") / "model", "llama"))


@pytest.fixture
def output(source: Checkpoint, tmp_path: Path) -> Path:
    press(source, Safetensors(output=tmp_path / "file", dtype="bf16"), RunContext(threads=1), judge=JUDGE)
    return tmp_path / "file"


def said(output: Path) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads(sidecar_path(output).read_text())
    return contents


def test_the_sidecar_is_that_of_a_run_with_these_options_from_the_start(
    source: Checkpoint, output: Path, tmp_path: Path
) -> None:
    judge = dataclasses.replace(JUDGE, chunks=3, max_kld=0.5)
    renewed = prove_again(output, said(output), Reference(source, judge), "BF16")
    other = tmp_path / "elsewhere" / output.name
    press(source, Safetensors(output=other, dtype="bf16"), RunContext(threads=1), judge=judge)
    assert renewed == said(output)
    fresh = said(other)
    assert list(renewed) == list(fresh)
    assert list(renewed["timings"]) == list(fresh["timings"])
    assert {**renewed, "timings": None} == {**fresh, "timings": None}


def test_an_output_that_was_never_judged_gets_its_first_verdict(source: Checkpoint, tmp_path: Path) -> None:
    press(source, Safetensors(output=tmp_path / "file", dtype="bf16"), RunContext(threads=1))
    before = said(tmp_path / "file")
    assert before["parity"] is None
    reference = Reference(source, JUDGE)
    renewed = prove_again(tmp_path / "file", before, reference)
    assert renewed["parity"] == rounded(reference.judge(tmp_path / "file", "BF16").to_json())
    assert renewed["timings"].keys() == before["timings"].keys() | {"verify"}


def test_a_verdict_that_is_not_passed_is_written_too(source: Checkpoint, output: Path) -> None:
    strict = dataclasses.replace(JUDGE, max_kld=1e-12)
    assert not prove_again(output, said(output), Reference(source, strict), "BF16")["parity"]["passed"]
    assert not said(output)["parity"]["passed"]


def test_an_output_that_is_not_what_its_sidecar_says_is_refused(source: Checkpoint, output: Path) -> None:
    before, reference = said(output), Reference(source, JUDGE)
    (output / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json: 2 bytes, its sidecar says \d+"):
        prove_again(output, before, reference, "BF16")
    (output / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: cannot be judged again: No such file"):
        prove_again(output, before, reference, "BF16")
    assert said(output) == before

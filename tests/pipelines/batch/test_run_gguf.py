"""GGUF outputs of pipeline files whose blocks GPTQ finds, and what their types take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.batch import estimates
from quantpress.pipelines.gguf_stage import Gguf
from tests.gguf_exports import wide_model
from tests.pipelines.batch.batches import Batch, done, gguf, job, started

TEXT = "The press takes a model and gives a file. " * 60
FOUND: dict[str, Any] = {"method": "gptq", "calibration": "calib.txt", "samples": 4, "sequence_length": 32}


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    made = Batch.with_model(tmp_path)
    (tmp_path / "calib.txt").write_text(TEXT)
    return made


def run(batch: Batch, **options: Any) -> tuple[qp.BatchResult, list[str]]:
    events: list[qp.Event] = []
    result = batch.run(watch=events.append, **options)
    return result, started(events)


def test_a_file_is_that_of_the_function_and_stands_until_its_text_changes(batch: Batch) -> None:
    batch.write(job("a", gguf("q4_0", **FOUND), verify=False))
    result, tasks = run(batch)
    assert done(result) == {"a": "written"}
    assert len(tasks) == 1
    text, written = batch.folder / "calib.txt", batch.output("q4_0.gguf")
    options = {**FOUND, "calibration": text, "outtype": "q4_0"}
    single = qp.export_gguf(qp.open_checkpoint(batch.folder / "model"), batch.folder / "x.gguf", **options)
    assert written.read_bytes() == single.artifact.path.read_bytes()
    assert run(batch)[1] == []
    before = written.read_bytes()
    text.write_text("What differs is thrown away, and names stay names. " * 60)
    run(batch, force=True)
    assert written.read_bytes() != before


@pytest.mark.parametrize(
    "options", [{"method": "awq"}, {"split_max_tensors": -1}, {"outtype": "q9_k"}, {"samples": 0}, {"damping": -1}]
)
def test_a_pipeline_file_with_wrong_options_is_refused_before_a_model_is_opened(
    batch: Batch, options: dict[str, Any]
) -> None:
    batch.write(job("a", gguf(**{"outtype": "q4_0", **FOUND, **options}), verify=False))
    with pytest.raises(qp.UsageError, match=next(iter(options))):
        run(batch)


def test_a_file_takes_longer_where_scales_are_searched_and_longest_on_a_text(tmp_path: Path) -> None:
    source = open_checkpoint(wide_model(tmp_path / "model"))

    def seconds(**options: Any) -> float:
        stage = Gguf(output=tmp_path / "out.gguf", **options).resolved(source)
        return estimates.building(stage.plan(source), stage, source, None, gpu=False).seconds

    plain, searched = seconds(outtype="q8_0"), seconds(outtype="q4_k_m")
    assert plain < searched < seconds(outtype="q4_k_m", method="gptq")

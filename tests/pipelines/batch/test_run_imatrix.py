"""The stage `imatrix` in pipeline files: measured once, kept, and the same as a file of the command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf as official
import numpy as np
import pytest

import quantpress as qp
from quantpress.convert.gguf.importance_file import read_importance
from quantpress.pipelines.batch import estimates
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.imatrix_stage import Imatrix
from quantpress.quant.errors import InputError
from tests.pipelines.batch.batches import Batch, done, gguf, job, started

TEXT = "The press takes a model and gives a file. " * 60
STAGE: dict[str, Any] = {"imatrix": {"text": "calib.txt", "context": 16, "chunks": 8}}


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    made = Batch.with_model(tmp_path)
    (tmp_path / "calib.txt").write_text(TEXT)
    return made


def run(batch: Batch, **options: Any) -> tuple[qp.BatchResult, list[str]]:
    events: list[qp.Event] = []
    result = batch.run(watch=events.append, **options)
    return result, started(events)


def test_an_output_after_the_stage_is_that_of_a_file_with_the_matrix(batch: Batch) -> None:
    batch.write(job("a", STAGE, gguf("q4_0", "with"), verify=False), job("b", gguf("q4_0", "without"), verify=False))
    assert done(batch.run()) == {"a": "written", "b": "written"}
    model, text = qp.open_checkpoint(batch.folder / "model"), batch.folder / "calib.txt"
    qp.imatrix(model, batch.folder / "imatrix.gguf", text=text, context=16, chunks=8)
    single = qp.export_gguf(model, batch.folder / "x.gguf", outtype="q4_0", imatrix=batch.folder / "imatrix.gguf")
    assert batch.output("with.gguf").read_bytes() == single.artifact.path.read_bytes()
    fields = official.GGUFReader(batch.output("with.gguf")).fields
    said = {key: fields[key].contents() for key in fields if key.startswith("quantize.imatrix.")}
    assert said == {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "calib.txt",
        "quantize.imatrix.entries_count": len(read_importance(batch.folder / "imatrix.gguf").entries),
        "quantize.imatrix.chunks_count": 8,
    }
    assert batch.output("with.gguf").read_bytes() != batch.output("without.gguf").read_bytes()


def test_jobs_share_the_matrix_and_a_second_run_measures_nothing(batch: Batch) -> None:
    batch.write(
        job("a", STAGE, gguf("q4_0", "a"), gguf("q5_0", "b"), verify=False), job("c", STAGE, gguf("q4_1"), verify=False)
    )
    result, tasks = run(batch)
    assert done(result) == {"a": "written", "c": "written"}
    assert sum(task.startswith("imatrix") for task in tasks) == 1
    _, again = run(batch)
    assert again == []
    batch.output("a.gguf").unlink()
    _, lost = run(batch)
    assert len(lost) == 1
    assert not lost[0].startswith("imatrix")


def test_another_text_is_measured_anew(batch: Batch) -> None:
    batch.write(job("a", STAGE, gguf("q4_0"), verify=False))
    run(batch)
    before = batch.output("q4_0.gguf").read_bytes()
    (batch.folder / "calib.txt").write_text("What differs is thrown away, and names stay names. " * 60)
    _, tasks = run(batch, force=True)
    assert any(task.startswith("imatrix") for task in tasks)
    assert batch.output("q4_0.gguf").read_bytes() != before


def test_the_sidecar_names_the_text_and_the_stage(batch: Batch) -> None:
    batch.write(job("a", STAGE, gguf("q4_0"), verify=False))
    batch.run()
    contents = json.loads((batch.folder / "out" / "q4_0.gguf.quantpress.json").read_text())
    assert [stage["name"] for stage in contents["stages"]] == ["imatrix", "gguf"]
    assert contents["stages"][0]["options"]["text"] == "calib.txt"
    assert (contents["calibration"]["samples"], contents["calibration"]["sequence_length"]) == (8, 16)


@pytest.mark.parametrize("outtype", ["q4_0", "q8_0"])
def test_a_plan_is_made_without_measuring(batch: Batch, outtype: str) -> None:
    batch.write(job("a", STAGE, gguf(outtype), verify=False))
    stage = Imatrix(text=batch.folder / "calib.txt", context=16, chunks=8)
    source = qp.open_checkpoint(batch.folder / "model")
    planned = stage.resolved(source).planned(source)
    assert planned.checkpoint.importance is not None
    plan = Gguf(output=batch.folder / "x.gguf", outtype=outtype).plan(planned.checkpoint)
    batch.run()
    assert plan.output_bytes == batch.output(f"{outtype}.gguf").stat().st_size


def test_the_planned_matrix_has_the_measured_names_and_sizes(batch: Batch) -> None:
    source, text = qp.open_checkpoint(batch.folder / "model"), batch.folder / "calib.txt"
    stage = Imatrix(text=text, context=16, chunks=8).resolved(source)
    planned = stage.planned(source).checkpoint.importance
    stage.prepare(source, batch.folder, qp.RunContext(threads=1))
    measured = stage.opened(source, batch.folder).checkpoint.importance
    assert planned is not None
    assert measured is not None
    sizes = {name: entry.sums.shape for name, entry in planned.entries.items()}
    assert sizes == {name: entry.sums.shape for name, entry in measured.entries.items()}
    assert (planned.datasets, planned.chunk_size) == (measured.datasets, measured.chunk_size)
    assert not (batch.folder / "live").exists()
    assert stage.needs(source)[2] == sum(entry.sums.nbytes for entry in measured.entries.values())


def test_work_that_is_not_finished_is_not_opened(batch: Batch) -> None:
    source = qp.open_checkpoint(batch.folder / "model")
    with pytest.raises(InputError, match="the importance matrix is not finished"):
        Imatrix().resolved(source).opened(source, batch.folder)


def test_the_estimate_grows_with_the_text(batch: Batch) -> None:
    source = qp.open_checkpoint(batch.folder / "model")
    few = Imatrix(text=batch.folder / "calib.txt", context=16, chunks=2).resolved(source)
    whole = dataclasses.replace(few, chunks=None)
    assert few.text_tokens(source) == 32
    assert whole.text_tokens(source) == len(TEXT) // 3 // 16 * 16
    seconds = [estimates.preparing(stage, source, gpu=False).seconds for stage in (few, whole)]
    assert seconds[0] < seconds[1]


def test_a_wrong_option_is_refused_with_its_place(batch: Batch) -> None:
    batch.write(job("a", {"imatrix": {"chunks": 0}}, gguf("q4_0"), verify=False))
    with pytest.raises(qp.UsageError, match="chunks"):
        batch.run()


def test_the_matrix_in_the_cache_is_a_file_that_can_be_read(batch: Batch) -> None:
    batch.write(job("a", STAGE, gguf("q4_0"), verify=False))
    batch.run()
    (path,) = (batch.folder / "cache").rglob("imatrix.gguf")
    matrix = read_importance(path)
    assert matrix.chunk_count == 8
    assert all(np.isfinite(entry.sums).all() for entry in matrix.entries.values())


def test_a_matrix_does_not_outlive_a_stage_that_scales_columns(batch: Batch) -> None:
    awq = {"awq": {"bits": 4, "group_size": 32, "calibration": "calib.txt", "samples": 2, "sequence_length": 16}}
    batch.write(job("a", STAGE, awq, gguf("q4_0", "x"), verify=False))
    (failed,) = batch.run().jobs
    assert "stage imatrix before awq" in str(failed.error)
    assert "put imatrix after awq" in str(failed.error)

"""Batches as the library runs them: what is shared, what is done again, and what is left alone."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import quantpress as qp
from quantpress.pipelines.cache.store import Cache
from tests.pipelines.batch.batches import GPTQ, Batch, done, gguf, job, started


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch.with_model(tmp_path)


def run(batch: Batch, **options: Any) -> tuple[qp.BatchResult, list[str]]:
    events: list[qp.Event] = []
    result = batch.run(watch=events.append, **options)
    return result, started(events)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sidecar(path: Path) -> dict[str, Any]:
    place = path / "quantpress.json" if path.is_dir() else path.with_name(path.name + ".quantpress.json")
    contents: dict[str, Any] = json.loads(place.read_text())
    return {name: value for name, value in contents.items() if name != "timings"}


def test_outputs_are_those_of_single_commands(batch: Batch) -> None:
    batch.write(job("a", gguf("Q8_0"), {"safetensors": {"dtype": "f16", "output": "out/f16"}}))
    assert done(batch.run()) == {"a": "verified"}
    judge = qp.JudgeOptions(chunks=1, context=32, max_kld=9, max_ppl_change=9, min_top1=0, device="cpu")
    model = qp.open_checkpoint(batch.folder / "model")
    single = qp.export_gguf(model, batch.folder / "Q8_0.gguf", outtype="Q8_0", verify=True, judge=judge)
    assert sha256(batch.output("Q8_0.gguf")) == sha256(single.artifact.path)
    assert sidecar(batch.output("Q8_0.gguf")) == sidecar(single.artifact.path)
    folder = qp.export_safetensors(model, batch.folder / "f16", dtype="f16", verify=True, judge=judge)
    assert sidecar(batch.output("f16")) == sidecar(folder.artifact.path)


def test_jobs_share_codes_and_reference(batch: Batch) -> None:
    batch.write(
        job("a", GPTQ, {"safetensors": {"format": "gptq", "output": "out/a"}}),
        job("b", GPTQ, gguf("Q4_0"), {"safetensors": {"format": "compressed-tensors", "output": "out/b"}}),
    )
    result, tasks = run(batch)
    assert done(result) == {"a": "verified", "b": "verified"}
    assert sum(task.startswith("gptq") for task in tasks) == 1
    assert sum(task.startswith("reference") for task in tasks) == 1
    assert len(tasks) == 5


def test_a_second_run_does_nothing(batch: Batch) -> None:
    batch.write(job("a", GPTQ, gguf("Q4_0")), job("b", gguf("Q8_0")))
    first, _ = run(batch)
    before = {path: path.stat().st_mtime_ns for path in batch.output("").iterdir()}
    second, tasks = run(batch)
    assert not tasks
    assert [job.cached for job in second.jobs] == [True, True]
    assert {path: path.stat().st_mtime_ns for path in batch.output("").iterdir()} == before
    assert [o.sidecar for j in second.jobs for o in j.outputs] == [o.sidecar for j in first.jobs for o in j.outputs]


def test_a_lost_output_is_written_from_the_kept_codes(batch: Batch) -> None:
    batch.write(job("a", GPTQ, gguf("Q4_0")))
    batch.run()
    output = batch.output("Q4_0.gguf")
    before, said = sha256(output), sidecar(output)
    output.unlink()
    result, tasks = run(batch)
    assert done(result) == {"a": "verified"}
    assert tasks == ["a: gguf Q4_0 [1]"]
    assert sha256(output) == before
    assert sidecar(output) == said


def test_a_lost_sidecar_is_written_again(batch: Batch) -> None:
    batch.write(job("a", gguf("Q8_0")))
    batch.run()
    place = batch.output("Q8_0.gguf.quantpress.json")
    before = json.loads(place.read_text())
    place.unlink()
    _, tasks = run(batch)
    assert not tasks
    assert json.loads(place.read_text()) == before


def test_a_changed_output_is_not_replaced_without_force(batch: Batch) -> None:
    batch.write(job("a", gguf("Q8_0")), job("b", gguf("Q4_0")))
    batch.run()
    output = batch.output("Q8_0.gguf")
    whole = output.read_bytes()
    output.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    changed = output.read_bytes()
    states = done(batch.run())
    assert states["a"].startswith("failed")
    assert "--force" in states["a"]
    assert states["b"] == "verified"
    assert output.read_bytes() == changed
    assert done(batch.run(force=True))["a"] == "verified"
    assert output.read_bytes() == whole


def test_a_foreign_file_stops_its_job_before_any_work(batch: Batch) -> None:
    batch.write(job("a", GPTQ, gguf("Q4_0")))
    batch.output("").mkdir()
    batch.output("Q4_0.gguf").write_text("mine")
    result, tasks = run(batch)
    assert not tasks
    assert result.exit_code == 7
    assert result.jobs[0].exit_code == 2
    assert batch.output("Q4_0.gguf").read_text() == "mine"


def test_other_limits_are_judged_without_writing_again(batch: Batch) -> None:
    batch.write(job("a", GPTQ, gguf("Q4_0")))
    batch.run()
    output = batch.output("Q4_0.gguf")
    before, said = output.stat().st_mtime_ns, sidecar(output)
    batch.write(job("a", GPTQ, gguf("Q4_0")), max_kld=1e-9)
    result, tasks = run(batch)
    assert tasks == ["a: gguf Q4_0 [1]"]
    assert result.jobs[0].state == "failed"
    assert result.jobs[0].exit_code == 4
    assert output.stat().st_mtime_ns == before
    now = sidecar(output)
    assert not now["parity"]["passed"]
    assert {**now, "parity": 0} == {**said, "parity": 0}
    again, tasks = run(batch)  # the verdict is kept too
    assert not tasks
    assert again.jobs[0].exit_code == 4
    batch.write(job("a", GPTQ, gguf("Q4_0")))
    assert done(batch.run()) == {"a": "verified"}
    assert sidecar(output) == said


def test_judging_again_needs_no_codes(batch: Batch) -> None:
    batch.write(job("a", GPTQ, gguf("Q4_0")))
    batch.run()
    with Cache(batch.folder / "cache") as cache:
        codes = [key for key in cache.kept_keys() if (entry := cache.peek(key)) is not None and entry.kind == "gptq"]
        assert [cache.remove(key) for key in codes] == [True]
    batch.write(job("a", GPTQ, gguf("Q4_0")), max_kld=8)
    result, tasks = run(batch)
    assert done(result) == {"a": "verified"}
    assert tasks == ["a: gguf Q4_0 [1]"]


@pytest.mark.parametrize("option", [{"bits": 3}, {"damping": 0.02}, {"seed": 1}])
def test_every_option_is_part_of_the_key(batch: Batch, option: dict[str, Any]) -> None:
    batch.write(job("a", GPTQ, gguf("Q8_0", "one")))
    batch.run()
    batch.write(job("a", {"gptq": {**GPTQ["gptq"], **option}}, gguf("Q8_0", "two")))
    _, tasks = run(batch)
    assert [task.partition(" ")[0] for task in tasks] == ["gptq", "a:"]  # the reference is kept


def test_a_changed_model_changes_everything(batch: Batch) -> None:
    batch.write(job("a", GPTQ, gguf("Q8_0")))
    batch.run()
    weights = load_file(batch.folder / "model" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name] * np.float32(1.01)}, batch.folder / "model" / "model.safetensors")
    result, tasks = run(batch, force=True)
    assert len(tasks) == 3
    assert done(result) == {"a": "verified"}


def test_fresh_makes_everything_anew_with_the_same_bytes(batch: Batch) -> None:
    batch.write(job("a", GPTQ, gguf("Q4_0")))
    batch.run()
    before, said = sha256(batch.output("Q4_0.gguf")), sidecar(batch.output("Q4_0.gguf"))
    result, tasks = run(batch, fresh=True)
    assert len(tasks) == 3
    assert done(result) == {"a": "verified"}
    assert sha256(batch.output("Q4_0.gguf")) == before
    assert sidecar(batch.output("Q4_0.gguf")) == said


def test_one_bad_job_leaves_the_others(batch: Batch) -> None:
    broken = batch.folder / "broken"
    shutil.copytree(batch.folder / "model", broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    batch.write(
        job("a", gguf("Q8_0")),
        job("b", gguf("Q8_0", "b"), model="broken"),
        job("c", gguf("Q4_0")),
        job("d", gguf("Q4_0", "d"), model="missing"),
    )
    result = batch.run()
    states = done(result)
    assert result.exit_code == 7
    assert (states["a"], states["c"]) == ("verified", "verified")
    assert states["b"].startswith("failed")
    assert "model.safetensors" in states["b"]
    assert states["d"].startswith("failed")
    assert "missing" in states["d"]
    assert not batch.output("b.gguf").exists()
    with pytest.raises(qp.BatchError, match="2 of 4 jobs failed: b, d"):
        result.require_success()


def test_values_that_are_not_finite_fail_their_job_while_it_runs(batch: Batch) -> None:
    path = batch.folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(weights, path)
    batch.write(job("a", GPTQ, gguf("Q4_0")), verify=False)
    result = batch.run()
    assert result.jobs[0].exit_code == 3
    assert "up_proj" in result.jobs[0].error
    assert not batch.output("Q4_0.gguf").exists()
    assert result.jobs[0].outputs == ()


def test_two_jobs_may_not_write_the_same_output(batch: Batch) -> None:
    batch.write(job("a", gguf("Q8_0", "{ftype}")), job("b", gguf("Q8_0")))
    states = done(batch.run())
    assert states["a"] == "verified"
    assert "job a writes this output too" in states["b"]


def test_verify_speaks_of_the_outputs_before_it(batch: Batch) -> None:
    batch.write(
        job("a", gguf("Q8_0"), {"verify": {"max_kld": 0.5}}, gguf("Q4_0"), gguf("F16"), {"verify": {"max_kld": 0.25}}),
        job("b", gguf("F32"), verify=False),
        job("c", gguf("BF16"), {"verify": {"max_kld": 0.125}}, verify=False),
    )
    result = batch.run()
    limits = {o.ftype: o.parity and o.parity["limits"]["max_kld"] for j in result.jobs for o in j.outputs}
    assert limits == {"Q8_0": 0.5, "Q4_0": 0.25, "F16": 0.25, "F32": None, "BF16": 0.125}
    assert [job.state for job in result.jobs] == ["verified", "written", "verified"]


@pytest.mark.parametrize("before", [{}, GPTQ], ids=["converted", "calibrated"])
def test_an_input_that_changes_between_plan_and_work_is_noticed(batch: Batch, before: dict[str, Any]) -> None:
    batch.write(job("a", *([before] if before else []), gguf("Q4_0")))
    path = batch.folder / "model" / "model.safetensors"
    changed: list[str] = []

    def change(event: qp.Event) -> None:
        last = "gptq" if before else "reference"
        if event.kind == "finished" and event.task.startswith(last) and not changed:
            changed.append(event.task)
            weights = load_file(path)
            save_file({name: value * 2 for name, value in weights.items()}, path)

    result = batch.run(watch=change)
    assert changed
    assert result.jobs[0].exit_code == 3
    assert "changed" in result.jobs[0].error or "removed" in result.jobs[0].error
    assert not batch.output("Q4_0.gguf").exists()


def test_a_batch_can_be_cancelled_and_goes_on_later(batch: Batch) -> None:
    batch.write(job("a", GPTQ, gguf("Q4_0")), job("b", gguf("Q8_0")))
    stop = threading.Event()

    def watch(event: qp.Event) -> None:
        if event.kind == "progress" and event.phase == "quantizing":
            stop.set()

    result = batch.run(watch=watch, cancel=stop)
    assert {job.state for job in result.jobs} == {"cancelled"}
    assert not batch.output("").exists() or not list(batch.output("").iterdir())
    assert done(batch.run()) == {"a": "verified", "b": "verified"}


def test_what_the_disk_cannot_hold_is_refused_before_any_work(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(batch.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    batch.write(job("a", gguf("Q8_0")))
    with pytest.raises(qp.OutputError, match=r"bytes are needed and 1000 are free"):
        batch.run()


def test_a_moved_folder_keeps_its_results(batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> None:
    batch.write(job("a", GPTQ, gguf("Q4_0")))
    batch.run()
    moved = Batch(tmp_path_factory.mktemp("moved") / "there")
    shutil.copytree(batch.folder, moved.folder)
    result, tasks = run(moved)
    assert not tasks
    assert result.jobs[0].outputs[0].path == str(moved.output("Q4_0.gguf"))


def test_outputs_go_to_a_store_and_are_known_there(batch: Batch) -> None:
    import fsspec

    url = f"memory://{batch.folder.name}/Q8_0.gguf"
    batch.write(job("a", {"gguf": {"outtype": "Q8_0", "output": url}}))
    result, _ = run(batch)
    assert done(result) == {"a": "verified"}
    assert result.jobs[0].outputs[0].path == url
    store = fsspec.filesystem("memory")
    local = qp.export_gguf(batch.folder / "model", batch.folder / "Q8_0.gguf", outtype="Q8_0").artifact.path
    assert store.cat_file(f"/{batch.folder.name}/Q8_0.gguf") == local.read_bytes()
    assert json.loads(store.cat_file(f"/{batch.folder.name}/Q8_0.gguf.quantpress.json"))["parity"]["passed"]
    _, tasks = run(batch)
    assert not tasks
    store.rm_file(f"/{batch.folder.name}/Q8_0.gguf")
    _, tasks = run(batch)
    assert tasks == ["a: gguf Q8_0 [1]"]
    store.rm(f"/{batch.folder.name}", recursive=True)

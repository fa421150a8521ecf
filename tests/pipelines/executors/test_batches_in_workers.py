"""Whole batches in worker processes: results as in one process, also where they are stopped or share a cache."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import quantpress as qp
from tests.pipelines.batch.batches import GPTQ, Batch, done, gguf, job
from tests.pipelines.executors.processes import is_gone

FOLDER = {"safetensors": {"format": "gptq", "output": "out/gptq"}}


def written(folder: Path) -> dict[str, str]:
    """Every output -> its hash; of sidecars that of what does not change from run to run."""
    found = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        data = path.read_bytes()
        if path.name.endswith("quantpress.json"):
            contents = json.loads(data)
            del contents["timings"]
            data = json.dumps(contents, sort_keys=True).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def fill(folder: Path) -> Batch:
    folder.mkdir()
    return Batch.with_model(folder).write(job("a", GPTQ, gguf("Q4_0"), FOLDER), job("b", gguf("Q8_0")))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process writes, undisturbed."""
    batch = fill(tmp_path_factory.mktemp("calm") / "here")
    assert done(batch.run()) == {"a": "verified", "b": "verified"}
    return written(batch.output(""))


def test_two_workers_write_what_one_process_writes(calm: dict[str, str], tmp_path: Path) -> None:
    batch, events = fill(tmp_path / "here"), list[qp.Event]()
    result = qp.run_pipeline(batch.file, workers=2, watch=events.append)
    assert done(result) == {"a": "verified", "b": "verified"}
    assert written(batch.output("")) == calm
    assert any(event.kind == "log" and "calibrated on" in event.message for event in events)
    assert all(event.result.peak_rss > 30 << 20 for event in events if event.result is not None)


def test_a_batch_that_is_cancelled_and_whose_worker_is_killed_ends_as_if_undisturbed(
    calm: dict[str, str], tmp_path: Path
) -> None:
    stormy = fill(tmp_path / "here")
    stop, workers = threading.Event(), set[int]()

    def cancel(event: qp.Event) -> None:
        workers.update(children())
        if event.kind == "progress" and event.phase == "quantizing" and event.done:
            stop.set()

    result = qp.run_pipeline(stormy.file, workers=2, watch=cancel, cancel=stop)
    assert "cancelled" in {job.state for job in result.jobs}
    assert workers
    assert all(is_gone(pid) for pid in workers)
    kinds = list[str]()

    def kill(event: qp.Event) -> None:
        kinds.append(event.kind)
        if event.kind == "progress" and event.phase == "quantizing" and "retried" not in kinds:
            for pid in children():
                os.kill(pid, signal.SIGKILL)

    result = qp.run_pipeline(stormy.file, workers=1, watch=kill)
    assert "retried" in kinds
    assert done(result) == {"a": "verified", "b": "verified"}
    assert written(stormy.output("")) == calm


def test_a_server_runs_two_batches_at_once_on_one_cache(tmp_path: Path) -> None:
    batch = fill(tmp_path / "shared")
    other = batch.file.with_name("other.yaml")
    text = batch.file.read_text().replace("out/", "other/")
    other.write_text(text)
    results = dict[str, Any]()

    def serve(file: Path) -> None:
        results[file.name] = qp.run_pipeline(file, workers=1)

    threads = [threading.Thread(target=serve, args=(file,)) for file in (batch.file, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [done(result) for result in results.values()] == [{"a": "verified", "b": "verified"}] * 2
    first, second = written(batch.folder / "out"), written(batch.folder / "other")
    assert {name: value for name, value in first.items() if "quantpress.json" not in name} == {
        name: value for name, value in second.items() if "quantpress.json" not in name
    }


def children() -> set[int]:
    """Processes that this one has started; zombies are none."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(folder.name))
    return found


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes as Linux shows them"),
]

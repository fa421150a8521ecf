"""A batch as a program: one bad job, a second run, runs beside each other, signals, full disks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.batch.batch_runs import (
    OUTPUTS,
    PIPELINE,
    Running,
    alive,
    children,
    command,
    contents,
    environment,
    gone,
    only_whole,
    run,
    stopped_at,
    write_pipeline,
)
from tests.tiny import tiny_checkpoint

LONG = "QUANTPRESS_KILLS" in os.environ  # make faults

pytestmark = pytest.mark.slow

THREE = """\
version: 1
defaults: {context: 32, chunks: 2, max_kld: 9, max_ppl_change: 9, min_top1: 0}
jobs:
  - {name: first, model: GOOD, stages: [{gguf: {outtype: F16, output: out/first.gguf}}]}
  - {name: broken, model: BAD, stages: [{gguf: {outtype: F16, output: out/broken.gguf}}]}
  - {name: third, model: GOOD, stages: [{gguf: {outtype: Q8_0, output: out/third.gguf}}]}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("batch") / "tiny", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed; never write into it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run(write_pipeline(folder, model), "--json")
    assert ended.code == 0, ended.said
    assert {path.name for path in (folder / "out").iterdir() if not path.name.endswith(".json")} == OUTPUTS
    return folder


def damaged(model: Path, folder: Path) -> Path:
    """A model whose weights end too early."""
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def test_one_bad_job_of_three_leaves_the_others_verified_and_is_all_that_is_left_to_do(
    model: Path, tmp_path: Path
) -> None:
    bad = damaged(model, tmp_path / "bad")
    text = THREE.replace("GOOD", str(model)).replace("BAD", str(bad))
    file = write_pipeline(tmp_path, model, text)
    ended = run(file, "--json")
    assert ended.code == 7, ended.said
    jobs = {job["name"]: job for job in ended.result["jobs"]}
    assert {name: job["state"] for name, job in jobs.items()} == {
        "first": "verified", "broken": "failed", "third": "verified",
    }  # fmt: skip
    assert jobs["broken"]["exit_code"] == 3
    assert "model.safetensors" in jobs["broken"]["error"]
    assert all(jobs[name]["outputs"][0]["parity"]["passed"] for name in ("first", "third"))
    last = ended.events[-1][1]
    assert (last["event"], last["exit_code"]) == ("error", 7)
    assert "broken" in last["message"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{name}.gguf{end}" for name in ("first", "third") for end in ("", ".quantpress.json")}

    shutil.copy(model / "model.safetensors", bad)
    mended = run(file, "--json")
    assert mended.code == 0, mended.said
    assert [job["cached"] for job in mended.result["jobs"]] == [True, False, True]
    assert {event["job"] for event in mended.of_kind("planned")} == {"broken"}


def test_a_second_run_does_nothing_and_takes_seconds(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "out").rglob("*")}
    ended = run(undisturbed / "batch.yaml", "--json")
    assert ended.code == 0, ended.said
    assert all(job["cached"] and job["state"] == "verified" for job in ended.result["jobs"])
    assert ended.of_kind("planned") == []
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "out").rglob("*")} == before
    assert ended.seconds < 30  # a few on an idle machine


@pytest.mark.parametrize("signals", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"])
def test_a_signal_ends_a_run_in_seconds_and_the_next_goes_on(
    model: Path, undisturbed: Path, tmp_path: Path, signals: tuple[signal.Signals, int]
) -> None:
    how, code = signals
    file = write_pipeline(tmp_path, model)
    running = Running(command(file))
    deadline = time.monotonic() + 120
    while not any(event.get("phase") == "quantizing" for _, event in running.events) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children(running.process.pid)
    assert any(map(alive, workers))
    sent = time.monotonic()
    running.process.send_signal(how)
    ended = running.wait()
    assert ended.code == code, ended.said
    assert time.monotonic() - sent < 10  # workers are given five seconds to remove what they have begun
    assert gone(workers, 1)
    assert "Traceback" not in ended.said
    out = tmp_path / "out"
    assert not out.exists() or {path.name for path in out.iterdir()} <= {
        name + end for name in OUTPUTS for end in ("", ".quantpress.json")
    }
    assert run(file).code == 0
    assert contents(out) == contents(undisturbed / "out")


def test_workers_that_are_killed_are_replaced(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    file = write_pipeline(tmp_path, model)
    with stopped_at(file, 4, 0.3, signal.SIGKILL, worker=True) as running:
        ended = running.wait()
    assert ended.code == 0, ended.said
    assert 1 <= len(ended.of_kind("retried")) <= 2  # both are killed, and one of them may wait for work
    assert contents(tmp_path / "out") == contents(undisturbed / "out")


def test_two_runs_at_once_on_one_file_both_end_well_or_the_second_is_turned_away(
    model: Path, undisturbed: Path, tmp_path: Path
) -> None:
    file = write_pipeline(tmp_path, model)
    both = [Running(command(file)) for _ in range(2)]
    ended = [each.wait() for each in both]
    codes = sorted(each.code for each in ended)
    assert codes[0] == 0, [each.said for each in ended]
    assert codes[1] in (0, 6, 7), [each.said for each in ended]
    assert contents(tmp_path / "out") == contents(undisturbed / "out")
    assert run(file).code == 0


def test_two_files_on_one_cache_calibrate_once(model: Path, undisturbed: Path, tmp_path: Path) -> None:
    first = write_pipeline(tmp_path, model)
    second = write_pipeline(tmp_path, model, PIPELINE.replace("output: out/", "output: other/"), "other.yaml")
    both = [Running(command(file)) for file in (first, second)]
    ended = [each.wait() for each in both]
    assert [each.code for each in ended] == [0, 0], [each.said for each in ended]
    told = [[event for event in each.of_kind("progress") if event.get("task", "").startswith("gptq")] for each in ended]
    told = [[event for event in events if event["phase"] == "quantizing"] for events in told]
    assert sorted(map(bool, told)) == [False, True], "one calibrates, the other waits for it"
    for out in ("out", "other"):
        assert contents(tmp_path / out) == contents(undisturbed / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_without_room_is_refused_before_anything_is_written(model: Path, small_disk: Path) -> None:
    for flags in (("--dry-run",), ()):
        ended = run(write_pipeline(small_disk, model), *flags)
        assert ended.code == 5, ended.said
        assert "free on the disk" in ended.events[-1][1]["message"]
        assert {path.name for path in small_disk.iterdir()} <= {"batch.yaml", "cache"}


@pytest.mark.parametrize("kilobytes", [20, 140] if LONG else [140])
def test_a_disk_that_fills_up_fails_its_jobs_and_the_next_run_ends_well(
    model: Path, undisturbed: Path, tmp_path: Path, kilobytes: int
) -> None:
    """Files may not grow beyond a limit: as close to a full disk as a process can get without one.

    20 kB let no task end well, 140 kB all but those that write the largest files (ONNX and Q8_0).
    """
    file = write_pipeline(tmp_path, model)
    limited = ["sh", "-c", f'ulimit -f {kilobytes * 1000 // 512} && exec "$@"', "sh", *command(file, "--json")]
    starved = subprocess.run(limited, capture_output=True, text=True, timeout=180, env=environment())
    assert starved.returncode in (5, 7), starved.stderr
    assert "Traceback" not in starved.stderr
    out = tmp_path / "out"
    whole = contents(undisturbed / "out")
    assert only_whole(out, whole)
    assert run(file).code == 0
    assert contents(out) == whole

"""What is shown of a batch where there is no terminal: plain lines, JSON, errors alone."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from quantpress.pipelines.batch import standing as standing_module
from quantpress.pipelines.batch.display import batch_display
from quantpress.pipelines.batch.results import OutputResult
from quantpress.pipelines.batch.tasks import Estimate, Event, Task, TaskResult

TASKS = (
    Task("1", "smol", "gptq", estimate=Estimate(seconds=60, memory=10**9)),
    Task("2", "smol", "gguf Q4_0", needs=("1",), estimate=Estimate(seconds=4, output_bytes=10**8)),
)
PARITY = {"passed": True, "tokens": 512, "mean_kld": 0.004}
OUTPUT = OutputResult("gguf", "/out/smol.gguf", "gguf", "Q4_0", 91_700_000, "done", {"parity": PARITY})
Tick = Callable[[float], None]


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Tick:
    """A clock that stands still until it is told to go on."""
    now = [1000.0]
    monkeypatch.setattr(standing_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(standing_module.Standing.__init__, "__defaults__", (lambda: now[0],))

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    return pass_by


@pytest.fixture(autouse=True)
def warnings_and_more() -> Iterator[None]:
    """The level of messages that the program has without -v and -q."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(before)


def shown(*events: Event, **options: Any) -> list[str]:
    stream = io.StringIO()
    with batch_display(TASKS, stream=stream, **options) as watch:
        for event in events:
            watch(event)
    return stream.getvalue().splitlines()


def done(task: str, state: str = "done", **values: Any) -> Event:
    return Event("finished", task, result=TaskResult(task, state, **values))


def test_a_finished_task_is_one_line_with_its_place() -> None:
    lines = shown(
        Event("started", "1"),
        done("1", seconds=61.0, peak_rss=2_100_000_000),
        Event("started", "2"),
        done("2", seconds=4.2, peak_rss=210_000_000, output=OUTPUT),
    )
    assert lines == [
        "[1/2] smol: gptq done, 1 min 01 s, 2.10 GB of memory",
        "[2/2] smol: gguf Q4_0 done, 91.7 MB, verified (KLD 0.004), 4.2 s, 210.0 MB of memory",
    ]


def test_what_was_there_already_is_said_to_be_cached() -> None:
    assert shown(done("2", "cached", output=OUTPUT)) == ["[1/2] smol: gguf Q4_0 cached, 91.7 MB, verified (KLD 0.004)"]


def test_a_failure_is_one_line_whatever_the_error_holds() -> None:
    lines = shown(done("1", "failed", error="w.bin:\nwanted\x1b[2J 4 \u202etensors", exit_code=3), done("2", "skipped"))
    assert lines == ["[1/2] smol: gptq FAILED: w.bin: wanted\\x1b[2J 4 \\u202etensors", "[2/2] smol: gguf Q4_0 skipped"]


def test_progress_is_told_every_few_seconds_and_not_of_quick_tasks(tick: Tick) -> None:
    stream = io.StringIO()
    with batch_display(TASKS, stream=stream) as watch:
        watch(Event("started", "1"))
        for percent in range(100):
            tick(0.6)
            watch(Event("progress", "1", phase="quantizing", done=percent, total=100))
        watch(Event("started", "2"))
        watch(Event("progress", "2", phase="write", done=1, total=2))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "smol: gptq: quantizing 8 %, 5.4 s"
    assert 10 <= len(lines) <= 12  # sixty seconds, a line every five
    assert lines[-1].startswith("smol: gptq: quantizing 9")
    assert lines[-1].endswith("a few seconds left for all")
    assert not any("gguf" in line for line in lines)


def test_messages_of_workers_name_their_task_and_keep_to_the_level() -> None:
    lines = shown(
        Event("log", "1", level="WARNING", message="layer 2: damping\nraised \x1b[2J"),
        Event("log", "1", level="INFO", message="nobody asked"),
        Event("retried", "1", level="WARNING", message="its worker was killed (SIGKILL)"),
        Event("retried", "1"),
        Event("log", "nobody", level="ERROR", message="lost"),
    )
    assert lines == [
        "WARNING: smol: gptq: layer 2: damping",
        "  raised \\x1b[2J",
        "WARNING: smol: gptq: its worker was killed (SIGKILL)",
        "WARNING: smol: gptq: its worker was lost; it is tried again",
    ]


def test_quiet_shows_errors_alone() -> None:
    logging.getLogger().setLevel(logging.ERROR)
    lines = shown(
        Event("log", "1", level="WARNING", message="no"),
        Event("log", "1", level="ERROR", message="disk"),
        done("1", "failed", error="full"),
        done("2", "skipped"),
        quiet=True,
    )
    assert lines == ["ERROR: smol: gptq: disk", "smol: gptq FAILED: full"]


def test_json_plans_every_task_and_tells_every_event() -> None:
    lines = shown(
        Event("started", "1"),
        Event("log", "1", level="WARNING", message="a\nb"),
        Event("log", "1", level="DEBUG", message="no"),
        done("1", "failed", error="x", exit_code=3),
        log_format="json",
    )
    records = [json.loads(line) for line in lines]
    assert [record["event"] for record in records] == ["planned", "planned", "started", "log", "finished"]
    assert records[1]["task"] == "2"
    assert records[1]["needs"] == ["1"]
    assert records[1]["estimate"] == {"seconds": 4, "bytes": 10**8, "peak_memory": 0, "disk_needed": 0}
    assert records[3]["message"] == "a\nb"
    assert records[4]["state"] == "failed"
    assert records[4]["exit_code"] == 3


def test_json_tells_the_first_and_the_last_of_every_phase_and_some_between(tick: Tick) -> None:
    stream = io.StringIO()
    with batch_display(TASKS, stream=stream, log_format="json") as watch:
        for phase in ("quantizing", "write"):
            for part in range(101):
                tick(0.12)
                watch(Event("progress", "1", phase=phase, done=part, total=100))
                watch(Event("progress", "1", phase=phase, done=part, total=100))
    records = [json.loads(line) for line in stream.getvalue().splitlines()[len(TASKS) :]]
    for phase in ("quantizing", "write"):
        told = [record["done"] for record in records if record["phase"] == phase]
        assert told[0] == 0
        assert told[-1] == 100
        assert len(told) == 4  # twelve seconds: two of them between


def test_quiet_json_is_errors_alone() -> None:
    lines = shown(Event("started", "1"), done("1"), done("2", "failed", error="x"), log_format="json", quiet=True)
    assert [json.loads(line)["error"] for line in lines] == ["x"]

"""Worker processes: what they see, what they say, how many run, and what becomes of the work of one that dies."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantpress.pipelines.batch.tasks import Estimate, Event, Task, TaskResult
from quantpress.pipelines.executors.local import LocalPool
from quantpress.pipelines.executors.schedule import run_tasks
from tests.pipelines.executors.processes import is_gone, within

PERFORM = "fake_work:perform"
linux = pytest.mark.skipif(sys.platform != "linux", reason="what only Linux tells of a process")
posix = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LocalPool]]:
    """Pools of one or two workers; no worker is left when the test ends."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    pools = list[LocalPool]()

    def make(workers: int = 1, **options: Any) -> LocalPool:
        pools.append(LocalPool(workers, **({"cores": workers, "gpus": (), "perform": PERFORM} | options)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close(kill=True)
        assert pool.pids == ()


def work(name: str, *what: object, **options: Any) -> Task:
    return Task(name, f"job-{name}", "fake", work=what or (None,), **options)


def ran(pool: LocalPool, *tasks: Task) -> tuple[dict[str, TaskResult], list[Event]]:
    seen: list[Event] = []
    return run_tasks(tasks, pool, seen.append), seen


def test_tasks_run_in_processes_that_are_used_again(make_pool: Callable[..., LocalPool]) -> None:
    results, seen = ran(make_pool(), *(work(name, "pid") for name in "abc"))
    pids = {result.output for result in results.values()}
    assert len(pids) == 1
    assert os.getpid() not in pids
    assert all(is_gone(pid) for pid in pids)
    assert all(result.seconds > 0 and result.peak_rss > 1 << 20 for result in results.values())
    assert [event.kind for event in seen] == ["started", "finished"] * 3


def test_nothing_is_started_before_there_is_work(make_pool: Callable[..., LocalPool]) -> None:
    pool = make_pool(2)
    assert pool.pids == ()
    pool.close(kill=False)


def test_tasks_get_their_share_of_the_processors(make_pool: Callable[..., LocalPool]) -> None:
    tasks = work("a", "threads"), work("b", "env", "OMP_NUM_THREADS")
    os.environ.pop("OMP_NUM_THREADS", None)
    results, _ = ran(make_pool(2, cores=7), *tasks)
    assert [result.output for result in results.values()] == [3, "3"]
    assert LocalPool(cores=9, gpus=()).workers == 2
    assert LocalPool(cores=2, gpus=()).workers == 1


def test_a_users_number_of_threads_is_left_as_it_is(
    make_pool: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    results, _ = ran(make_pool(), work("a", "env", "OMP_NUM_THREADS"))
    assert results["a"].output == "5"


def test_progress_arrives_while_the_task_works_and_not_too_often(make_pool: Callable[..., LocalPool]) -> None:
    started = time.monotonic()
    when = list[tuple[float, Event]]()
    pool = make_pool()
    run_tasks([work("a", "steps", 100, 0.005)], pool, lambda event: when.append((time.monotonic() - started, event)))
    told = [(at, event) for at, event in when if event.kind == "progress"]
    assert told[0][1].done == 1
    assert (told[-1][1].done, told[-1][1].total) == (100, 100)
    assert 3 <= len(told) <= 2 + told[-1][0] / 0.1
    assert told[0][0] < told[-1][0] - 0.3  # the first was not held back until the end
    if sys.platform == "linux":
        assert all(event.memory > 1 << 20 for _, event in told)


def test_messages_and_what_is_printed_become_events(
    make_pool: Callable[..., LocalPool], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "quantpress")
    results, seen = ran(make_pool(), work("a", "talk"), work("b", "steps", 1, 0.3))
    assert results["a"].state == "done"
    said = {event.message: event.level for event in seen if event.kind == "log"}
    assert said["a warning of 4 words"] == "WARNING"
    assert said["an information"] == "INFO"
    assert any("a python warning" in message and level == "WARNING" for message, level in said.items())
    printed = [message for message in said if "descriptor" in message or "printed" in message]
    assert sorted(printed) == ["an  [31mescape� to descriptor 2", "printed text", "written to descriptor 1"]
    assert capfd.readouterr() == ("", "")


def test_only_messages_that_are_wanted_are_sent(
    make_pool: Callable[..., LocalPool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "quantpress")
    _, seen = ran(make_pool(), work("a", "talk"), work("b", "steps", 1, 0.3))
    assert {event.level for event in seen if event.kind == "log"} == {"WARNING"}


@pytest.mark.parametrize(
    ("what", "error", "code"),
    [
        (("fail", "model.safetensors: wrong"), "model.safetensors: wrong", 3),
        (("bug",), "internal error: RuntimeError: two lines (at fake_work.py:", 1),
        (("unsendable",), "internal error: the result cannot be sent to another process", 1),
        ((lambda: None,), "the task cannot be sent to a worker process", 2),
    ],
)
def test_an_error_ends_its_task_and_not_the_worker(
    what: tuple[object, ...], error: str, code: int, make_pool: Callable[..., LocalPool]
) -> None:
    results, seen = ran(make_pool(), work("a", "pid"), work("b", *what), work("c", "pid"))
    assert results["b"].state == "failed"
    assert results["b"].error.startswith(error)
    assert "\n" not in results["b"].error
    assert results["b"].exit_code == code
    assert results["a"].output == results["c"].output
    logged = [event for event in seen if event.kind == "log"]
    assert bool(logged) == (what == ("bug",))
    assert all("Traceback" in event.message and "two" in event.message for event in logged)


def test_a_stage_that_a_worker_cannot_import_is_told_so(
    make_pool: Callable[..., LocalPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OfAScript:
        pass

    OfAScript.__module__, OfAScript.__qualname__ = "__main__", "OfAScript"
    monkeypatch.setattr(sys.modules["__main__"], "OfAScript", OfAScript, raising=False)
    results, _ = ran(make_pool(), work("a", OfAScript()))
    assert "OfAScript" in results["a"].error
    assert results["a"].error.endswith("stages must be in a module that can be imported")


def test_what_does_the_tasks_may_be_missing(make_pool: Callable[..., LocalPool]) -> None:
    results, _ = ran(make_pool(perform="no.such.module:perform"), work("a", "pid"))
    assert results["a"].error.startswith("internal error: ModuleNotFoundError: No module named 'no'")


def test_modules_in_the_working_folder_are_not_imported(
    make_pool: Callable[..., LocalPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "json.py").write_text("import pathlib; pathlib.Path('was-run').touch()")
    (tmp_path / "pickle.py").write_text("import pathlib; pathlib.Path('was-run').touch()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    results, _ = ran(make_pool(), work("a", "pid"))
    assert results["a"].state == "done"
    assert not (tmp_path / "was-run").exists()


def test_nobody_else_reads_what_a_worker_is_told(make_pool: Callable[..., LocalPool]) -> None:
    results, _ = ran(make_pool(), work("a", "listening"), work("b", "pid"))
    assert "EOFError" in results["a"].output
    assert results["b"].state == "done"


@posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_the_task_of_a_lost_worker_is_tried_once_more(
    number: int, make_pool: Callable[..., LocalPool], tmp_path: Path
) -> None:
    results, seen = ran(make_pool(), work("a", "die", int(number), str(tmp_path / "marker")), work("b", "pid"))
    assert (results["a"].state, results["a"].output) == ("done", ["marker"])
    assert results["b"].state == "done"
    assert [event.kind for event in seen if event.task == "a"] == ["started", "retried", "finished"]
    assert "fake is tried once more" in seen[1].message


@posix
@pytest.mark.parametrize(
    ("what", "said", "code"),
    [
        (("die", int(signal.SIGKILL)), "killed (SIGKILL), probably because memory ran out, 3.0 GB were expected", 5),
        (("die", int(signal.SIGSEGV)), "died of SIGSEGV; its last words: Fatal Python error: Segmentation fault |", 1),
        (("leave", 7), "its worker process ended with code 7", 1),
    ],
)
def test_a_worker_that_dies_twice_fails_its_task_with_what_is_known(
    what: tuple[object, ...], said: str, code: int, make_pool: Callable[..., LocalPool]
) -> None:
    estimate = Estimate(memory=3_000_000_000)
    results, seen = ran(make_pool(), work("a", *what, estimate=estimate), work("b", "pid"), work("c", "pid"))
    assert results["a"].state == "failed"
    assert said in results["a"].error
    assert "\n" not in results["a"].error
    assert results["a"].exit_code == code
    assert [event.kind for event in seen if event.task == "a"] == ["started", "retried", "finished"]
    assert results["b"].output == results["c"].output


@posix
def test_a_task_that_was_killed_is_tried_again_alone(make_pool: Callable[..., LocalPool], tmp_path: Path) -> None:
    marker, file = str(tmp_path / "marker"), str(tmp_path / "held")
    tasks = [
        work("held", "hold", file, 2.0),
        work("killed", "die", int(signal.SIGKILL), marker),
        work("later", "hold", file, 0.2),
    ]
    results, seen = ran(make_pool(2), *tasks)
    assert results["killed"].output == ["marker"]  # when it ran again, no other held its file
    order = [(event.kind, event.task) for event in seen]
    assert order.index(("retried", "killed")) < order.index(("finished", "held"))
    assert order.index(("started", "later")) > order.index(("finished", "killed"))


def test_no_more_run_than_workers_and_memory_allow(make_pool: Callable[..., LocalPool], tmp_path: Path) -> None:
    folder = str(tmp_path)
    pool = make_pool(3, memory=100)
    tasks = [work(f"t{place}", "together", folder, f"t{place}", 2, estimate=Estimate(memory=50)) for place in range(4)]
    results, _ = ran(pool, *tasks)
    assert [result.output for result in results.values()] == [2, 2, 2, 2]


def test_a_task_larger_than_all_memory_runs_alone(make_pool: Callable[..., LocalPool], tmp_path: Path) -> None:
    pool = make_pool(2, memory=100)
    tasks = [
        work("large", "together", str(tmp_path), "large", 1, estimate=Estimate(memory=1000)),
        work("small", "together", str(tmp_path), "small", 1, estimate=Estimate(memory=1)),
    ]
    results, _ = ran(pool, *tasks)
    assert [result.output for result in results.values()] == [1, 1]


def test_gpus_are_lent_to_one_task_each(make_pool: Callable[..., LocalPool], tmp_path: Path) -> None:
    gpu = Estimate(gpu=True)
    pool = make_pool(3, gpus=("2", "GPU-5"))
    tasks = [work(f"g{place}", "env", "CUDA_VISIBLE_DEVICES", estimate=gpu) for place in range(2)]
    assert pool.has_room(tasks[0])
    for task in tasks:
        pool.start(task)
    assert not pool.has_room(work("g2", estimate=gpu))
    assert pool.has_room(work("cpu"))
    found = list[Event]()
    assert within(20, lambda: bool(found.extend(pool.events(0.2)) or sum(e.kind == "finished" for e in found) == 2))
    assert {event.result.output for event in found if event.result} == {"2", "GPU-5"}


def test_a_worker_for_a_gpu_takes_the_place_of_an_idle_one_without(make_pool: Callable[..., LocalPool]) -> None:
    pool = make_pool(1, gpus=("1",))
    name = "CUDA_VISIBLE_DEVICES"
    results, _ = ran(
        pool,
        work("a", "env", name),
        work("b", "env", name, estimate=Estimate(gpu=True)),
        work("c", "env", name),
    )
    assert [result.output for result in results.values()] == [os.environ.get(name), "1", os.environ.get(name)]


def test_a_device_that_was_not_found_is_left_to_the_one_task_that_asks_for_it(
    make_pool: Callable[..., LocalPool],
) -> None:
    pool = make_pool(2)
    pool.start(work("a", "steps", 1, 0.2, estimate=Estimate(gpu=True)))
    assert not pool.has_room(work("b", estimate=Estimate(gpu=True)))


@linux
def test_peak_memory_is_counted_for_each_task_anew(make_pool: Callable[..., LocalPool]) -> None:
    results, _ = ran(make_pool(), work("a", "peaks", 300 << 20), work("b", "peaks", 1))
    assert results["a"].peak_rss > 300 << 20
    assert results["b"].peak_rss < 150 << 20
    assert results["b"].output < 150 << 20  # what a task says of itself

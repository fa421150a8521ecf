"""Batches that are stopped, and drivers that are killed: no worker goes on, and workers clean up where they can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantpress.pipelines.batch.tasks import Event, Task
from quantpress.pipelines.executors import local
from quantpress.pipelines.executors.local import LocalPool
from quantpress.pipelines.executors.schedule import run_tasks
from tests.pipelines.executors.processes import descriptors, is_gone, within

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

HERE = Path(__file__).parent
DRIVER = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from quantpress.pipelines.batch.tasks import Task
from quantpress.pipelines.executors.local import LocalPool
from quantpress.pipelines.executors.schedule import run_tasks

class Terminated(BaseException):
    pass

def terminate(number, frame):
    raise Terminated

signal.signal(signal.SIGTERM, terminate)
tasks = [Task(f"t{i}", "job", "fake", work=(sys.argv[2], sys.argv[3])) for i in range(2)]
try:
    run_tasks(tasks, LocalPool(2, gpus=(), perform="fake_work:perform"), lambda event: None)
except KeyboardInterrupt:
    sys.exit(130)
except Terminated:
    sys.exit(143)
"""


@pytest.fixture(autouse=True)
def find_fake_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


def workers_in(folder: Path) -> list[int]:
    """Process ids of the workers that have begun: each has left a file."""
    return [int(path.stem) for path in folder.glob("*.tmp")]


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], list[int]]]]:
    """Starts a program with two workers at work, in a process group of its own as a shell does."""
    started = list[subprocess.Popen[bytes]]()

    def start(what: str) -> tuple[subprocess.Popen[bytes], list[int]]:
        command = [sys.executable, "-c", DRIVER, str(HERE), what, str(tmp_path)]
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
        started.append(process)
        assert within(30, lambda: len(workers_in(tmp_path)) == 2)
        return process, workers_in(tmp_path)

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers must get to run to notice")
@pytest.mark.parametrize("what", ["cleanly", "deaf", "frozen"])
def test_kill_9_of_the_driver_ends_its_workers_within_a_second(
    what: str, drive: Callable[[str], tuple[subprocess.Popen[bytes], list[int]]]
) -> None:
    process, workers = drive(what)
    process.kill()
    process.wait()
    assert within(1, lambda: all(is_gone(pid) for pid in workers))


def test_workers_notice_a_lost_driver_by_the_end_of_their_input(
    drive: Callable[[str], tuple[subprocess.Popen[bytes], list[int]]],
) -> None:
    process, workers = drive("undying")  # has told the system not to kill it with its parent
    process.kill()
    process.wait()
    assert within(5, lambda: all(is_gone(pid) for pid in workers))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_driver_that_is_stopped_stops_its_workers_which_clean_up(
    number: int, code: int, drive: Callable[[str], tuple[subprocess.Popen[bytes], list[int]]], tmp_path: Path
) -> None:
    process, workers = drive("cleanly")
    started = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal sends it: to the whole group
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert errors == b""
    assert time.monotonic() - started < 10  # on a busy machine
    assert all(is_gone(pid) for pid in workers)
    assert workers_in(tmp_path) == []


def test_a_second_ctrl_c_does_not_wait_for_workers(
    drive: Callable[[str], tuple[subprocess.Popen[bytes], list[int]]],
) -> None:
    process, workers = drive("deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the workers have their five seconds
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert time.monotonic() - started < 2
    assert process.returncode == 130
    assert all(is_gone(pid) for pid in workers)


def tasks_of(what: str, folder: Path) -> list[Task]:
    return [Task(f"t{place}", "job", "fake", work=(what, str(folder))) for place in range(3)]


@pytest.mark.parametrize(("what", "grace"), [("cleanly", 5.0), ("dropping", 5.0), ("deaf", 0.5), ("frozen", 0.5)])
def test_a_cancelled_batch_ends_its_workers_and_says_what_was_cancelled(
    what: str, grace: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_STOP_SECONDS", grace)
    pool = LocalPool(2, cores=2, gpus=(), perform="fake_work:perform")
    seen, threads, pids = list[Event](), threading.active_count(), list[int]()

    def cancelled() -> bool:
        pids[:] = workers_in(tmp_path) or pids
        return len(pids) == 2

    started = time.monotonic()
    results = run_tasks(tasks_of(what, tmp_path), pool, seen.append, cancelled)
    assert {result.state for result in results.values()} == {"cancelled"}
    assert time.monotonic() - started < 10
    assert all(is_gone(pid) for pid in pids)
    assert (workers_in(tmp_path) == []) == (what in ("cleanly", "dropping"))
    assert threading.active_count() == threads
    assert bool(list(tmp_path.glob("*.dropped"))) == (what == "dropping")
    if what == "frozen":
        children = [int(path.read_text()) for path in tmp_path.glob("*.tmp")]
        assert within(2, lambda: all(is_gone(pid) for pid in children))


def test_a_second_sigterm_does_not_stop_the_cleaning_up(tmp_path: Path) -> None:
    pool = LocalPool(1, gpus=(), perform="fake_work:perform")
    pool.start(tasks_of("cleanly", tmp_path)[0])
    assert within(30, lambda: len(workers_in(tmp_path)) == 1)
    (pid,) = pool.pids
    for _ in range(2):
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
    assert within(10, lambda: is_gone(pid))
    assert workers_in(tmp_path) == []
    pool.close(kill=True)


def test_closing_twice_and_without_work_is_harmless() -> None:
    pool = LocalPool(1, gpus=())
    pool.close(kill=False)
    pool.close(kill=True)
    assert pool.events(0) == []


def test_no_descriptor_and_no_thread_is_left_by_many_batches() -> None:
    def batch(kill: bool) -> Any:
        pool = LocalPool(2, cores=2, gpus=(), perform="fake_work:perform")
        tasks = [Task("a", "job", "fake", work=("pid",)), Task("b", "job", "fake", work=("die", 9))]
        run_tasks(tasks, pool, lambda event: None)
        pool.close(kill=kill)

    batch(True)
    open_before, threads = descriptors(), threading.active_count()
    for turn in range(4):
        batch(turn % 2 == 0)
    assert descriptors() == open_before
    assert threading.active_count() == threads

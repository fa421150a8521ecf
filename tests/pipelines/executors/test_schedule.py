"""The scheduler on a pool of cards: what runs when, what is skipped, and what is left when it is stopped."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from quantpress.pipelines.batch.tasks import Event, Task, TaskResult
from quantpress.pipelines.executors.inline import InlinePool
from quantpress.pipelines.executors.schedule import run_tasks
from quantpress.pipelines.machine import peak_rss
from quantpress.quant.errors import InputError


class Cards:
    """A pool where a test's random numbers say which of the running tasks ends next."""

    def __init__(self, room: int = 2, seed: int = 0, failing: Sequence[str] = ()) -> None:
        self.room, self.failing = room, failing
        self.random = random.Random(seed)
        self.running: list[Task] = []
        self.order: list[str] = []
        self.closed: list[bool] = []
        self.most = 0

    def has_room(self, task: Task) -> bool:
        return len(self.running) < self.room

    def start(self, task: Task) -> None:
        self.running.append(task)
        self.order.append(task.id)
        self.most = max(self.most, len(self.running))

    def events(self, timeout: float) -> list[Event]:
        if not self.running:
            return []
        task = self.running.pop(self.random.randrange(len(self.running)))
        failed = task.id in self.failing
        result = TaskResult(task.id, "failed" if failed else "done", "no luck" if failed else "", 3 if failed else 0)
        return [Event("progress", task.id, "work", 1, 1), Event("finished", task.id, result=result)]

    def close(self, *, kill: bool) -> None:
        self.closed.append(kill)


def job(name: str, *needs: str) -> Task:
    return Task(name, f"job {name}", f"title {name}", needs)


def ignore(event: Event) -> None:
    pass


def random_graph(seed: int) -> list[Task]:
    """Up to 40 tasks in a random order, each with up to three needs."""
    generator = random.Random(seed)
    count = generator.randrange(1, 40)
    tasks = []
    for place in range(count):
        known = [f"t{other}" for other in range(place)]
        tasks.append(job(f"t{place}", *generator.sample(known, min(len(known), generator.randrange(4)))))
    generator.shuffle(tasks)
    return tasks


@pytest.mark.parametrize("seed", range(60))
def test_every_task_runs_once_after_its_needs_and_those_of_a_failed_one_never(seed: int) -> None:
    tasks = random_graph(seed)
    by_name = {task.id: task for task in tasks}
    generator = random.Random(-seed)
    failing = [task.id for task in tasks if generator.random() < 0.1]
    pool = Cards(1 + seed % 4, seed, failing)
    seen: list[Event] = []
    results = run_tasks(tasks, pool, seen.append)

    def above(name: str) -> set[str]:  # all that a task needs, by brute force
        needs = by_name[name].needs
        return set(needs).union(*(above(need) for need in needs))

    assert list(results) == [task.id for task in tasks]
    assert len(pool.order) == len(set(pool.order))
    finished = [event.task for event in seen if event.kind == "finished"]
    assert sorted(finished) == sorted(by_name)
    for task in tasks:
        cause = above(task.id) & set(failing)
        state = "skipped" if cause else "failed" if task.id in failing else "done"
        assert results[task.id].state == state
        assert (task.id in pool.order) == (state != "skipped")
        assert results[task.id].exit_code == (0 if state == "done" else 3)
        if state == "skipped":
            assert any(f"title {name} of job {name}" in results[task.id].error for name in cause)
        for need in task.needs:
            assert finished.index(need) < finished.index(task.id)
            if state != "skipped":
                assert pool.order.index(need) < pool.order.index(task.id)
    assert pool.most <= pool.room
    assert pool.closed == [False]


def test_ready_tasks_start_in_the_order_they_are_given_and_fill_the_pool() -> None:
    pool = Cards(room=3)
    run_tasks([job("late", "first"), job("first"), job("a"), job("b"), job("c")], pool, ignore)
    assert pool.order[:3] == ["first", "a", "b"]
    assert pool.most == 3


def test_a_task_without_room_is_passed_by_one_that_has_room() -> None:
    class OneLarge(Cards):
        def has_room(self, task: Task) -> bool:
            return super().has_room(task) and (task.id != "large" or not self.running)

    pool = OneLarge()
    run_tasks([job("small"), job("large"), job("other")], pool, ignore)
    assert pool.order == ["small", "other", "large"]


def test_when_cancelled_the_workers_are_stopped_and_what_has_not_finished_says_so() -> None:
    pool, seen = Cards(room=1), list[Event]()
    results = run_tasks([job("a"), job("b"), job("c", "b")], pool, seen.append, lambda: len(seen) > 0)
    assert pool.closed[0] is True
    assert [result.state for result in results.values()] == ["done", "cancelled", "cancelled"]
    assert [result.exit_code for result in results.values()] == [0, 130, 130]
    assert [event.task for event in seen if event.kind == "finished"] == ["a", "b", "c"]


def test_what_finished_while_the_workers_were_stopped_counts() -> None:
    pool = Cards(room=1)
    answers = iter([False, True])
    pool_events, calls = pool.events, list[float]()

    def events(timeout: float) -> list[Event]:
        calls.append(timeout)
        return pool_events(timeout) if len(calls) > 1 else []

    pool.events = events  # type: ignore[method-assign]
    results = run_tasks([job("a"), job("b")], pool, ignore, lambda: next(answers))
    assert [result.state for result in results.values()] == ["done", "cancelled"]


def test_an_error_of_the_display_stops_the_workers_and_arrives() -> None:
    def watch(event: Event) -> None:
        raise KeyboardInterrupt

    pool = Cards()
    with pytest.raises(KeyboardInterrupt):
        run_tasks([job("a"), job("b")], pool, watch)
    assert pool.closed == [True]


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([job("a"), job("a")], "same id"),
        ([job("a", "b")], "a needs b"),
        ([job("a", "b"), job("b", "a")], "cycle"),
    ],
)
def test_tasks_that_cannot_all_run_are_refused_before_one_starts(tasks: list[Task], said: str) -> None:
    pool = Cards()
    with pytest.raises(ValueError, match=said):
        run_tasks(tasks, pool, ignore)
    assert pool.order == []


def test_a_batch_of_ten_thousand_jobs_is_scheduled_in_seconds() -> None:
    tasks = [job("shared"), *(job(f"t{place}", "shared") for place in range(10_000))]
    asked = 0

    class Counting(Cards):
        def has_room(self, task: Task) -> bool:
            nonlocal asked
            asked += 1
            return super().has_room(task)

    results = run_tasks(tasks, Counting(room=4), ignore)
    assert len(results) == 10_001
    assert asked <= 70 * len(tasks)  # not of all that wait, whenever something ends


def test_nothing_to_do_ends_at_once() -> None:
    assert run_tasks([], Cards(), ignore) == {}


def test_tasks_run_in_this_process_with_their_progress_as_it_comes() -> None:
    seen: list[Event] = []

    def perform(task: Task, progress: object, threads: int) -> TaskResult:
        assert callable(progress)
        progress("half", 1, 2)
        assert (seen[-1].kind, seen[-1].phase, seen[-1].done) == ("progress", "half", 1)
        assert threads == 3
        if task.id == "b":
            raise InputError("b.safetensors: wrong")
        if task.id == "d":
            raise RuntimeError("a bug")
        return TaskResult(task.id, "done", output=task.work)

    tasks = [Task("a", "j", "A", work=lambda: 1), job("b"), job("c", "b"), job("d"), job("e", "a")]
    results = run_tasks(tasks, InlinePool(seen.append, threads=3, perform=perform), seen.append)
    assert [result.state for result in results.values()] == ["done", "failed", "skipped", "failed", "done"]
    assert results["a"].output is tasks[0].work
    assert (results["b"].error, results["b"].exit_code) == ("b.safetensors: wrong", 3)
    assert results["c"].error == "needs title b of job b, which failed: b.safetensors: wrong"
    assert results["d"].error.startswith("internal error: RuntimeError: a bug (at test_schedule.py:")
    assert results["a"].seconds > 0
    assert [event.kind for event in seen if event.task == "a"] == ["started", "progress", "finished"]


def test_a_task_in_this_process_is_cancelled_where_it_tells_its_progress() -> None:
    stop = list[bool]()

    def perform(task: Task, progress: object, threads: int) -> TaskResult:
        assert callable(progress)
        for step in range(100):
            progress("work", step, 100)
            stop.extend([True] * (step == 5))
        return TaskResult(task.id, "done")

    seen: list[Event] = []
    pool = InlinePool(seen.append, cancelled=lambda: bool(stop), perform=perform)
    results = run_tasks([job("a"), job("b")], pool, seen.append, lambda: bool(stop))
    assert [result.state for result in results.values()] == ["cancelled", "cancelled"]
    assert max(event.done for event in seen) == 5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
def test_the_callers_own_peak_memory_is_not_forgotten() -> None:
    data = bytearray(200 << 20)
    del data
    before = peak_rss()
    run_tasks([job("a")], InlinePool(perform=lambda task, progress, threads: TaskResult(task.id, "done")), ignore)
    assert peak_rss() >= before

"""Where a batch stands, and what is guessed of the time that is left."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from quantpress.pipelines.batch.standing import Standing
from quantpress.pipelines.batch.tasks import Estimate, Event, Task, TaskResult


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def task(name: str, seconds: float = 0.0, needs: Sequence[str] = (), job: str = "job") -> Task:
    return Task(name, job, name, needs=tuple(needs), estimate=Estimate(seconds=seconds))


def finished(name: str, seconds: float, state: str = "done") -> Event:
    return Event("finished", name, result=TaskResult(name, state, seconds=seconds))


def test_a_task_waits_runs_and_is_finished() -> None:
    clock = Clock()
    standing = Standing([task("a"), task("b", needs=["a"], job="other")], clock)
    assert standing.running == []
    standing.tell(Event("started", "a", memory=5))
    clock.now += 3
    standing.tell(Event("progress", "a", phase="write", done=1, total=4))
    (running,) = standing.running
    assert (running.elapsed(clock.now), running.share, running.memory) == (3, 0.25, 5)
    assert not standing.job_finished("job")
    standing.tell(finished("a", 3))
    assert (standing.running, standing.finished, standing.elapsed) == ([], 1, 3)
    assert standing.job_finished("job")
    assert not standing.job_finished("other")


def test_events_of_unknown_tasks_and_senseless_progress_are_survived() -> None:
    standing = Standing([task("a")], Clock())
    assert standing.tell(Event("progress", "nobody", done=1, total=2)) is None
    standing.tell(Event("started", "a"))
    for done, total, share in ((0, 0, None), (5, -1, None), (9, 3, 1.0), (-4, 3, 0.0)):
        each = standing.tell(Event("progress", "a", phase="p", done=done, total=total))
        assert each is not None
        assert each.share == share
    each = standing.tell(Event("finished", "a"))
    assert each is not None
    assert each.result is not None
    assert each.result.state == "failed"


def test_a_task_whose_worker_was_lost_begins_anew() -> None:
    clock = Clock()
    standing = Standing([task("a")], clock)
    standing.tell(Event("started", "a"))
    standing.tell(Event("progress", "a", phase="write", done=3, total=4))
    clock.now += 50
    standing.tell(Event("retried", "a"))
    (running,) = standing.running
    assert (running.elapsed(clock.now), running.share, running.phase) == (0, None, "")


def test_nothing_is_guessed_from_nothing() -> None:
    assert Standing([task("a"), task("b")], Clock()).left() is None


def test_estimates_hold_until_something_was_measured() -> None:
    assert Standing([task("a", 60), task("b", 30)], Clock()).left() == 90


def test_a_batch_with_nothing_left_is_finished_at_once() -> None:
    standing = Standing([task("a", 60)], Clock())
    standing.tell(finished("a", 1))
    assert standing.left() == 0


def test_what_goes_on_at_once_shares_the_time() -> None:
    standing = Standing([task(name, 60) for name in "abcd"], Clock())
    standing.tell(Event("started", "a"))
    standing.tell(Event("started", "b"))
    assert standing.left() == 120


def test_the_longest_chain_bounds_the_time() -> None:
    tasks = [task("a", 60), task("b", 60, ["a"]), task("c", 60, ["b"]), task("d", 10)]
    standing = Standing(tasks, Clock())
    for name in "ad":
        standing.tell(Event("started", name))
    assert standing.left() == 180


def test_tasks_that_take_longer_than_thought_make_the_others_longer() -> None:
    standing = Standing([task("a", 100), task("b", 100)], Clock())
    standing.tell(finished("a", 1000))
    left = standing.left()
    assert left is not None
    assert left == pytest.approx(100 * (1000 + 10) / (100 + 10))  # ten seconds of faith in the estimate


def test_cached_tasks_say_nothing_of_how_long_others_take() -> None:
    standing = Standing([task("a", 100), task("b", 100)], Clock())
    standing.tell(finished("a", 0.01, "cached"))
    assert standing.left() == 100


def test_a_phase_that_is_slower_than_thought_lengthens_the_guess() -> None:
    clock = Clock()
    standing = Standing([task("a", 10)], clock)
    standing.tell(Event("started", "a"))
    standing.tell(Event("progress", "a", phase="quantizing", done=0, total=100))
    clock.now += 20
    standing.tell(Event("progress", "a", phase="quantizing", done=10, total=100))
    assert standing.left() == pytest.approx(20 * 90 / 10)


def test_a_phase_that_goes_on_with_kept_work_is_not_thought_to_be_fast() -> None:
    clock = Clock()
    standing = Standing([task("a", 10)], clock)
    standing.tell(Event("started", "a"))
    standing.tell(Event("progress", "a", phase="quantizing", done=80, total=100))  # kept from a run that was stopped
    clock.now += 20
    standing.tell(Event("progress", "a", phase="quantizing", done=90, total=100))
    assert standing.left() == pytest.approx(20 * 10 / 10)


def test_a_phase_that_begins_again_is_timed_anew() -> None:
    clock = Clock()
    standing = Standing([task("a", 1)], clock)
    standing.tell(Event("started", "a"))
    standing.tell(Event("progress", "a", phase="write", done=100, total=100))
    clock.now += 500
    standing.tell(Event("progress", "a", phase="write", done=0, total=100))
    clock.now += 10
    standing.tell(Event("progress", "a", phase="write", done=50, total=100))
    assert standing.left() == pytest.approx(10)


def test_tasks_without_estimates_take_as_long_as_those_that_were_done() -> None:
    standing = Standing([task(name) for name in "abc"], Clock())
    standing.tell(finished("a", 30))
    assert standing.left() == 60


def test_guesses_are_near_in_simulated_batches() -> None:
    """Two workers, estimates four times too low with noise: at half time the guess is right within a factor of two."""
    for seed in range(20):
        source = random.Random(seed)
        clock = Clock()
        tasks = [task(str(number), source.uniform(5, 50)) for number in range(20)]
        took = {each.id: 4 * each.estimate.seconds * source.uniform(0.7, 1.4) for each in tasks}
        standing, waiting, running = Standing(tasks, clock), list(tasks), dict[str, float]()
        guesses: list[tuple[float, float]] = []
        while waiting or running:
            while waiting and len(running) < 2:
                name = waiting.pop(0).id
                running[name] = clock.now + took[name]
                standing.tell(Event("started", name))
            name = min(running, key=running.__getitem__)
            clock.now = running.pop(name)
            standing.tell(finished(name, took[name]))
            left = standing.left()
            assert left is not None
            guesses.append((clock.now, left))
        now, left = guesses[len(guesses) // 2]
        assert 0.5 < left / (clock.now - now) < 2

"""Pieces of work on threads: their order, how many are held, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from quantpress.convert.gguf.stream import in_order


def test_results_come_in_the_order_of_the_tasks() -> None:
    second_done = threading.Event()

    def first() -> int:
        assert second_done.wait(10)
        return 1

    def second() -> int:
        second_done.set()
        return 2

    assert list(in_order([first, second], threads=2, window=3)) == [1, 2]


@pytest.mark.parametrize("window", [1, 2, 5])
def test_no_more_tasks_are_held_than_the_window_allows(window: int) -> None:
    made = 0

    def tasks() -> Iterator[Callable[[], int]]:
        nonlocal made
        for number in range(20):
            made += 1
            yield partial(int, number)

    for taken, result in enumerate(in_order(tasks(), threads=2, window=window)):
        assert result == taken
        assert made <= taken + window


def test_an_error_comes_at_its_place_and_drops_what_has_not_begun() -> None:
    release = threading.Event()
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise KeyError(number)
        if number == 2:
            assert release.wait(10)
        return number

    results = in_order([partial(work, number) for number in range(6)], threads=1, window=6)
    assert next(results) == 0
    threading.Timer(0.2, release.set).start()
    with pytest.raises(KeyError):
        next(results)
    assert begun in ([0, 1], [0, 1, 2])


def test_a_generator_that_is_closed_early_stops_its_threads() -> None:
    results = in_order([partial(int, number) for number in range(100)], threads=2, window=4)
    assert next(results) == 0
    before = threading.active_count()
    results.close()
    assert threading.active_count() < before

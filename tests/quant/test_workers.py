"""Workers: order, errors, and one thread of torch in each."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch

from quantpress.quant.workers import Workers, chunks


def test_tasks_compute_with_one_thread_and_the_caller_keeps_its_own_number() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Workers(2) as workers:
            assert workers.run([torch.get_num_threads] * 8) == [1] * 8
        assert torch.get_num_threads() == 3
        seen: list[int] = []
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [3]
    finally:
        torch.set_num_threads(before)


def test_a_worker_that_was_idle_while_another_pool_ended_still_computes_with_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    together = threading.Barrier(2)
    try:
        with Workers(2) as workers:
            workers.run([together.wait] * 2)  # both have started, and neither has used torch
            with Workers(1):
                pass
            seen = workers.run([partial(_threads_beside, together)] * 2)
        assert seen == [1, 1]
    finally:
        torch.set_num_threads(before)


def _threads_beside(together: threading.Barrier) -> int:
    together.wait()
    return int(torch.get_num_threads())


def test_results_come_in_the_order_of_the_tasks() -> None:
    def slow(number: int) -> int:
        time.sleep(0.02 if number == 0 else 0)
        return number

    with Workers(3) as workers:
        assert workers.run(partial(slow, number) for number in range(9)) == list(range(9))


def test_the_error_of_a_task_is_raised() -> None:
    def fail() -> None:
        raise ValueError("this one")

    with pytest.raises(ValueError, match="this one"), Workers(2) as workers:
        workers.run([fail])


def test_chunks_cover_everything_once() -> None:
    assert chunks(0, 4) == []
    assert chunks(9, 4) == [slice(0, 4), slice(4, 8), slice(8, 9)]

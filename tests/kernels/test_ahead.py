"""Compiling launches ahead in processes of their own: they end, and what goes wrong in one is no error here."""

from __future__ import annotations

import multiprocessing
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.kernels.launch import Launch, Problem
from quantpress.kernels.tuning.ahead import Ahead

PROBLEM = Problem(1, 32, 64, 4, 32, "float16")
LAUNCHES = [Launch("gemv", block_n=32, block_k=64), Launch("gemv", block_n=17)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_launches_run_in_processes_that_end_with_the_pool() -> None:
    with Ahead(2, "cpu") as ahead:
        ahead.compile(PROBLEM, LAUNCHES)  # the second one is refused by its kernel; both are, where none is interpreted
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()


def test_no_process_is_started_for_one_job_or_one_launch() -> None:
    for jobs, launches in ((1, LAUNCHES), (8, LAUNCHES[:1])):
        with Ahead(jobs) as ahead:
            ahead.compile(PROBLEM, launches)
            assert ahead._pool is None


def test_a_process_that_crashes_ends_compiling_ahead_and_nothing_else() -> None:
    class Pool:
        ended = False

        def map(self, *given: Any) -> Any:
            raise BrokenProcessPool

        def shutdown(self, **flags: Any) -> None:
            self.ended = True

    ahead, pool = Ahead(4), Pool()
    ahead._pool = pool  # type: ignore[assignment]
    ahead.compile(PROBLEM, LAUNCHES)
    assert pool.ended
    ahead.compile(PROBLEM, LAUNCHES)
    assert ahead._pool is None

"""Transfers on threads: what is counted, and what an error does to the others."""

from __future__ import annotations

import threading
import time

import pytest

from quantpress.pipelines.batch import transfers
from quantpress.pipelines.batch.transfers import Moved, Transfer, run_transfers
from quantpress.pipelines.progress import no_progress


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "_PAUSES", (0.01, 0.01))


def test_bytes_of_an_attempt_that_failed_are_not_counted() -> None:
    attempts: list[int] = []
    seen: list[int] = []

    def fails_once(moved: Moved) -> None:
        attempts.append(1)
        moved(60)
        if len(attempts) == 1:
            raise OSError("broken")
        moved(40)

    def waits(moved: Moved) -> None:
        time.sleep(0.5)
        moved(900)

    run_transfers(
        [Transfer(fails_once), Transfer(waits)],
        threads=1,
        phase="fetch",
        total=1000,
        progress=lambda phase, done, total: seen.append(done),
    )
    assert len(attempts) == 2
    assert set(seen) <= {0, 60, 100, 1000}
    assert 100 in seen
    assert seen[-1] == 1000


def test_an_error_stops_the_others() -> None:
    stopped = threading.Event()

    def endless(moved: Moved) -> None:
        try:
            while True:
                moved(1)
                time.sleep(0.01)
        finally:
            stopped.set()

    def fails(moved: Moved) -> None:
        raise PermissionError("not yours")

    with pytest.raises(PermissionError, match="not yours"):
        run_transfers([Transfer(endless), Transfer(fails)], threads=2, phase="fetch", total=10, progress=no_progress)
    assert stopped.wait(1)


def test_a_bug_is_raised_and_not_tried_again() -> None:
    attempts: list[int] = []

    def buggy(moved: Moved) -> None:
        attempts.append(1)
        raise TypeError("bug")

    with pytest.raises(TypeError):
        run_transfers([Transfer(buggy)], threads=1, phase="fetch", total=1, progress=no_progress)
    assert len(attempts) == 1

"""What every executor offers to the scheduler: start a task, and say what has happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from quantpress.pipelines.batch.tasks import Event, Task

__all__ = ["Pool"]


class Pool(Protocol):
    """Workers. Every method is called on one thread, the scheduler's."""

    def has_room(self, task: Task) -> bool:
        """Whether the task can be started now; True for any task, however large, where nothing runs."""
        ...

    def start(self, task: Task) -> None:
        """Starts a task; its events follow, the last one is "finished"."""
        ...

    def events(self, timeout: float) -> Sequence[Event]:
        """Gives what has happened since the last call, waiting at most `timeout` seconds for the first event."""
        ...

    def close(self, *, kill: bool) -> None:
        """Ends the workers: when they are idle, or at once (they are stopped as SIGTERM stops a command)."""
        ...

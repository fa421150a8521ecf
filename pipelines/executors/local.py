"""Runs tasks in processes of this machine, as many at once as memory, processors and GPUs allow."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from queue import Empty, SimpleQueue

from quantpress.pipelines.batch.tasks import Event, Task, TaskResult
from quantpress.pipelines.executors.attempt import PERFORM
from quantpress.pipelines.executors.room import free_bytes, usable_cores, visible_gpus
from quantpress.pipelines.executors.worker import Hello
from quantpress.pipelines.executors.worker_process import Heard, WorkerProcess
from quantpress.quant.errors import OutputError, QuantpressError

__all__ = ["LocalPool"]

_CORES_PER_WORKER = 4  # a task computes on several threads; with more workers at once they wait for the same memory
_STOP_SECONDS = 5.0  # that a worker has to remove what it has begun
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS")


class LocalPool:
    """Worker processes that live as long as the pool and do one task at a time.

    A worker is a fresh Python program that imports `perform`: nothing is inherited by forking, and a script that uses
    this needs no `if __name__ == "__main__"`. A task whose worker dies is tried once more; where the system killed it,
    probably for want of memory, alone.

    Attributes:
        workers: tasks at once, at most.
        threads: of each task.
        memory: bytes that the estimates of running tasks may come to; one task may exceed it alone.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        memory: int | None = None,
        cores: int | None = None,
        gpus: Sequence[str] | None = None,
        perform: str = PERFORM,
    ) -> None:
        """Starts nothing yet; workers are started when they are needed.

        Args:
            workers: tasks at once; None for one per four processors.
            memory: bytes for all; None for what is free now.
            cores: processors for all; None for those that this process may use.
            gpus: CUDA_VISIBLE_DEVICES of each GPU slot; None for all devices there are.
            perform: what does a task, "module:function".
        """
        cores = cores or usable_cores()
        self.workers = workers or max(1, cores // _CORES_PER_WORKER)
        self.threads = max(1, cores // self.workers)
        self.memory = free_bytes() if memory is None else memory
        found = visible_gpus() if gpus is None else tuple(gpus)
        self._gpus = found or ("",)  # a device that was not found is the one of whoever asks for it
        level = logging.getLogger("quantpress").getEffectiveLevel()
        self._hello = Hello(os.getpid(), perform, self.threads, level)
        self._heard: SimpleQueue[Heard] = SimpleQueue()
        self._said: deque[Event] = deque()
        self._all: list[WorkerProcess] = []
        self._tried: set[str] = set()
        self._again: deque[tuple[Task, bool]] = deque()  # tasks of lost workers, and whether they must be alone
        self._alone = False

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the workers, idle or not."""
        return tuple(worker.pid for worker in self._all)

    def _running(self) -> list[Task]:
        return [worker.task for worker in self._all if worker.task is not None]

    def has_room(self, task: Task) -> bool:
        """Whether a worker, memory and, where one is needed, a GPU are free; True where nothing runs."""
        running = self._running()
        if self._again or (self._alone and running):
            return False
        if not running:
            return True
        if len(running) >= self.workers or (task.estimate.gpu and self._free_gpu() is None):
            return False
        return sum(each.estimate.memory for each in running) + task.estimate.memory <= self.memory

    def _free_gpu(self) -> str | None:
        taken = {worker.gpu for worker in self._all if worker.task is not None}
        return next((gpu for gpu in self._gpus if gpu not in taken), None)

    def start(self, task: Task) -> None:
        """Starts a task; that it cannot be sent to a worker is its result."""
        self._said.append(Event("started", task.id))
        self._start(task)

    def _start(self, task: Task) -> None:
        try:
            self._worker_for(task).start(task)
        except QuantpressError as error:
            self._fail(task, str(error), error.exit_code)

    def _worker_for(self, task: Task) -> WorkerProcess:
        """Gives an idle worker that sees the right GPU, a new one, or a new one in the place of another idle one."""
        gpu = (self._free_gpu() or "") if task.estimate.gpu else None
        idle = [worker for worker in self._all if worker.task is None]
        for worker in idle:
            if worker.gpu == gpu:
                return worker
        if len(self._all) >= self.workers and idle:
            self._all.remove(idle[0])
            idle[0].ask_to_end()
            idle[0].wait(time.monotonic() + _STOP_SECONDS)
        environment = {name: str(self.threads) for name in _THREADS} | dict(os.environ)
        if gpu:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        worker = WorkerProcess(self._hello, self._heard, environment, gpu)
        self._all.append(worker)
        return worker

    def _fail(self, task: Task, error: str, exit_code: int) -> None:
        result = TaskResult(task.id, "failed", error=error, exit_code=exit_code)
        self._said.append(Event("finished", task.id, result=result))

    def events(self, timeout: float) -> Sequence[Event]:
        """Gives what has happened, waiting at most `timeout` seconds for the first event."""
        with contextlib.suppress(Empty):
            self._take(*self._heard.get(timeout=0 if self._said else max(timeout, 0)))
            while True:
                self._take(*self._heard.get_nowait())
        self._start_again()
        events = list(self._said)
        self._said.clear()
        return events

    def _take(self, worker: WorkerProcess, event: Event | None) -> None:
        if worker not in self._all:
            return  # it was stopped, or it is known that it is lost
        if event is None:
            self._lost(worker)
            return
        if event.kind == "finished":
            worker.task = None
        self._said.append(event)

    def _lost(self, worker: WorkerProcess) -> None:
        self._all.remove(worker)
        worker.wait(time.monotonic())
        how, memory = worker.death()
        task = worker.task
        if task is None:
            return
        if task.id not in self._tried:
            self._tried.add(task.id)
            self._again.append((task, memory))
            again = f"{task.title} is tried once more{', alone' if memory else ''}: {how}"
            self._said.append(Event("retried", task.id, level="WARNING", message=again))
            return
        wanted = f", {task.estimate.memory / 1e9:.1f} GB were expected" if memory and task.estimate.memory else ""
        self._fail(task, f"{how}{wanted}; this was its second try", OutputError.exit_code if memory else 1)

    def _start_again(self) -> None:
        """Starts tasks of lost workers before all others."""
        while self._again:
            task, alone = self._again[0]
            running = self._running()
            if (running and (alone or self._alone)) or len(running) >= self.workers:
                return
            self._again.popleft()
            self._alone = alone
            self._start(task)

    def close(self, *, kill: bool) -> None:
        """Ends the workers; with `kill` they have five seconds to remove what they have begun."""
        workers, self._all = self._all, []
        self._again.clear()
        try:
            for worker in workers:
                if kill:
                    worker.terminate()
                else:
                    worker.ask_to_end()
            deadline = time.monotonic() + _STOP_SECONDS
            for worker in workers:
                worker.wait(deadline)
        finally:
            for worker in workers:
                worker.wait(time.monotonic())

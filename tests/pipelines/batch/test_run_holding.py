"""While a batch runs, `cache prune` takes away nothing that its later tasks read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from quantpress.pipelines.batch import run
from quantpress.pipelines.batch.tasks import Event, Task, TaskResult
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.prune import Wanted, prune
from quantpress.pipelines.cache.store import Cache
from tests.pipelines.cache.making_entries import make, material


def test_what_a_task_has_kept_is_held_from_its_end_to_that_of_the_batch(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with Cache(folder) as worker:
        keys = [make(worker, bits).key for bits in (2, 3, 4)]
    kinds = dict(zip(keys, ("prepare", "reference", "build"), strict=True))
    tasks = tuple(Task(key, "job", kind, work=SimpleNamespace(kind=kind, key=key)) for key, kind in kinds.items())
    plan = cast(Any, SimpleNamespace(tasks=tasks, cache=Cache(folder)))
    told: list[Event] = []
    tell = run._holding(plan, told.append)
    events = [Event("log", "", message="hello"), *(Event("started", key) for key in keys)]
    events += [Event("finished", key, result=TaskResult(key, "done")) for key in keys]
    for event in events:
        tell(event)
    assert told == events
    assert {piece.name for piece in prune(Cache(folder), Wanted(everything=True)).in_use} == set(keys[:2])
    plan.cache.close()
    assert {piece.name for piece in prune(Cache(folder), Wanted(everything=True)).removed} == set(keys[:2])


def test_a_task_whose_entry_is_gone_already_is_no_error(tmp_path: Path) -> None:
    key = key_of(material())
    task = Task(key, "job", "gptq", work=SimpleNamespace(kind="prepare", key=key))
    plan = cast(Any, SimpleNamespace(tasks=(task,), cache=Cache(tmp_path / "cache")))
    run._holding(plan, lambda event: None)(Event("finished", key, result=TaskResult(key, "done")))

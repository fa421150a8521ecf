"""Tasks on a local Ray: results and events come back, lost workers are replaced, nothing is left behind."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import quantpress as qp
from quantpress.pipelines.batch.tasks import Estimate, Event, Task, TaskResult
from quantpress.pipelines.executors.ray_pool import RayPool
from quantpress.pipelines.executors.schedule import run_tasks
from quantpress.quant.errors import OutputError, UsageError
from tests.pipelines.batch.batches import Batch, gguf, job
from tests.pipelines.executors.processes import is_gone, within

pytest.importorskip("ray", reason="the ray executor needs Ray: pip install 'quantpress[ray]'")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals")

HERE = Path(__file__).parent
WORK = "fake_work:perform"


class Kept:
    """A pool whose Ray outlives single runs, for starting one takes ten seconds; `close` only ends what runs."""

    def __init__(self, pool: RayPool) -> None:
        self._pool = pool
        self.threads, self.address, self.pid = pool.threads, pool.address, pool.pid

    def has_room(self, task: Task) -> bool:
        return self._pool.has_room(task)

    def start(self, task: Task) -> None:
        self._pool.start(task)

    def events(self, timeout: float) -> Any:
        return self._pool.events(timeout)

    def close(self, *, kill: bool) -> None:
        assert not kill


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pool(cache: Path) -> Iterator[Kept]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setattr(logging.getLogger("quantpress"), "level", logging.INFO)
        kept = RayPool(cores=2, threads=1, memory=2 << 30, cache=cache, perform=WORK)
    yield Kept(kept)
    kept.close(kill=False)


def run(pool: Any, *tasks: Task, watch: Callable[[Event], None] | None = None) -> tuple[list[TaskResult], list[Event]]:
    events: list[Event] = []

    def told(event: Event) -> None:
        events.append(event)
        if watch is not None:
            watch(event)

    return list(run_tasks(tasks, pool, told).values()), events


def task(name: str, *work: Any, needs: tuple[str, ...] = (), **estimate: Any) -> Task:
    return Task(name, "job", f"fake {name}", needs=needs, work=work, estimate=Estimate(**estimate))


def test_results_come_back_in_order_and_workers_are_other_processes(pool: Kept) -> None:
    results, events = run(pool, task("a", "pid"), task("b", "threads", needs=("a",)))
    assert [(result.task, result.state) for result in results] == [("a", "done"), ("b", "done")]
    assert results[0].output != os.getpid()
    assert results[1].output == pool.threads == 1
    kinds = [(event.kind, event.task) for event in events if event.kind != "log"]
    assert kinds == [("started", "a"), ("finished", "a"), ("started", "b"), ("finished", "b")]
    assert all(result.seconds > 0 and result.peak_rss > 1 << 20 for result in results)


def test_two_tasks_run_at_once_and_not_three(pool: Kept, tmp_path: Path) -> None:
    results, _ = run(pool, *(task(name, "together", str(tmp_path), name, 2) for name in "abc"))
    assert max(result.output for result in results) == 2


def test_memory_that_is_expected_bounds_how_many_run(pool: Kept, tmp_path: Path) -> None:
    tasks = [task(name, "together", str(tmp_path), name, 1, memory=1200 << 20) for name in "abc"]
    assert [result.output for result in run(pool, *tasks)[0]] == [1, 1, 1]


def test_a_task_larger_than_every_node_runs_alone(pool: Kept) -> None:
    results, _ = run(pool, task("a", "pid", memory=1 << 50), task("b", "pid", gpu=True))
    assert [result.state for result in results] == ["done", "done"]


def test_progress_and_messages_arrive(pool: Kept, capfd: pytest.CaptureFixture[str]) -> None:
    _, events = run(pool, task("a", "steps", 5, 0.1), task("b", "talk"))
    steps = [event for event in events if event.kind == "progress"]
    assert steps[-1].phase == "work"
    assert (steps[-1].done, steps[-1].total) == (5, 5)
    assert all(event.memory > 1 << 20 for event in steps)
    logs = {(event.level, event.message) for event in events if event.kind == "log" and event.task == "b"}
    assert ("WARNING", "a warning of 4 words") in logs
    assert ("INFO", "an information") in logs
    assert any("a python warning" in message for _, message in logs)
    assert capfd.readouterr() == ("", "")


def test_one_failed_task_leaves_the_others(pool: Kept) -> None:
    results, _ = run(
        pool,
        task("a", "fail", "config.json: no such file"),
        task("b", "pid", needs=("a",)),
        task("c", "bug"),
        task("d", "unsendable"),
        Task("e", "job", "lambda", work=lambda: None),
        task("f", "pid"),
    )
    assert [result.state for result in results] == ["failed", "skipped", "failed", "failed", "failed", "done"]
    assert [result.exit_code for result in results] == [3, 3, 1, 1, 2, 0]
    assert results[0].error == "config.json: no such file"
    assert "RuntimeError: two lines" in results[2].error


def test_a_killed_worker_is_replaced_and_told_of(pool: Kept, tmp_path: Path) -> None:
    results, events = run(pool, task("a", "die", signal.SIGKILL, str(tmp_path / "died")), task("b", "pid"))
    assert [result.state for result in results] == ["done", "done"]
    assert (tmp_path / "died").exists()
    assert [
        (event.kind, event.task) for event in events if event.kind in ("retried", "started") and event.task == "a"
    ] == [
        ("started", "a"),
        ("retried", "a"),
    ]


@pytest.mark.parametrize("work", [("die", signal.SIGSEGV), ("leave", 3)])
def test_a_task_that_always_kills_its_worker_fails_alone(pool: Kept, work: tuple[Any, ...]) -> None:
    results, events = run(pool, task("a", *work), task("b", "pid"))
    assert [result.state for result in results] == ["failed", "done"]
    assert "was lost" in results[0].error
    assert "second try" in results[0].error
    assert sum(event.kind == "retried" for event in events) == 1


def test_nodes_that_do_not_see_the_cache_folder_fail_with_its_name(pool: Kept, cache: Path) -> None:
    token = next(path for path in cache.iterdir() if path.name.startswith(".quantpress-ray-") and path.suffix == ".tmp")
    data = token.read_bytes()
    token.unlink()
    try:
        results, _ = run(pool, task("a", "pid"))
    finally:
        token.write_bytes(data)
    assert results[0].exit_code == OutputError.exit_code
    assert f"{cache}: the cache folder is not there on" in results[0].error


def test_a_batch_on_ray_gives_the_bytes_of_a_batch_here(
    pool: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", pool.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    batch = Batch.with_model(tmp_path)
    codes = {"rtn": {"bits": 4, "group_size": 32}}
    batch.write(job("a", gguf("Q8_0")), job("b", codes, gguf("Q4_0")))
    there = qp.run_pipeline(batch.file, executor="ray", workers=2)
    assert [each.state for each in there.jobs] == ["verified", "verified"]
    bytes_there = {name: batch.output(f"{name}.gguf").read_bytes() for name in ("Q8_0", "Q4_0")}
    assert [each.state for each in batch.run(force=True, fresh=True).jobs] == ["verified", "verified"]
    assert {name: batch.output(f"{name}.gguf").read_bytes() for name in bytes_there} == bytes_there


def children(pid: int) -> set[int]:
    """Process ids of a process's children and theirs, and of what its session holds."""
    found = {pid}
    listing = [path for path in Path("/proc").iterdir() if path.name.isdigit()]
    while True:
        more = set(found)
        for path in listing:
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) in found or int(fields[3]) in found:  # parent, session (proc_pid_stat(5))
                more.add(int(path.name))
        if more == found:
            return found
        found = more


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_cancelled_tasks_clean_up_and_a_cluster_that_was_there_before_stays(
    pool: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("RAY_ADDRESS", pool.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # what newer versions start here wants one
    (tmp_path / "work").mkdir()
    second = RayPool(2, cache=tmp_path / "cache", perform=WORK)
    assert (second.address, second.threads) == (pool.address, 1)
    family = children(second.pid)
    seen = threading.Event()

    def watch(event: Event) -> None:
        if event.kind == "progress":
            assert list((tmp_path / "work").iterdir())
            seen.set()

    tasks = [task(name, "cleanly", str(tmp_path / "work")) for name in "abc"]
    results = run_tasks([*tasks, task("d", "pid", needs=("a",))], second, watch, seen.is_set)
    assert {result.state for result in results.values()} == {"cancelled"}
    assert not list((tmp_path / "work").iterdir())
    assert not list((tmp_path / "cache").iterdir())
    assert within(5, lambda: all(map(is_gone, family)))
    assert run(pool, task("a", "pid"))[0][0].state == "done"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_when_the_driver_is_killed_everything_ends(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    short = Path(tempfile.mkdtemp(prefix="q-"))  # a socket's name may have 107 characters
    code = (
        "import sys; from quantpress.pipelines.executors.ray_pool import RayPool;"
        "from quantpress.pipelines.executors.schedule import run_tasks;"
        "from quantpress.pipelines.batch.tasks import Task;"
        f"sys.path.insert(0, {str(HERE)!r});"
        f"pool = RayPool(cores=1, perform={WORK!r}); print(pool.pid, flush=True);"
        f"run_tasks([Task('a', 'j', 't', work=('cleanly', {str(tmp_path / 'work')!r}))], pool, lambda event: None)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"TMPDIR": str(short)}
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert driver.stdout is not None
        pid = int(driver.stdout.readline())
        assert within(60, lambda: bool(list((tmp_path / "work").iterdir())))
        family = children(pid)
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    assert within(20, lambda: all(map(is_gone, family)))
    assert not list((tmp_path / "work").iterdir())
    short.rmdir()  # nothing is in it


def raylet_of(pid: int) -> int:
    """Process id of the node's process that a worker descends from."""
    while "raylet" not in Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid


@pytest.mark.slow
@pytest.mark.skipif("QUANTPRESS_KILLS" not in os.environ, reason="a cluster that loses a node takes long: make faults")
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_task_of_a_lost_node_is_done_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    program = [sys.executable, str(HERE / "ray_nodes.py")]
    cluster = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        said = ""
        while not said.startswith("address "):
            said = cluster.stdout.readline()
            assert said
        (tmp_path / "pids").mkdir()
        pool = RayPool(address=said.split()[1], cache=tmp_path / "cache", threads=1, perform="ray_nodes:perform")
        assert pool.nodes == 3
        killed: list[Event] = []

        def watch(event: Event) -> None:
            if event.kind == "started" and not killed:
                killed.append(event)
                assert within(30, lambda: bool(list((tmp_path / "pids").iterdir())))
                pid = int(next((tmp_path / "pids").iterdir()).stem)
                cluster.stdin.write(f"kill {raylet_of(pid)}\n")  # type: ignore[union-attr]
                cluster.stdin.flush()  # type: ignore[union-attr]

        results, events = run(pool, Task("a", "job", "fake", work=str(tmp_path / "pids")), watch=watch)
        assert results[0].state == "done"
        assert [event.kind for event in events if event.kind != "log"] == ["started", "retried", "finished"]
    finally:
        cluster.stdin.close()
        cluster.wait()
        cluster.stdout.close()


def test_an_address_where_nobody_is_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("RAY_gcs_rpc_server_connect_timeout_s", "1")
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
    with pytest.raises(OutputError, match=r"the Ray cluster at 127\.0\.0\.1:1 cannot be used"):
        RayPool(perform=WORK)


def test_an_address_of_ray_client_is_refused() -> None:
    with pytest.raises(UsageError, match="ray://head:10001: Ray Client"):
        RayPool(address="ray://head:10001")


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OutputError, match=r"pip install 'quantpress\[ray\]'") as caught:
        RayPool()
    assert caught.value.exit_code == 5

"""A Ray cluster as batches need it: started here or connected to, its nodes looked at, resources for each task."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.pipelines.batch.tasks import Task
from quantpress.pipelines.executors.ray_work import Seen, look
from quantpress.pipelines.executors.room import free_bytes, usable_cores
from quantpress.quant.errors import OutputError

__all__ = ["Cluster", "RayHello", "connected"]

_THREADS = 4  # of each task where nobody says how many tasks are to run at once
_OBJECT_BYTES = 128 << 20  # for Ray's own store; only events pass through it, and Ray would take 30 % of the memory
_LOOK_SECONDS = 90.0  # for a node to start a worker and answer
_MEMORY_SHARE = 0.95  # of a node's memory, for a task that would want more than there is
_SOCKETS = 60  # characters that Ray adds to its folder for a socket, whose name may have 107


@dataclass(frozen=True, slots=True)
class RayHello:
    """What the process that talks to Ray is told first.

    Attributes:
        address: of a cluster; "" to start one on this machine.
        workers: tasks at once; None for as many as there is room for.
        cores: processors of a cluster that is started here; None for all.
        memory: bytes of memory of a cluster that is started here; None for what is free.
        threads: worker threads of each task; None to choose.
        perform: what does the tasks, "module:function".
        level: least level of log messages that are sent on.
        cache: the cache folder; "" where none is used.
        paths: where this program imports from.
        python, packages: versions here, which the nodes' must equal.
    """

    address: str
    workers: int | None
    cores: int | None
    memory: int | None
    threads: int | None
    perform: str
    level: int
    cache: str
    paths: tuple[str, ...]
    python: str
    packages: dict[str, str]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that answers.

    Attributes:
        ray: the module.
        threads: worker threads of each task.
        cores: processors of the largest node.
        memory: bytes of memory of the node that has most.
        gpus: whether a node has a GPU.
        nodes: how many there are.
        token: a file in the cache folder that all nodes see; "" where none is used.
        address: where others can connect to it.
    """

    ray: Any
    threads: int
    cores: int
    memory: int
    gpus: bool
    nodes: int
    token: str
    address: str

    def options(self, task: Task, *, alone: bool) -> dict[str, Any]:
        """Gives the resources that a task takes, in Ray's words.

        No node has room for a task that wants more than the largest node has; it gets nearly all of it and may try.

        Args:
            task: with its estimate.
            alone: whether it is to have the memory of a whole node, for memory ran out.
        """
        most = int(self.memory * _MEMORY_SHARE)
        return {
            "num_cpus": min(self.threads, self.cores),
            "memory": most if alone else min(task.estimate.memory, most),
            "num_gpus": 1 if task.estimate.gpu and self.gpus else 0,
            "max_retries": 0,  # a lost task is started again by us, who tell of it
            "num_returns": "streaming",
            "name": f"{task.job}: {task.title}",
        }


@contextlib.contextmanager
def connected(hello: RayHello) -> Iterator[Cluster]:
    """Starts Ray or connects to a cluster, and checks every node; afterwards leaves it, or ends what was started.

    Raises:
        OutputError: Ray is not installed, the cluster does not answer, or a node cannot do the work.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise OutputError(f"the ray executor needs Ray: pip install 'quantpress[ray]' ({error})") from error
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        _init(ray, hello, stack)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if not nodes:
            raise OutputError(f"the Ray cluster at {hello.address} has no live node")
        token = stack.enter_context(_token(hello.cache))
        _check_nodes(ray, hello, nodes, token)
        yield _described(ray, hello, nodes, token)


def _init(ray: Any, hello: RayHello, stack: contextlib.ExitStack) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if hello.address:
        options["address"] = hello.address
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": hello.cores or usable_cores(),
            "object_store_memory": _OBJECT_BYTES,
            "_memory": hello.memory or free_bytes(),
        }
        folder = tempfile.mkdtemp(prefix="quantpress-ray-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(ray.shutdown)  # before its folder goes
        if len(folder) + _SOCKETS < 107:
            options["_temp_dir"] = folder
    where = f"the Ray cluster at {hello.address}" if hello.address else "a Ray on this machine"
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError, ImportError, AssertionError, ray.exceptions.RayError) as error:
        # ConnectionError and TimeoutError are OSErrors; versions that do not fit are a RuntimeError.
        hint = "; does it want a token (RAY_AUTH_MODE=token)?" if isinstance(error, ConnectionError) else ""
        raise OutputError(f"{where} cannot be used: {_first_line(error)}{hint}") from error


@contextlib.contextmanager
def _token(cache: str) -> Iterator[str]:
    """Puts a small file into the cache folder for as long as the cluster is used."""
    if not cache:
        yield ""
        return
    token = Path(cache) / f".quantpress-ray-{secrets.token_hex(8)}.tmp"
    try:
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_bytes(b"")
    except OSError as error:
        raise OutputError(f"{cache}: cannot be written: {error.strerror}") from error
    try:
        yield str(token)
    finally:
        for path in token.parent.glob(f"{token.name}*"):
            with contextlib.suppress(OSError):
                path.unlink()


def _check_nodes(ray: Any, hello: RayHello, nodes: list[dict[str, Any]], token: str) -> None:
    """Lets every node look at the cache folder and at what is installed.

    Raises:
        OutputError: naming the node.
    """
    strategy = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
    looking = ray.remote(num_cpus=0, max_retries=1)(look)
    asked = [
        (node, looking.options(scheduling_strategy=strategy(node["NodeID"], soft=False)).remote(token))
        for node in nodes
    ]
    for node, answer in asked:
        name = f"Ray node {node.get('NodeManagerHostname') or node.get('NodeManagerAddress')}"
        try:
            seen: Seen = ray.get(answer, timeout=_LOOK_SECONDS)
        except ray.exceptions.GetTimeoutError:
            raise OutputError(f"{name} has not answered for {_LOOK_SECONDS:.0f} seconds") from None
        except ray.exceptions.RayError as error:
            raise OutputError(f"{name} cannot work: quantpress must be installed there: {_last_line(error)}") from error
        _check_seen(name, seen, hello)


def _check_seen(name: str, seen: Seen, hello: RayHello) -> None:
    if hello.cache and not (seen.reply and Path(seen.reply).is_file()):
        raise OutputError(
            f"{hello.cache}: the cache folder is not the same folder on {name}; give `cache` a path on a disk that all"
            " nodes can write"
        )
    there, here = {"python": seen.python, **seen.packages}, {"python": hello.python, **hello.packages}
    for package in sorted({*there, *here}):
        if there.get(package) != here.get(package):
            raise OutputError(
                f"{name} has {package} {there.get(package)}, here it is {here.get(package)}; install the same versions,"
                " or the bytes of outputs would depend on the node"
            )


def _described(ray: Any, hello: RayHello, nodes: list[dict[str, Any]], token: str) -> Cluster:
    resources = [node["Resources"] for node in nodes]
    cores = max(1, int(max(each.get("CPU", 0) for each in resources)))
    total = max(1, int(sum(each.get("CPU", 0) for each in resources)))
    threads = hello.threads or (max(1, total // hello.workers) if hello.workers else _THREADS)
    return Cluster(
        ray=ray,
        threads=min(threads, cores),
        cores=cores,
        memory=int(max(each.get("memory", 0) for each in resources)),
        gpus=any(each.get("GPU", 0) >= 1 for each in resources),
        nodes=len(nodes),
        token=token,
        address=ray.get_runtime_context().gcs_address,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split())[:300] if lines else type(error).__name__


def _last_line(error: Exception) -> str:
    """Ray puts the traceback of the other side first, and the error last."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[-1].split())[:300] if lines else type(error).__name__

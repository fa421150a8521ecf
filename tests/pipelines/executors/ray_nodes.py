"""A Ray cluster of several nodes on this machine, as a program: prints its address, kills the node of a raylet.

Standard input: `kill PID`, where PID is that of a raylet; the end of it ends the cluster.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
    print(f"address {cluster.address}", flush=True)  # noqa: T201
    for line in sys.stdin:
        pid = int(line.split()[1])
        for node in nodes:
            if node.all_processes["raylet"][0].process.pid == pid:
                cluster.remove_node(node, allow_graceful=False)
    cluster.shutdown()


def perform(task: object, progress: object, threads: int) -> object:
    """Does a task of the test: works for long the first time, so that its node can be killed meanwhile."""
    import time
    from pathlib import Path

    from quantpress.pipelines.batch.tasks import Task, TaskResult

    assert isinstance(task, Task)
    folder = Path(task.work)
    again = list(folder.iterdir())
    (folder / f"{os.getpid()}.pid").touch()
    while not again:
        time.sleep(0.05)
    return TaskResult(task.id, "done", output=threads)


if __name__ == "__main__":
    main()

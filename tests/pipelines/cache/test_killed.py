"""A cache is whole at every instant: SIGKILL at each file operation, and at random moments with two runs at once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.store import Cache
from tests.pipelines.cache.killed_at_every_step import SCENARIOS
from tests.pipelines.cache.making_entries import files_in, material

ROOT = Path(__file__).parents[3]
STEPS = 6
STRIDES = {"make": 2, "redo": 3, "update": 2}  # where QUANTPRESS_KILLS does not ask for all
CONTENTS = {f"step {step}": f"{step} of 4 bits".encode() * 1000 for step in range(STEPS)}

# what a stage does that goes on from its last finished step; every start of the work is counted
MAKER = """
import os, sys, time
from pathlib import Path
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.store import Cache
from tests.pipelines.cache.making_entries import material
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
with Cache(folder) as cache, cache.making(key_of(material()), "prepare", material()) as making:
    if making.entry is None:
        with log.open("a") as lines:
            lines.write("begin %d with %d\\n" % (os.getpid(), len(list(making.folder.glob("step ?")))))
        for step in range(int(sys.argv[3])):
            if not (making.folder / f"step {step}").exists():
                time.sleep(0.03)
                (making.folder / "temporary").write_bytes(f"{step} of 4 bits".encode() * 1000)
                (making.folder / "temporary").replace(making.folder / f"step {step}")
        making.commit({})
        with log.open("a") as lines:
            lines.write("end %d\\n" % os.getpid())
"""


def start(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", MAKER, str(folder), str(log), str(STEPS)]
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def at_work(runs: list[subprocess.Popen[bytes]], log: Path) -> subprocess.Popen[bytes]:
    """Waits for a run that has begun the work, or any run if none needs to."""
    while True:
        begun = {line.split()[1] for line in log.read_text().splitlines()} if log.exists() else set()
        for run in runs:
            if str(run.pid) in begun or run.poll() is not None:
                return run
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_killed_at_each_file_operation_it_holds_whole_entries_and_the_work_can_be_done(
    scenario: str, tmp_path: Path
) -> None:
    stride = 1 if "QUANTPRESS_KILLS" in os.environ else STRIDES.get(scenario, 1)
    module = "tests.pipelines.cache.killed_at_every_step"
    arguments = [sys.executable, "-m", module, scenario, str(tmp_path), str(stride)]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert int(ended.stdout) >= 6
    assert "damaged" not in ended.stderr


def test_of_several_runs_at_once_one_does_the_work(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with contextlib.ExitStack() as stack:
        for run in [stack.enter_context(start(tmp_path / "cache", log)) for _ in range(4)]:
            _, message = run.communicate(timeout=60)
            assert run.returncode == 0, message.decode()
    assert [line.split()[0] for line in log.read_text().splitlines()] == ["begin", "end"]
    found = Cache(tmp_path / "cache").find(key_of(material()))
    assert found is not None
    assert files_in(found.folder) == CONTENTS


@pytest.mark.slow
def test_runs_that_are_killed_at_random_moments_end_with_the_same_bytes(tmp_path: Path) -> None:
    rng = random.Random(7)
    kills = int(os.environ.get("QUANTPRESS_KILLS", "12"))
    folder, log = tmp_path / "cache", tmp_path / "log"
    key = key_of(material())
    runs: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        for _ in range(kills):
            runs = [run for run in runs if run.poll() is None]
            while len(runs) < 2:
                runs.append(stack.enter_context(start(folder, log)))
            victim = at_work(runs, log)
            time.sleep(rng.uniform(0, 0.3))  # the work takes 0.2 s
            victim.kill()
            victim.wait(10)
            cache = Cache(folder)
            assert not cache.layout.entry(key).exists() or cache.damage(key) == ""
            cache.remove(key)  # so that there is work to be killed at
        for run in runs:
            assert run.wait(60) in (0, -signal.SIGKILL)
        assert stack.enter_context(start(folder, log)).wait(60) == 0
    found = Cache(folder).find(key)
    assert found is not None
    assert files_in(found.folder) == CONTENTS
    assert any(not line.endswith("with 0") for line in log.read_text().splitlines() if line.startswith("begin"))

"""A batch that is killed at random moments and run again gives the bytes of one that nobody disturbed.

A few kills here; `QUANTPRESS_KILLS=50` for as many as it takes to believe it (make faults).
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from tests.pipelines.batch.batch_runs import Ended, contents, only_whole, run, stopped_at, write_pipeline
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("QUANTPRESS_KILLS", "1"))
SEED = int(os.environ.get("QUANTPRESS_KILLS_SEED", "0"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("kills") / "tiny", "llama", dtype="bfloat16")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, dict[str, bytes]]:
    """How a run ends that nobody disturbs, and what it writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run(write_pipeline(folder, model))
    assert ended.code == 0, ended.said
    return ended, contents(folder / "out")


def moment(recorded: Ended, chance: random.Random) -> tuple[int, float]:
    """A moment of a run: an event, and seconds after it; most of the time something else is going on each time.

    Times of the recorded run are no good by themselves, for a busy machine stretches them.
    """
    times = [0.0, *(when for when, _ in recorded.events), recorded.seconds]
    place = chance.randrange(len(times) - 1)
    return place - 1, chance.uniform(0, times[place + 1] - times[place])


@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    model: Path, undisturbed: tuple[Ended, dict[str, bytes]], tmp_path: Path, number: int
) -> None:
    recorded, whole = undisturbed
    chance = random.Random(f"{SEED}-{number}")
    file, out = write_pipeline(tmp_path, model), tmp_path / "out"
    told = []
    for _ in range(chance.choice((1, 1, 2, 3))):
        place, delay = moment(recorded, chance)
        with stopped_at(file, place, delay, signal.SIGKILL) as running:
            ended = running.wait()
        told.append(f"killed {delay:.2f} s after event {place}, exit code {ended.code}")
        assert only_whole(out, whole), told
    last = run(file)
    assert last.code == 0, (told, last.said)
    assert contents(out) == whole, told

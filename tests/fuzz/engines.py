"""Where inputs come from: an engine that watches which code runs, one that makes examples smaller, one of our own."""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz.mutate import mutated, mutated_once
from tests.fuzz.target import Target

__all__ = ["ENGINES", "Try", "best_engine", "run_engine"]

ENGINES = ("atheris", "hypothesis", "own")
Try = Callable[[bytes], None]
_FRESH = 0.25  # of the inputs begin with a seed again: what covers new code is most often a new way to be refused
_STRAIGHT = 0.2  # of the changes are libFuzzer's own; it knows bytes and what they were compared with, not the formats


def best_engine() -> str:
    """Gives the engine that watches coverage, where it is installed."""
    return "atheris" if importlib.util.find_spec("atheris") else "own"


def run_engine(engine: str, target: Target, attempt: Try, *, seconds: float, seed: int, folder: Path) -> None:
    """Gives inputs to `attempt` until the time is over; atheris ends the process then."""
    seeds = dict(target.seeds())
    for data in seeds.values():
        attempt(data)
    if engine == "atheris":
        _atheris(target, attempt, seconds, seed, folder)
    elif engine == "hypothesis":
        _hypothesis(target, attempt, seconds, seed)
    else:
        end = time.monotonic() + seconds
        for data in own_inputs(target, seed):
            if time.monotonic() > end:
                return
            attempt(data)


def own_inputs(target: Target, seed: int) -> Iterator[bytes]:
    """Gives changed seeds without end, the same ones for the same seed."""
    rng = random.Random(f"{seed} {target.name}")
    seeds = list(target.seeds().values())
    while True:
        yield mutated(rng.choice(seeds), rng, target.words, seeds, target.max_len)


def _hypothesis(target: Target, attempt: Try, seconds: float, seed: int) -> None:
    """Draws a seed and a list of changes, so that what is found is made of as few changes as will do."""
    import hypothesis
    from hypothesis import strategies as st

    seeds = list(target.seeds().values())
    end = time.monotonic() + seconds

    def run(start: bytes, changes: list[int]) -> None:
        if time.monotonic() > end:
            return
        for number in changes:
            start = mutated_once(start, random.Random(number), target.words, seeds)[: target.max_len]
        attempt(start)

    changes = st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=6)
    given = hypothesis.given(st.sampled_from(seeds), changes)(run)
    settings = hypothesis.settings(
        max_examples=1000, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    while time.monotonic() < end:
        hypothesis.seed(seed)(settings(given))()
        seed += 1


def _atheris(target: Target, attempt: Try, seconds: float, seed: int, folder: Path) -> None:
    """Runs libFuzzer under Python; modules that are to be watched were imported by `watched_import`."""
    import atheris

    seeds = list(target.seeds().values())
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(seeds):
        (corpus / str(number)).write_bytes(data)

    def change(data: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < _FRESH:
            data = rng.choice(seeds)
        elif rng.random() < _STRAIGHT:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(bytes(data), rng, target.words, seeds, max_size)

    options = [
        sys.argv[0], f"-seed={seed % (1 << 31) or 1}", f"-max_total_time={max(1, int(seconds))}",
        f"-max_len={target.max_len}", "-timeout=120", "-rss_limit_mb=0", "-verbosity=0", "-detect_leaks=0",
        f"-artifact_prefix={folder}/", str(corpus),
    ]  # fmt: skip
    atheris.Setup(options, lambda data: attempt(bytes(data)), custom_mutator=change)
    atheris.Fuzz()

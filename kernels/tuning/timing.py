"""How long a launch takes on a GPU, as a model that decodes would see it.

Launches are captured in a CUDA graph, so that the host's part is not counted, and follow each other as the layers of a
model do. Each launch of the graph takes another copy of the weight: a graph goes through several times the L2 cache
before it comes back to a copy, so every weight is read from memory (inputs and outputs, which a layer finds in the
cache in a model too, may stay there). A replay is one sample; what is reported is the median of many.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "copies", "copy_bandwidth", "graph_seconds", "timing"]

_CACHES = 4  # times the L2 cache that lie between two reads of a copy
_COPIED = 1 << 30  # bytes of the copy that bandwidth is measured by
_LAUNCHES = 32  # of a graph, at least: what a replay takes to start, some microseconds, is then shared by as many


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one launch: the median of samples, and the values below which a fifth and four fifths of them lie."""

    median: float
    low: float
    high: float
    samples: int


def timing(seconds: Sequence[float]) -> Timing:
    """Sums samples up."""
    if len(seconds) < 2:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[3], len(seconds))


def copies(nbytes: int, cache_bytes: int) -> int:
    """Gives how many copies of a weight of `nbytes` a graph takes turns with, so that none is found in the L2 cache."""
    return 1 + math.ceil(_CACHES * cache_bytes / max(nbytes, 1 << 16))


def graph_seconds(runs: Sequence[Callable[[], object]], replays: int = 25) -> list[float]:
    """Measures launches in a CUDA graph.

    Args:
        runs: the same work on as many copies of its weight; they are launched on the current stream.
        replays: samples.

    Returns:
        Seconds of one launch, a value for each replay.

    Raises:
        RuntimeError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("launches are timed on CUDA devices")
    count = math.ceil(_LAUNCHES / len(runs)) * len(runs)
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is compiled or allocated once must not be captured
        for run in runs[:2]:
            run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        for number in range(count):
            runs[number % len(runs)]()
    graph.replay()
    return [seconds / count for seconds in _event_seconds(graph.replay, replays)]


def copy_bandwidth(device: torch.device | str = "cuda", *, replays: int = 25) -> float:
    """Measures bytes a second, read and written together, of a copy far larger than the cache."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    source.random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * _COPIED / statistics.median(_event_seconds(lambda: target.copy_(source), replays))


def _event_seconds(run: Callable[[], object], replays: int) -> list[float]:
    kind: Any = torch.cuda.Event
    events = [(kind(enable_timing=True), kind(enable_timing=True)) for _ in range(replays)]
    for start, end in events:  # all are queued at once: the device does not wait for the host in between
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) / 1000 for start, end in events]

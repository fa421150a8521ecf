"""The decoder as a runtime: what it keeps of weights and of windows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.torch_runtime import TorchRuntime
from quantpress.quant.errors import InputError
from tests.pipelines.kept_references import watched
from tests.tiny import tiny_checkpoint

WINDOWS = [np.random.default_rng(seed).integers(1, 320, 24).astype(np.int32) for seed in range(5)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("runtime") / "model", "gemma2"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keeps tiny products from waiting for threads."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("max_memory", [0, None])
def test_windows_that_were_prepared_are_scored_as_others(source: Checkpoint, max_memory: int | None) -> None:
    one, other = (TorchRuntime.of_checkpoint(source, max_memory=max_memory) for _ in range(2))
    one.prepare(WINDOWS, 12)
    for window in WINDOWS:
        np.testing.assert_array_equal(one.logits(window, 12), other.logits(window, 12))


@pytest.mark.parametrize("max_memory", [0, None])
def test_preparing_reads_each_layer_once_and_scoring_none(source: Checkpoint, max_memory: int | None) -> None:
    reads = Counter[str]()
    runtime = TorchRuntime.of_checkpoint(watched(source, reads), max_memory=max_memory)
    runtime.prepare(WINDOWS, 12)
    runtime.prepare(WINDOWS[:2], 12)
    for window in WINDOWS:
        runtime.logits(window, 12)
    assert {count for name, count in reads.items() if ".layers." in name} == {1}


def test_layers_are_forgotten_once_all_windows_passed_through(source: Checkpoint) -> None:
    runtime = TorchRuntime.of_checkpoint(source)
    runtime.prepare(WINDOWS, 12)
    assert {layer for _, layer in runtime._decoder.weights._kept} == {-1}


def test_a_window_that_was_not_prepared_stays_with_its_weights(source: Checkpoint, tmp_path: Path) -> None:
    reads = Counter[str]()
    runtime = TorchRuntime.of_checkpoint(watched(source, reads))
    for window in WINDOWS:
        runtime.logits(window, 12)
    assert set(reads.values()) == {1}


@pytest.mark.parametrize("threads", [2, 3])
def test_windows_side_by_side_give_what_one_after_the_other_gives(source: Checkpoint, threads: int) -> None:
    one, other = (TorchRuntime.of_checkpoint(source) for _ in range(2))
    one.prepare(WINDOWS, 12)
    torch.set_num_threads(threads)
    other.prepare(WINDOWS, 12)
    assert torch.get_num_threads() == threads
    for window in WINDOWS:
        np.testing.assert_array_equal(one.prepared(window, 12), other.prepared(window, 12))


@pytest.mark.parametrize(
    ("threads", "windows", "length", "taken"),
    [(4, 5, 24, 4), (4, 3, 24, 3), (8, 5, 24, 5), (10, 5, 24, 1), (1, 5, 24, 1), (4, 5, 6000, 1)],
    ids=["enough", "fewer windows", "most are busy", "half would be idle", "one", "too much memory"],
)
def test_windows_run_side_by_side_where_that_keeps_threads_busy_and_memory_small(
    source: Checkpoint, threads: int, windows: int, length: int, taken: int
) -> None:
    torch.set_num_threads(threads)
    assert TorchRuntime.of_checkpoint(source)._threads(windows, length) == taken


def test_an_error_in_a_window_reaches_the_caller(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(layer: int, slot: str, values: torch.Tensor) -> torch.Tensor:
        raise InputError(f"layer {layer}")

    runtime = TorchRuntime.of_checkpoint(source)
    monkeypatch.setattr(runtime, "_rounded_input", refuse)
    torch.set_num_threads(2)
    with pytest.raises(InputError, match="layer 0"):
        runtime.prepare(WINDOWS, 12)
    assert torch.get_num_threads() == 2

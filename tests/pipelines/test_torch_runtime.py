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
    assert {layer for _, layer in runtime._decoder._kept} == {-1}


def test_a_window_that_was_not_prepared_stays_with_its_weights(source: Checkpoint, tmp_path: Path) -> None:
    reads = Counter[str]()
    runtime = TorchRuntime.of_checkpoint(watched(source, reads))
    for window in WINDOWS:
        runtime.logits(window, 12)
    assert set(reads.values()) == {1}

"""The torch runtime keeps codes where their numbers do not fit, and gives the same logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.compressed_tensors.pack import FORMAT as COMPRESSED
from quantpress.convert.gptq.pack import GPTQ_V1
from quantpress.convert.open import open_checkpoint
from quantpress.convert.packed_weights import PackedWeights
from quantpress.convert.preflight import preflight
from quantpress.pipelines.torch_runtime import TorchRuntime
from tests.packed_folder import rounded
from tests.packed_models import Codes, quantized_model, reference
from tests.tiny import tiny_checkpoint

# float32 sums in another order, see tests/convert/test_packed_weights.py
TOLERANCE = 1e-4
WINDOWS = [np.arange(start, start + 32, dtype=np.int32) for start in (1, 50, 99, 150, 200)]

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Read = TypeVar("Read")
Model = tuple[Path, Path, Codes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("packed")
    source = tiny_checkpoint(folder / "model", "llama")
    return source, folder / "q", quantized_model(source, folder / "q", GPTQ_V1, rounded(4, 32, symmetric=True))


def counted(checkpoint: Checkpoint) -> tuple[Checkpoint, Counter[str]]:
    """Gives the checkpoint and how often the codes of each weight are read."""
    reads: Counter[str] = Counter()

    def reader(name: str, read: Callable[[], Read] | None) -> Callable[[], Read]:
        def counting() -> Read:
            assert read is not None
            reads[name] += 1
            return read()

        return counting

    lazies = {
        name: replace(lazy, read=reader(name, lazy.read), streams=reader(name, lazy.streams))
        for name, lazy in checkpoint.quantized.items()
    }
    return replace(checkpoint, quantized=lazies), reads


def limits(checkpoint: Checkpoint) -> tuple[int, int]:
    """Bytes that the packed and the float32 weights take."""
    packed = PackedWeights(checkpoint, preflight(checkpoint)).resident_bytes(4)
    dense = checkpoint.parameters * 4
    assert packed < dense
    return packed, dense


@pytest.mark.parametrize("prepared", [True, False])
@torch.no_grad()
def test_codes_are_read_once_where_only_they_fit_memory(model: Model, prepared: bool) -> None:
    source, folder, codes = model
    checkpoint, reads = counted(open_checkpoint(folder))
    packed, dense = limits(checkpoint)
    theirs = reference(source, codes)
    for memory in (packed, dense - 1):
        reads.clear()
        with TorchRuntime.of_checkpoint(checkpoint, max_memory=memory) as runtime:
            if prepared:
                runtime.prepare(WINDOWS, 16)
            for window in WINDOWS:
                wanted = theirs(torch.from_numpy(window[None].astype(np.int64))).logits[0, 16:]
                np.testing.assert_allclose(runtime.logits(window, 16), wanted, atol=TOLERANCE, rtol=0)
        assert reads == dict.fromkeys(codes, 1)


@pytest.mark.parametrize("above", [True, False], ids=["numbers fit", "nothing fits"])
@torch.no_grad()
def test_a_processor_multiplies_by_numbers_in_all_other_cases(model: Model, above: bool) -> None:
    checkpoint, reads = counted(open_checkpoint(model[1]))
    packed, dense = limits(checkpoint)
    with TorchRuntime.of_checkpoint(checkpoint, max_memory=dense if above else packed - 1) as runtime:
        runtime.prepare(WINDOWS[:1], 16)
    assert not reads  # `tensors` are read, whose values are the numbers


@torch.no_grad()
def test_inputs_are_rounded_before_packed_weights_too(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "q"
    quantized_model(model[0], folder, COMPRESSED, rounded(8, -1, symmetric=True, scale_type="F32"), input_bits=8)
    checkpoint = open_checkpoint(folder)
    packed, dense = limits(checkpoint)
    results: dict[Any, np.ndarray] = {}
    for memory in (packed, dense):
        for as_served in (True, False):
            with TorchRuntime.of_checkpoint(checkpoint, max_memory=memory, as_served=as_served) as runtime:
                results[memory, as_served] = runtime.logits(WINDOWS[0], 0)
    # an input between two codes may take the other one where the sums before differ: 1/255 of one input of 64
    np.testing.assert_allclose(results[packed, True], results[dense, True], atol=0.02, rtol=0)
    np.testing.assert_allclose(results[packed, False], results[dense, False], atol=TOLERANCE, rtol=0)
    assert np.abs(results[packed, True] - results[packed, False]).max() > 0.02

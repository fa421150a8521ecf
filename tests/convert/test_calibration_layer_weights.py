"""Tensors of a layer and the way back into the checkpoint, judged by the decoder's own reading of what was stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantpress.convert.calibration.layer_weights import ModelWeights
from quantpress.convert.checkpoint import DTYPES, Array, Checkpoint, LazyTensor
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.weights import CheckpointWeights
from quantpress.quant.grid import Grid, round_to_nearest
from tests.tiny import tiny_case, tiny_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

CPU = torch.device("cpu")
CASES = [("llama-bias", "float16"), ("gemma2", "bfloat16"), ("gemma3", "float32"), ("gpt2", "bfloat16"),
         ("gptneox", "float16"), ("phi3", "float32")]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    name, dtype = request.param
    case = tiny_case(name)
    return open_checkpoint(tiny_checkpoint(tmp_path / name, case.family, dtype=dtype, **case.options))


def replaced(checkpoint: Checkpoint, name: str, values: Array) -> Checkpoint:
    """Gives a checkpoint with other values in the place of a tensor's, which must be of its shape and type."""
    tensor = checkpoint.tensors[name]
    assert values.shape == tensor.shape
    assert values.dtype == DTYPES[tensor.dtype]
    stored = replace(tensor, read_rows=lambda start, stop: values[start:stop])
    return replace(checkpoint, tensors={**checkpoint.tensors, name: stored})


def decoders_reading(checkpoint: Checkpoint) -> Callable[[str, int], torch.Tensor | None]:
    checked = preflight(checkpoint)
    return CheckpointWeights(checkpoint, checked.spec, checked.hyper)


def test_tensors_are_the_decoders_in_float32(checkpoint: Checkpoint) -> None:
    loaded, read = ModelWeights(preflight(checkpoint)).layer(1, CPU), decoders_reading(checkpoint)
    for slot, values in loaded.values.items():
        wanted = read(slot, 1)
        assert wanted is not None
        assert values.dtype == torch.float32
        assert torch.equal(values, wanted.float()), slot
        assert values.data_ptr() % 64 == 0
    weights = {slot for slot in loaded.values if slot not in loaded.plain()}
    assert all(slot.endswith(".weight") and "norm" not in slot for slot in weights)


def test_changed_tensors_are_read_back_as_announced(checkpoint: Checkpoint) -> None:
    loaded = ModelWeights(preflight(checkpoint)).layer(1, CPU)
    random = np.random.default_rng(0)
    for slot, old in loaded.values.items():
        values = (random.standard_normal(old.shape) * 0.7 + 1).astype(np.float32)
        announced = loaded.read_back(slot, values)
        ((name, stored),) = loaded.stored_plain({slot: announced})
        assert name == loaded.name(slot)
        found = decoders_reading(replaced(checkpoint, name, stored))(slot, 1)
        assert found is not None
        np.testing.assert_array_equal(found.float().numpy(), announced, err_msg=slot)
        # announced is the nearest that can be stored: 2^-9 of the value that bfloat16 holds, which is up to 5
        assert np.abs(announced - values).max() <= 5 * 2.0**-9


def test_codes_are_stored_in_the_rows_of_the_checkpoint(checkpoint: Checkpoint) -> None:
    loaded = ModelWeights(preflight(checkpoint)).layer(2, CPU)
    for slot in [slot for slot in loaded.values if slot not in loaded.plain()]:
        for grid in (Grid(4, 16), Grid(3, -1, symmetric=False)):
            codes = round_to_nearest(loaded.weight(slot), grid)
            ((name, stored),) = loaded.stored_codes({slot: codes})
            tensor = checkpoint.tensors[name]
            values = stored.dequantize()
            turned = tensor.shape == values.shape[::-1] and "GPT2" in checkpoint.config["architectures"][0]
            wide = replace(checkpoint, tensors={**checkpoint.tensors, name: as_float32(tensor, values, turned)})
            found = decoders_reading(wide)(slot, 2)
            assert found is not None
            np.testing.assert_array_equal(found.numpy(), codes.dequantize(), err_msg=slot)


def as_float32(tensor: LazyTensor, values: NDArray[np.float32], turned: bool) -> LazyTensor:
    array = np.ascontiguousarray(values.T if turned else values)
    return replace(tensor, dtype="F32", read_rows=lambda start, stop: array[start:stop], wide_rows=None)


def test_tensors_are_read_as_exact_as_they_are_known(checkpoint: Checkpoint) -> None:
    """As those of a merge, which are rounded when they are stored only."""
    random = np.random.default_rng(1)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        exact = random.standard_normal(tensor.shape).astype(np.float32)
        tensors[name] = replace(tensor, wide_rows=lambda start, stop, exact=exact: exact[start:stop])
    merged = replace(checkpoint, tensors=tensors)
    plain = {name: replace(tensor, dtype="F32", read_rows=tensor.wide_rows) for name, tensor in tensors.items()}
    weights, read = ModelWeights(preflight(merged)), decoders_reading(replace(checkpoint, tensors=plain))
    for slot, values in weights.layer(0, CPU).values.items():
        wanted = read(slot, 0)
        assert wanted is not None
        assert torch.equal(values, wanted), slot
    ids = np.array([0, 5, 6, 319])
    rows = read("token_embd.weight", -1)
    assert rows is not None
    assert torch.equal(weights.some_rows("token_embd.weight", ids), rows[ids])


def test_embedding_rows_are_found_in_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("quantpress.convert.calibration.layer_weights._ROWS", 50)
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, "llama"))
    weights = ModelWeights(preflight(checkpoint))
    whole = torch.from_numpy(checkpoint.tensors["model.embed_tokens.weight"].read())
    for ids in ([49, 50, 99, 100, 319], [0], [120, 121], list(range(320))):
        assert torch.equal(weights.some_rows("token_embd.weight", np.array(ids)), whole[ids])

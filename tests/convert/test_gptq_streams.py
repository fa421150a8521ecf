"""GPTQ weights reach the kernels as their file keeps them: read in place, not unpacked and packed again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.open import open_checkpoint
from quantpress.convert.quantized import PackFormat
from quantpress.kernels.packed import reference_dequantize
from quantpress.quant.errors import InputError
from quantpress.quant.grid import Grid
from quantpress.quant.packed import packed_streams
from tests.packed_folders import Tensors, change_tensors, pack_folder
from tests.quantized_tensors import read_gptq
from tests.tiny import tiny_checkpoint

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "llama", "llama")


@pytest.mark.parametrize(
    ("fmt", "version", "grid"),
    [
        (GPTQ_V1, 1, Grid(4, 32)),
        (GPTQ_V1, 1, Grid(8, -1)),
        (GPTQ_V2, 2, Grid(4, 64, symmetric=False)),
        (GPTQ_V2, 2, Grid(3, 32, symmetric=False)),
        (GPTQ_V2, 2, Grid(2, 16, symmetric=False)),
    ],
)
def test_what_the_kernels_read_are_the_files_own_words(
    source: Path, tmp_path: Path, fmt: PackFormat, version: int, grid: Grid
) -> None:
    packed = pack_folder(source, tmp_path / "packed", fmt, grid)
    opened = open_checkpoint(tmp_path / "packed")
    for name, tensor in packed.items():
        lazy = opened.quantized[name]
        assert lazy.streams is not None
        streams = lazy.streams()
        stored = fmt.pack(name, tensor, tensor.form)
        parts = {key.rpartition(".")[2]: values for key, values in stored.items()}
        assert np.array_equal(streams.words, parts["qweight"])
        weight = packed_streams(
            streams.words, streams.scale, streams.zero, grid.bits, lazy.form.group_size, columns=lazy.form.shape[1]
        )
        wanted = read_gptq(parts, grid.bits, version)
        assert np.array_equal(reference_dequantize(weight, torch.float32).numpy(), wanted)


def test_columns_in_an_order_of_their_own_have_none(source: Path, tmp_path: Path) -> None:
    pack_folder(source, tmp_path / "packed", GPTQ_V1, Grid(4, 32), details={"method": "gptq", "act_order": True})

    def reverse(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("down_proj.g_idx"):
                tensors[name] = np.ascontiguousarray(tensors[name][::-1])

    change_tensors(tmp_path / "packed", reverse)
    config = tmp_path / "packed" / "config.json"
    config.write_text(config.read_text().replace('"desc_act": false', '"desc_act": true'))
    opened = open_checkpoint(tmp_path / "packed")
    ordered = {name: lazy.streams is None for name, lazy in opened.quantized.items()}
    assert ordered == {name: "down_proj" in name for name in ordered}
    assert any(ordered.values())


def test_zeros_that_are_not_what_the_configuration_says_are_refused_here_too(source: Path, tmp_path: Path) -> None:
    pack_folder(source, tmp_path / "packed", GPTQ_V1, Grid(4, 32))
    name = "model.layers.1.mlp.down_proj"

    def another_zero(tensors: Tensors) -> None:
        tensors[f"{name}.qzeros"][1, 0] ^= 1

    change_tensors(tmp_path / "packed", another_zero)
    streams = open_checkpoint(tmp_path / "packed").quantized[f"{name}.weight"].streams
    assert streams is not None
    with pytest.raises(InputError, match="sym is true"):
        streams()

"""Importance matrices, and GGUF files whose blocks GPTQ finds, of models with experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import quantpress as qp
from quantpress.convert.gguf.importance_file import read_importance
from tests.families import decoders_one, experts
from tests.families.cases import write_checkpoint

WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2,
    "shared_expert_intermediate_size": 512,
}  # fmt: skip
TEXT = {"samples": 8, "sequence_length": 64}
LOOSE = qp.JudgeOptions(chunks=1, context=32, max_kld=3.0, max_ppl_change=1e9, min_top1=0.0)  # random weights


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a function that makes the checkpoint of a case, with rows of 256, once."""
    made: dict[str, Path] = {}

    def one(name: str) -> Path:
        if name not in made:
            case = next(case for case in (*experts.CASES, *decoders_one.CASES) if case.id == name)
            known = WIDE if "qwen" in name else {key: WIDE[key] for key in list(WIDE)[:2]}
            case = replace(case, options={**case.options, **known}) if name in ("mixtral", "qwen2_moe") else case
            made[name] = write_checkpoint(case, tmp_path_factory.mktemp("mixtures") / name)
        return made[name]

    return one


def values_of(path: Path) -> dict[str, NDArray[np.float32]]:
    """All tensors of a file in float32, by llama.cpp's own package."""
    tensors = gguf.GGUFReader(path).tensors
    return {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in tensors}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_matrix_counts_the_tokens_of_each_expert(name: str, make: Callable[[str], Path], tmp_path: Path) -> None:
    qp.imatrix(make(name), tmp_path / "m.gguf", context=32, chunks=8)
    entries = read_importance(tmp_path / "m.gguf").entries
    files = values_of(Path(qp.export_gguf(make(name), tmp_path / "f32.gguf", outtype="f32").artifact.path))
    for weight, entry in entries.items():
        shape = files[weight].shape
        assert entry.sums.shape == ((shape[0] if len(shape) == 3 else 1), shape[-1])
        used = 2 if "_exps" in weight else 1
        assert entry.counts.sum() == 8 * 32 * used, weight
    linear = {weight for weight in files if "blk." in weight and files[weight].ndim > 1}
    assert linear <= set(entries)
    again = qp.export_gguf(make(name), tmp_path / "q.gguf", outtype="iq4_xs", imatrix=tmp_path / "m.gguf")
    assert all(np.isfinite(values).all() for values in values_of(Path(again.artifact.path)).values())


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_blocks_that_gptq_finds_are_those_of_the_expert(name: str, make: Callable[[str], Path], tmp_path: Path) -> None:
    pressed = qp.export_gguf(
        make(name), tmp_path / "q.gguf", outtype="q4_k", method="gptq", verify=True, judge=LOOSE, **TEXT
    )
    found = values_of(Path(pressed.artifact.path))
    wanted = values_of(Path(qp.export_gguf(make(name), tmp_path / "f32.gguf", outtype="f32").artifact.path))
    plain = values_of(Path(qp.export_gguf(make(name), tmp_path / "p.gguf", outtype="q4_k").artifact.path))
    seen = 0
    for weight, values in wanted.items():
        if "_exps" not in weight:
            continue
        for expert, (own, one) in enumerate(zip(values, found[weight], strict=True)):
            # steps of 1/15 of a range of 5 deviations, and what GPTQ moves from column to column
            assert np.corrcoef(own.ravel(), one.ravel())[0, 1] > 0.95, (weight, expert)
        assert not np.array_equal(found[weight], plain[weight])
        seen += 1
    assert seen >= 6


def test_linears_around_the_layers_stay_as_they_are(make: Callable[[str], Path], tmp_path: Path) -> None:
    """GPTQ's readers look into the layers only; OPT-350m projects embeddings before and behind them."""
    pressed = qp.quantize(make("opt-350m"), tmp_path / "out", method="gptq", bits=8, group_size=32, **TEXT)
    stored = qp.open_checkpoint(Path(pressed.artifact.path))
    assert not any("project_" in name for name in stored.quantized)
    assert "model.decoder.project_in.weight" in stored.tensors

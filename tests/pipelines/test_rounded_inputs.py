"""Inputs are rounded as the libraries do that run int8 checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import quantpress as qp
from quantpress.convert.preflight import preflight
from quantpress.pipelines.rounded_inputs import llm_int8_inputs, rounded_inputs
from quantpress.pipelines.torch_runtime import TorchRuntime
from tests.tiny import tiny_checkpoint

CONTEXT = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("rounded") / "model", "llama")


def window() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 320, CONTEXT).astype(np.int32)


def logits_of_transformers(folder: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return loaded(torch.from_numpy(window()[None].astype(np.int64))).logits[0].numpy()


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 3, "group_size": -1},
        {"bits": 8, "group_size": -1, "activation_bits": 8},
        {"bits": 4, "group_size": 32, "override": ("down_proj=bits:8,group_size:-1",), "skip": ("layers.0.*k_proj",)},
    ],
    ids=["int4", "int3", "w8a8", "mixed"],
)
def test_a_quantized_model_runs_here_as_in_transformers(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "out"
    qp.quantize(model, out, method="rtn", format="compressed-tensors", **options)
    with TorchRuntime.of_checkpoint(qp.open_checkpoint(out), as_served=True) as runtime:
        found = runtime.logits(window(), 0)
    wanted = logits_of_transformers(out)
    # the same float32 operations in another order: a few 2^-24 of logits below 20, through three layers; what rounds
    # its inputs may take the other of two neighbouring codes where they differ by that, 1/255 of one input of 64
    atol = 0.02 if "activation_bits" in options else 1e-4
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)
    plain = qp.open_checkpoint(model)
    with TorchRuntime.of_checkpoint(plain) as runtime:
        assert np.abs(runtime.logits(window(), 0) - wanted).max() > 5 * atol


def test_inputs_of_llm_int8_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(1, 40, 96, generator=torch.Generator().manual_seed(1))
    values[0, :, 7] *= 9
    values[0, 3, 50] = -6.0  # as large as the threshold
    values[0, 5] = 0.0
    half = values[0].to(torch.float16)
    codes, absmax, columns = functional.int8_vectorwise_quant(half, threshold=6.0)
    assert {7, 50} <= set(columns.tolist())
    wanted = codes.float() * absmax[:, None].float() / 127
    wanted[:, columns] = half[:, columns].float()
    found = llm_int8_inputs(half.float()[None])[0]
    # it computes absmax / 127 in float16 or float32 depending on the device: half a unit of 2^-11 of the greatest
    torch.testing.assert_close(found, wanted, rtol=2**-10, atol=1e-6)


def test_texts_of_a_batch_do_not_change_each_other() -> None:
    values = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(2))
    values[1, 4, 5] = 100.0
    together = llm_int8_inputs(values)
    for number in range(3):
        torch.testing.assert_close(together[number], llm_int8_inputs(values[number : number + 1])[0], rtol=0, atol=0)


def test_only_linears_that_were_quantized_round_their_inputs(model: Path, tmp_path: Path) -> None:
    source = qp.open_checkpoint(model)
    assert rounded_inputs(source, preflight(source)) is None
    out = tmp_path / "out"
    qp.quantize(model, out, method="rtn", activation_bits=8, skip=("k_proj",))
    opened = qp.open_checkpoint(out)
    rounded = rounded_inputs(opened, preflight(opened))
    assert rounded is not None
    values = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(3))
    assert rounded(0, "attn_k.weight", values) is values
    assert rounded(-1, "output.weight", values) is values
    assert not torch.equal(rounded(0, "attn_q.weight", values), values)
    greatest = values.abs().amax(-1, keepdim=True)
    # half a step of greatest / 127.5, or a whole one where the greatest is positive and cut at 127
    assert ((rounded(0, "attn_q.weight", values) - values).abs() <= greatest / 127).all()


def test_weights_of_a_quantized_model_are_exact_and_its_source_is_not_rounded(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qp.quantize(model, out, method="rtn", bits=3, group_size=32)
    opened = qp.open_checkpoint(out)
    checked = preflight(opened)
    from quantpress.convert.weights import CheckpointWeights

    name = "model.layers.1.mlp.up_proj.weight"
    found = CheckpointWeights(opened, checked.spec, checked.hyper)("ffn_up.weight", 1)
    codes = opened.quantized[name].read()
    scale = np.repeat(codes.scale.astype(np.float64), 32, axis=1)
    wanted = scale * (codes.codes.astype(np.float64) - 4)
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), wanted.astype(np.float32))

"""GPTQModel, through which transformers runs GPTQ and AWQ, loads what is packed here and computes the same numbers.

It brings a torch of its own choice, so it is not among the packages that tests need: they skip where it is missing.
Verified with GPTQModel 7.7.0, optimum 2.3.0, transformers 5.23 and torch 2.13 on CPU. What those cannot do: GPTQModel's
own loader splits Phi-3's fused projections and leaves GPT-NeoX's head empty; transformers' AWQ knows no Conv1D; optimum
no modules of different bits.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.open import open_checkpoint
from quantpress.convert.quantized import PackFormat
from quantpress.quant.grid import Grid
from tests.packed_folders import pack_folder
from tests.tiny import tiny_checkpoint

if importlib.util.find_spec("gptqmodel") is not None:  # where it is missing, other tests of this process compile
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
torch = pytest.importorskip("torch")
gptqmodel = pytest.importorskip("gptqmodel", reason="the oracle, gptqmodel, is not installed", exc_type=ImportError)
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_Case = tuple[PackFormat, Any, Any]  # format, grid, which names are skipped


def _mixed(name: str) -> Grid:
    return Grid(8, 32) if "down_proj" in name or "layers.1.self_attn.q" in name else Grid(4, 64)


def _some(name: str) -> bool:
    return "o_proj" in name or "layers.2.mlp.up" in name


def _none(name: str) -> bool:
    return False


_CASES: dict[str, _Case] = {
    "gptq": (GPTQ_V1, Grid(4, 32), _none),
    "gptq-8-rows": (GPTQ_V1, Grid(8, -1), _none),
    "gptq-short-group": (GPTQ_V1, Grid(4, 128), _none),
    "gptq-skips": (GPTQ_V1, Grid(4, 32), _some),
    "gptq-mixed": (GPTQ_V1, _mixed, _some),
    "gptq_v2": (GPTQ_V2, Grid(4, 64, symmetric=False), _none),
    "gptq_v2-3": (GPTQ_V2, Grid(3, 32, symmetric=False), _none),
    "gptq_v2-2": (GPTQ_V2, Grid(2, 16, symmetric=False), _none),
    "awq": (AWQ, Grid(4, 64, symmetric=False), _none),
    "awq-rows": (AWQ, Grid(4, -1, symmetric=False), _none),
    "awq-skips": (AWQ, Grid(4, 32), _some),
}
_BACKENDS = {"gptq": "gptq_torch", "gptq_v2": "gptq_torch", "awq": "torch_awq"}
_IDS = [[(7 * place) % 300 + 1 for place in range(32)]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "attention_bias": True, "mlp_bias": True}
    return tiny_checkpoint(tmp_path_factory.mktemp("gptqmodel") / "source", "llama", **sizes)


def _wanted_logits(folder: Path, source: Path) -> Any:
    """Logits of the weights as they are opened here, in float32."""
    opened = open_checkpoint(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    values = {name: torch.tensor(tensor.exact_rows(0, tensor.rows)) for name, tensor in opened.tensors.items()}
    names = {name.replace("embed_out", "lm_head"): value for name, value in values.items()}  # as transformers 5 does
    model.load_state_dict({name: value.float() for name, value in names.items()})
    with torch.inference_mode():
        return model(torch.tensor(_IDS)).logits


def _load_with_transformers(folder: Path, fmt: PackFormat) -> Any:
    kind = transformers.AwqConfig if fmt is AWQ else transformers.GPTQConfig
    chosen = kind(bits=4, backend=_BACKENDS[fmt.name])  # the folder's settings win in all but the backend
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float16, quantization_config=chosen
    )


def _check(model: Any, folder: Path, wanted: Any) -> None:
    opened = open_checkpoint(folder)
    for name, module in model.named_modules():
        if type(module).__name__ == "TorchLinear":
            found = module.dequantize_weight().T.numpy()
            np.testing.assert_array_equal(found, opened.tensor(f"{name}.weight").read())
    assert sum("TorchLinear" in type(module).__name__ for module in model.modules()) == len(opened.quantized)
    with torch.inference_mode():
        got = model(torch.tensor(_IDS)).logits.float()
    # It computes in float16: a logit is a sum of 128 products whose inputs went through 3 layers with some 30 roundings
    # of 2^-11 each. That is a relative error of about sqrt(30) * 2^-11 = 0.003 of the largest logit.
    assert float((got - wanted).abs().max()) < 0.006 * float(wanted.abs().max())


@pytest.mark.parametrize("case", _CASES)
def test_gptqmodel_runs_it(source: Path, tmp_path: Path, case: str) -> None:
    fmt, grid, skip = _CASES[case]
    pack_folder(source, tmp_path / "q", fmt, grid, skip=skip)
    backend = gptqmodel.BACKEND.AWQ_TORCH if fmt is AWQ else gptqmodel.BACKEND.GPTQ_TORCH
    model = gptqmodel.GPTQModel.load(str(tmp_path / "q"), backend=backend, device="cpu", dtype=torch.float16).model
    _check(model, tmp_path / "q", _wanted_logits(tmp_path / "q", source))


@pytest.mark.parametrize("case", [case for case in _CASES if case != "gptq-mixed"])
def test_transformers_runs_it(source: Path, tmp_path: Path, case: str) -> None:
    fmt, grid, skip = _CASES[case]
    if fmt is not AWQ:
        pytest.importorskip("optimum", reason="transformers loads GPTQ through optimum")
    pack_folder(source, tmp_path / "q", fmt, grid, skip=skip)
    _check(_load_with_transformers(tmp_path / "q", fmt), tmp_path / "q", _wanted_logits(tmp_path / "q", source))


@pytest.mark.parametrize("fmt", [GPTQ_V2, AWQ], ids=["gptq_v2", "awq"])
@pytest.mark.parametrize("family", ["gptneox", "phi3"])
def test_transformers_runs_other_families(tmp_path: Path, family: str, fmt: PackFormat) -> None:
    if fmt is not AWQ:
        pytest.importorskip("optimum", reason="transformers loads GPTQ through optimum")
    source = tiny_checkpoint(tmp_path / "source", family)
    pack_folder(source, tmp_path / "q", fmt, Grid(4, 32, symmetric=False))
    _check(_load_with_transformers(tmp_path / "q", fmt), tmp_path / "q", _wanted_logits(tmp_path / "q", source))

"""Folders as compressed-tensors wants them load in transformers, and its logits are those of the decoder here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.compressed_tensors.activations import round_inputs
from quantpress.convert.compressed_tensors.pack import FORMAT
from quantpress.convert.model import Decoder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.weights import CheckpointWeights
from quantpress.quant.qtensor import QuantizedTensor
from tests.packed_folder import Quantize, rounded, write_packed
from tests.tiny import tiny_checkpoint

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors", reason="the oracle is not installed")

# float32 sums of up to 96 products through 3 layers, in another order, as in test_model.py
TOLERANCE = 5e-5
TOKENS = torch.randint(4, 320, (2, 40), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:You passed `quantization_config`"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return tiny_checkpoint(folder, "llama", dtype="bfloat16", attention_bias=True, tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def theirs(folder: Path, **options: Any) -> Any:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, **options
    )
    return model.eval()


@torch.no_grad()
def decoded(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    arch = find_arch(checkpoint.config)
    hyper = arch.read_config(checkpoint.config)
    return Decoder(CheckpointWeights(checkpoint, arch, hyper), arch, hyper, resident=True).logits(TOKENS)


@pytest.mark.parametrize(
    "quantize",
    [
        rounded(4, 32, symmetric=True, scale_type="BF16"),
        rounded(4, -1, symmetric=True),
        rounded(3, -1, symmetric=True, scale_type="BF16"),
        rounded(2, 16, symmetric=True),
        rounded(8, 32, symmetric=True, scale_type="F32"),
    ],
    ids=["int4-g32", "int4-row", "int3-row", "int2-g16", "int8-g32"],
)
@torch.no_grad()
def test_a_symmetric_model_loads_compressed(source: Path, tmp_path: Path, quantize: Quantize) -> None:
    made = write_packed(source, tmp_path / "q", FORMAT, quantize, act_order=True)
    model = theirs(tmp_path / "q")
    wanted = model(TOKENS).logits
    assert len(made) == 21
    assert all(hasattr(model.get_submodule(name.removesuffix(".weight")), "quantization_scheme") for name in made)
    assert not hasattr(model.lm_head, "quantization_scheme")  # tied, so no tensor names it
    assert wanted.std() > 0.5
    torch.testing.assert_close(decoded(tmp_path / "q"), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@torch.no_grad()
def test_an_asymmetric_model_loads_dequantized(source: Path, tmp_path: Path, bits: int) -> None:
    # transformers 5.23 with compressed-tensors 0.20 cannot load packed zeros compressed, its own neither: on the "meta"
    # device, where the model is made, zeros are not packed and then have another shape than the file's.
    write_packed(source, tmp_path / "q", FORMAT, rounded(bits, 32, symmetric=False, scale_type="F32"))
    config = transformers.CompressedTensorsConfig(dequantize=True)
    wanted = theirs(tmp_path / "q", quantization_config=config)(TOKENS).logits
    torch.testing.assert_close(decoded(tmp_path / "q"), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_a_model_with_rounded_inputs_computes_as_round_inputs_says(source: Path, tmp_path: Path, bits: int) -> None:
    made = write_packed(source, tmp_path / "q", FORMAT, rounded(bits, -1, symmetric=True), input_bits=8)
    wanted = theirs(tmp_path / "q")(TOKENS).logits
    plain = theirs(source)
    for name, tensor in made.items():
        module = plain.get_submodule(name.removesuffix(".weight"))
        module.weight.copy_(torch.from_numpy(tensor.dequantize()))
        module.register_forward_pre_hook(lambda _module, inputs: (round_inputs(inputs[0]),))
    assert torch.equal(plain(TOKENS).logits, wanted)
    assert not torch.allclose(decoded(tmp_path / "q"), wanted, atol=100 * TOLERANCE)  # the rounding is felt


@torch.no_grad()
def test_modules_with_forms_of_their_own_load_as_such(source: Path, tmp_path: Path) -> None:
    usual, eight = rounded(4, 32, symmetric=True), rounded(8, -1, symmetric=True)

    def quantize(name: str, weight: np.ndarray) -> QuantizedTensor | None:
        if "o_proj" in name or name.endswith("layers.1.mlp.up_proj.weight"):
            return None
        if "down_proj" in name:
            return eight(name, weight)
        return rounded(2, 16, symmetric=True)(name, weight) if "layers.2.mlp.gate" in name else usual(name, weight)

    made = write_packed(source, tmp_path / "q", FORMAT, quantize)
    assert len(made) == 17
    checkpoint = open_checkpoint(tmp_path / "q")
    assert {name: lazy.form for name, lazy in checkpoint.quantized.items()} == {
        name: tensor.form for name, tensor in made.items()
    }
    wanted = theirs(tmp_path / "q")(TOKENS).logits
    torch.testing.assert_close(decoded(tmp_path / "q"), wanted, rtol=0, atol=TOLERANCE)


def test_layouts_that_differ_from_module_to_module_are_mixed_precision() -> None:
    tensor = rounded(8, -1, symmetric=True)("", np.ones((8, 32), np.float32))
    assert tensor is not None
    forms = {"a.x.weight": tensor.form, "a.y.weight": replace(tensor.form, input_bits=8), "a.z.weight": tensor.form}
    settings = FORMAT.settings(forms, [], {})
    assert settings["format"] == "mixed-precision"
    groups = settings["config_groups"]
    assert [groups[key]["format"] for key in groups] == ["pack-quantized", "int-quantized"]
    assert [groups[key]["targets"] for key in groups] == [["Linear"], ["a.y"]]

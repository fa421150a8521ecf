"""A whole model on the Triton kernels, which run in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.convert import packed_weights
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.open import open_checkpoint
from quantpress.convert.packed_weights import packed_decoder
from quantpress.convert.static_decode import StaticDecoder
from quantpress.kernels import dispatch
from quantpress.kernels.packed import PackedWeight
from quantpress.quant.grid import Grid
from tests.packed_folder import rounded
from tests.packed_models import ordered, quantized_model, reference
from tests.tiny import tiny_checkpoint

# float32 sums in another order, see test_packed_weights.py
TOLERANCE = 1e-4
FORMS = {
    "int4": (GPTQ_V1, rounded(4, 32, symmetric=True)),
    "int3 zeros": (GPTQ_V2, rounded(3, 32, symmetric=False)),
    "ordered": (GPTQ_V1, ordered(Grid(8, 32))),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU: see tests/gpu"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return tiny_checkpoint(folder, "llama", attention_bias=True, mlp_bias=True, num_hidden_layers=1)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Has linears run the kernels as they would on CUDA; gives which ran, with how many rows of input."""
    found: list[tuple[str, int]] = []

    def linear(
        x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, deterministic: bool = False
    ) -> torch.Tensor:
        flat = x.reshape(-1, weight.columns).contiguous()
        found.append((dispatch.choose(dispatch.problem_of(flat, weight), "").kernel, len(flat)))
        product = dispatch.matmul(flat, weight, bias, deterministic=deterministic)
        return product.view(*x.shape[:-1], weight.rows)

    monkeypatch.setattr(packed_weights, "linear", linear)
    return found


@pytest.mark.parametrize(("form", "deterministic"), [("int4", False), ("int3 zeros", True), ("ordered", False)])
@torch.no_grad()
def test_logits_and_text_are_those_of_transformers_on_the_numbers(
    form: str, deterministic: bool, source: Path, tmp_path: Path, launched: list[tuple[str, int]]
) -> None:
    fmt, quantize = FORMS[form]
    codes = quantized_model(source, tmp_path / "q", fmt, quantize)
    model = packed_decoder(open_checkpoint(tmp_path / "q"), deterministic=deterministic)
    tokens = torch.randint(4, 320, (2, 9), generator=torch.Generator().manual_seed(1))
    theirs = reference(source, codes)
    torch.testing.assert_close(model.logits(tokens), theirs(tokens).logits, atol=TOLERANCE, rtol=0)
    assert launched
    assert {rows for _, rows in launched} == {18}
    static = StaticDecoder(model, 16)
    static.prefill(tokens[:1])
    static.step()
    text = torch.cat([tokens[:1], theirs(tokens[:1]).logits[:, -1:].argmax(-1)], dim=1)
    torch.testing.assert_close(static.logits, theirs(text).logits[:, -1], atol=TOLERANCE, rtol=0)
    assert ("gemv", 1) in launched
    assert "tiled" in {kernel for kernel, rows in launched if rows == 9}


@torch.no_grad()
def test_computing_in_float16_is_as_near_as_transformers_in_float16(
    source: Path, tmp_path: Path, launched: list[tuple[str, int]]
) -> None:
    codes = quantized_model(source, tmp_path / "q", *FORMS["int4"])
    tokens = torch.randint(4, 320, (1, 12), generator=torch.Generator().manual_seed(2))
    theirs = reference(source, codes)
    exact = theirs(tokens).logits
    half = (theirs.to(torch.float16)(tokens).logits.float() - exact).pow(2).mean().sqrt()
    model = packed_decoder(open_checkpoint(tmp_path / "q"), dtype=torch.float16)
    assert (model.logits(tokens) - exact).pow(2).mean().sqrt() < 1.5 * half  # both round to 11 bits some 20 times
    assert launched

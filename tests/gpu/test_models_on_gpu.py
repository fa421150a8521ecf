"""Whole models on the kernels of a real GPU: skipped without one. Interpreted: tests/convert/test_packed_kernels.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.compressed_tensors.pack import FORMAT as COMPRESSED
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.model import Decoder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.packed_weights import Int8Linear, packed_decoder
from quantpress.convert.quantized import PackFormat
from quantpress.convert.safetensors_writer import write_checkpoint
from quantpress.convert.static_decode import StaticDecoder
from quantpress.pipelines.perplexity import perplexity
from quantpress.pipelines.torch_runtime import TorchRuntime
from quantpress.quant.grid import Grid
from tests.packed_folder import Quantize, lazy_array, rounded, write_packed
from tests.packed_models import ordered
from tests.tiny import tiny_config

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, when it compiles
]

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
GPT2_SIZES = {"n_embd": 512, "n_head": 8}
FORMS: dict[str, tuple[str, PackFormat, Quantize, dict[str, Any]]] = {
    "gptq": ("llama", GPTQ_V1, rounded(4, 128, symmetric=True), {}),
    "gptq-3-bits": ("llama", GPTQ_V2, rounded(3, 64, symmetric=False), {}),
    "gptq-ordered": ("qwen2", GPTQ_V1, ordered(Grid(4, 128)), {}),
    "gptq-conv1d": ("gpt2", GPTQ_V1, rounded(8, -1, symmetric=True), {}),
    "gptq-fused-heads": ("gptneox", GPTQ_V2, rounded(2, 32, symmetric=False), {}),
    "awq": ("gemma2", AWQ, rounded(4, 128, symmetric=False), {}),
    "compressed": ("llama", COMPRESSED, rounded(4, 32, symmetric=True, scale_type="BF16"), {}),
    "w8a8": ("llama", COMPRESSED, rounded(8, -1, symmetric=True, scale_type="F32"), {"input_bits": 8}),
}


def source(folder: Path, family: str) -> Path:
    """Writes a random model of the family's table; needs no other library."""
    config = tiny_config(family, **(GPT2_SIZES if family == "gpt2" else SIZES))
    spec = find_arch(config)
    hyper = spec.read_config(config)
    random = np.random.default_rng(0)
    tensors = {}
    for row, layer in spec.rows(hyper):
        if row.tied_to and hyper.tied:
            continue
        shape = tuple(hyper.dims[dim] for dim in row.shape)
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:  # norms around what they multiply by, biases around 0
            values = 0.2 * values + (1 - row.offset if "norm" in row.slot and row.slot.endswith("weight") else 0)
        else:
            values *= 0.05 if row.role.name in ("EMBEDDING", "HEAD", "POSITION") else 512**-0.5
        name = spec.names(row, layer)[0]
        tensors[name] = lazy_array(name, values.astype(np.float32))
    write_checkpoint(Checkpoint("random", config, tensors), folder)
    return folder


@pytest.fixture(params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    family, fmt, quantize, options = FORMS[request.param]
    target = tmp_path / request.param
    target.mkdir()
    write_packed(source(tmp_path / "source", family), target, fmt, quantize, **options)
    return target


def plain_inputs(checkpoint: Checkpoint, **options: Any) -> Decoder:
    """A decoder that rounds no inputs to int8: which of two codes they take would hide what else differs."""
    return packed_decoder(checkpoint, as_served=False, **options)


def windows(count: int = 6, length: int = 64) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(1, 320, length).astype(np.int32) for _ in range(count)]


@pytest.mark.parametrize("memory", [None, 0], ids=["resident", "streamed"])
def test_perplexity_is_that_of_the_processor(folder: Path, memory: int | None) -> None:
    checkpoint = open_checkpoint(folder)
    results = []
    for device, limit in (("cpu", 1 << 40), ("cuda", memory)):
        with TorchRuntime.of_checkpoint(checkpoint, device=device, max_memory=limit, as_served=True) as runtime:
            results.append(perplexity(runtime, windows(), model=device).perplexity)
    on_processor, on_gpu = results
    assert 1 < on_processor < 1e9
    # float32 sums of up to 1408 products in another order; where inputs are rounded to int8, a token's greatest input
    # may stand between two codes exactly, and what differs by a last bit takes the other one (see test_packed_weights)
    limit = 1e-2 if folder.name == "w8a8" else 2e-5
    assert math.log(on_gpu) == pytest.approx(math.log(on_processor), abs=limit)


def test_two_runs_give_the_same_logits(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    found = []
    for _ in range(2):
        with TorchRuntime.of_checkpoint(checkpoint, device="cuda", as_served=True) as runtime:
            runtime.prepare(windows(2), 0)
            found.append([runtime.logits(window, 0) for window in windows(2)])
    np.testing.assert_array_equal(found[0], found[1])


@torch.no_grad()
def test_quantized_weights_stay_codes_on_the_device(folder: Path) -> None:
    model = packed_decoder(open_checkpoint(folder), device="cuda", dtype=torch.bfloat16)
    model.logits(torch.from_numpy(windows(1)[0][None].astype(np.int64)))
    linears = [linear for linear in model._kept_linears.values() if linear is not None]
    codes = [linear.codes if isinstance(linear, Int8Linear) else linear.weight.words for linear in linears]
    assert {part.device.type for part in codes} == {"cuda"}
    assert all(isinstance(linear, Int8Linear) == (folder.name == "w8a8") for linear in linears)
    kept = [weight for (slot, _), weight in model.weights._kept.items() if weight is not None and "norm" not in slot]
    assert all(weight.ndim == 1 or 320 in weight.shape or 64 in weight.shape for weight in kept)  # embeddings, head


@torch.no_grad()
def test_int8_products_of_w8a8_are_those_of_the_processor(tmp_path: Path) -> None:
    _family, fmt, quantize, options = FORMS["w8a8"]
    (tmp_path / "q").mkdir()
    write_packed(source(tmp_path / "source", "gptneox"), tmp_path / "q", fmt, quantize, **options)
    checkpoint = open_checkpoint(tmp_path / "q")
    one, other = packed_decoder(checkpoint), packed_decoder(checkpoint, device="cuda")
    tokens = torch.from_numpy(np.stack(windows(2)).astype(np.int64))
    wanted, found = one.logits(tokens), other.logits(tokens).cpu()
    effect = (plain_inputs(checkpoint).logits(tokens) - wanted).pow(2).mean().sqrt()
    assert (found - wanted).pow(2).mean().sqrt() < 0.6 * effect  # see test_packed_weights
    for place, linear in one._kept_linears.items():
        if isinstance(linear, Int8Linear):
            values = torch.randn(7, linear.codes.shape[1], generator=torch.Generator().manual_seed(0))
            moved = other._kept_linears[place]
            assert moved is not None
            assert torch.equal(moved.run(values.cuda(), None).cpu(), linear.run(values, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_logits_are_near_those_of_the_processor_in_every_type(folder: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(folder)
    tokens = torch.from_numpy(np.stack(windows(2)).astype(np.int64))
    exact = plain_inputs(checkpoint).logits(tokens)
    error = (plain_inputs(checkpoint, device="cuda", dtype=dtype).logits(tokens).cpu() - exact).pow(2).mean().sqrt()
    # each of some 20 roundings to 8 or 11 bits adds half a unit of what it rounds
    steps = {torch.float32: 2**-17, torch.float16: 2**-8, torch.bfloat16: 2**-5}
    assert error < steps[dtype] * exact.std()


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@torch.no_grad()
def test_a_graph_gives_the_text_of_the_plain_decoder(folder: Path, compiled: bool) -> None:
    if compiled and folder.name not in ("gptq", "gptq-ordered"):
        pytest.skip("compiling is the same for the others, and slow")
    checkpoint = open_checkpoint(folder)
    static = StaticDecoder(plain_inputs(checkpoint, device="cuda", deterministic=True), 48, compiled=compiled)
    for start in (5, 20):
        text = windows(1)[0][:start].tolist()
        wanted = plain_inputs(checkpoint).generate(text, 20)
        assert static.generate(text, 20) == wanted


@torch.no_grad()
def test_a_graph_of_several_texts_gives_the_logits_of_each(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    write_packed(source(tmp_path / "source", "llama"), tmp_path / "q", GPTQ_V1, rounded(4, 128, symmetric=True))
    model = packed_decoder(open_checkpoint(tmp_path / "q"), device="cuda", dtype=torch.bfloat16)
    static = StaticDecoder(model, 40, batch=3)
    tokens = torch.from_numpy(np.stack(windows(3, 30)).astype(np.int64))
    static.prefill(tokens)
    for _ in range(9):
        tokens = torch.cat([tokens, static.token.cpu()], dim=1)
        static.step()
        wanted = model.logits(tokens, first=tokens.shape[1] - 1)[:, 0]
        error = (static.logits - wanted).pow(2).mean().sqrt()
        assert error < 2**-5 * wanted.std()  # bfloat16's roundings, as above

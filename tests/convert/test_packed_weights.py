"""Decoders on packed weights against transformers on the numbers that the codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantpress.convert.awq.pack import FORMAT as AWQ
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.compressed_tensors.pack import FORMAT as COMPRESSED
from quantpress.convert.compressed_tensors.reader import opened
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.model import Decoder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.packed_weights import Int8Linear, PackedLinear, PackedWeights, form_bytes, packed_decoder
from quantpress.convert.preflight import preflight
from quantpress.convert.quantized import LazyQuantized
from quantpress.convert.static_decode import StaticDecoder
from quantpress.convert.weights import CheckpointWeights
from quantpress.kernels.packed import PackedWeight
from quantpress.kernels.tuning.tables import TuningError
from quantpress.quant.errors import InputError
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.packed import packed_streams, packed_weight
from tests.packed_folder import lazy_array, rounded
from tests.packed_models import Codes, ordered, quantized_model, reference, values_of
from tests.tiny import tiny_checkpoint

LENGTH = 40
# float32 sums of up to 160 products through three layers, in another order, as in test_model.py; the formula is off
# from the float32 product of scale and code by half a unit of 2^-24 more
TOLERANCE = 1e-4

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Make = Callable[..., Path]
Model = tuple[Path, Path, Codes]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def one(family: str, **options: Any) -> Path:
        key = f"{family}-{options}"
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(family) / "model", family, **options)
        return made[key]

    return one


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(4, 320, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


CASES: dict[str, tuple[str, dict[str, Any], Any, Any]] = {
    "llama-gptq": ("llama", {}, GPTQ_V1, rounded(4, 32, symmetric=True)),
    "llama-gptq-3-bits": ("llama", {}, GPTQ_V2, rounded(3, 32, symmetric=False)),
    "llama-gptq-ordered": ("llama", {"attention_bias": True, "mlp_bias": True}, GPTQ_V1, ordered(Grid(4, 32))),
    "llama-gptq-rows": ("llama", {}, GPTQ_V1, rounded(8, -1, symmetric=True)),
    "llama-awq": ("llama", {}, AWQ, rounded(4, 32, symmetric=False)),
    "llama-compressed-2-bits": ("llama", {}, COMPRESSED, rounded(2, 32, symmetric=True)),
    "qwen2-compressed": ("qwen2", {}, COMPRESSED, rounded(4, 32, symmetric=False, scale_type="BF16")),
    "gpt2-gptq": ("gpt2", {}, GPTQ_V1, rounded(4, 32, symmetric=True)),
    "gptneox-gptq": ("gptneox", {}, GPTQ_V1, rounded(4, 32, symmetric=True)),
    "gptneox-gptq-zeros": ("gptneox", {}, GPTQ_V2, rounded(8, 64, symmetric=False)),
    "phi3-gptq": ("phi3", {}, GPTQ_V1, rounded(4, 32, symmetric=True)),
    "gemma2-gptq": ("gemma2", {}, GPTQ_V1, rounded(4, 32, symmetric=True)),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_and_text_are_those_of_transformers_on_the_numbers(name: str, make: Make, tmp_path: Path) -> None:
    family, options, fmt, quantize = CASES[name]
    source = make(family, **options)
    codes = quantized_model(source, tmp_path / "q", fmt, quantize)
    model = reference(source, codes)
    wanted = model(tokens()).logits
    ours = packed_decoder(open_checkpoint(tmp_path / "q"))
    torch.testing.assert_close(ours.logits(tokens()), wanted, atol=TOLERANCE, rtol=0)
    packed = [linear for linear in ours.weights._kept_linears.values() if linear is not None]
    assert len(packed) == len(codes)  # and none of them is there in numbers
    assert all(kept is None or kept.ndim == 1 or kept.shape[1] != 96 for kept in ours.weights._kept.values())
    text = tokens()[0, :20].tolist()
    longer = model(torch.tensor([text])).logits[0, -1].argmax()
    assert ours.generate(text, 1) == [int(longer)]


@pytest.fixture(scope="module")
def gptq(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Model:
    source, target = make("llama"), tmp_path_factory.mktemp("gptq") / "q"
    return source, target, quantized_model(source, target, GPTQ_V1, rounded(4, 32, symmetric=True))


def decoder(checkpoint: Checkpoint, **options: Any) -> Decoder:
    checked = preflight(checkpoint)
    return Decoder(CheckpointWeights(checkpoint, checked.spec, checked.hyper), checked.spec, checked.hyper, **options)


@torch.no_grad()
def test_nothing_stays_on_another_device(gptq: Model) -> None:
    """torch's meta device holds no values; what meets a tensor of the processor there is an error."""
    ours = packed_decoder(open_checkpoint(gptq[1]), device="meta", dtype=torch.bfloat16)
    found = ours.logits(tokens())
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, LENGTH, 320), torch.float32)
    weights = [linear.weight for linear in ours.weights._kept_linears.values() if isinstance(linear, PackedLinear)]
    assert {weight.words.device.type for weight in weights} == {"meta"}


@torch.no_grad()
def test_computing_in_bfloat16_is_as_near_as_transformers_in_bfloat16(gptq: Model) -> None:
    source, folder, codes = gptq
    model = reference(source, codes)
    exact = model(tokens()).logits
    theirs = (model.to(torch.bfloat16)(tokens()).logits.float() - exact).pow(2).mean().sqrt()
    found = packed_decoder(open_checkpoint(folder), dtype=torch.bfloat16).logits(tokens())
    # both round to 8 bits some 20 times; ours does not round the weights
    assert (found - exact).pow(2).mean().sqrt() < 1.5 * theirs


@pytest.mark.parametrize("family", ["llama", "gptneox"])
@torch.no_grad()
def test_inputs_of_w8a8_weights_are_rounded_as_compressed_tensors_rounds_them(
    family: str, make: Make, tmp_path: Path
) -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    source = make(family)
    quantize = rounded(8, -1, symmetric=True, scale_type="F32")
    codes = quantized_model(source, tmp_path / "q", COMPRESSED, quantize, input_bits=8)
    model = reference(source, codes)
    settings = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)

    def round_inputs(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        scale, zero = compute_dynamic_scales_and_zp(inputs[0], settings, None)
        return (forward.fake_quantize(inputs[0], scale, zero, settings), *inputs[1:])

    for name in codes:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(round_inputs)
    wanted = model(tokens()).logits
    checkpoint = open_checkpoint(tmp_path / "q")
    ours = packed_decoder(checkpoint)
    exact = packed_decoder(checkpoint, as_served=False).logits(tokens())
    effect = (exact - wanted).pow(2).mean().sqrt()

    def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
        # where a token's greatest input is negative it stands at -127.5 steps, so that what differs by a float's last
        # bit may take the other code: one of 64 inputs by a step, the others were rounded by a step / sqrt(12) each
        return bool((found - expected).pow(2).mean().sqrt() < 0.6 * effect)

    assert near(ours.logits(tokens()), wanted)
    values = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    linear = ours.weights._kept_linears["ffn_up.weight", 1]
    name = next(name for name in codes if "layers.1" in name and ("up_proj" in name or "h_to_4h" in name))
    product = round_inputs(None, (values,))[0] @ torch.from_numpy(values_of(codes[name])).float().T
    torch.testing.assert_close(linear.run(values, None), product, atol=1e-5, rtol=0)
    assert all(isinstance(linear, Int8Linear) for linear in ours.weights._kept_linears.values() if linear is not None)
    static = StaticDecoder(packed_decoder(checkpoint), LENGTH + 1)
    static.prefill(tokens()[:1, :-1])
    static.token.copy_(tokens()[:1, -1:])
    static.step()
    assert near(static.logits, wanted[:1, -1])
    assert static._layers[0].linears["attn_qkv.weight"].dense().shape == (192 if family == "gptneox" else 128, 64)


@torch.no_grad()
def test_a_head_in_codes_is_multiplied_by_as_well(make: Make, tmp_path: Path) -> None:
    source = make("llama")
    codes = quantized_model(source, tmp_path / "q", COMPRESSED, rounded(4, 32, symmetric=True))
    checkpoint = open_checkpoint(tmp_path / "q")
    head = checkpoint.tensor("lm_head.weight")
    codes["lm_head.weight"] = round_to_nearest(head.read().astype(np.float32), Grid(4, 32))
    lazy = LazyQuantized("lm_head.weight", codes["lm_head.weight"].form, "", lambda: codes["lm_head.weight"])
    with_head = replace(checkpoint, quantized={**checkpoint.quantized, "lm_head.weight": lazy})
    ours = packed_decoder(with_head)
    torch.testing.assert_close(ours.logits(tokens()), reference(source, codes)(tokens()).logits, atol=TOLERANCE, rtol=0)
    assert ours.weights._kept_linears["output.weight", -1] is not None


@torch.no_grad()
def test_uneven_groups_are_taken_as_numbers(gptq: Model) -> None:
    source, folder, codes = gptq
    name = "model.layers.1.self_attn.q_proj.weight"
    moved = codes[name].columns - np.arange(codes[name].columns)  # all but one column are in the last group
    uneven = replace(codes[name], g_idx=np.minimum(moved - 1, 1).astype(np.int32))
    checkpoint = open_checkpoint(folder)
    tensor = checkpoint.tensors[name]
    changed = replace(
        checkpoint,
        quantized={**checkpoint.quantized, name: LazyQuantized(name, uneven.form, "", lambda: uneven)},
        tensors={**checkpoint.tensors, name: replace(tensor, wide_rows=lambda a, b: uneven.dequantize(a, b))},
    )
    ours = packed_decoder(changed)
    wanted = reference(source, {**codes, name: uneven})(tokens()).logits
    torch.testing.assert_close(ours.logits(tokens()), wanted, atol=TOLERANCE, rtol=0)
    assert ours.weights._kept_linears["attn_q.weight", 1] is None


@torch.no_grad()
def test_adapters_run_beside_packed_weights(gptq: Model) -> None:
    seen: list[tuple[str, int]] = []

    class Doubled:
        """Adds what the weight gives, from the numbers that it is told."""

        def linear(self, place: tuple[str, int], values: Any, result: Any, weight: Any, bias: Any) -> Any:
            seen.append(place)
            assert bias is None
            return result + torch.nn.functional.linear(values, weight)

        def rows(self, slot: str, index: Any, result: Any, weight: Any) -> Any:
            del slot, index, weight
            return result

    source, folder, codes = gptq
    checkpoint = open_checkpoint(folder)
    linears = PackedWeights(checkpoint, preflight(checkpoint))
    found = decoder(checkpoint, adapt=Doubled(), linears=linears).logits(tokens())
    model = reference(source, codes)
    for name, parameter in model.named_parameters():
        if name in codes or name == "lm_head.weight":
            parameter.mul_(2)
    torch.testing.assert_close(found, model(tokens()).logits, atol=4 * TOLERANCE, rtol=0)
    assert len(seen) == len(codes) + 1


@pytest.mark.parametrize("quantize", [rounded(3, 32, symmetric=False), rounded(8, -1, symmetric=True), ordered(Grid())])
def test_bytes_of_a_form_are_those_of_the_packed_tensors(quantize: Any) -> None:
    tensor = quantize("", np.random.default_rng(0).standard_normal((24, 96)).astype(np.float32))
    assert form_bytes(tensor.form) == packed_weight(tensor).nbytes


def test_resident_bytes_count_codes_once_and_the_rest_in_its_width(gptq: Model) -> None:
    _source, folder, codes = gptq
    checkpoint = open_checkpoint(folder)
    others = 2 * 320 * 64 + 7 * 64  # embedding, head, norms
    packed = sum(packed_weight(tensor).nbytes for tensor in codes.values())
    found = PackedWeights(checkpoint, preflight(checkpoint)).resident_bytes(2)
    assert found == packed + 2 * others


@pytest.mark.parametrize("name", CASES)
def test_what_files_keep_packed_is_what_their_codes_pack_to(name: str, make: Make, tmp_path: Path) -> None:
    family, options, fmt, quantize = CASES[name]
    quantized_model(make(family, **options), tmp_path / "q", fmt, quantize)
    for lazy in open_checkpoint(tmp_path / "q").quantized.values():
        assert (lazy.streams is None) == lazy.form.ordered
        if lazy.streams is None:
            continue
        found = lazy.streams()
        wanted = packed_weight(lazy.read())
        kept = packed_streams(
            found.words, found.scale, found.zero, lazy.form.bits, lazy.form.group_size, columns=lazy.form.shape[1]
        )
        assert (kept.columns, kept.bits, kept.group_size) == (wanted.columns, wanted.bits, wanted.group_size)
        for one, other in ((kept.words, wanted.words), (kept.scale, wanted.scale), (kept.zero, wanted.zero)):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one, other)


@pytest.mark.parametrize("columns", [96, 33])
def test_bytes_of_int8_checkpoints_are_taken_as_words_where_they_fill_them(columns: int, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((32, columns)).astype(np.float32)
    tensor = round_to_nearest(weight, Grid(8, -1, scale_type="F32"))
    form = replace(tensor.form, input_bits=8)
    stored = COMPRESSED.pack("a.weight", tensor, form)
    settings = COMPRESSED.settings({"a.weight": form}, [], {})
    tensors = {name: lazy_array(name, values) for name, values in stored.items()}
    config = {"model_type": "x", "architectures": ["X"], "quantization_config": settings}
    lazy = opened(Checkpoint(str(tmp_path), config, tensors)).quantized["a.weight"]
    assert (lazy.streams is not None) == (columns == 96)
    if lazy.streams is not None:
        assert torch.equal(torch.from_numpy(lazy.streams().words), packed_weight(tensor).words)


def test_a_damaged_file_of_launch_parameters_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise TuningError("/home/a/h200.json: not JSON")

    monkeypatch.setattr("quantpress.convert.packed_weights.linear", refuse)
    words = torch.zeros((4, 8), dtype=torch.int32)
    weight = PackedWeight(words, torch.ones((1, 8)), None, None, columns=32, bits=4, group_size=32)
    with pytest.raises(InputError, match=r"h200\.json: not JSON"):
        PackedLinear(weight).run(torch.zeros(1, 32), None)

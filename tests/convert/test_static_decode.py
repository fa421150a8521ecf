"""Decoding with a cache of fixed size against transformers, and against what a CUDA graph asks of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.gptq.pack import GPTQ_V1, GPTQ_V2
from quantpress.convert.model import Decoder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.packed_weights import PackedLinear, packed_decoder
from quantpress.convert.static_decode import StaticDecoder
from quantpress.convert.weights import CheckpointWeights
from quantpress.quant.errors import InputError
from quantpress.quant.grid import Grid, round_to_nearest
from tests.families import decoders_one, decoders_two, experts, gpt_oss, latent
from tests.families.cases import write_checkpoint
from tests.packed_folder import rounded
from tests.packed_models import ordered, quantized_model, reference
from tests.tiny import tiny_case, tiny_checkpoint

# as in test_model.py: float32 sums of up to 160 products through 3 to 6 layers, in another order
TOLERANCE = 5e-5
NAMES = (
    "llama", "llama-bias", "llama-mqa", "llama-dynamic", "mistral-window", "qwen2-tied", "qwen3", "gemma2-caps",
    "gemma2-layers", "gemma3", "phi3-longrope", "phi3-window", "gpt2", "gpt2-inverse", "gptneox",
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Make = Callable[[str], Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def one(name: str) -> Path:
        if name not in made:
            case = tiny_case(name)
            made[name] = tiny_checkpoint(tmp_path_factory.mktemp(name) / "model", case.family, **case.options)
        return made[name]

    return one


def decoder(folder: Path, **options: Any) -> Decoder:
    checkpoint = open_checkpoint(folder)
    spec = find_arch(checkpoint.config)
    hyper = spec.read_config(checkpoint.config)
    return Decoder(CheckpointWeights(checkpoint, spec, hyper), spec, hyper, resident=True, **options)


def some_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(4, 320, (rows, length), generator=torch.Generator().manual_seed(1))


def continued(model: Any, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the greedy continuation (B, count) and its logits (B, count, vocab), without a cache."""
    text, logits = tokens, []
    for _ in range(count):
        logits.append(model(text, use_cache=False).logits[:, -1])
        text = torch.cat([text, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return text[:, tokens.shape[1] :], torch.stack(logits, dim=1)


def stepped(static: StaticDecoder, tokens: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by steps."""
    static.prefill(tokens)
    found, logits = [static.token.clone()], [static.logits.clone()]
    for _ in range(count - 1):
        static.step()
        found.append(static.token.clone())
        logits.append(static.logits.clone())
    return torch.cat(found, dim=1), torch.stack(logits, dim=1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_text_is_that_of_transformers(name: str, make: Make) -> None:
    folder = make(name)
    static = StaticDecoder(decoder(folder), 40)
    # from short texts over the training lengths of longrope (16) and dynamic (32)
    start = {"phi3-longrope": 10, "llama-dynamic": 28}.get(name, 20)
    tokens = some_tokens(1, start)
    wanted, _ = continued(reference(folder, {}), tokens, 10)
    assert static.generate(tokens[0].tolist(), 10) == wanted[0].tolist()
    assert static.generate(tokens[0, :5].tolist(), 3) == decoder(folder).generate(tokens[0, :5].tolist(), 3)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-caps", "gemma3", "gpt2", "gptneox", "phi3-window"])
@torch.no_grad()
def test_logits_of_several_texts_are_those_of_transformers_at_every_step(name: str, make: Make) -> None:
    folder = make(name)
    tokens = some_tokens(3, 12)
    wanted, logits = continued(reference(folder, {}), tokens, 8)
    static = StaticDecoder(decoder(folder), 19, batch=3)
    for _ in range(2):  # what the first texts have left in the cache is not seen by the second
        found, ours = stepped(static, tokens, 8)
        assert torch.equal(found, wanted)
        torch.testing.assert_close(ours, logits, atol=TOLERANCE, rtol=0)
        stepped(static, some_tokens(3, 19), 1)


FORMS = {
    "int4": (GPTQ_V1, rounded(4, 32, symmetric=True)),
    "int3 zeros": (GPTQ_V2, rounded(3, 32, symmetric=False)),
    "ordered": (GPTQ_V1, ordered(Grid(4, 32))),
    "mixed": (GPTQ_V1, lambda name, weight: round_to_nearest(weight, Grid(8 if ".k_proj" in name else 4, 32))),
    "partly": (GPTQ_V1, lambda name, weight: None if ".v_proj" in name else round_to_nearest(weight, Grid(4, 32))),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_packed_weights_give_the_text_of_transformers_on_the_numbers(form: str, make: Make, tmp_path: Path) -> None:
    source = make("llama-bias")
    fmt, quantize = FORMS[form]
    codes = quantized_model(source, tmp_path / "q", fmt, quantize)
    tokens = some_tokens(1, 12)
    wanted, logits = continued(reference(source, codes), tokens, 8)
    static = StaticDecoder(packed_decoder(open_checkpoint(tmp_path / "q")), 20)
    found, ours = stepped(static, tokens, 8)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(ours, logits, atol=2 * TOLERANCE, rtol=0)
    joined = static._layers[0].linears.keys() | static._layers[0].weights.keys()
    assert ("attn_qkv.weight" in joined) == (form in ("int4", "int3 zeros"))
    assert ("ffn_gate.weight" not in joined) == (form != "ordered")


FAMILIES = (*decoders_one.CASES, *decoders_two.CASES, *experts.CASES, *gpt_oss.CASES, *latent.CASES)


@pytest.mark.parametrize(
    "name",
    ["bloom", "falcon-7b", "opt-350m", "mpt", "olmo2", "cohere2", "smollm3-window", "mixtral", "qwen2_moe", "gpt_oss",
     "deepseek2"],
)  # fmt: skip
@torch.no_grad()
def test_steps_give_the_logits_of_every_kind_of_layer(name: str, tmp_path: Path) -> None:
    """The oracle of the case, which is transformers, computes the whole text at once."""
    case = next(case for case in FAMILIES if case.id == name)
    folder = write_checkpoint(case, tmp_path / "model")
    text = np.random.default_rng(3).integers(4, 320, 30)
    wanted = torch.from_numpy(np.array(case.logits(folder, text)))
    static = StaticDecoder(decoder(folder), 40)
    static.prefill(torch.from_numpy(text[None, :20]))
    for place in range(20, 30):
        torch.testing.assert_close(static.logits[0], wanted[place - 1], atol=2 * TOLERANCE, rtol=1e-4)
        static.token.fill_(int(text[place]))
        static.step()
    torch.testing.assert_close(static.logits[0], wanted[-1], atol=2 * TOLERANCE, rtol=1e-4)


def test_models_with_experts_are_not_captured_or_compiled(tmp_path: Path) -> None:
    case = next(case for case in FAMILIES if case.id == "mixtral")
    model = decoder(write_checkpoint(case, tmp_path / "model"))
    for options in ({"graph": True}, {"compiled": True}):
        with pytest.raises(InputError, match="which experts run depends on the tokens"):
            StaticDecoder(model, 20, **options)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_step_looks_at_no_value_and_stays_on_its_device(name: str, make: Make, tmp_path: Path) -> None:
    """Tensors on torch's meta device have no values: an `item()`, or a tensor of another device, is an error."""
    quantized_model(make(name), tmp_path / "q", GPTQ_V1, rounded(4, 32, symmetric=True))
    model = packed_decoder(open_checkpoint(tmp_path / "q"), device="meta", dtype=torch.float16)
    static = StaticDecoder(model, 40, batch=2)
    static.step()
    assert {tensor.device.type for tensor in (static.token, static.logits, static.position)} == {"meta"}


def test_a_step_writes_into_the_same_memory_each_time(make: Make) -> None:
    static = StaticDecoder(decoder(make("llama-dynamic")), 60)

    def kept() -> list[int]:
        tables = [part for table in static._tables.values() if table is not None for part in table]
        tensors = [static.token, static.logits, static.position, static._keys, static._values, *tables]
        return [tensor.data_ptr() for tensor in tensors]

    before = kept()
    static.generate([5, 6, 7, 8] * 8, 6)  # over the context of 32, where every turn changes
    assert kept() == before


@torch.no_grad()
def test_the_decoder_keeps_no_second_copy_of_a_layer(make: Make) -> None:
    model = decoder(make("llama"))
    static = StaticDecoder(model, 20)
    assert all(layer == -1 for _, layer in model.weights._kept)
    text = static.generate([5, 6, 7], 6)
    assert model.generate([5, 6, 7], 6) == text  # it reads them again


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that torch.compile makes from now on; they run as they are."""
    made: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return made


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2-inverse"])
@torch.no_grad()
def test_a_compiled_step_is_compiled_once_for_layers_that_compute_the_same(
    name: str, make: Make, graphs: list[Any]
) -> None:
    folder = make(name)
    tokens = some_tokens(1, 12)
    wanted, _ = continued(reference(folder, {}), tokens, 5)
    found, _ = stepped(StaticDecoder(decoder(folder), 20, compiled=True), tokens, 5)
    assert torch.equal(found, wanted)
    assert len(graphs) == (3 if name == "gpt2-inverse" else 1)  # its layers differ in their number


@torch.no_grad()
def test_packed_linears_are_compiled_as_one_operator(make: Make, tmp_path: Path, graphs: list[Any]) -> None:
    quantized_model(make("llama"), tmp_path / "q", GPTQ_V1, rounded(4, 32, symmetric=True))
    plain, static = (
        StaticDecoder(packed_decoder(open_checkpoint(tmp_path / "q")), 20, compiled=compiled)
        for compiled in (False, True)
    )
    assert static.generate([5, 6, 7], 5) == plain.generate([5, 6, 7], 5)
    assert len(graphs) == 1
    nodes = [node for node in graphs[0].graph.nodes if "packed_linear" in str(node.target)]
    assert len(nodes) == 4  # q, k and v; the attention's output; gate and up; down


def test_fused_linears_are_packed_ones(make: Make, tmp_path: Path) -> None:
    quantized_model(make("llama"), tmp_path / "q", GPTQ_V1, rounded(4, 32, symmetric=True))
    static = StaticDecoder(packed_decoder(open_checkpoint(tmp_path / "q")), 20)
    rows = {
        slot: linear.weight.rows
        for slot, linear in static._layers[1].linears.items()
        if isinstance(linear, PackedLinear)
    }
    assert rows == {"attn_qkv.weight": 128, "attn_output.weight": 64, "ffn_up.weight": 192, "ffn_down.weight": 64}


def test_generation_stops_at_a_stop_token(make: Make) -> None:
    static = StaticDecoder(decoder(make("llama")), 20)
    text = static.generate([5, 6, 7], 12)
    assert static.generate([5, 6, 7], 12, stop=frozenset({text[4]})) == text[: text.index(text[4]) + 1]


def test_what_does_not_fit_the_cache_is_refused(make: Make) -> None:
    static = StaticDecoder(decoder(make("llama")), 8)
    for tokens in (some_tokens(1, 9), some_tokens(2, 4), some_tokens(1, 0)):
        with pytest.raises(InputError, match="the cache is for 1 of 1 to 8"):
            static.prefill(tokens)
    assert len(static.generate([5, 6, 7, 8], 5)) == 5  # the last one needs no place in the cache
    with pytest.raises(InputError, match="the cache is full: it is for 8 tokens"):
        static.generate([5, 6, 7, 8], 6)
    with pytest.raises(InputError, match="65 tokens, the model has 64 positions"):
        StaticDecoder(decoder(make("gpt2")), 65)

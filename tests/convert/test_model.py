"""The decoder against transformers: every family, every option, from the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.model import Decoder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.weights import CheckpointWeights
from quantpress.quant.errors import InputError
from tests.tiny import FAMILIES, Tiny, tiny_case, tiny_checkpoint

LENGTH = 48  # longer than every window (8), training length (16, 32) and dynamic context (32) of the tiny models
# float32 sums of up to 160 products through 3 to 6 layers, in another order: 1e-5 was the most seen; a wrong formula is
# off by 1e-2 or more
TOLERANCE = 5e-5

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives a function that makes the checkpoint of a case once."""
    made: dict[tuple[str, str], Path] = {}

    def one(case: Tiny, dtype: str = "float32") -> Path:
        key = (case.id, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("tiny") / f"{case.id}-{dtype}"
            made[key] = tiny_checkpoint(folder, case.family, dtype=dtype, **case.options)
        return made[key]

    return one


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keeps tiny products from waiting for threads."""
    torch.set_num_threads(1)


def reference(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loader = Gemma3ForConditionalGeneration if "text_config" in config else AutoModelForCausalLM
    return loader.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def decoder(checkpoint: Checkpoint, *, resident: bool = True, dtype: torch.dtype = torch.float32) -> Decoder:
    spec = find_arch(checkpoint.config)
    hyper = spec.read_config(checkpoint.config)
    return Decoder(CheckpointWeights(checkpoint, spec, hyper), spec, hyper, resident=resident, dtype=dtype)


def some_tokens(vocab: int, *, rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    # the first ids are special: Gemma 3 with images would look for one
    return torch.randint(4, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def greedy(model: Any, tokens: torch.Tensor, count: int) -> list[int]:
    """Continues without a cache, so that nothing depends on how a cache is kept."""
    text = tokens[None]
    for _ in range(count):
        text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return text[0, len(tokens) :].tolist()


@pytest.mark.parametrize("case", FAMILIES, ids=str)
@torch.no_grad()
def test_logits_and_greedy_text_equal_those_of_transformers(case: Tiny, make: Make) -> None:
    folder = make(case)
    model = reference(folder)
    ours = decoder(open_checkpoint(folder))
    tokens = some_tokens(ours.hyper.vocab)
    wanted = model(tokens).logits
    assert wanted.std() > 0.5, "logits that hardly differ would hide a wrong layer"
    torch.testing.assert_close(ours.logits(tokens), wanted, atol=TOLERANCE, rtol=0)
    # from a short text over the training lengths of longrope (16) and dynamic (32)
    start = {"longrope": 10, "dynamic": 28}.get(ours.hyper.rope.kind if ours.hyper.rope else "", 20)
    assert ours.generate(tokens[0, :start].tolist(), 10) == greedy(model, tokens[0, :start], 10)


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_rows_of_the_table_are_the_parameters_of_transformers(case: Tiny, make: Make) -> None:
    """Names and shapes come from the file that transformers wrote."""
    checkpoint = open_checkpoint(make(case))
    spec = find_arch(checkpoint.config)
    hyper = spec.read_config(checkpoint.config)
    ours = [name for name in checkpoint.tensors if not name.startswith(spec.foreign)]
    shapes = {name: checkpoint.tensors[name].shape for name in ours}
    found = set()
    for row, layer in spec.rows(hyper):
        names = [name for name in spec.names(row, layer) if name in shapes]
        if not names and row.tied_to and hyper.tied:
            continue
        assert len(names) == 1, (row.hf, layer, names)
        assert shapes[names[0]] == tuple(hyper.dims[dim] for dim in row.shape), names[0]
        found.add(names[0])
    assert found == set(shapes)


@pytest.mark.parametrize("name", ["llama-bias", "gemma3-six", "phi3-longrope", "gpt2", "gptneox", "gemma2"])
def test_streaming_equals_resident_and_first_cuts_positions(name: str, make: Make) -> None:
    checkpoint = open_checkpoint(make(tiny_case(name)))
    resident, streaming = decoder(checkpoint), decoder(checkpoint, resident=False)
    tokens = some_tokens(resident.hyper.vocab)
    whole = resident.logits(tokens)
    assert torch.equal(resident.logits(tokens), whole)
    assert torch.equal(streaming.logits(tokens), whole)
    # fewer rows in the last product may be summed in other blocks
    torch.testing.assert_close(streaming.logits(tokens, first=30), whole[:, 30:], atol=TOLERANCE, rtol=0)


def test_streaming_never_holds_two_layers(make: Make) -> None:
    checkpoint = open_checkpoint(make(tiny_case("llama")))
    spec = find_arch(checkpoint.config)
    hyper = spec.read_config(checkpoint.config)
    asked: list[int] = []
    read = CheckpointWeights(checkpoint, spec, hyper)

    def weight(slot: str, layer: int) -> torch.Tensor | None:
        asked.append(layer)
        return read(slot, layer)

    model = Decoder(weight, spec, hyper)
    tokens = some_tokens(hyper.vocab)
    model.logits(tokens)
    model.logits(tokens)
    order = [layer for at, layer in enumerate(asked) if at == 0 or asked[at - 1] != layer]
    assert order == [-1, 0, 1, 2, -1, 0, 1, 2, -1]  # one walk through the layers each time, nothing kept
    assert not model.weights._kept


def test_resident_reads_each_weight_once(make: Make) -> None:
    checkpoint = open_checkpoint(make(tiny_case("llama-tied")))
    spec = find_arch(checkpoint.config)
    hyper = spec.read_config(checkpoint.config)
    asked: list[tuple[str, int]] = []
    read = CheckpointWeights(checkpoint, spec, hyper)

    def weight(slot: str, layer: int) -> torch.Tensor | None:
        asked.append((slot, layer))
        return read(slot, layer)

    model = Decoder(weight, spec, hyper, resident=True)
    model.logits(some_tokens(hyper.vocab))
    model.logits(some_tokens(hyper.vocab))
    assert len(asked) == len(set(asked))
    assert ("output.weight", -1) not in asked  # the embedding stands in


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gptneox", "phi3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_weights_of_16_bits_are_widened_without_rounding(name: str, dtype: str, make: Make) -> None:
    folder = make(tiny_case(name), dtype)
    ours = decoder(open_checkpoint(folder))
    tokens = some_tokens(ours.hyper.vocab, rows=1)
    torch.testing.assert_close(ours.logits(tokens), reference(folder)(tokens).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@torch.no_grad()
def test_computing_in_bfloat16_is_as_near_as_transformers_in_bfloat16(name: str, make: Make) -> None:
    folder = make(tiny_case(name), "bfloat16")
    tokens = some_tokens(320, rows=1)
    exact = reference(folder)(tokens).logits
    theirs = (reference(folder).to(torch.bfloat16)(tokens).logits.float() - exact).pow(2).mean().sqrt()
    ours = (decoder(open_checkpoint(folder), dtype=torch.bfloat16).logits(tokens) - exact).pow(2).mean().sqrt()
    assert ours < 1.5 * theirs  # both round to 8 bits some 20 times; neither order is better


@pytest.mark.parametrize("name", ["stories260k-hf", "glasslm-en-hf", "mix6m-hf"])
@torch.no_grad()
def test_real_models_equal_transformers(name: str, shared: Path) -> None:
    folder = shared / "models" / name
    model, ours = reference(folder), decoder(open_checkpoint(folder))
    tokens = some_tokens(ours.hyper.vocab, length=96)
    # logits go up to 30 here, so float32 has four times the step
    torch.testing.assert_close(ours.logits(tokens), model(tokens).logits, atol=4 * TOLERANCE, rtol=0)
    assert ours.generate([1], 40) == greedy(model, torch.tensor([1]), 40)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gptneox-sequential", "gemma3"])
def test_observers_see_the_input_of_every_linear(name: str, make: Make) -> None:
    """The input times the weight is what the linear gives: checked through the output projection of the MLP."""
    checkpoint = open_checkpoint(make(tiny_case(name)))
    model = decoder(checkpoint)
    seen: dict[str, torch.Tensor] = {}
    hidden = model.embed(some_tokens(model.hyper.vocab))
    model.run_layer(0, hidden, observe=lambda slot, values: seen.update({slot: values.clone()}))
    linears = {row.slot: row for row in model.spec.tensors if row.per_layer and row.role.name == "LINEAR"}
    assert set(seen) == set(linears)
    for slot, values in seen.items():
        weight = model.weights.get(slot, 0)
        assert weight is not None
        assert values.shape == (*hidden.shape[:2], weight.shape[1])


def test_generation_stops_at_a_stop_token(make: Make) -> None:
    model = decoder(open_checkpoint(make(tiny_case("llama"))))
    text = model.generate([5, 6, 7], 12)
    stop = text[4]
    assert model.generate([5, 6, 7], 12, stop=frozenset({stop})) == text[: text.index(stop) + 1]


def test_tokens_outside_the_vocabulary_are_refused(make: Make) -> None:
    model = decoder(open_checkpoint(make(tiny_case("llama"))))
    for token in (-1, 320):
        with pytest.raises(InputError, match="has 320 tokens"):
            model.logits(torch.tensor([[1, token]]))


def test_text_longer_than_learned_positions_is_refused(make: Make) -> None:
    model = decoder(open_checkpoint(make(tiny_case("gpt2"))))
    with pytest.raises(InputError, match="65 tokens, the model has 64 positions"):
        model.logits(torch.ones(1, 65, dtype=torch.int64))


def test_a_missing_or_misshapen_tensor_is_an_error_that_names_it(make: Make) -> None:
    checkpoint = open_checkpoint(make(tiny_case("llama")))
    name = "model.layers.1.mlp.up_proj.weight"
    without = replace(checkpoint, tensors={key: value for key, value in checkpoint.tensors.items() if key != name})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        decoder(without).logits(some_tokens(320))
    swapped = replace(checkpoint, tensors={**checkpoint.tensors, name: checkpoint.tensors["lm_head.weight"]})
    with pytest.raises(InputError, match=r"lm_head\.weight' has shape \(320, 64\), wanted \(96, 64\)"):
        decoder(swapped).logits(some_tokens(320))
    headless = {key: value for key, value in checkpoint.tensors.items() if key != "lm_head.weight"}
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        decoder(replace(checkpoint, tensors=headless)).logits(some_tokens(320))


@pytest.mark.parametrize("nested", [False, True], ids=["llama", "gemma3"])
@torch.no_grad()
def test_spelling_of_transformers_4_gives_the_same_model(nested: bool, make: Make, tmp_path: Path) -> None:
    """transformers itself reads the old spelling of the same settings and is the judge."""
    case = tiny_case("gemma3-linear" if nested else "llama-yarn")
    folder = make(case)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    ropes = config.pop("rope_parameters")
    if nested:
        full, local = ropes["full_attention"], ropes["sliding_attention"]
        config["rope_theta"], config["rope_local_base_freq"] = full.pop("rope_theta"), local["rope_theta"]
        config["rope_scaling"] = full
        config.pop("layer_types")
        config["sliding_window_pattern"] = 2
    else:
        config["rope_theta"] = ropes.pop("rope_theta")
        config["rope_scaling"] = {"type": ropes.pop("rope_type"), **ropes}
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    spec = find_arch(config)
    new = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert spec.read_config(config) == spec.read_config(new)
    checkpoint = replace(open_checkpoint(folder), config=config)
    tokens = some_tokens(320)
    wanted = reference(tmp_path)(tokens).logits
    torch.testing.assert_close(decoder(checkpoint).logits(tokens), wanted, atol=TOLERANCE, rtol=0)

"""Base and adapter run unmerged in the decoder against PEFT's own model that is never merged, from the same files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantpress.convert.lora import activations
from quantpress.convert.lora.adapter import open_adapter
from quantpress.convert.lora.ledger import Applied
from quantpress.convert.lora.unmerged import unmerged
from quantpress.convert.model import Decoder
from quantpress.convert.open import open_checkpoint
from quantpress.quant.errors import InputError
from tests.tiny import VOCABULARY, tiny_case, tiny_checkpoint

LENGTH = 24
# Logits of the tiny models are up to 10 in float32. Sums of 64 to 160 products in another order, through three layers,
# gave up to 1e-5 between the decoder and transformers (test_model.py); adapters add sums of the same length. Leaving
# one module's adapter out changes logits by 1e-2 or more (test below).
TOLERANCE = 5e-5

# what PEFT and transformers have to say of tied embeddings, patterns and the like is not the matter here
pytestmark = pytest.mark.filterwarnings("ignore:.*")

Make = Callable[..., Path]
ALL = "all-linear"


@dataclass(frozen=True)
class Case:
    """An adapter's config for a tiny model.

    Attributes:
        id: name of the test.
        options: of the config class.
        base: id of a case of tests.tiny.
        kind: name of the config class in PEFT.
    """

    id: str
    options: Mapping[str, Any]
    base: str = "llama"
    kind: str = "LoraConfig"

    def __str__(self) -> str:
        return self.id


def lora(name: str, base: str = "llama", **options: Any) -> Case:
    return Case(name, {"r": 4, "lora_alpha": 6, "target_modules": ALL, **options}, base)


EMBEDDED = {"target_modules": ["embed_tokens", "q_proj"]}
HEADED = {"target_modules": ["lm_head", "q_proj"]}
ADALORA = {"init_r": 6, "target_r": 3, "lora_alpha": 5, "total_step": 10, "target_modules": ["q_proj", "down_proj"]}
CASES = (
    lora("lora"),
    lora("rslora", use_rslora=True),
    lora(
        "patterns", rank_pattern={"q_proj": 2, "layers.1.mlp.*": 3}, alpha_pattern={"v_proj|down_proj": 1, "o_proj": 9}
    ),
    lora("rslora-patterns", use_rslora=True, rank_pattern={".*gate_proj": 9}, alpha_pattern={"^model.*0.*up_proj": 2}),
    lora("layers", target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]),
    lora("regex", target_modules=r".*layers\.[12]\..*(k|down)_proj"),
    lora("exclude", exclude_modules=["v_proj", "up_proj"]),
    lora("lora-bias", "llama-bias", lora_bias=True),
    lora("dora", use_dora=True),
    lora("dora-rslora", use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}),
    lora("dora-bias", "llama-bias", use_dora=True),
    lora("bias-all", "llama-bias", bias="all"),
    lora("bias-lora_only", "llama-bias", bias="lora_only", target_modules=["q_proj", "down_proj"]),
    lora("qwen2", "qwen2", bias="all"),
    lora("qwen2-dora", "qwen2", use_dora=True),
    lora("gpt2", "gpt2", target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True),
    lora("gpt2-dora", "gpt2", target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, use_dora=True),
    lora("gpt2-embeddings", "gpt2", target_modules=["wte", "wpe", "c_attn"]),
    lora("gpt2-bias", "gpt2", target_modules=["c_attn", "c_fc"], lora_bias=True, bias="all"),
    lora("gptneox", "gptneox", bias="all"),
    lora("gptneox-dora", "gptneox", use_dora=True),
    lora("gptneox-lora-bias", "gptneox", lora_bias=True),
    lora("gptneox-ends", "gptneox", target_modules=["embed_in", "embed_out", "lm_head", "dense"]),
    lora("phi3", "phi3"),
    lora("phi3-dora", "phi3", use_dora=True),
    lora("gemma2", "gemma2"),
    lora("gemma3-embedding", "gemma3", **EMBEDDED),
    lora("gemma3-embedding-dora", "gemma3", **EMBEDDED, use_dora=True),
    lora("gemma3-vision", "gemma3-vision", target_modules=r".*language_model.*(q_proj|up_proj)"),
    lora("embedding", **EMBEDDED),
    lora("embedding-dora", **EMBEDDED, use_dora=True),
    lora("embedding-tied", "llama-tied", **EMBEDDED),
    lora("embedding-tied-dora", "llama-tied", **EMBEDDED, use_dora=True),
    lora("embedding-ensured", "llama-tied", **EMBEDDED, ensure_weight_tying=True),
    lora("head", **HEADED),
    lora("head-tied", "llama-tied", **HEADED),
    lora("head-tied-dora", "llama-tied", **HEADED, use_dora=True),
    lora("head-caps", "gemma2-caps", **HEADED),
    lora("saved", modules_to_save=["embed_tokens", "lm_head", "norm"]),
    lora("saved-mlp", modules_to_save=["layers.1.mlp.gate_proj", "input_layernorm"], target_modules=["q_proj"]),
    lora("saved-embedding-tied", "llama-tied", modules_to_save=["embed_tokens"]),
    lora("saved-head-tied", "llama-tied", modules_to_save=["lm_head"]),
    lora("saved-both-tied", "llama-tied", modules_to_save=["embed_tokens", "lm_head"]),
    lora("saved-ensured", "llama-tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    lora("saved-gemma", "gemma3", modules_to_save=["embed_tokens", "post_feedforward_layernorm", "q_norm"]),
    lora("saved-gptneox", "gptneox", modules_to_save=["query_key_value"], target_modules=["dense"]),
    lora("saved-gpt2", "gpt2", modules_to_save=["ln_f", "h.1.mlp.c_fc"], target_modules=["c_attn"]),
    lora("tokens", trainable_token_indices=[3, 200, 7]),
    lora("tokens-tied", "llama-tied", trainable_token_indices=[3, 200, 7]),
    lora("tokens-head-tied", "llama-tied", trainable_token_indices={"lm_head": [5, 6]}),
    lora("tokens-both", trainable_token_indices={"embed_tokens": [9, 4], "lm_head": [5, 6]}),
    lora("tokens-both-tied", "llama-tied", trainable_token_indices={"embed_tokens": [9, 4], "lm_head": [9, 4]}),
    lora("tokens-apart-tied", "llama-tied", trainable_token_indices={"embed_tokens": [9, 4], "lm_head": [5, 6]}),
    lora("tokens-gemma3", "gemma3", trainable_token_indices=[3, 200, 7]),
    Case("adalora", ADALORA, kind="AdaLoraConfig"),
    Case("adalora-gpt2", {**ADALORA, "target_modules": ["c_attn"]}, "gpt2", kind="AdaLoraConfig"),
    Case("loha", {"r": 3, "alpha": 5, "target_modules": ALL, "rank_pattern": {"q_proj": 2}}, kind="LoHaConfig"),
    Case("loha-gptneox", {"r": 3, "alpha": 5, "target_modules": ALL}, "gptneox", kind="LoHaConfig"),
    Case("lokr", {"r": 3, "alpha": 5, "target_modules": ALL, "alpha_pattern": {"q_proj": 9}}, kind="LoKrConfig"),
    Case("lokr-both", {"r": 2, "alpha": 5, "target_modules": ALL, "decompose_both": True}, kind="LoKrConfig"),
    Case("lokr-full", {"r": 64, "alpha": 5, "target_modules": ALL, "decompose_factor": 4}, kind="LoKrConfig"),
    Case("lokr-gptneox", {"r": 2, "alpha": 5, "target_modules": ALL}, "gptneox", kind="LoKrConfig"),
    Case("tokens-alone", {"token_indices": [3, 200, 7]}, "llama", kind="TrainableTokensConfig"),
    Case("tokens-alone-tied", {"token_indices": [3, 200, 7]}, "llama-tied", kind="TrainableTokensConfig"),
)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives a function that makes the checkpoint of a tiny case once."""
    made: dict[str, Path] = {}

    def one(name: str) -> Path:
        if name not in made:
            case = tiny_case(name)
            made[name] = tiny_checkpoint(tmp_path_factory.mktemp("tiny") / name, case.family, **case.options)
        return made[name]

    return one


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keeps tiny products from waiting for threads."""
    torch.set_num_threads(1)


def peft() -> Any:
    """Gives the package, which is typed too narrowly for tables of options."""
    return importlib.import_module("peft")


def transformers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, Gemma3ForConditionalGeneration, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    loader = Gemma3ForConditionalGeneration if "text_config" in config else AutoModelForCausalLM
    return loader.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def train(model: Any, seed: int) -> None:
    """Gives every parameter that training would change another value, so that each one matters."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if not parameter.requires_grad or "ranknum" in name:
                continue
            noise = torch.randn(parameter.shape, generator=random)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif "lora_A" in name or "embedding_A" in name:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif any(part in name for part in ("lora_", "hada_", "lokr_")):
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.2 * noise)


def write_adapter(case: Case, base: Path, folder: Path, seed: int = 1) -> Path:
    model = peft().get_peft_model(transformers_model(base), getattr(peft(), case.kind)(**case.options))
    train(model, seed)
    model.save_pretrained(folder)
    return folder


def peft_logits(base: Path, folders: Mapping[Path, float], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of PEFT's model with adapters that are loaded, weighted and active, and not merged."""
    names = [f"adapter{number}" for number in range(len(folders))]
    model: Any = None
    for name, folder in zip(names, folders, strict=True):
        if model is None:
            model = peft().PeftModel.from_pretrained(transformers_model(base), folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        for name, weight in zip(names, folders.values(), strict=True):
            if weight != 1.0 and hasattr(module, "set_scale") and name in module.scaling:
                module.set_scale(name, weight)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(tokens).logits
    return logits


def our_logits(base: Path, folders: Mapping[Path, float], tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    applied = [Applied(open_adapter(folder), weight) for folder, weight in folders.items()]
    model = unmerged(open_checkpoint(base), applied)
    with torch.no_grad():
        return Decoder(model.weight, model.spec, model.hyper, adapt=model.adapt, **options).logits(tokens)


def some_tokens() -> torch.Tensor:
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens[:, 3:12] = torch.tensor([3, 200, 7, 9, 4, 5, 6, 5, 200])  # the tokens that cases train
    return tokens


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_are_those_of_pefts_model(case: Case, make: Make, tmp_path: Path) -> None:
    base, tokens = make(case.base), some_tokens()
    folder = write_adapter(case, base, tmp_path / "adapter")
    wanted = peft_logits(base, {folder: 1.0}, tokens)
    with torch.no_grad():
        plain = transformers_model(base)(tokens).logits
    assert (wanted - plain).abs().max() > 0.1, "the adapter does nothing, the test cannot tell"
    np.testing.assert_allclose(our_logits(base, {folder: 1.0}, tokens), wanted, rtol=0, atol=TOLERANCE)


PAIRS = (
    ("llama", lora("a"), lora("b", use_rslora=True, target_modules=["q_proj", "v_proj"])),
    ("llama-bias", lora("a", use_dora=True), lora("b", use_dora=True, target_modules=["q_proj", "down_proj"])),
    ("llama-bias", lora("a"), lora("b", use_dora=True)),
    ("llama-bias", lora("a", use_dora=True), lora("b", lora_bias=True)),
    ("llama-tied", lora("a", **EMBEDDED, use_dora=True), lora("b", target_modules=["embed_tokens", "lm_head"])),
)


@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
def test_several_adapters_act_with_their_weights(
    name: str, first: Case, second: Case, make: Make, tmp_path: Path
) -> None:
    base, tokens = make(name), some_tokens()
    folders = {
        write_adapter(first, base, tmp_path / "first", seed=1): 0.7,
        write_adapter(second, base, tmp_path / "second", seed=2): 1.3,
    }
    wanted = peft_logits(base, folders, tokens)
    np.testing.assert_allclose(our_logits(base, folders, tokens), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_a_grown_vocabulary_speaks_its_new_tokens(base: str, make: Make, tmp_path: Path) -> None:
    model = transformers_model(make(base))
    model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    tied = base == "llama-tied"
    config = peft().LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"] + ["lm_head"] * (not tied),
        ensure_weight_tying=tied,
    )  # fmt: skip
    model = peft().get_peft_model(model, config)
    train(model, 3)
    model.save_pretrained(tmp_path / "adapter")
    tokens = some_tokens()
    tokens[:, 0], tokens[:, 5] = VOCABULARY, VOCABULARY + 1
    with torch.no_grad():
        wanted = model.eval()(tokens).logits
    found = our_logits(make(base), {tmp_path / "adapter": 1.0}, tokens)
    assert found.shape[-1] == VOCABULARY + 2
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


def test_adalora_keeps_its_divisor_when_directions_were_dropped(make: Make, tmp_path: Path) -> None:
    base, tokens = make("llama"), some_tokens()
    model = peft().get_peft_model(transformers_model(base), peft().AdaLoraConfig(**ADALORA))
    train(model, 1)
    names = [name for name, _ in model.base_model.model.named_parameters() if "lora_E" in name]
    masks = {name: [True, False, True, True, bool(number % 2), False] for number, name in enumerate(names)}
    model.peft_config["default"].rank_pattern = masks
    model.save_pretrained(tmp_path / "adapter")
    wanted = peft_logits(base, {tmp_path / "adapter": 1.0}, tokens)
    np.testing.assert_allclose(our_logits(base, {tmp_path / "adapter": 1.0}, tokens), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("options", [{"resident": True}, {"dtype": torch.float64}], ids=["resident", "float64"])
def test_weights_that_stay_and_other_types_give_the_same(make: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    base, tokens = make("llama-tied"), some_tokens()
    case = lora("all", use_dora=True, target_modules=["embed_tokens", "lm_head", "q_proj", "down_proj"])
    folders = {write_adapter(case, base, tmp_path / "adapter"): 1.0}
    found = our_logits(base, folders, tokens, **options)
    np.testing.assert_allclose(found, our_logits(base, folders, tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("base", ["llama-tied", "gptneox"])
def test_norms_of_large_weights_are_taken_block_by_block(
    base: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = lora("all", use_dora=True, target_modules=["embed_tokens", "embed_in", "dense", "q_proj"])
    folders = {write_adapter(case, make(base), tmp_path / "adapter"): 1.0}
    wanted = our_logits(make(base), folders, some_tokens())
    monkeypatch.setattr(activations, "_BLOCK", 500)
    np.testing.assert_allclose(our_logits(make(base), folders, some_tokens()), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("options", [EMBEDDED, {"modules_to_save": ["embed_tokens"]}], ids=["lora", "saved"])
def test_an_ensured_head_follows_also_where_the_file_does_not_repeat_it(
    options: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    base, tokens = make("llama-tied"), some_tokens()
    folder = write_adapter(lora("ensured", ensure_weight_tying=True, **options), base, tmp_path / "adapter")
    wanted = peft_logits(base, {folder: 1.0}, tokens)
    edit(folder, lambda tensors: {name: values for name, values in tensors.items() if "lm_head" not in name})
    np.testing.assert_allclose(our_logits(base, {folder: 1.0}, tokens), wanted, rtol=0, atol=TOLERANCE)


def test_one_module_left_out_is_far_beyond_the_tolerance(make: Make, tmp_path: Path) -> None:
    base, tokens = make("llama"), some_tokens()
    folder = write_adapter(lora("lora"), base, tmp_path / "adapter")
    wanted = our_logits(base, {folder: 1.0}, tokens)
    for module in ("0.self_attn.q_proj", "1.self_attn.k_proj", "2.mlp.up_proj"):
        edit(folder, without(module))
        assert (our_logits(base, {folder: 1.0}, tokens) - wanted).abs().max() > 200 * TOLERANCE, module


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: values.contiguous() for name, values in change(load_file(path)).items()}, path)


def without(module: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: values * (module not in name) for name, values in tensors.items()}


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name.replace(old, new): values for name, values in tensors.items()}


DAMAGES = {
    "a module the base lacks": (renamed("layers.2.", "layers.9."), "the base has no tensor 'model.layers.9."),
    "wider than the base": (
        lambda tensors: {n: torch.cat([t, t], -1) if "q_proj.lora_A" in n else t for n, t in tensors.items()},
        r"lora_A.* is \(4, 128\), wanted \(4, 64\)",
    ),
    "a norm": (renamed("0.self_attn.q_proj", "0.input_layernorm"), "input_layernorm.* is no linear"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_adapter_that_does_not_fit_is_refused(name: str, make: Make, tmp_path: Path) -> None:
    change, message = DAMAGES[name]
    folder = write_adapter(lora("lora", target_modules=["q_proj"]), make("llama"), tmp_path / "adapter")
    edit(folder, change)
    with pytest.raises(InputError, match=message):
        unmerged(open_checkpoint(make("llama")), [Applied(open_adapter(folder))])


def test_a_model_inside_another_is_found(make: Make, tmp_path: Path) -> None:
    base, tokens = make("llama"), some_tokens()
    folder = write_adapter(lora("lora"), base, tmp_path / "adapter")
    wanted = our_logits(base, {folder: 1.0}, tokens)
    edit(folder, renamed("base_model.model.model.", "base_model.model.model.language_model."))
    assert torch.equal(our_logits(base, {folder: 1.0}, tokens), wanted)


def test_two_adapters_that_replace_the_same_tensor_are_refused(make: Make, tmp_path: Path) -> None:
    base = make("llama")
    case = lora("saved", modules_to_save=["lm_head"], target_modules=["q_proj"])
    one, two = (open_adapter(write_adapter(case, base, tmp_path / name, seed)) for seed, name in enumerate("ab"))
    with pytest.raises(InputError, match=r"'lm_head.weight' is replaced by an earlier adapter already"):
        unmerged(open_checkpoint(base), [Applied(one), Applied(two)])

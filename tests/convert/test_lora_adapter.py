"""Adapters that PEFT saved open as PEFT opens them; renamed, damaged and hostile ones are understood or refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from quantpress.convert.lora.adapter import Adapter, open_adapter
from quantpress.convert.lora.description import describe
from quantpress.quant.errors import InputError
from tests.tiny import tiny_case, tiny_checkpoint

# what PEFT and transformers have to say about tied embeddings and the like is not the matter here
pytestmark = pytest.mark.filterwarnings("ignore:.*")


@dataclass(frozen=True)
class Case:
    """An adapter to be made by PEFT.

    Attributes:
        id: name of the test.
        options: of the config class.
        base: id of a case of tests.tiny, or "mixtral".
        kind: the config class.
        grow: rows that the vocabulary gets more.
        spare: tensors of the file that are not used.
    """

    id: str
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str = "llama"
    kind: str = "LoraConfig"
    grow: int = 0
    spare: int = 0

    def __str__(self) -> str:
        return self.id


def lora(name: str, base: str = "llama", grow: int = 0, spare: int = 0, **options: Any) -> Case:
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    return Case(name, {**defaults, **options}, base, grow=grow, spare=spare)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ADALORA = {"init_r": 6, "target_r": 3, "lora_alpha": 5, "total_step": 10, "target_modules": ["q_proj", "down_proj"]}
CASES = (
    lora("lora"),
    lora("rslora-patterns", use_rslora=True, rank_pattern={"layers.1.*q_proj": 2}, alpha_pattern={"down_proj": 9}),
    lora("dora", use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    lora("embedding", target_modules=["embed_tokens", "q_proj"]),
    lora("embedding-grown", target_modules=["embed_tokens", "q_proj"], grow=10),
    lora("embedding-tied", "llama-tied", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    lora("grown", grow=10),
    lora("saved", modules_to_save=["lm_head", "norm"]),
    lora("saved-grown", modules_to_save=["lm_head", "embed_tokens"], grow=10, spare=4),
    lora("tokens", trainable_token_indices=[3, 1]),
    lora("tokens-grown", trainable_token_indices={"embed_tokens": [321, 322]}, grow=10),
    lora("tokens-gpt2", "gpt2", trainable_token_indices=[3, 1], target_modules=["c_attn"], fan_in_fan_out=True),
    lora("layers", layers_to_transform=[0, 2], layers_pattern="layers"),
    lora("pattern", target_modules=r".*layers\.[12]\..*(k|down)_proj", exclude_modules=["v_proj"]),
    lora("all-linear", target_modules="all-linear"),
    lora("bias-all", "llama-bias", bias="all"),
    lora("bias-lora_only", "gpt2", bias="lora_only", target_modules=["c_attn"], fan_in_fan_out=True),
    lora("lora-bias", "llama-bias", lora_bias=True),
    lora("velora", velora_config=VeloraConfig(), spare=6),
    lora("monteclora", monteclora_config=MontecloraConfig(), spare=24),
    lora("mica", init_lora_weights="mica"),
    lora("experts", "mixtral", **EXPERTS),
    lora("experts-ranks", "mixtral", **EXPERTS, rank_pattern={"experts.down_proj": 3}),
    Case("adalora", ADALORA, kind="AdaLoraConfig"),
    Case(
        "loha", {"r": 4, "alpha": 6, "target_modules": ["q_proj"], "rank_pattern": {"0.*q_proj": 2}}, kind="LoHaConfig"
    ),
    Case("lokr", {"r": 4, "alpha": 6, "target_modules": ["q_proj", "up_proj"]}, kind="LoKrConfig"),
    Case("lokr-both", {"r": 2, "target_modules": ["q_proj"], "decompose_both": True}, kind="LoKrConfig"),
    Case("tokens-alone", {"token_indices": [5, 2]}, kind="TrainableTokensConfig"),
    Case("tokens-alone-tied", {"token_indices": [5, 2]}, base="llama-tied", kind="TrainableTokensConfig"),
)
Make = Callable[[Case], Path]


def _mixtral(folder: Path) -> None:
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives a function that lets PEFT save an adapter of random values, once for each case."""
    root = tmp_path_factory.mktemp("adapters")

    def base(case: Case) -> torch.nn.Module:
        folder = root / "bases" / case.base
        if not folder.exists():
            if case.base == "mixtral":
                _mixtral(folder)
            else:
                tiny = tiny_case(case.base)
                tiny_checkpoint(folder, tiny.family, **tiny.options)
        model = AutoModelForCausalLM.from_pretrained(folder)
        if case.grow:
            model.resize_token_embeddings(model.config.vocab_size + case.grow, mean_resizing=False)
        return model

    def one(case: Case) -> Path:
        folder = root / case.id
        if not folder.exists():
            torch.manual_seed(1)
            model = peft.get_peft_model(base(case), getattr(peft, case.kind)(**case.options))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_()  # in place: tied ones stay tied
            model.save_pretrained(folder)
        return folder

    one.base = base
    return one


@pytest.fixture
def copy(make: Make, tmp_path: Path) -> Callable[..., Path]:
    """Gives a function that copies an adapter, with other names or keys."""

    def one(case: str = "lora", *, rename: Callable[[str], str] | None = None, drop: str = "", **config: Any) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(make(next(found for found in CASES if found.id == case)), folder)
        if rename is not None or drop:
            tensors = load_file(folder / "adapter_model.safetensors")
            kept = {name: value for name, value in tensors.items() if not drop or drop not in name}
            save_file(
                {(rename or str)(name): value for name, value in kept.items()}, folder / "adapter_model.safetensors"
            )
        if config:
            path = folder / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return folder

    return one


def values(adapter: Adapter) -> dict[tuple[str, int, str], np.ndarray[Any, Any]]:
    return {
        (module.path, module.depth, part): tensor.read()
        for module in adapter.modules
        for part, tensor in module.parts.items()
    }


def assert_same(one: Adapter, other: Adapter) -> None:
    left, right = values(one), values(other)
    assert left.keys() == right.keys()
    for place, array in left.items():
        np.testing.assert_array_equal(array, right[place])


def _tuner_layers(model: Any) -> Iterator[tuple[str, BaseTunerLayer]]:
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer) and not name.endswith("token_adapter"):
            yield name, module


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_adapter_that_peft_saved_opens_as_peft_opens_it(case: Case, make: Make) -> None:
    folder = make(case)
    adapter = open_adapter(folder)
    model: Any = peft.PeftModel.from_pretrained(make.base(case), folder)
    modules = {(module.path, module.depth): module for module in adapter.modules}
    seen = set()
    for name, layer in _tuner_layers(model):
        segments = name.split(".")
        path, depth = ".".join(s for s in segments if s != "base_layer"), segments.count("base_layer")
        parts = modules[path, depth].parts
        seen.add((path, depth))
        for part in ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
            held: Any = getattr(layer, part, {})
            if "default" in held:
                theirs = held["default"]
                theirs = theirs.weight if isinstance(theirs, torch.nn.Module) else theirs
                np.testing.assert_array_equal(parts[part].read(), theirs.detach().numpy())
        if hasattr(layer, "scaling"):
            place = f"{path}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else path
            ranknum = float(layer.ranknum["default"]) + 1e-5 if case.kind == "AdaLoraConfig" else 1
            assert adapter.config.rank_of(place) == layer.r["default"]
            # float32's step: ranknum is a float32 of torch
            assert adapter.config.scale_of(place) == pytest.approx(layer.scaling["default"] / ranknum, rel=2e-7)
            if adapter.config.target_modules is not None and not adapter.config.ensure_weight_tying:
                assert adapter.config.targets(path) or adapter.config.parameters_of(path)
    assert seen or adapter.config.kind == "TRAINABLE_TOKENS"
    others = [module for place, module in modules.items() if place not in seen]
    assert all(part in ("weight", "bias", "trainable_tokens_delta") for module in others for part in module.parts)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sorted(tensor.name for tensor in (*adapter.tensors, *adapter.spare)) == sorted(tensors)
    assert len(adapter.spare) == case.spare
    kept = ("modules_to_save", "original_module", "velora", "monteclora")
    assert all(any(word in tensor.name for word in kept) for tensor in adapter.spare)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.id in ("lora", "dora", "adalora", "saved-grown")], ids=str
)
def test_bin_files_hold_the_same_as_safetensors(case: Case, make: Make, tmp_path: Path) -> None:
    folder = make(case)
    other = tmp_path / "bin"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, other / "adapter_model.bin")
    assert_same(open_adapter(other), open_adapter(folder))
    assert (other / "adapter_model.bin") in [file.path for file in open_adapter(other).files]


def test_a_bin_file_that_peft_itself_saved_opens(make: Make, tmp_path: Path) -> None:
    case = CASES[0]
    model = peft.PeftModel.from_pretrained(make.base(case), make(case))
    try:
        model.save_pretrained(tmp_path, safe_serialization=False)
    except (TypeError, ValueError):
        pytest.skip("this PEFT no longer writes .bin files")
    assert_same(open_adapter(tmp_path), open_adapter(make(case)))


def test_safetensors_are_preferred_to_bin_as_peft_does(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "adapter_model.bin").write_bytes(b"nonsense")
    assert open_adapter(folder).modules


RENAMES: Mapping[str, Callable[[str], str]] = {
    "adapter name": lambda name: name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "prefix twice": lambda name: "base_model.model." + name,
    "DDP": lambda name: "module." + name,
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointing": lambda name: name.replace("self_attn.", "self_attn._checkpoint_wrapped_module."),
    "no weight": lambda name: name.removesuffix(".weight"),
}


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_names_of_other_wrappers_mean_the_same(
    rename: Callable[[str], str], make: Make, copy: Callable[..., Path]
) -> None:
    assert_same(open_adapter(copy(rename=rename)), open_adapter(make(CASES[0])))


@pytest.mark.parametrize(
    ("name", "modules"),
    [("lora-shakespeare-r8", 35), ("dora-shakespeare-r4", 35), ("lora-wikitext-rslora-r16-attn", 20)],
)
def test_trained_adapters_open(shared: Path, name: str, modules: int) -> None:
    adapter = open_adapter(shared / "adapters" / name)
    assert len(adapter.modules) == modules
    assert adapter.name == name
    assert adapter.config.base_model == "stories260k-hf"
    assert [file.path.name for file in adapter.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((record.delta_norm or 0) > 0 for record in describe(adapter))


def test_tokenizer_files_beside_the_adapter_are_read_and_the_model_card_is_not(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("hi")
    adapter = open_adapter(folder)
    assert adapter.tokenizer_files == {"tokenizer_config.json": b"{}", "chat_template.jinja": b"hi"}
    assert {file.path.name for file in adapter.files} >= {"chat_template.jinja", "adapter_config.json"}


# --- descriptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.base != "mixtral" and not case.grow], ids=str)
def test_the_norm_of_a_delta_is_that_of_what_peft_adds(case: Case, make: Make) -> None:
    model: Any = peft.PeftModel.from_pretrained(make.base(case), make(case))
    records = {record.path: record for record in describe(open_adapter(make(case)))}
    for name, layer in _tuner_layers(model):
        if not hasattr(layer, "get_delta_weight"):
            continue
        delta: Any = layer.get_delta_weight("default")
        # float32 products of up to 96 values, in float64 here
        assert records[name].delta_norm == pytest.approx(float(torch.linalg.norm(delta.double())), rel=1e-5)
        assert records[name].scale == pytest.approx(open_adapter(make(case)).config.scale_of(name))
    for record in records.values():
        assert (record.delta_norm is None) == (record.kind in ("tokens", "whole"))


def test_the_norm_of_experts_is_that_of_what_peft_adds(make: Make) -> None:
    case = next(case for case in CASES if case.id == "experts")
    model: Any = peft.PeftModel.from_pretrained(make.base(case), make(case))
    found = sorted(record.delta_norm or 0 for record in describe(open_adapter(make(case))) if record.kind == "expert")
    deltas = [
        layer.get_delta_weight("default") for _, layer in _tuner_layers(model) if hasattr(layer, "parameter_name")
    ]
    assert found == pytest.approx(sorted(float(torch.linalg.norm(delta.double())) for delta in deltas), rel=1e-5)
    unknown = next(case for case in CASES if case.id == "experts-ranks")
    assert any(record.kind == "expert" and record.rank is None for record in describe(open_adapter(make(unknown))))


# --- what is wrong with an adapter ---------------------------------------------------------------------------------


def refused(folder: Path | str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        open_adapter(folder)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    assert str(folder) in message or repr(str(folder)) in message


@pytest.mark.parametrize(
    ("case", "drop", "words"),
    [
        ("lora", "layers.1.self_attn.q_proj.lora_B", "has lora_A but no lora_B"),
        ("lora", "layers.1.self_attn.q_proj.lora_A", "has lora_B but no lora_A"),
        ("dora", "layers.1.self_attn.q_proj.lora_magnitude", r"no lora_magnitude_vector \(use_dora is true"),
        ("embedding", "lora_embedding_B", "has lora_embedding_A but no lora_embedding_B"),
        ("adalora", "layers.0.mlp.down_proj.lora_E", "but no lora_E"),
        ("loha", "layers.0.self_attn.q_proj.hada_w2_a", "but no hada_w2_a"),
        ("lokr", "layers.0.self_attn.q_proj.lokr_w1", "but no lokr_w1_a"),
        ("lora-bias", "layers.0.self_attn.q_proj.lora_B.bias", r"no lora_B.bias \(lora_bias is true"),
    ],
)
def test_a_tensor_without_its_counterpart_is_an_error_that_names_it(
    case: str, drop: str, words: str, copy: Callable[..., Path]
) -> None:
    refused(copy(case, drop=drop), words)


@pytest.mark.parametrize(
    ("case", "config", "words"),
    [
        ("lora", {"r": 5}, "have rank 4, .* says 5"),
        ("rslora-patterns", {"rank_pattern": {}}, "have rank 2, .* says 4"),
        ("lora", {"use_dora": True}, "no lora_magnitude_vector"),
        ("dora", {"use_dora": False}, r"has lora_magnitude_vector, which does not go with .*use_dora is false"),
        ("lora-bias", {"lora_bias": False}, "has lora_B.bias, which does not go with"),
        ("tokens", {"trainable_token_indices": None}, "names none for it"),
        ("tokens", {"trainable_token_indices": [1, 2, 3]}, "names 3 tokens"),
        ("adalora", {"init_r": 7}, "have rank 6, .* says 7"),
        ("adalora", {"peft_type": "LORA"}, "does not belong to an adapter of peft_type LORA"),
        ("lora", {"peft_type": "LOHA"}, "does not belong to an adapter of peft_type LOHA"),
        ("loha", {"r": 9}, "have rank 4, .* says 9"),
        ("experts", {"r": 5}, "have rank 12, .* says 5"),
    ],
)
def test_tensors_that_do_not_agree_with_the_configuration_are_refused(
    case: str, config: Mapping[str, Any], words: str, copy: Callable[..., Path]
) -> None:
    refused(copy(case, **config), words)


def _change(folder: Path, name: str, value: np.ndarray[Any, Any] | None, new: str = "") -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    found = next(key for key in tensors if name in key)
    old = tensors.pop(found) if not new else tensors[found]
    tensors[new or found] = old if value is None else value
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros(0, np.float32), "ZeRO-3"),
        (np.zeros(256, np.float32), "ZeRO-3"),
        (np.zeros((4, 0), np.float32), "ZeRO-3"),
        (np.zeros((4, 64, 1), np.float32), "convolutions"),
        (np.zeros((4, 64, 3, 3), np.float32), "convolutions"),
        (np.zeros((5, 64), np.float32), "do not fit"),
        (np.zeros((4, 64), np.int8), "is of type I8"),
        (np.zeros((4, 64), np.bool_), "is of type BOOL"),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_matrices_of_wrong_shapes_and_types_are_refused(
    value: np.ndarray[Any, Any], words: str, copy: Callable[..., Path]
) -> None:
    refused(_change(copy(), "layers.1.self_attn.q_proj.lora_A", value), words)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("dora", "layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ("lora-bias", "layers.0.self_attn.q_proj.lora_B.bias"),
    ],
)
def test_vectors_of_wrong_lengths_are_refused(case: str, name: str, copy: Callable[..., Path]) -> None:
    refused(_change(copy(case), name, np.zeros(63, np.float32)), r"has shape \(63,\), must be \(64,\)")


def test_singular_values_of_a_wrong_number_are_refused(copy: Callable[..., Path]) -> None:
    refused(_change(copy("adalora"), "lora_E", np.zeros((5, 1), np.float32)), "must have one value for each row")


def test_two_names_of_one_tensor_are_refused(copy: Callable[..., Path]) -> None:
    path = "model.layers.1.self_attn.q_proj.lora_A"
    refused(_change(copy(), path, None, f"{path}.weight"), "mean the same parameter")


def test_two_adapters_in_one_file_are_refused(copy: Callable[..., Path]) -> None:
    names = iter(("one", "other") * 100)
    refused(copy(rename=lambda name: name.replace(".weight", f".{next(names)}.weight")), "several adapters")


def test_a_name_that_is_not_understood_is_refused(copy: Callable[..., Path]) -> None:
    refused(_change(copy(), "lora_A", None, "base_model.model.model.layers.0.gate"), "'gate' is no part of an adapter")


def test_a_whole_module_left_empty_is_refused(copy: Callable[..., Path]) -> None:
    refused(_change(copy("saved"), "norm.weight", np.zeros(0, np.float32)), "ZeRO-3")


def test_a_rank_number_of_an_old_adalora_file_must_be_the_first_rank(copy: Callable[..., Path]) -> None:
    path = "base_model.model.model.layers.1.self_attn.q_proj"
    folder = _change(copy("adalora"), "lora_E", np.asarray([6], np.float32), f"{path}.ranknum")
    assert len(open_adapter(folder).spare) == 1
    refused(_change(folder, "ranknum", np.asarray([3], np.float32)), "is 3, init_r is 6")


def test_a_pruned_adalora_adapter_has_the_ranks_of_its_masks(make: Make, copy: Callable[..., Path]) -> None:
    kept = {"model.layers.0.self_attn.q_proj": 0, "model.layers.1.self_attn.q_proj": 2}
    masks = {f"{path}.lora_E": [True] * count + [False] * (6 - count) for path, count in kept.items()}
    folder = copy("adalora", rank_pattern=masks)
    refused(folder, "have rank 6, .* says [02]")
    tensors = load_file(folder / "adapter_model.safetensors")
    for path, count in kept.items():
        name = f"base_model.model.{path}"
        for part in ("lora_A", "lora_E"):
            tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][:count]
        tensors[f"{name}.lora_B"] = np.ascontiguousarray(tensors[f"{name}.lora_B"][:, :count])
    save_file(tensors, folder / "adapter_model.safetensors")
    records = {record.path: record for record in describe(open_adapter(folder))}
    assert [records[path].rank for path in kept] == [0, 2]
    assert records["model.layers.0.self_attn.q_proj"].delta_norm == 0
    case = next(case for case in CASES if case.id == "adalora")
    model: Any = peft.PeftModel.from_pretrained(make.base(case), folder)
    theirs = dict(_tuner_layers(model))["model.layers.1.self_attn.q_proj"].get_delta_weight("default")
    norm = float(torch.linalg.norm(theirs.double()))
    assert records["model.layers.1.self_attn.q_proj"].delta_norm == pytest.approx(norm, rel=1e-5)


# --- what is no adapter ---------------------------------------------------------------------------------------------


def test_folders_and_files_that_are_no_adapter_are_refused_with_what_to_do(
    copy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy()
    refused(tmp_path, "an adapter is in the folder 'adapter' inside it")
    refused(folder / "adapter_model.safetensors", "give the folder that holds it")
    refused(folder / "adapter_config.json", "give the folder that holds it")
    refused(tmp_path / "none", "no such folder")
    refused("", "is empty")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "a.gguf", "give the PEFT folder this one was made from")
    (folder / "adapter_config.json").unlink()
    refused(folder, "adapter_config.json is missing")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "a folder that PEFT saved is expected")
    (folder / "lora.gguf").write_bytes(b"GGUF")
    refused(folder, "'lora.gguf' is not read")
    (folder / "config.json").write_text("{}")
    refused(folder, "this is a model, not an adapter")


def test_weights_that_are_not_there_are_an_error_that_says_what_is(copy: Callable[..., Path]) -> None:
    folder = copy()
    weights = folder / "adapter_model.safetensors"
    values = weights.read_bytes()
    for data, words in (
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (values[:-8], "cut short"),
        (values[:40], "header"),
        (b"\2\0\0\0\0\0\0\0{}", "holds no tensors"),
    ):
        weights.write_bytes(data)
        refused(folder, words)
    weights.unlink()
    (folder / "adapter_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(folder, "Git LFS pointer")
    torch.save({}, folder / "adapter_model.bin")
    refused(folder, "holds no tensors")
    (folder / "adapter_model.bin").unlink()
    refused(folder, "neither adapter_model.safetensors nor adapter_model.bin")
    (folder / "adapters.safetensors").write_bytes(values)
    refused(folder, "MLX")
    (folder / "model.safetensors").write_bytes(values)
    (folder / "adapters.safetensors").unlink()
    refused(folder, "the weights of a whole model")


def test_files_of_training_tools_beside_the_adapter_are_left_alone(copy: Callable[..., Path]) -> None:
    folder = copy()
    for name in ("value_head.safetensors", "optimizer.pt", "trainer_state.json", "training_args.bin"):
        (folder / name).write_bytes(b"nonsense")  # LLaMA-Factory and transformers' Trainer write these
    assert len(open_adapter(folder).files) == 2


def test_a_link_out_of_the_folder_is_refused(copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy()
    shutil.move(folder / "adapter_model.safetensors", tmp_path / "elsewhere")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(folder, "leaves the model folder")


_MEASURE = """
import resource, sys, time
from quantpress.convert.lora.adapter import open_adapter
import quantpress.convert.lora.description
from quantpress.quant.errors import InputError
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    adapter = open_adapter(sys.argv[1])
    print("opened", len(adapter.modules))
except InputError as error:
    print("refused", str(error)[:300])
print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def _config(**values: Any) -> bytes:
    return json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], **values}).encode()


def _safetensors(names: list[str], shape: list[int], nbytes: int) -> bytes:
    header = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": [index * nbytes, (index + 1) * nbytes]}
        for index, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(nbytes * len(names))


_GOOD = _safetensors(["base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"], [8, 8], 256)


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        pytest.param(lambda: b"[" * (64 << 20), lambda: _GOOD, id="64 MB of brackets"),
        pytest.param(lambda: _config(rank_pattern={f"q{i}": 1 for i in range(400_000)}), lambda: _GOOD, id="ranks"),
        pytest.param(
            lambda: _config(rank_pattern={f"(.*q{i}.*)+x": 1 for i in range(90_000)}), lambda: _GOOD, id="expressions"
        ),
        pytest.param(lambda: _config(modules_to_save=[f"{i:099}" for i in range(60_000)]), lambda: _GOOD, id="names"),
        pytest.param(
            lambda: _config(),
            lambda: _safetensors([f"base_model.model.{i}.q_proj.lora_A.weight" for i in range(40_000)], [0], 0),
            id="empty tensors",
        ),
        pytest.param(
            lambda: _config(modules_to_save=[f"x{i}" for i in range(1000)], target_modules="(?:(?:.*a)*b)*c"),
            lambda: _safetensors([f"base_model.model.{i}.q_proj.lora_A.weight" for i in range(20_000)], [8, 8], 256),
            id="no lora_B",
        ),
        pytest.param(
            lambda: _config(),
            lambda: _safetensors([f"{'a.' * 400}{i}.weight.lora_A" for i in range(40_000)], [8, 8], 256),
            id="long names",
        ),
        pytest.param(
            lambda: _config(trainable_token_indices=list(range(1_200_000))), lambda: _GOOD, id="a million tokens"
        ),
    ],
)
def test_hostile_adapters_are_refused_within_two_seconds_and_200_mb(
    config: Callable[[], bytes], weights: Callable[[], bytes], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes(config())
    (tmp_path / "adapter_model.safetensors").write_bytes(weights())
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 70 << 20
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    said, figures = result.stdout.splitlines()
    seconds, megabytes = map(float, figures.split())
    assert said.startswith("refused ") or "tokens" in said
    assert seconds < 2
    assert megabytes < 200

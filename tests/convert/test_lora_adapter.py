"""Adapters that PEFT saved open as PEFT opens them, and what is said of them is what PEFT adds."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from quantpress.convert.lora.adapter import Adapter, open_adapter
from quantpress.convert.lora.description import describe
from tests.peft_cases import CASES, Case, Saved, peft_case, tuner_layers

# what PEFT and transformers have to say about tied embeddings and the like is not the matter here
pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Adapters that PEFT saved."""
    return Saved(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def copy(saved: Saved, tmp_path: Path) -> Callable[..., Path]:
    """Gives a function that copies an adapter with changes, see `Saved.copy`."""

    def one(case: str = "lora", **changes: Any) -> Path:
        return saved.copy(tmp_path / "adapter", case, **changes)

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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_adapter_that_peft_saved_opens_as_peft_opens_it(case: Case, saved: Saved) -> None:
    folder = saved.folder(case)
    adapter = open_adapter(folder)
    model: Any = saved.loaded(case)
    modules = {(module.path, module.depth): module for module in adapter.modules}
    seen = set()
    for name, layer in tuner_layers(model):
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


@pytest.mark.parametrize("case", [peft_case(name) for name in ("lora", "dora", "adalora", "saved-grown")], ids=str)
def test_bin_files_hold_the_same_as_safetensors(case: Case, saved: Saved, tmp_path: Path) -> None:
    folder = saved.folder(case)
    other = tmp_path / "bin"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, other / "adapter_model.bin")
    assert_same(open_adapter(other), open_adapter(folder))
    assert (other / "adapter_model.bin") in [file.path for file in open_adapter(other).files]


def test_a_bin_file_that_peft_itself_saved_opens(saved: Saved, tmp_path: Path) -> None:
    case = CASES[0]
    model = saved.loaded(case)
    try:
        model.save_pretrained(tmp_path, safe_serialization=False)
    except (TypeError, ValueError):
        pytest.skip("this PEFT no longer writes .bin files")
    assert_same(open_adapter(tmp_path), open_adapter(saved.folder(case)))


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
    rename: Callable[[str], str], saved: Saved, copy: Callable[..., Path]
) -> None:
    assert_same(open_adapter(copy(rename=rename)), open_adapter(saved.folder(CASES[0])))


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


@pytest.mark.parametrize("case", [case for case in CASES if case.base != "mixtral" and not case.grow], ids=str)
def test_the_norm_of_a_delta_is_that_of_what_peft_adds(case: Case, saved: Saved) -> None:
    model: Any = saved.loaded(case)
    records = {record.path: record for record in describe(open_adapter(saved.folder(case)))}
    for name, layer in tuner_layers(model):
        if not hasattr(layer, "get_delta_weight"):
            continue
        delta: Any = layer.get_delta_weight("default")
        # float32 products of up to 96 values, in float64 here
        assert records[name].delta_norm == pytest.approx(float(torch.linalg.norm(delta.double())), rel=1e-5)
        assert records[name].scale == pytest.approx(open_adapter(saved.folder(case)).config.scale_of(name))
    for record in records.values():
        assert (record.delta_norm is None) == (record.kind in ("tokens", "whole"))


def test_the_norm_of_experts_is_that_of_what_peft_adds(saved: Saved) -> None:
    case = peft_case("experts")
    model: Any = saved.loaded(case)
    found = sorted(
        record.delta_norm or 0 for record in describe(open_adapter(saved.folder(case))) if record.kind == "expert"
    )
    deltas = [layer.get_delta_weight("default") for _, layer in tuner_layers(model) if hasattr(layer, "parameter_name")]
    assert found == pytest.approx(sorted(float(torch.linalg.norm(delta.double())) for delta in deltas), rel=1e-5)
    unknown = peft_case("experts-ranks")
    assert any(
        record.kind == "expert" and record.rank is None for record in describe(open_adapter(saved.folder(unknown)))
    )

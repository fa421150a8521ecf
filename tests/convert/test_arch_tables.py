"""The tables themselves: names that llama.cpp's own package knows, and what hangs together in every family."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable

import pytest
from gguf.constants import GGML_QUANT_VERSION, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES, Keys

from quantpress.convert.arch.fields import NEUTRAL
from quantpress.convert.arch.registry import ARCHITECTURES, find_arch, find_gguf_arch
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role
from quantpress.quant.errors import InputError
from tests.families.cases import write_checkpoint
from tests.families.registered import ALL
from tests.tiny import FAMILIES, Tiny, tiny_config

DECODERS = pytest.mark.parametrize(
    "spec", [spec for spec in ARCHITECTURES if spec.kind == "decoder"], ids=lambda spec: spec.family
)
# rows that no file holds: the family's files are refused when a model has them
UNWRITTEN = {
    "phi": ("blk.{layer}.attn_q_norm", "blk.{layer}.attn_k_norm"),
    "falcon": ("blk.{layer}.ffn_norm",),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), tuple(f"blk.{{layer}}.ffn_{part}" for part in ("gate", "up", "down"))),
}
SPECS = pytest.mark.parametrize("spec", ARCHITECTURES, ids=lambda spec: spec.family)


def known_tensors(architecture: str) -> set[str]:
    """Names of an architecture in the gguf package, without `.weight` and `.bias`."""
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return {TENSOR_NAMES[tensor].replace("{bid}", "{layer}") for tensor in MODEL_TENSORS[arch]}


@pytest.fixture(scope="module")
def hypers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ArchSpec], Hyperparameters]:
    """Gives hyperparameters of a family, from the config.json of its first case."""
    root = tmp_path_factory.mktemp("configs")

    @functools.cache
    def of(spec: ArchSpec) -> Hyperparameters:
        if any(case.family == spec.family for case in FAMILIES):
            return spec.read_config(tiny_config(spec.family))
        case = next(case for case in ALL if case.family == spec.family)
        folder = write_checkpoint(case, root / case.id)
        return spec.read_config(json.loads((folder / "config.json").read_text()))

    return of


@SPECS
def test_gguf_names_are_those_of_the_gguf_package(spec: ArchSpec) -> None:
    if spec.gguf not in MODEL_ARCH_NAMES.values():
        pytest.skip("llama.cpp has no such architecture")
    known = known_tensors(spec.gguf) | {"token_types", *UNWRITTEN.get(spec.family, ())}
    for row in spec.tensors:
        stem, _, suffix = row.gguf.rpartition(".")
        assert suffix in ("weight", "bias")
        stem = stem.replace("blk.0.", "blk.{layer}.")  # only the first layer has it (T5)
        assert stem in known or (row.role is Role.HEAD and spec.gguf_head == "never"), row.gguf


@DECODERS
def test_names_and_slots_are_unique_and_dims_are_known(
    spec: ArchSpec, hypers: Callable[[ArchSpec], Hyperparameters]
) -> None:
    hyper = hypers(spec)
    rows = spec.rows(hyper)
    stored = [(row.hf, row.part, row.expert, layer) for row, layer in rows]
    asked = [(row.slot, layer) for row, layer in rows]
    assert len(stored) == len(set(stored))
    assert len(asked) == len(set(asked))
    for row, _ in rows:
        assert all(dim in hyper.dims for dim in row.shape), row.hf
        assert row.per_layer == row.gguf.startswith("blk.{layer}."), row.hf


@SPECS
def test_rows_that_turn_belong_to_q_and_k_of_norm_rope_files(spec: ArchSpec) -> None:
    turned = {row.slot for row in spec.tensors if row.rotary}
    assert turned <= {f"attn_{part}.{kind}" for part in "qk" for kind in ("weight", "bias")}
    assert not turned or spec.gguf_rope


@DECODERS
def test_a_tied_head_names_an_embedding(spec: ArchSpec) -> None:
    heads = [row for row in spec.tensors if row.role is Role.HEAD and row.tied_to]
    embeddings = {row.hf for row in spec.tensors if row.role is Role.EMBEDDING}
    assert {row.tied_to for row in heads} <= embeddings


@SPECS
def test_family_is_found_by_class_and_by_model_type(spec: ArchSpec) -> None:
    for name in spec.classes:
        assert find_arch({"architectures": [name], "model_type": spec.model_types[0]}) is spec
    for model_type in spec.model_types:
        assert find_arch({"model_type": model_type}) is spec
    if spec.gguf:
        assert find_gguf_arch(spec.gguf, {"general.type": "model"}).gguf == spec.gguf


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["Qwen9ForCausalLM"]}, r"Qwen9ForCausalLM.*nearest: Qwen"),
        ({"architectures": ["MinistralForCausalLM"]}, r"not implemented; nearest: Mistral"),
        ({"model_type": "lama"}, r"model_type is 'lama'.*nearest: llama"),
        ({"model_type": "zzz"}, r"not implemented; see `quantpress architectures`"),
        ({}, "neither 'architectures' nor 'model_type'"),
        ({"architectures": "LlamaForCausalLM"}, "wanted a list"),
        ({"architectures": [7]}, "wanted a list"),
        ({"architectures": [], "model_type": 5}, "'model_type' is 5"),
        ({"architectures": ["x" * 100_000]}, r"'xxx.*\.\.\."),
    ],
)
def test_unknown_family_is_refused_with_the_nearest_names(config: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        find_arch(config)
    assert len(str(error.value)) < 600


def test_unknown_gguf_architecture_and_other_kinds_of_file_are_refused() -> None:
    with pytest.raises(InputError, match=r"general.architecture is 'qwen9'.*nearest: qwen"):
        find_gguf_arch("qwen9", {})
    with pytest.raises(InputError, match=r"'general\.type' is 'adapter', wanted a model"):
        find_gguf_arch("llama", {"general.type": "adapter"})


def gguf_keys() -> set[str]:
    """All keys of the gguf package that start with the architecture, without it."""
    assert GGML_QUANT_VERSION == 2
    groups = [group for group in vars(Keys).values() if isinstance(group, type)]
    texts = [value for group in groups for value in vars(group).values() if isinstance(value, str)]
    return {text.removeprefix("{arch}.") for text in texts if text.startswith("{arch}.")}


@pytest.mark.parametrize("case", [case for case in FAMILIES if case.gguf and "vision" not in case.options], ids=str)
def test_metadata_keys_and_types_are_those_of_the_gguf_package(case: Tiny) -> None:
    options = {key: value for key, value in case.options.items() if key != "bare"}
    config = tiny_config(case.family, **options)
    spec = find_arch(config)
    hyper = spec.read_config(config)
    spec.gguf_check(hyper, config)
    entries = spec.gguf_metadata(hyper, config)
    assert set(entries) <= gguf_keys()
    kinds = {"uint32": int, "float32": float, "string": str, "bool": bool, "array[bool]": list}
    for key, (kind, value) in entries.items():
        assert type(value) is kinds[kind], key
    known = known_tensors(spec.gguf)
    for name, values in spec.gguf_tensors(hyper).items():
        stem = name.rpartition(".")[0]
        stem = ".".join("{layer}" if part.isdecimal() else part for part in stem.split("."))
        assert stem in known or stem in ("rope_factors_long", "rope_factors_short"), name
        assert all(isinstance(value, float) for value in values)


def test_old_buffers_are_ignored_in_every_spelling() -> None:
    spec = find_arch({"model_type": "gpt_neox"})
    ignored = spec.ignored_names(2)
    assert "gpt_neox.layers.1.attention.masked_bias" in ignored
    assert "layers.0.attention.rotary_emb.inv_freq" in ignored
    assert "gpt_neox.layers.2.attention.bias" not in ignored


def test_names_of_gemma3_inside_an_image_reading_model() -> None:
    spec = find_arch({"architectures": ["Gemma3ForConditionalGeneration"]})
    norm = next(row for row in spec.tensors if row.slot == "ffn_norm.weight")
    assert spec.names(norm, 3) == (
        "model.layers.3.pre_feedforward_layernorm.weight",
        "model.language_model.layers.3.pre_feedforward_layernorm.weight",
        "language_model.model.layers.3.pre_feedforward_layernorm.weight",
        "layers.3.pre_feedforward_layernorm.weight",
    )
    head = next(row for row in spec.tensors if row.role is Role.HEAD)
    assert spec.names(head, -1) == ("lm_head.weight", "language_model.lm_head.weight")


def test_neutral_values_are_really_neutral_in_every_family() -> None:
    for spec in (spec for spec in ARCHITECTURES if any(case.family == spec.family for case in FAMILIES)):
        for key, values in NEUTRAL.items():
            for value in values:
                plain = list(value) if isinstance(value, tuple) else value
                assert spec.read_config(tiny_config(spec.family, **{key: plain})) == spec.read_config(
                    tiny_config(spec.family)
                )

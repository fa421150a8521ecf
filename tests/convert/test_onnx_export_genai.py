"""genai_config.json: what it says of a model, and that onnxruntime-genai takes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from tests.tiny import tiny_checkpoint

pytest.importorskip("onnx")
export = pytest.importorskip("quantpress.convert.onnx.export")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("genai") / "model", "llama")


def config_of(
    model: Path, *, config: Mapping[str, Any] | None = None, generation: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """genai_config.json of a model whose own files are changed."""
    found: dict[str, Any] = json.loads(plan_of(model, config, generation, files, **options).files["genai_config.json"])
    return found


def plan_of(
    model: Path,
    config: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
    **options: Any,
) -> Any:
    source: Checkpoint = open_checkpoint(model)
    source = dataclasses.replace(
        source,
        config={key: value for key, value in {**source.config, **(config or {})}.items() if value is not ...},
        generation_config=source.generation_config if generation is None else generation,
        tokenizer_files={**source.tokenizer_files, **(files or {})},
    )
    return export.plan_onnx(source, preflight(source), OnnxOptions(**options))


def test_sizes_and_names_are_those_of_the_graph(model: Path) -> None:
    import onnx

    plan = plan_of(model)
    found = json.loads(plan.files["genai_config.json"])["model"]
    graph = onnx.ModelProto.FromString(plan.files["model.onnx"]).graph
    inputs = {each.name: [dim.dim_value for dim in each.type.tensor_type.shape.dim] for each in graph.input}
    decoder = found["decoder"]
    for layer in range(decoder["num_hidden_layers"]):
        for key in ("past_key_names", "past_value_names"):
            shape = inputs[decoder["inputs"][key] % layer]
            assert (shape[1], shape[3]) == (decoder["num_key_value_heads"], decoder["head_size"])
    assert len(inputs) == 2 + 2 * decoder["num_hidden_layers"]
    outputs = {each.name for each in graph.output}
    assert decoder["outputs"]["present_key_names"] % 2 in outputs
    assert decoder["outputs"]["logits"] in outputs
    assert (found["context_length"], found["vocab_size"], decoder["num_attention_heads"]) == (64, 320, 4)


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({}, {}, (0, 0, 0)),
        ({"eos_token_id": [5, 7], "bos_token_id": 3}, {}, (3, [0, 5, 7], 0)),  # the tokenizer's own end is 0
        ({"eos_token_id": 5}, {"eos_token_id": [9, 8, 9]}, (0, [9, 8], 9)),
        ({}, {"eos_token_id": 4, "pad_token_id": 6, "bos_token_id": 2}, (2, 4, 6)),
        ({"pad_token_id": -1}, {"eos_token_id": 4}, (0, 4, 4)),
        ({"pad_token_id": 999999, "eos_token_id": True}, {}, (0, 0, 0)),
        ({}, {"eos_token_id": [320, "7", None, 7]}, (0, 7, 7)),
    ],
)
def test_tokens_come_from_generation_config_then_from_config_and_the_tokenizer(
    config: dict[str, Any], generation: dict[str, Any], wanted: tuple[Any, ...], model: Path
) -> None:
    found = config_of(model, config=config, generation=generation)["model"]
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == wanted


def test_a_model_without_any_special_token_is_described_all_the_same(model: Path) -> None:
    nothing = {f"{kind}_token_id": None for kind in ("bos", "eos", "pad")}
    files = {"tokenizer_config.json": b"{}", "special_tokens_map.json": b"{}"}
    found = config_of(model, config=nothing, generation={}, files=files)["model"]
    assert "bos_token_id" not in found
    assert (found["eos_token_id"], found["pad_token_id"]) == ([], 0)


def test_the_models_way_of_sampling_is_kept_where_genai_takes_it(model: Path) -> None:
    wanted = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    found = config_of(model, generation={**wanted, "max_length": 7})["search"]
    assert {key: found[key] for key in wanted} == wanted
    assert found["max_length"] == 64, "the context, not a default of transformers"
    odd = {"do_sample": "yes", "temperature": "hot", "top_p": 3, "top_k": 321, "repetition_penalty": 0}
    defaults = config_of(model, generation={**odd, "num_return_sequences": 4})["search"]
    wanted = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
    assert {key: defaults[key] for key in wanted} == wanted
    assert (defaults["num_beams"], defaults["num_return_sequences"]) == (1, 1)


def test_buffers_are_shared_only_where_grouped_query_attention_writes_in_place(model: Path, tmp_path: Path) -> None:
    assert config_of(model)["search"]["past_present_share_buffer"] is True
    assert config_of(model, standard_ops=True)["search"]["past_present_share_buffer"] is False
    odd = tiny_checkpoint(tmp_path / "odd", "llama", head_dim=12)
    assert config_of(odd)["search"]["past_present_share_buffer"] is False


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("llama", {"standard_ops": True}), ("gemma3", {}), ("gpt2", {}), ("phi3", {"precision": "int4"})],
)
def test_genai_generates_from_the_folder(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    folder = tiny_checkpoint(tmp_path / family, family)
    export.write_onnx(tmp_path / "out", plan_of(folder, **options), threads=1)
    model = og.Model(str(tmp_path / "out"))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=12)
    generator = og.Generator(model, parameters)
    generator.append_tokens([11, 12, 13])
    while not generator.is_done():
        generator.generate_next_token()
    assert 4 <= len(generator.get_sequence(0)) <= 12
    assert og.Tokenizer(model).encode("The press").tolist()

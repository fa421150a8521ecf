"""The base as a QLoRA training saw it, against models that transformers quantizes with bitsandbytes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantpress.convert.checkpoint import DTYPES, Checkpoint, LazyTensor
from quantpress.convert.linears import linear_weights
from quantpress.convert.open import open_checkpoint
from quantpress.convert.qlora import dequantized_base, detect_training_quantization
from quantpress.quant.bitsandbytes import round_trip_4bit
from quantpress.quant.errors import InputError, UsageError
from tests.tiny import tiny_checkpoint

_FAMILIES = ("llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
_ALL = (*_FAMILIES, "gpt2", "gpt2-untied", "gptneox", "gptneox-tied")


@pytest.fixture(scope="module")
def bnb() -> Any:
    pytest.importorskip("accelerate", reason="transformers needs accelerate to quantize")
    return pytest.importorskip("bitsandbytes", reason="the oracle, bitsandbytes, is not installed")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("qlora")
    return {family: tiny_checkpoint(root / family, family, dtype="bfloat16") for family in ("llama", "gpt2")}


def _quantized(source: Path, dtype: str = "bfloat16", **settings: Any) -> dict[str, Any]:
    """The quantized linear layers of a model that transformers loads, by path."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**settings), dtype=getattr(torch, dtype)
    )
    return {path: m for path, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}


def _four_bit_values(functional: Any, weight: Any, absmax: Any) -> np.ndarray:
    """What bitsandbytes dequantizes with these scales, float32 (N, K), in one row: see tests/quant."""
    import torch

    state = weight.quant_state
    flat = functional.QuantState(
        absmax=absmax,
        shape=torch.Size((1, state.shape.numel())),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    return functional.dequantize_4bit(weight.data, flat).float().reshape(state.shape).numpy()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linear_weights_are_bit_for_bit_those_of_a_model_in_4_bits(
    bnb: Any, sources: dict[str, Path], family: str, quant_type: str
) -> None:
    base = open_checkpoint(sources[family])
    view = dequantized_base(base, quant_type=quant_type, double_quant=False)
    modules = _quantized(sources[family], load_in_4bit=True, bnb_4bit_quant_type=quant_type)
    differing = 0
    for path, module in modules.items():
        theirs = _four_bit_values(bnb.functional, module.weight, module.weight.quant_state.absmax)
        ours = view.tensor(f"{path}.weight").read().astype(np.float32)
        differing += int(np.count_nonzero(ours != (theirs.T if family == "gpt2" else theirs)))
    # FP4's limits differ in their last digits between CPU and CUDA, which is followed; see tests/quant
    total = sum(module.weight.quant_state.shape.numel() for module in modules.values())
    assert differing <= (0 if quant_type == "nf4" else 0.002 * total)
    _same_elsewhere(base, view, modules)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linear_weights_are_bit_for_bit_those_of_a_model_in_4_bits_with_double_quantization(
    bnb: Any, sources: dict[str, Path], family: str
) -> None:
    import torch

    base = open_checkpoint(sources[family])
    view = dequantized_base(base)
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    modules = _quantized(sources[family], load_in_4bit=True, **settings)
    plain = _quantized(sources[family], load_in_4bit=True, bnb_4bit_quant_type="nf4")
    levels = bnb.functional.create_dynamic_map()
    for path, module in modules.items():
        state = module.weight.quant_state
        # bitsandbytes' CPU kernel misses the nearest level for one scale in a thousand: found by brute force instead,
        # with its offset, its map and its outer scales
        centred = plain[path].weight.quant_state.absmax - state.offset
        outer = state.state2.absmax.repeat_interleave(256)[: centred.numel()]
        codes = (centred / outer)[:, None].double().sub(levels.double()).abs().argmin(dim=1)
        assert (codes != state.absmax).float().mean() < 0.05
        theirs = _four_bit_values(bnb.functional, module.weight, levels[codes] * outer + state.offset)
        ours = view.tensor(f"{path}.weight").read().astype(np.float32)
        np.testing.assert_array_equal(ours, theirs.T if family == "gpt2" else theirs, err_msg=path)
        assert torch.equal(module.weight.data, plain[path].weight.data)
    _same_elsewhere(base, view, modules)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linear_weights_are_bit_for_bit_those_of_a_model_in_8_bits(
    bnb: Any, sources: dict[str, Path], family: str
) -> None:
    base = open_checkpoint(sources[family])
    view = dequantized_base(base, quant_type="int8")
    modules = _quantized(sources[family], load_in_8bit=True)
    for path, module in modules.items():
        theirs = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).numpy()
        theirs = theirs.T if family == "gpt2" else theirs
        tensor = view.tensor(f"{path}.weight")
        assert tensor.wide_rows is not None
        np.testing.assert_array_equal(tensor.wide_rows(0, tensor.rows), theirs)
        np.testing.assert_array_equal(tensor.read(), theirs.astype(ml_dtypes.bfloat16))
    _same_elsewhere(base, view, modules)


def _same_elsewhere(base: Checkpoint, view: Checkpoint, modules: Mapping[str, Any]) -> None:
    changed = {f"{path}.weight" for path in modules}
    assert {name for name in base.tensors if view.tensors[name] is not base.tensors[name]} == changed
    assert list(view.tensors) == list(base.tensors)
    shapes = [(tensor.shape, tensor.dtype) for tensor in base.tensors.values()]
    assert [(tensor.shape, tensor.dtype) for tensor in view.tensors.values()] == shapes


@pytest.mark.parametrize("case", _ALL)
def test_the_same_layers_are_quantized_as_by_transformers(bnb: Any, case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    from tests.tiny import tiny_case

    tiny = tiny_case(case)
    folder = tiny_checkpoint(tmp_path, tiny.family, **tiny.options)
    checkpoint = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True)
    replaced = replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    theirs = {f"{path}.weight" for path, module in replaced.named_modules() if type(module).__name__ == "Linear4bit"}
    found = linear_weights(checkpoint.config, checkpoint.tensors)
    assert set(found) == theirs
    assert set(found.values()) == {tiny.family == "gpt2"}
    # by name alone, as for a family without a table, the same is found
    unknown = {"model_type": "unheard-of"}
    assert set(linear_weights(unknown, checkpoint.tensors)) == theirs


def test_a_family_without_a_table_is_judged_by_names() -> None:
    shapes = {
        "model.embed_tokens.weight": (32, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.q_norm.weight": (2, 4),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.0.block_sparse_moe.gate.weight": (4, 8),
        "model.layers.0.block_sparse_moe.experts.3.w1.weight": (16, 8),
        "model.layers.0.mlp.shared_expert_gate.weight": (1, 8),
        "model.layers.0.mlp.experts.gate_up_proj": (4, 32, 8),
        "model.layers.0.output.weight": (8, 8),
        "model.layers.0.conv.weight": (8, 1, 4),
        "model.norm.weight": (8,),
        "output.weight": (32, 8),
        "lm_head.weight": (32, 8),
    }
    tensors = {name: _lazy(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()}
    assert list(linear_weights({"model_type": "novel"}, tensors)) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "model.layers.0.output.weight",
    ]
    conv1d = {f"transformer.h.0.{part}.weight": _lazy("x", np.zeros((8, 8))) for part in ("attn.c_attn", "q_proj")}
    assert list(linear_weights({"model_type": "openai-gpt"}, conv1d).values()) == [True, False]


def test_skipped_modules_are_left_alone(sources: dict[str, Path]) -> None:
    base = open_checkpoint(sources["llama"])
    every = set(linear_weights(base.config, base.tensors))
    for skip, left in [
        (["o_proj"], {name for name in every if "o_proj" in name}),
        (["model.layers.1"], {name for name in every if ".1." in name}),
        (["layers.1"], set()),  # neither the beginning nor the end of a path
        (["model.layers.2.mlp", "k_proj"], {name for name in every if ".2.mlp." in name or "k_proj" in name}),
    ]:
        view = dequantized_base(base, skip_modules=skip)
        changed = {name for name in base.tensors if view.tensors[name] is not base.tensors[name]}
        assert changed == every - left, skip


def _lazy(name: str, values: np.ndarray) -> LazyTensor:
    dtype = next(key for key, kind in DTYPES.items() if kind == values.dtype)
    return LazyTensor(name, values.shape, dtype, "x", lambda start, stop: values[start:stop].copy())


def _one(values: np.ndarray, name: str = "model.layers.0.mlp.up_proj.weight") -> Checkpoint:
    return Checkpoint("tiny", {"model_type": "unheard-of"}, {name: _lazy(name, values)})


@pytest.mark.parametrize("shape", [(37, 96), (5, 1000), (300, 7), (1, 64), (64, 64), (3, 1), (400, 4096)])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_rows_can_be_read_in_any_order_and_from_threads(shape: tuple[int, int], blocksize: int) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=shape).astype(np.float32).astype(ml_dtypes.bfloat16)
    tensor = next(iter(dequantized_base(_one(values), blocksize=blocksize).tensors.values()))
    plain = next(iter(dequantized_base(_one(values), blocksize=blocksize, double_quant=False).tensors.values()))
    whole = tensor.read()
    flat = round_trip_4bit(values.reshape(-1), quant_type="nf4", blocksize=blocksize)
    assert plain.read().tobytes() == flat.tobytes()
    cuts = np.sort(random.integers(0, shape[0] + 1, size=(8, 2)), axis=1).tolist()
    with ThreadPoolExecutor(4) as pool:
        for view, wanted in ((tensor, whole), (plain, flat.reshape(shape))):
            parts = list(pool.map(lambda cut: view.read_rows(*cut), cuts))  # noqa: B023 - used at once
            for (start, stop), part in zip(cuts, parts, strict=True):
                assert part.shape == (stop - start, shape[1])
                assert part.tobytes() == wanted[start:stop].tobytes()


def test_double_quantization_reads_a_tensor_once_more_and_not_for_every_row() -> None:
    values = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    read: list[int] = []
    name = "model.layers.0.mlp.up_proj.weight"
    source = LazyTensor(
        name, values.shape, "F32", "x", lambda start, stop: (read.append(stop - start), values[start:stop])[1]
    )
    base = Checkpoint("tiny", {"model_type": "unheard-of"}, {name: source})
    tensor = dequantized_base(base).tensor(name)
    assert not read
    for row in range(64):
        tensor.read_rows(row, row + 1)
    assert sum(read) == 2 * 64


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("compute", ["F32", "F16", "BF16"])
def test_a_training_in_another_type_rounds_before_and_after(stored: str, compute: str) -> None:
    values = np.random.default_rng(0).normal(scale=0.02, size=(16, 128)).astype(np.float32).astype(DTYPES[stored])
    view = dequantized_base(_one(values), double_quant=False, compute_dtype=compute)
    tensor = next(iter(view.tensors.values()))
    assert tensor.dtype == stored
    held = values.astype(np.float32).astype(DTYPES[compute])
    wanted = round_trip_4bit(held.reshape(-1), quant_type="nf4", blocksize=64).reshape(16, 128)
    np.testing.assert_array_equal(tensor.read(), wanted.astype(np.float32).astype(DTYPES[stored]))


def test_values_before_the_rounding_of_the_source_do_not_pass_by_the_quantization() -> None:
    base = _one(np.ones((4, 64), np.float16))
    ((name, tensor),) = base.tensors.items()
    wide = replace(tensor, wide_rows=lambda start, stop: np.zeros((stop - start, 64), np.float32))
    view = dequantized_base(replace(base, tensors={name: wide})).tensor(name)
    np.testing.assert_array_equal(view.exact_rows(0, 4), np.ones((4, 64)))


def test_memory_does_not_grow_with_the_tensor() -> None:
    rows, length = 4096, 4096
    block = np.random.default_rng(0).normal(size=(256, length)).astype(np.float32).astype(ml_dtypes.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    source = LazyTensor(
        name, (rows, length), "BF16", "x", lambda start, stop: np.take(block, np.arange(start, stop) % 256, axis=0)
    )
    tensor = dequantized_base(Checkpoint("tiny", {"model_type": "unheard-of"}, {name: source})).tensor(name)
    tensor.read_rows(0, 1)
    tracemalloc.start()
    for start in range(0, rows, 256):
        tensor.read_rows(start, start + 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 256 rows asked for (2 MB), 2^20 values read and rounded (4 MB), scratch; the tensor itself has 32 MB
    assert peak < 12 << 20


def test_what_cannot_be_quantized_is_refused_by_name(sources: dict[str, Path]) -> None:
    values = np.ones((4, 64), np.float32)
    values[1, 3], values[2, 5] = np.nan, np.inf
    for settings in ({}, {"double_quant": False}, {"quant_type": "int8"}):
        tensor = next(iter(dequantized_base(_one(values), **settings).tensors.values()))
        with pytest.raises(InputError, match=r"^x: tensor 'model\.layers\.0\.mlp\.up_proj\.weight': 2 values are NaN"):
            tensor.read()
    with pytest.raises(InputError, match=r"up_proj\.weight' is F64, but bitsandbytes quantizes BF16, F16, F32"):
        dequantized_base(_one(np.ones((4, 64))))
    base = open_checkpoint(sources["llama"])
    with pytest.raises(UsageError, match="'q4_0' is unknown"):
        dequantized_base(base, quant_type="q4_0")
    with pytest.raises(UsageError, match="blocksize 100"):
        dequantized_base(base, blocksize=100)
    with pytest.raises(UsageError, match="'float16' is not one of"):
        dequantized_base(base, compute_dtype="float16")


def test_a_quantized_base_is_returned_as_it_is_and_an_adapted_one_is_refused(sources: dict[str, Path]) -> None:
    base = open_checkpoint(sources["llama"])
    quantized = replace(base, storage_types={"model.layers.0.mlp.up_proj.weight": "nf4"})
    assert dequantized_base(quantized) is quantized
    adapted: Any = object()
    with pytest.raises(InputError, match="an adapter is merged already"):
        dequantized_base(replace(base, adapted=adapted))


_OLD_README = b"""
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- load_in_8bit: False
- load_in_4bit: True
- llm_int8_threshold: 6.0
- bnb_4bit_quant_type: fp4
- bnb_4bit_use_double_quant: True
"""


@pytest.mark.parametrize(
    ("config", "files", "answer"),
    [
        ({}, {}, None),
        ({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}, {"README.md": b"no load_in_4bit: true here"}, None),
        ({"base_model_name_or_path": "unsloth/llama-3-8b-bnb-4bit"}, {}, "nf4"),
        ({"base_model_name_or_path": "unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit"}, {}, "nf4"),
        ({"base_model_name_or_path": "org/model-4bit-merged"}, {}, "nf4"),
        ({"base_model_name_or_path": "org/model-bnb-8bit"}, {}, "int8"),
        ({"base_model_name_or_path": "org/model-14bit"}, {}, None),
        ({"base_model_name_or_path": "models/nf4x"}, {}, None),
        ({"base_model_name_or_path": None}, {}, None),
        ({"base_model_name_or_path": "org/model", "init_lora_weights": "loftq"}, {}, "nf4"),
        ({}, {"README.md": _OLD_README}, "fp4"),
        ({}, {"README.md": _OLD_README.replace(b"fp4", b"nf4")}, "nf4"),
        ({}, {"README.md": b"- load_in_8bit: True\n- load_in_4bit: False\n"}, "int8"),
        ({}, {"README.md": b"<summary>config</summary>\n```yaml\nload_in_4bit: true\nadapter: qlora\n"}, "nf4"),
        ({}, {"config.yaml": b"adapter: qlora\n"}, "nf4"),
        ({}, {"training.yml": b"quantization_bit: 4\n"}, "nf4"),
        ({}, {"training.yml": b"quantization_bit: 8\n"}, "int8"),
        ({}, {"settings.json": b'{\n "load_in_4bit": true,\n "bnb_4bit_quant_type": "nf4"}'}, "nf4"),
        ({}, {"training_args.bin": b"load_in_4bit: true\n"}, None),
        ({}, {"README.md": b"\xff\xfe\n" * 1000}, None),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}, {}, "fp4"),
        ({"quantization_config": {"load_in_8bit": True}}, {}, "int8"),
    ],
)
def test_hints_at_a_quantized_training_are_found(
    config: dict[str, Any], files: dict[str, bytes], answer: str | None
) -> None:
    assert detect_training_quantization(config, files) == answer


def test_hostile_texts_are_searched_quickly() -> None:
    import time

    started = time.perf_counter()
    for text in (b"\n" * (4 << 20), b" " * (4 << 20), b"- >" * (2 << 20), b"bnb_4bit_quant_type" * (1 << 18)):
        assert detect_training_quantization({}, {"README.md": text}) is None
    assert detect_training_quantization({"base_model_name_or_path": "-4bi" * (1 << 20)}) is None
    assert time.perf_counter() - started < 10

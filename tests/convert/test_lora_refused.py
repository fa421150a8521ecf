"""Adapters that are damaged, hostile, not whole or no adapters at all are refused with a message that says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from quantpress.convert.lora.adapter import open_adapter
from quantpress.convert.lora.description import describe
from quantpress.quant.errors import InputError
from tests.peft_cases import Saved, peft_case, tuner_layers

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


def test_a_pruned_adalora_adapter_has_the_ranks_of_its_masks(saved: Saved, copy: Callable[..., Path]) -> None:
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
    case = peft_case("adalora")
    model: Any = saved.loaded(case, folder)
    theirs = dict(tuner_layers(model))["model.layers.1.self_attn.q_proj"].get_delta_weight("default")
    norm = float(torch.linalg.norm(theirs.double()))
    assert records["model.layers.1.self_attn.q_proj"].delta_norm == pytest.approx(norm, rel=1e-5)


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

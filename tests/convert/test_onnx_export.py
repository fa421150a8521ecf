"""Folders of ONNX models: what is in them, that they are planned to the byte, and always the same."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError, OutputError, UsageError
from tests.tiny import tiny_checkpoint, tiny_config

onnx = pytest.importorskip("onnx")
export = pytest.importorskip("quantpress.convert.onnx.export")

OPTIONS: dict[str, Mapping[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16", "compute_type": "fp16"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "int4-zeros": {"precision": "int4", "symmetric": False, "block_size": 16},
    "int4-fp16": {"precision": "int4", "compute_type": "fp16"},
    "int4-standard": {"precision": "int4", "standard_ops": True},
    "int8-dynamic": {"precision": "int8", "int8": "dynamic"},
    "opset21": {"opset": 21},
    "opset26": {"opset": 26},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with heads of 16 values and an embedding of its own; never write into it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("export") / "model", "llama", dtype="bfloat16")


def plan_of(source: Checkpoint, **options: Any) -> Any:
    return export.plan_onnx(source, preflight(source), OnnxOptions(**options))


def written(model: Path, out: Path, *, threads: int = 1, **options: Any) -> dict[str, bytes]:
    export.write_onnx(out, plan_of(open_checkpoint(model), **options), threads=threads)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def places(folder: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of every tensor in the data file, as the onnx package reads them."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    external = {each.name: {item.key: item.value for item in each.external_data} for each in graph.initializer}
    assert all(item["location"] == "model.onnx.data" for item in external.values() if item)
    return {name: (int(item["offset"]), int(item["length"])) for name, item in external.items() if item}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_folder_is_planned_to_the_byte_and_passes_the_checker(name: str, model: Path, tmp_path: Path) -> None:
    plan = plan_of(open_checkpoint(model), **OPTIONS[name])
    files = export.write_onnx(tmp_path / "out", plan, threads=2)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sum(sizes.values()) == plan.nbytes
    assert {path.name: file.nbytes for path, file in files.items()} == sizes
    assert set(sizes) == {
        "model.onnx", "model.onnx.data", "genai_config.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    onnx.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)
    found = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert {each.version for each in found.opset_import if each.domain == ""} == {OPTIONS[name].get("opset", 23)}
    assert found.ByteSize() < 200_000, "weights belong into the data file"


@pytest.mark.parametrize("name", ["fp32", "int4-zeros", "int8-dynamic"])
def test_tensors_fill_the_data_file_in_order_and_large_ones_begin_at_pages(
    name: str, tmp_path: Path, model: Path
) -> None:
    source = open_checkpoint(model)
    plan = plan_of(source, **OPTIONS[name])
    export.write_onnx(tmp_path / "out", plan, threads=1)
    found = sorted(set(places(tmp_path / "out").values()))
    ends = [0] + [offset + length for offset, length in found]
    for (offset, _), before in zip(found, ends, strict=False):
        assert 0 <= offset - before < 64
        assert offset % 64 == 0
    assert ends[-1] == plan.data_bytes == (tmp_path / "out" / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("name", ["fp32", "int4", "int4-standard", "int8-dynamic"])
def test_any_number_of_threads_gives_the_same_bytes(name: str, model: Path, tmp_path: Path) -> None:
    first, *others = (
        written(model, tmp_path / str(threads), threads=threads, **OPTIONS[name]) for threads in (1, 2, 3)
    )
    assert all(each == first for each in others)


def test_another_hash_seed_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    script = (
        "import sys; import quantpress as qp; qp.export_onnx(sys.argv[1], sys.argv[2], precision='int4', threads=1)"
    )
    found = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", script, model, out], check=True, env=environment)
        found.append({path.name: path.read_bytes() for path in out.iterdir() if path.name != "quantpress.json"})
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "int4", "int8"])
def test_a_head_that_is_tied_is_stored_once(name: str, tmp_path: Path) -> None:
    tied = tiny_checkpoint(tmp_path / "tied", "llama", tie_word_embeddings=True, dtype="bfloat16")
    untied = tiny_checkpoint(tmp_path / "untied", "llama", dtype="bfloat16")
    sizes = []
    for folder in (tied, untied):
        plan = plan_of(open_checkpoint(folder), **OPTIONS[name])
        sizes.append(plan.data_bytes)
        vocabulary = [group for group, _ in plan.groups if "embed_tokens" in group.source or "lm_head" in group.source]
        assert len(vocabulary) == (1 if folder == tied else 2)
    # what lies beside a head of its own: 320 rows of 64 values, where int4 and int8 keep the embedding in bfloat16
    assert sizes[1] - sizes[0] >= 320 * 64 * (4 if name == "fp32" else 2)


def test_planning_reads_no_weight(model: Path) -> None:
    def refuse(start: int, stop: int) -> Any:
        raise AssertionError(f"rows [{start}, {stop}) were read")

    source = open_checkpoint(model)
    unread = {name: dataclasses.replace(each, read_rows=refuse) for name, each in source.tensors.items()}
    for options in OPTIONS.values():
        assert plan_of(dataclasses.replace(source, tensors=unread), **options).nbytes > 0


def test_a_model_of_70_billion_parameters_is_planned_in_seconds_and_its_graph_is_small() -> None:
    def refuse(start: int, stop: int) -> Any:
        raise AssertionError(f"rows [{start}, {stop}) were read")

    config = tiny_config(
        "llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    empty = Checkpoint("large", config, {})
    from quantpress.convert.arch.registry import find_arch

    spec = find_arch(config)
    hyper = spec.read_config(config)
    tensors = {}
    for row, layer in spec.rows(hyper):
        name = spec.names(row, layer)[0]
        shape = tuple(hyper.dims[dim] for dim in row.shape)
        tensors[name] = LazyTensor(name, shape, "BF16", "large.safetensors", refuse)
    source = dataclasses.replace(empty, tensors=tensors)
    start = time.perf_counter()
    plan = plan_of(source, precision="bf16")
    assert time.perf_counter() - start < 20  # 2 seconds where nothing else runs
    parameters = sum(each.size for each in tensors.values())
    assert parameters > 70e9
    assert 2 * parameters < plan.data_bytes < 2.001 * parameters
    assert len(plan.files["model.onnx"]) < 4e6
    assert max(place.offset for _, found in plan.groups for place in found) > 1 << 36


def test_nan_is_refused_by_name_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in model.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][5] = np.nan
    save_file(tensors, damaged / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        written(damaged, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(open_checkpoint(model))
    usage = shutil.disk_usage(tmp_path)._replace(free=plan.nbytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match=f"{plan.nbytes} bytes are needed and {plan.nbytes - 1} are free"):
        export.write_onnx(tmp_path / "out", plan, threads=1)
    assert list(tmp_path.iterdir()) == []


def test_a_kind_of_head_that_an_older_opset_cannot_compute_is_refused_while_planning(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "odd", "llama", head_dim=12)
    with pytest.raises(UsageError, match="--opset 23"):
        plan_of(open_checkpoint(folder), opset=22)
    assert plan_of(open_checkpoint(folder)).nbytes > 0


def test_the_model_says_who_made_it_and_of_which_family_it_is(model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model)
    plan = export.plan_onnx(source, preflight(source), OnnxOptions(), version="9.9")
    found = onnx.ModelProto.FromString(plan.files["model.onnx"])
    assert (found.producer_name, found.producer_version, found.graph.name) == ("quantpress", "9.9", "llama")
    assert json.loads(plan.files["config.json"]) == json.loads((model / "config.json").read_text())

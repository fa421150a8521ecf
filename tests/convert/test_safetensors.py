"""safetensors: what the library writes we read, what we write the library reads, by rows and in bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from quantpress.convert.checkpoint import DTYPES, Checkpoint, LazyTensor
from quantpress.convert.hf_folder import open_folder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.safetensors_reader import open_shard
from quantpress.convert.safetensors_writer import planned_tensors, write_checkpoint
from quantpress.quant.errors import InputError, LayoutError, UsageError

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _random(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + len(dtype))
    if dtype == "BOOL":
        return torch.rand(shape, generator=generator) > 0.5
    return (torch.rand(shape, generator=generator) * 100).to(_TORCH[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_the_library_writes_is_read_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "a": _random(dtype, (7, 3, 2)),
        "b": _random(dtype, ()),
        "c": _random(dtype, (0, 5)),
        "d": _random(dtype, (5,)),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    shard = open_shard(tmp_path / "x.safetensors")
    assert dict(shard.metadata) == {"k": "v"}
    assert set(shard.tensors) == set(tensors)
    for name, wanted in tensors.items():
        lazy = shard.tensors[name]
        values = lazy.read()
        assert (lazy.dtype, lazy.shape) == (dtype, tuple(wanted.shape))
        assert (values.dtype, values.shape) == (DTYPES[dtype], tuple(wanted.shape))
        assert values.flags.c_contiguous
        assert values.tobytes() == _bytes(wanted)
    for start in range(8):
        for stop in range(start, 8):
            rows = shard.tensors["a"].read_rows(start, stop)
            assert rows.shape == (stop - start, 3, 2)
            assert rows.tobytes() == _bytes(tensors["a"][start:stop])
    with pytest.raises(IndexError):
        shard.tensors["a"].read_rows(0, 8)


def _file(path: Path, header: Mapping[str, Any], data: bytes, pad: int = 0) -> Path:
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_values_that_are_not_aligned_are_read_right(tmp_path: Path) -> None:
    header = {
        "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "y": {"dtype": "F64", "shape": [2], "data_offsets": [1, 17]},
    }
    for pad in range(8):
        path = _file(tmp_path / "x", header, b"\x07" + np.array([1.5, -2.5]).tobytes(), pad)
        assert open_shard(path).tensors["y"].read().tolist() == [1.5, -2.5]


def test_rows_may_be_read_from_several_threads(tmp_path: Path) -> None:
    values = torch.arange(40_000, dtype=torch.float32).reshape(1000, 40)
    safetensors.torch.save_file({"x": values}, tmp_path / "x")
    lazy = open_shard(tmp_path / "x").tensors["x"]
    wrong: list[int] = []

    def read(offset: int) -> None:
        for start in range(offset, 1000, 7):
            if not np.array_equal(lazy.read_rows(start, start + 1), values[start : start + 1].numpy()):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_that_changes_after_it_was_opened_is_an_error_and_no_dead_process(tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.torch.save_file({"x": torch.zeros(100_000)}, path)
    lazy = open_shard(path).tensors["x"]
    os.truncate(path, 1000)
    with pytest.raises(InputError, match="changed while it was in use"):
        lazy.read()
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        lazy.read()


def _memory(tensors: Mapping[str, torch.Tensor], **fields: Any) -> Checkpoint:
    lazies = {}
    for name, tensor in tensors.items():
        dtype = next(key for key, value in _TORCH.items() if value == tensor.dtype)
        values = np.frombuffer(_bytes(tensor), DTYPES[dtype]).reshape(tuple(tensor.shape))
        read = (lambda v: lambda start, stop: v[start:stop] if v.shape else v)(values)
        lazies[name] = LazyTensor(name, values.shape, dtype, "memory", read)
    return Checkpoint(name="m", config={"model_type": "llama", "torch_dtype": "float32"}, tensors=lazies, **fields)


_MIXED = {
    "mask": torch.ones(3, dtype=torch.bool),
    "w": torch.linspace(-3, 3, 2_000_000).reshape(1000, 2000),
    "half": torch.linspace(-3, 3, 10).to(torch.float16),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "long": torch.arange(5),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("max_shard_nbytes", [5_000_000_000, 4_000_000])
def test_the_library_reads_what_was_written(tmp_path: Path, threads: int, max_shard_nbytes: int) -> None:
    out = tmp_path / "out"
    source = _memory(
        _MIXED,
        generation_config={"temperature": 0.5},
        tokenizer_files={"tokenizer.json": b"{ }", "additional_chat_templates/t.jinja": b"hi", "config.json": b"old"},
    )
    files = write_checkpoint(source, out, threads=threads, max_shard_nbytes=max_shard_nbytes)
    assert list(files) == sorted(path for path in out.rglob("*") if path.is_file())
    for path, file in files.items():
        data = path.read_bytes()
        assert (file.sha256, file.nbytes) == (hashlib.sha256(data).hexdigest(), len(data))
    read: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        for name, entry in json.loads(data[8 : 8 + length]).items():
            assert name == "__metadata__" or entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0
        read |= safetensors.torch.load_file(path)
    assert {name: _bytes(tensor) for name, tensor in read.items()} == {n: _bytes(t) for n, t in _MIXED.items()}
    assert {name: tensor.dtype for name, tensor in read.items()} == {n: t.dtype for n, t in _MIXED.items()}
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"
    assert json.loads((out / "generation_config.json").read_text()) == {"temperature": 0.5}
    assert (out / "tokenizer.json").read_bytes() == b"{ }"
    assert (out / "additional_chat_templates" / "t.jinja").read_bytes() == b"hi"
    index = out / "model.safetensors.index.json"
    if max_shard_nbytes == 4_000_000:
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(t.nbytes for t in _MIXED.values())
        assert {path.name for path in out.glob("model-*")} == set(json.loads(index.read_text())["weight_map"].values())
        assert (out / "model-00001-of-00003.safetensors").is_file()
    else:
        assert not index.exists()
    assert {name: tensor.read().tobytes() for name, tensor in open_folder(out).tensors.items()} == {
        name: _bytes(tensor) for name, tensor in _MIXED.items()
    }


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("f16", torch.float16), ("BF16", torch.bfloat16), ("float32", torch.float32)]
)
def test_casts_are_those_of_torch_and_leave_integers_alone(tmp_path: Path, dtype: str, wanted: torch.dtype) -> None:
    source = _memory(_MIXED)
    write_checkpoint(source, tmp_path / "one", dtype=dtype)
    write_checkpoint(source, tmp_path / "two", dtype=dtype, threads=2)
    data = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert data == (tmp_path / "two" / "model.safetensors").read_bytes()
    read = safetensors.torch.load(data)
    for name, tensor in _MIXED.items():
        expected = tensor.to(wanted) if tensor.is_floating_point() else tensor
        assert read[name].dtype == expected.dtype
        assert _bytes(read[name]) == _bytes(expected)
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["torch_dtype"] == str(wanted).removeprefix("torch.")
    sizes = {name: nbytes for name, _, _, nbytes in planned_tensors(source, dtype)}
    assert sizes == {name: tensor.nbytes for name, tensor in read.items()}


def test_values_that_are_not_finite_are_refused_with_tensor_and_count(tmp_path: Path) -> None:
    bad = torch.zeros(3000, 3000)
    bad[0, 0], bad[2999, 1], bad[1, 1] = float("nan"), float("inf"), -float("inf")
    source = _memory({"fine": torch.ones(2), "bad": bad})
    for dtype in (None, "bf16"):
        with pytest.raises(InputError, match=r"'bad': 3 of 9000000 values are NaN or infinite"):
            write_checkpoint(source, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(source, tmp_path / "out", allow_nonfinite=True)
    read = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert _bytes(read["bad"]) == _bytes(bad)


def test_values_too_large_for_the_type_are_refused_with_tensor_and_count(tmp_path: Path) -> None:
    source = _memory({"big": torch.tensor([1.0, 65504.0, 65520.0, -1e9])})
    with pytest.raises(InputError, match=r"'big': 2 of 4 values are too large for F16"):
        write_checkpoint(source, tmp_path / "out", dtype="f16", allow_nonfinite=True)
    wide = _memory({"wide": torch.tensor([1e300], dtype=torch.float64)})
    with pytest.raises(LayoutError, match="'wide'"):
        write_checkpoint(wide, tmp_path / "out", dtype="f32")
    with pytest.raises(UsageError, match="int8"):
        write_checkpoint(source, tmp_path / "out", dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_a_real_model_is_loaded_by_transformers_after_a_cast(shared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = shared / "models" / "stories260k-hf"
    write_checkpoint(open_checkpoint(source), tmp_path / "bf16", dtype="bf16")
    wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").state_dict()
    assert {name: _bytes(tensor) for name, tensor in found.items()} == {n: _bytes(t) for n, t in wanted.items()}
    assert (tmp_path / "bf16" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def _llama_70b(folder: Path) -> None:
    """A folder of the size of Llama 3 70B: 723 tensors in 30 shards, 141 GB on paper, a few blocks on the disk."""
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [128256, 8192]}
    for layer in range(80):
        start = f"model.layers.{layer}."
        for name in ("q", "k", "v", "o"):
            rows = 1024 if name in "kv" else 8192
            shapes[f"{start}self_attn.{name}_proj.weight"] = [rows, 8192]
        for name in ("gate", "up", "down"):
            shapes[f"{start}mlp.{name}_proj.weight"] = [8192, 28672] if name == "down" else [28672, 8192]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{start}{name}.weight"] = [8192]
    shapes |= {"model.norm.weight": [8192], "lm_head.weight": [128256, 8192]}
    assert len(shapes) == 723
    names, weight_map = list(shapes), {}
    for number in range(30):
        shard = f"model-{number + 1:05d}-of-00030.safetensors"
        header, position = {}, 0
        for name in names[number::30]:
            end = position + 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [position, end]}
            weight_map[name], position = shard, end
        path = _file(folder / shard, header, b"")
        os.truncate(path, path.stat().st_size + position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))


_MEASURE = """
import sys, time
start = time.perf_counter()
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
imported = time.perf_counter()
model = open_checkpoint(sys.argv[1])
opened = time.perf_counter()
checked = preflight(model)
row = model.tensors["lm_head.weight"].read_rows(128255, 128256)
assert len(checked.bindings) == 723 and model.parameters > 70e9 and row.shape == (1, 8192)
heavy = sorted({"torch", "transformers", "numba", "scipy"} & set(sys.modules))
# not ru_maxrss: that is also the peak of the process this one was forked from
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(opened - imported, time.perf_counter() - start, peak, heavy)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory as Linux gives it")
def test_a_70b_folder_opens_in_a_second_and_200_megabytes(tmp_path: Path) -> None:
    _llama_70b(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    opening, whole, rss, heavy = done.stdout.split(maxsplit=3)
    assert heavy.strip() == "[]"
    assert float(opening) < 1
    assert float(whole) < 5  # imports too, on a busy machine
    assert int(rss) < 200_000  # KiB

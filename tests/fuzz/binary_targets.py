"""Made-up weights, GGUF files and importance matrices: the formats that are bytes and not text."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from quantpress.convert.gguf.importance_file import read_importance
from quantpress.convert.gguf.reader import open_gguf_file
from quantpress.convert.open import open_checkpoint
from quantpress.convert.tokenizer import Tokenizer
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.inspection import inspect
from tests.fuzz.gguf_seeds import GGUF_WORDS, gguf_seeds, imatrix_seeds, split_seeds
from tests.fuzz.target import Target

__all__ = ["TARGETS"]

_TWO = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_PARTS = ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf")
_SMALL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16), "c": np.zeros((), np.int64)}


def _read_all(folder: Path) -> None:
    """Opens a folder and reads what the header speaks of, whole and by rows."""
    for tensor in open_checkpoint(folder).tensors.values():
        rows = tensor.shape[0] if tensor.shape else 1
        tensor.read_rows(0, rows)
        tensor.read_rows(rows // 2, rows)


def _plain_folder(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')


def _header(table: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(shape: Any, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _safetensors_seeds() -> Mapping[str, bytes]:
    return {
        "good": safetensors.numpy.save(_SMALL),
        "good-metadata": safetensors.numpy.save(_SMALL, {"format": "pt"}),
        "good-types": _header({"f8": _tensor([4], 0, 4, "F8_E4M3"), "bf": _tensor([2, 1], 4, 8, "BF16")}, bytes(8)),
        "good-nothing-in-it": _header({"a": _tensor([0, 1 << 40], 0, 0), "b": _tensor([2], 0, 8)}, bytes(8)),
        "no-data": _header({"a": _tensor([1 << 40], 0, 1 << 42)}),
        "long": _header(b"{", length=(1 << 64) - 1), "hundred-million": _header(b"{", length=100_000_000),
        "overlap": _header({"a": _tensor([2], 0, 8), "b": _tensor([2], 4, 12)}, bytes(12)),
        "product": _header({"a": _tensor([1 << 32, 1 << 32], 0, 0)}),
        "hole": _header({"a": _tensor([1], 4, 8)}, bytes(8)),
        "deep": _header(b'{"a":' * 500), "twice": _header(b'{"a":{},"a":{}}'), "lfs": b"version https://git-lfs",
        "commas": _header(b'{"a":[' + b"0," * 20_000 + b"0]}"),
        "rank": _header({"a": _tensor([1] * 9, 0, 4)}, bytes(4)),
        "metadata": _header({"__metadata__": {"a": 5}}), "list": _header([1]), "tiny": b"\0" * 8,
    }  # fmt: skip


def _index_folder(folder: Path) -> None:
    _plain_folder(folder)
    for name, key in zip(_TWO, "ab", strict=True):
        (folder / name).write_bytes(safetensors.numpy.save({key: _SMALL[key]}))


def _index_seeds() -> Mapping[str, bytes]:
    good = {"metadata": {"total_size": 32}, "weight_map": {"a": _TWO[0], "b": _TWO[1]}}
    values: dict[str, Any] = {
        "good": good, "good-bare": {"weight_map": good["weight_map"]}, "none": {"weight_map": {}}, "list": [good],
        "up": {"weight_map": {"a": "../" + _TWO[0]}}, "root": {"weight_map": {"a": "/etc/passwd"}},
        "missing": {"weight_map": {"a": _TWO[0], "b": _TWO[1], "c": _TWO[0]}}, "wrong": {"weight_map": {"b": _TWO[0]}},
        "number": {"weight_map": {"a": 5}}, "zero": {"weight_map": {"a": "x\0y"}}, "dot": {"weight_map": {"a": "."}},
        "self": {"weight_map": {"a": "model.safetensors.index.json"}}, "long": {"weight_map": {"a": "x" * 5000}},
        "size": {**good, "metadata": {"total_size": -1}}, "surrogate": {"weight_map": {"a": "\ud800"}},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


def _torch_folder(folder: Path) -> None:
    _plain_folder(folder)


def _torch_seeds() -> Mapping[str, bytes]:
    import io
    import pickle

    import torch

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("never",))

    whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    states: dict[str, Any] = {
        "good": {"a": whole, "b": torch.ones(4, dtype=torch.bfloat16)}, "good-views": {"a": whole[1:], "b": whole[:2]},
        "good-transposed": {"a": whole.t()}, "code": {"a": Code()}, "list": [whole], "number": {"a": 5},
        "key": {5: whole}, "sparse": {"a": whole.to_sparse()}, "meta": {"a": torch.empty(5, device="meta")},
        "wide": {"a": torch.zeros(1).expand(1 << 20, 1 << 10)}, "parameter": {"a": torch.nn.Parameter(whole)},
        "complex": {"a": torch.zeros(2, dtype=torch.complex64)},
    }  # fmt: skip
    found = {}
    for name, state in states.items():
        out = io.BytesIO()
        torch.save(state, out)
        found[name] = out.getvalue()
    return {**found, "pickle": pickle.dumps({"a": 5}), "cut": found["good"][:-40], "zip": b"PK\x05\x06" + bytes(18)}


def _parse_gguf(folder: Path) -> object:
    """Reads header and table, and the values of small tensors."""
    file = open_gguf_file(folder / "model.gguf")
    for info in file.tensors.values():
        file.read(info, 0, min(info.nbytes, 1 << 16))
    return file.metadata


def _parse_gguf_checkpoint(folder: Path) -> object:
    """Opens a GGUF model, rebuilds and uses its tokenizer, reads rows, describes it, and plans a file of it."""
    checkpoint = open_checkpoint(folder / "model.gguf")
    report = inspect(checkpoint)
    for tensor in checkpoint.tensors.values():
        tensor.read_rows(0, min(tensor.shape[0] if tensor.shape else 1, 4))
    if checkpoint.tokenizer_files:
        Tokenizer(TokenizerFiles(checkpoint.tokenizer_files, name=checkpoint.name)).encode("the press", special=True)
    Gguf(output=Path("x.gguf"), outtype="Q8_0").resolved(checkpoint).plan(checkpoint)
    return report


def _split_folder(folder: Path) -> None:
    for name, data in split_seeds().items():
        (folder / name).write_bytes(data)


def _parse_split(folder: Path) -> object:
    return open_gguf_file(folder / _PARTS[0]).metadata


def _nothing(folder: Path) -> None:
    pass


TARGETS: tuple[Target, ...] = (
    Target(
        "safetensors-header", "model.safetensors", _plain_folder, _read_all, _safetensors_seeds,
        (b'"F4"', b'"BOOL"', b'"__metadata__":{}', b'"data_offsets":[0,0]', b'"shape":[]', b"\\ud800", b"1e99", b"-1"),
    ),
    Target(
        "safetensors-index", "model.safetensors.index.json", _index_folder, _read_all, _index_seeds,
        (b'"../x"', b'"' + _TWO[0].encode() + b'"', b"\\u0000", b"\\ud800", b'"total_size": 1e99', b"config.json"),
    ),
    Target(
        "torch-bin", "pytorch_model.bin", _torch_folder, _read_all, _torch_seeds,
        (b"cbuiltins\neval\n", b"cos\nsystem\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nHalfStorage\n",
         b"R.", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f", b"Q", b"b", b"(", b"t", b"h\x00"),
        max_len=1 << 14,
    ),
    Target("gguf", "model.gguf", _nothing, _parse_gguf, gguf_seeds, GGUF_WORDS, max_len=1 << 15),
    Target("gguf-checkpoint", "model.gguf", _nothing, _parse_gguf_checkpoint, gguf_seeds, GGUF_WORDS, max_len=1 << 15),
    Target(
        "gguf-split", _PARTS[1], _split_folder, _parse_split,
        lambda: {"good": split_seeds()[_PARTS[1]], "first": split_seeds()[_PARTS[0]]},
        (b"split.no", b"split.count", b"split.tensors.count"),
    ),
    Target(
        "imatrix", "imatrix.gguf", _nothing, lambda folder: read_importance(folder / "imatrix.gguf"), imatrix_seeds,
        (b".in_sum2", b".counts", b"imatrix.datasets", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"),
    ),
)  # fmt: skip

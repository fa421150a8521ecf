"""The real llama-quantize: `llama_model_quantize` of a llama.cpp library, on files whose matrices have two rows.

The library reads hyperparameters from the metadata and types and names from the table; it compares no shape with them,
so that a file of 80 layers can be small. The layout of the parameters is that of llama.h in llama.cpp 0.5.0.
"""

from __future__ import annotations

import ctypes as c
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_NONE = 42 + 1  # GGML_TYPE_COUNT of llama.cpp 0.5.0
# "[   3/  29] blk.0.attn_k.weight - [ 256, 2, 1, 1], type = f16, size = 0.00 MiB -> 0.00 MiB (q4_K)"
_LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[.*?\], type = +(\w+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\w+)\))?")
_NORM = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")


class _Parameters(c.Structure):
    _fields_ = [
        ("nthread", c.c_int32),
        *((name, c.c_int) for name in ("ftype", "output_tensor_type", "token_embedding_type")),
        *((name, c.c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy", "pure")),
        *((name, c.c_bool) for name in ("keep_split", "dry_run")),
        *((name, c.c_void_p) for name in ("imatrix", "kv_overrides", "tensor_types", "prune_layers")),
        ("max_buf_size", c.c_size_t),
    ]


class _Imatrix(c.Structure):
    _fields_ = [("name", c.c_char_p), ("data", c.POINTER(c.c_float)), ("size", c.c_size_t)]


class _Override(c.Structure):
    _fields_ = [("pattern", c.c_char_p), ("type", c.c_int)]


@dataclass(frozen=True)
class Model:
    """A model as the rules see it.

    Attributes:
        arch, layers, heads, kv_heads, experts, hidden: as its metadata says them.
        tensors: rows of name, with `{}` where the layer stands, shape, and the layers that have it (None: all).
        stored: type of the matrices; vectors and routers are F32.
    """

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int
    hidden: int
    tensors: tuple[tuple[str, tuple[int, ...], tuple[int, ...] | None], ...]
    stored: str = "F16"

    def named(self) -> dict[str, tuple[int, ...]]:
        """Every tensor and its shape, outermost dimension first."""
        found = {}
        for name, shape, layers in self.tensors:
            every = range(self.layers) if layers is None else layers
            found |= {name.format(layer): shape for layer in every} if "{}" in name else {name: shape}
        return found


@dataclass(frozen=True)
class Options:
    """What llama-quantize is asked for; names as its command line has them."""

    imatrix: bool = False
    pure: bool = False
    leave_output_tensor: bool = False
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    tensor_types: Sequence[tuple[str, str]] = field(default=())


def write(path: Path, model: Model) -> Path:
    """Writes the file that llama-quantize reads."""
    writer = gguf.GGUFWriter(path, model.arch)
    writer.add_block_count(model.layers)
    writer.add_context_length(64)
    writer.add_embedding_length(model.hidden)
    writer.add_feed_forward_length(2 * model.hidden)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(1)
    for key in _NORM:
        writer.add_float32(f"{model.arch}.{key}", 1e-5)
    if model.arch == "gptneox":
        writer.add_parallel_residual(True)
    for name, shape in model.named().items():
        plain = len(shape) == 1 or name.endswith(("_norm.weight", "ffn_gate_inp.weight"))  # as llama.cpp's converter
        kind = gguf.GGMLQuantizationType["F32" if plain else model.stored]
        values = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _type(name: str | None) -> int:
    return _NONE if name is None else gguf.GGMLQuantizationType[name.upper()].value


class LlamaQuantize:
    """One library; what it says goes to `log`."""

    def __init__(self, library: Path) -> None:
        for name in ("libggml.v0.5.0.so", "libggml.so", "libggml-base.so"):
            if (library.parent / name).exists():
                c.CDLL(str(library.parent / name), mode=c.RTLD_GLOBAL)
        self._library = c.CDLL(str(library), mode=c.RTLD_GLOBAL)
        self._library.llama_model_quantize_default_params.restype = _Parameters
        self._library.llama_model_quantize.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(_Parameters)]
        self._library.llama_model_quantize.restype = c.c_uint32
        self.log: list[str] = []
        self._say = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(
            lambda _level, text, _data: self.log.append(text.decode(errors="replace"))
        )
        self._library.llama_log_set(self._say, None)
        self._library.llama_backend_init()
        if self._library.llama_model_quantize_default_params().output_tensor_type != _NONE:
            raise ValueError(f"{library}: llama_model_quantize_params is another one than in llama.cpp 0.5.0")

    def types(self, source: Path, ftype: str, options: Options) -> dict[str, str] | None:
        """Gives the types that a file would get (a dry run); None where that needs an importance matrix.

        Raises:
            RuntimeError: llama.cpp fails, with its words.
        """
        parameters = self._library.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype, parameters.dry_run = 1, _ftype(ftype), True
        parameters.pure, parameters.quantize_output_tensor = options.pure, not options.leave_output_tensor
        parameters.output_tensor_type = _type(options.output_tensor_type)
        parameters.token_embedding_type = _type(options.token_embedding_type)
        kept: list[Any] = []
        if options.imatrix:
            parameters.imatrix = _entries(source, kept)
        if options.tensor_types:
            rows = [_Override(pattern.encode(), _type(kind)) for pattern, kind in options.tensor_types]
            kept.append((_Override * (len(rows) + 1))(*rows, _Override(None, _NONE)))
            parameters.tensor_types = c.cast(kept[-1], c.c_void_p)
        self.log.clear()
        failed = self._library.llama_model_quantize(str(source).encode(), b"", c.byref(parameters))
        text = "".join(self.log)
        if failed:
            raise RuntimeError(text)
        found = {row[1]: (row[3] or row[2]).upper() for row in _LINE.finditer(text)}
        assert len(found) == len(gguf.GGUFReader(source).tensors), text
        return None if "will require an imatrix" in text else found

    def quantize(self, source: Path, out: Path, ftype: str) -> Path:
        """Writes a file of another type.

        Raises:
            RuntimeError: llama.cpp fails, with its words.
        """
        parameters = self._library.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype = 1, _ftype(ftype)
        self.log.clear()
        if self._library.llama_model_quantize(str(source).encode(), str(out).encode(), c.byref(parameters)):
            raise RuntimeError("".join(self.log))
        return out


def quantizer(library: Path) -> LlamaQuantize | None:
    """Gives llama-quantize of a library, None where it has none or one with other parameters."""
    try:
        return LlamaQuantize(library)
    except (OSError, AttributeError, ValueError):
        return None


def _ftype(name: str) -> int:
    return int(gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"].value)


def _entries(source: Path, kept: list[Any]) -> c.c_void_p:
    """An importance of 1 for every matrix of a file."""
    rows = []
    for tensor in gguf.GGUFReader(source).tensors:
        size = int(tensor.shape[0]) * (int(tensor.shape[2]) if len(tensor.shape) > 2 else 1)
        ones = (c.c_float * size)(*[1.0] * size)
        kept.append(ones)
        rows.append(_Imatrix(tensor.name.encode(), c.cast(ones, c.POINTER(c.c_float)), size))
    kept.append((_Imatrix * (len(rows) + 1))(*rows, _Imatrix(None, None, 0)))
    return c.cast(kept[-1], c.c_void_p)


def packed(types: Mapping[str, str], rows: Iterable[str], layers: int) -> dict[str, str]:
    """Types by the names in `Model.tensors`: those of a name's layers one after another, `Q6_K*2 Q4_K*3`."""
    found = {}
    for name in rows:
        names = [name.format(layer) for layer in range(layers)] if "{}" in name else [name]
        runs: list[list[Any]] = []
        for kind in (types[each] for each in names if each in types):
            if runs and runs[-1][0] == kind:
                runs[-1][1] += 1
            else:
                runs.append([kind, 1])
        found[name] = " ".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)
    return found

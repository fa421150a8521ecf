"""Opens a GGUF file as a checkpoint: Hugging Face names, row orders and config restored, values decoded when read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from quantpress.convert.arch.registry import find_arch, find_gguf_arch
from quantpress.convert.arch.spec import GGUF_FACTORS, ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.convert.checkpoint import DTYPES, Array, Checkpoint, LazyTensor, SourceFile
from quantpress.convert.files import shown
from quantpress.convert.gguf.container import plain_metadata
from quantpress.convert.gguf.general import SAMPLING
from quantpress.convert.gguf.reader import GgufFile, open_gguf_file
from quantpress.convert.gguf.rows import ReadRows, Transposed, row_order
from quantpress.convert.gguf.table import TensorInfo
from quantpress.convert.gguf.unstack import Placed, joined, of_expert
from quantpress.convert.gguf.vocab_rebuild import tokenizer_files_from_gguf
from quantpress.convert.head_rows import heads_apart
from quantpress.convert.pieces import is_piece, piece_row
from quantpress.convert.recent import Recent
from quantpress.quant.errors import InputError
from quantpress.quant.floats import to_float32
from quantpress.quant.ggml.codec import DECODERS, dequantize

_STORED = ("F32", "F16", "BF16", "F64")  # types whose values are given as they are
_MAX_FACTORS = 1 << 16  # values of a tensor of rotary factors; half a head is 64


def open_gguf(path: Path | str) -> Checkpoint:
    """Opens a GGUF model; reads headers, and of the tensors only rotary factors.

    Args:
        path: the file; of a split model its first part.

    Raises:
        InputError: the file is damaged, not a model, of a family that is not known, or lacks tensors.
    """
    path = Path(path)
    file = open_gguf_file(path)
    metadata = plain_metadata(file.metadata)
    try:
        first = find_gguf_arch(_architecture(metadata), metadata)
        config = first.config_from_gguf(metadata, frozenset(file.tensors), _factors(file))
        arch = find_arch(config)  # several families may share an architecture, and the config says which it is
        hyper = arch.read_config(config)
        tensors = {tensor.name: tensor for tensor in _tensors(file, arch, hyper)}
    except InputError as error:
        said = str(error).replace("config.json: ", "its metadata, by config.json's names: ", 1)
        raise type(error)(f"{path}: {said}") from error
    return Checkpoint(
        name=str(metadata.get("general.name") or path.stem),
        config=config,
        tensors=tensors,
        tokenizer_files=_TokenizerFiles(metadata, str(path)),
        generation_config=_generation_config(metadata),
        files=tuple(SourceFile(*pair) for pair in zip(file.paths, file.sizes, strict=True)),
        metadata={key: pair for key, pair in file.metadata.items() if key.startswith(("general.", "tokenizer."))},
        storage_types=_storage_types(file, arch, hyper),
        format="gguf",
    )


def _storage_types(file: GgufFile, arch: ArchSpec, hyper: Hyperparameters) -> dict[str, str]:
    rows = ((one, layer) for row, layer in arch.rows(hyper) for one in arch.heads_of(row, hyper))
    found = ((row.hf.format(layer=layer), row.gguf.format(layer=layer)) for row, layer in rows)
    return {name: file.tensors[gguf].type.name for name, gguf in found if gguf in file.tensors}


class _TokenizerFiles(Mapping[str, bytes]):
    """Tokenizer files that are rebuilt when one is asked for: writing another GGUF file does not need them."""

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self._metadata, self._name = metadata, name
        self._files: Mapping[str, bytes] | None = None

    def _built(self) -> Mapping[str, bytes]:
        if self._files is None:
            none = self._metadata.get("tokenizer.ggml.model", "none") == "none"
            self._files = {} if none else tokenizer_files_from_gguf(self._metadata, name=self._name).files
        return self._files

    def __getitem__(self, name: str) -> bytes:
        return self._built()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._built())

    def __len__(self) -> int:
        return len(self._built())


def _architecture(metadata: Mapping[str, Any]) -> str:
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise InputError(f"general.architecture is {shown(name)}, the name of a model family is wanted")
    return name


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        key: metadata.get(f"general.sampling.{gguf}") for key, (gguf, _) in SAMPLING.items() if key != "penalty_repeat"
    }
    return {key: value for key, value in found.items() if value is not None}


def _factors(file: GgufFile) -> dict[str, tuple[float, ...]]:
    factors: dict[str, tuple[float, ...]] = {}
    for name in GGUF_FACTORS:
        info = file.tensors.get(name)
        if info is None:
            continue
        if info.type.name != "F32" or len(info.shape) != 1 or info.shape[0] > _MAX_FACTORS:
            raise InputError(f"tensor {name!r} is {info.type.name} of shape {info.shape}, a vector of F32 is wanted")
        factors[name] = tuple(np.frombuffer(file.read(info, 0, info.nbytes), "<f4").tolist())
    return factors


def _tensors(file: GgufFile, arch: ArchSpec, hyper: Hyperparameters) -> Iterator[LazyTensor]:
    """Gives the table's tensors; refuses what is missing, unknown or of another shape."""
    if hyper.layers > len(file.tensors):
        raise InputError(f"{hyper.layers} layers are promised, the file holds {len(file.tensors)} tensors")
    unused = set(file.tensors) - set(arch.gguf_tensors(hyper)) - set(GGUF_FACTORS)
    pieces: dict[str, list[Placed]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for row, layer in arch.rows(hyper):
        name = row.gguf.format(layer=layer)
        info = file.tensors.get(name)
        if info is None:
            if row.tied_to:
                continue
            raise InputError(f"tensor {name!r} is missing, {arch.family} needs it")
        unused.discard(name)
        if row.expert >= 0 and hyper.experts is not None:
            info = of_expert(info, row.expert, hyper.experts.count)
        plain, order = piece_row(row, hyper)
        whole = _restored(file, info, arch, hyper, plain, layer)
        if row.per_head:
            yield from heads_apart(arch, row, layer, hyper, whole)
        elif is_piece(row):
            stored = row.layout in (Layout.STACKED, Layout.STACKED_TRANSPOSED)
            placed = Placed(whole, order, row.expert if stored else -1, plain.layout is Layout.TRANSPOSED)
            pieces.setdefault(whole.name, []).append(placed)
            shapes[whole.name] = tuple(hyper.dims[dim] for dim in row.shape)
        else:
            yield whole
    if unused:
        raise InputError(f"tensor {shown(min(unused))} is not one of {arch.family}'s")
    recent: Recent[Array] = Recent(2)
    for name, found in pieces.items():
        yield joined(name, shapes[name], found, recent)


def _restored(
    file: GgufFile, info: TensorInfo, arch: ArchSpec, hyper: Hyperparameters, row: TensorSpec, layer: int
) -> LazyTensor:
    """Gives a tensor as the checkpoint had it."""
    shape = tuple(hyper.dims[dim] for dim in row.shape)
    transposed = row.layout is Layout.TRANSPOSED and len(shape) == 2
    wanted = shape[::-1] if transposed else shape
    flat = row.role is Role.ROUTER and shape[:1] == (1,) and info.shape == shape[1:]  # as llama.cpp's converter has it
    if info.shape != wanted and not flat:
        raise InputError(f"tensor {info.name!r} has shape {info.shape}, wanted {wanted}")
    if info.type.name not in (*_STORED, *DECODERS):
        raise InputError(f"tensor {info.name!r} is {info.type.name}, which cannot be decoded")
    dtype = info.type.name if info.type.name in _STORED and not row.offset else "F32"
    source = str(file.paths[info.part])
    read = _decoder(file, replace(info, shape=shape) if flat else info)
    if transposed:
        read = _transposed(LazyTensor(info.name, info.shape, dtype, source, read))
    order = row_order(arch, row, hyper).inverse()
    return LazyTensor(
        row.hf.format(layer=layer, head=0), shape, dtype, source, _reordered(order.read, read, row.offset)
    )


def _decoder(file: GgufFile, info: TensorInfo) -> ReadRows:
    """Gives a function that reads rows of the first dimension in the file's order."""
    kind, inner = info.type.name, info.shape[1:]
    row_nbytes = info.nbytes // info.shape[0] if inner else 0

    def read_rows(start: int, stop: int) -> Array:
        if not inner:  # a vector is one row; blocks are never cut
            return _decoded(file.read(info, 0, info.nbytes), kind, info.shape)[start:stop]
        data = file.read(info, start * row_nbytes, (stop - start) * row_nbytes)
        return _decoded(data, kind, (stop - start, *inner))

    return read_rows


def _decoded(data: bytes, kind: str, shape: tuple[int, ...]) -> Array:
    if kind in _STORED:
        return np.frombuffer(data, DTYPES[kind]).reshape(shape)
    rows = np.frombuffer(data, np.uint8).reshape(*shape[:-1], -1)
    return dequantize(kind, rows, shape[-1])


def _transposed(tensor: LazyTensor) -> ReadRows:
    # A new one for each call: a checkpoint that is only open holds no weights.
    return lambda start, stop: Transposed(tensor).read_rows(start, stop)


def _reordered(reorder: Callable[[ReadRows, int, int], Array], read: ReadRows, offset: float) -> ReadRows:
    def read_rows(start: int, stop: int) -> Array:
        rows = reorder(read, start, stop)
        return to_float32(rows) - np.float32(offset) if offset else rows

    return read_rows

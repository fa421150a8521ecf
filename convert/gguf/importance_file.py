"""Reads and writes importance matrices as files: llama.cpp's GGUF form, and its older `.dat` for reading.

Layout (llama.cpp, tools/imatrix/imatrix.cpp, `save_imatrix`, and common/imatrix-loader.cpp): `general.type` is
"imatrix"; for each weight, in the order of the names' bytes, a tensor `<name>.in_sum2` (E, K) with the sums of squares
and `<name>.counts` (E, 1) with the tokens, both F32. Trailing dimensions of 1 are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Array
from quantpress.convert.files import open_regular, read_at, shown
from quantpress.convert.gguf.container import MAGIC, MetadataValue
from quantpress.convert.gguf.importance import Importance, ImportanceMatrix
from quantpress.convert.gguf.importance_legacy import read_legacy
from quantpress.convert.gguf.reader import GgufFile, open_gguf_file
from quantpress.convert.gguf.table import TensorInfo
from quantpress.convert.gguf.writer import FilePlan, Slot, write_container
from quantpress.convert.hashed_output import Written
from quantpress.quant.errors import InputError
from quantpress.quant.ggml.types import ggml_type

__all__ = ["plan_importance", "read_importance", "write_importance"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_FLOAT = 4  # bytes


def read_importance(path: Path | str) -> ImportanceMatrix:
    """Reads an importance matrix of either form; which one is seen from its first bytes.

    Returns:
        The matrix, `name` being the file's name without its folder.

    Raises:
        InputError: the file cannot be read, is damaged, is no importance matrix, or holds values that are not finite
            or are negative.
    """
    path = Path(path)
    head = bytearray(len(MAGIC))
    with open_regular(path) as file:
        read_at(file, 0, memoryview(head))
    matrix = _read_gguf(path) if bytes(head) == MAGIC else read_legacy(path)
    for name, entry in matrix.entries.items():
        _check(path, name, entry)
    return replace(matrix, name=path.name)


def write_importance(path: Path | str, matrix: ImportanceMatrix, *, force: bool = False, held: bool = False) -> Written:
    """Writes an importance matrix in llama.cpp's GGUF form, atomically; the bytes are llama-imatrix's own.

    Args:
        path: the output.
        matrix: sums and counts.
        force: replace an existing file.
        held: the caller has the output's lock already, see `held_output`.

    Raises:
        LayoutError: a tensor's name is too long for GGUF.
        UsageError, BusyError, OutputError: see `atomic_file`.
    """
    chunks = ((number, values) for number, (_, values) in enumerate(_parts(matrix)))
    return write_container(path, plan_importance(matrix), chunks, force=force, held=held)


def plan_importance(matrix: ImportanceMatrix) -> FilePlan:
    """Gives header and table of the file; its size does not depend on the numbers."""
    metadata: dict[str, MetadataValue] = {
        "general.type": ("string", "imatrix"),
        _DATASETS: ("array[string]", list(matrix.datasets)),
        _CHUNKS: ("uint32", matrix.chunk_count),
        _CHUNK_SIZE: ("uint32", matrix.chunk_size),
    }
    kind = ggml_type("F32").type_id
    slots = [Slot(name, _squeezed(values.shape), kind, values.nbytes) for name, values in _parts(matrix)]
    return FilePlan(metadata, slots)


def _parts(matrix: ImportanceMatrix) -> Iterator[tuple[str, Array]]:
    for name in sorted(matrix.entries, key=lambda each: each.encode("utf-8", "surrogateescape")):
        entry = matrix.entries[name]
        experts = entry.counts.size
        yield name + _SUMS, np.ascontiguousarray(entry.sums.reshape(experts, -1), "<f4")
        yield name + _COUNTS, np.ascontiguousarray(entry.counts.reshape(experts, 1), "<f4")


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drops outer dimensions of 1, which GGUF as ggml writes it does not have."""
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = open_gguf_file(path)
    sums = {name.removesuffix(_SUMS): info for name, info in file.tensors.items() if name.endswith(_SUMS)}
    counts = {name.removesuffix(_COUNTS): info for name, info in file.tensors.items() if name.endswith(_COUNTS)}
    if not sums and not counts:
        raise InputError(
            f"{path}: not an importance matrix: it has no tensor *{_SUMS} (general.type is "
            f"{shown(file.metadata.get('general.type', ('', 'missing'))[1])})"
        )
    alone = sorted(sums.keys() ^ counts.keys())
    if alone:
        wanted = alone[0] + (_COUNTS if alone[0] in sums else _SUMS)
        raise InputError(f"{path}: tensor {shown(wanted)} is missing; the importance matrix is damaged")
    missing = [key for key in (_DATASETS, _CHUNKS, _CHUNK_SIZE) if key not in file.metadata]
    if missing:
        raise InputError(f"{path}: metadata {missing[0]} is missing, without which llama-quantize reads no matrix")
    entries = {name: _entry(path, file, sums[name], counts[name]) for name in sums}
    return ImportanceMatrix(
        entries,
        _datasets(path, file.metadata),
        _number(path, file.metadata, _CHUNKS),
        _number(path, file.metadata, _CHUNK_SIZE),
    )


def _entry(path: Path, file: GgufFile, sums: TensorInfo, counts: TensorInfo) -> Importance:
    values, seen = _values(path, file, sums), _values(path, file, counts)
    if values.size % seen.size:
        raise InputError(
            f"{path}: tensor {shown(sums.name)} has {values.size} values, which do not divide by the {seen.size} of "
            f"{shown(counts.name)}"
        )
    return Importance(values.reshape(seen.size, -1), np.round(seen))


def _values(path: Path, file: GgufFile, info: TensorInfo) -> NDArray[np.float32]:
    if info.type.name != "F32":
        raise InputError(f"{path}: tensor {shown(info.name)} is {info.type.name}, an importance matrix holds F32")
    return np.frombuffer(file.read(info, 0, info.nbytes), "<f4").astype(np.float32, copy=False)


def _number(path: Path, metadata: Mapping[str, MetadataValue], key: str) -> int:
    kind, value = metadata[key]
    if kind not in ("uint32", "int32", "uint64", "int64", "uint16") or value < 0:
        raise InputError(f"{path}: metadata {key} is {shown(value)} of type {kind}, a count (uint32) is wanted")
    return int(value)


def _datasets(path: Path, metadata: Mapping[str, MetadataValue]) -> tuple[str, ...]:
    kind, value = metadata[_DATASETS]
    if kind == "array[string]":
        return tuple(value)
    if kind.startswith("array") and len(value) == 0:
        return ()
    raise InputError(f"{path}: metadata {_DATASETS} is of type {kind}, an array of strings is wanted")


def _check(path: Path, name: str, entry: Importance) -> None:
    """Refuses what llama-quantize refuses, and sums that no squares have."""
    for what, values in (("sums", entry.sums), ("counts", entry.counts)):
        wrong = int(np.count_nonzero(~np.isfinite(values)))
        if wrong:
            raise InputError(
                f"{path}: entry {shown(name)}: {wrong} of {values.size} {what} are NaN or infinite; measure anew"
            )
        if values.size and values.min() < 0:
            raise InputError(f"{path}: entry {shown(name)}: {what} go down to {values.min():g}; no {what} are negative")

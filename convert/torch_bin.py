"""Opens pytorch_model.bin through torch's weights-only loader, and never through anything that could run its code."""

from __future__ import annotations

import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantpress.convert.checkpoint import DTYPES, Array, LazyTensor, SourceFile
from quantpress.convert.files import FileStamp, open_regular, read_at, shown
from quantpress.convert.safetensors_reader import Shard
from quantpress.quant.errors import InputError, OutputError

if TYPE_CHECKING:
    import torch

__all__ = ["open_bin"]

_MAX_DIRECTORY = 16 << 20  # bytes of the archive's table of contents, about 200,000 tensors
_MAX_PICKLE = 64 << 20  # bytes of data.pkl, which names the tensors
_MAX_CONTAINERS, _BYTES_PER_CONTAINER = 1 << 18, 8
_TAIL = 98  # bytes at the end in which a ZIP archive without a comment says where its table of contents is
_OLDEST = (2, 10)  # of torch; its weights-only loader could be made to write past its memory before: CVE-2026-24747
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
# What torch.load raises for damaged or hostile files; a bug of ours is none of these.
_REFUSALS = (
    pickle.UnpicklingError,
    struct.error,
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    ImportError,
    OverflowError,
    MemoryError,
    AssertionError,
)


def open_bin(path: Path, *, label: str = "") -> Shard:
    """Opens a file that `torch.save` wrote since torch 1.6: a ZIP archive, mapped into memory, loaded weights-only.

    Args:
        path: the file, already checked by `files.inside` if another file named it.
        label: what messages call it; its path by default.

    Raises:
        OutputError: torch is too old to be shown a stranger's file.
        InputError: another format, an archive that grows when unpacked, code in it, or contents other than a mapping
            from names to dense tensors.
    """
    label = label or str(path)
    nbytes = _check_archive(path, label)
    import torch

    _check_version(torch.__version__, label)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what a file holds; a refusal says it in one line
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except _REFUSALS as error:
        reason = shown(_reason(str(error)), 160)
        raise InputError(f"{label}: refused by torch's weights-only loader: {type(error).__name__} {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{label}: must hold a mapping from names to tensors, found {type(state).__name__}")
    tensors = {name: _lazy(name, value, label) for name, value in state.items()}
    return Shard(tensors=tensors, metadata={}, file=SourceFile(path=path, nbytes=nbytes))


def _reason(message: str) -> str:
    """Gives what was wrong: torch puts advice before it on how to run the file's code all the same."""
    found = re.search(r"((?:Unsupported|Trying to) .+?)(?: was not an allowed|$)", message, re.MULTILINE)
    return found[1] if found else (message.splitlines() or [""])[0]


def _check_version(version: str, label: str) -> None:
    """Checks that the loader may be shown a stranger's file.

    Raises:
        OutputError: it is one that such files can break.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < _OLDEST:
        raise OutputError(
            f"{label}: opened with torch 2.10 or newer only, this is {version}, whose weights-only loader a hostile"
            " file can make corrupt memory; upgrade torch, or save the model as safetensors with the tool that made it"
        )


def _check_archive(path: Path, label: str) -> int:
    """Checks the kind of file and its table of contents before torch sees it; gives its size in bytes."""
    with open_regular(path) as file:
        nbytes = FileStamp.of(file).nbytes
        start, tail = bytearray(4), bytearray(min(nbytes, _TAIL))
        read_at(file, 0, memoryview(start))
        read_at(file, nbytes - len(tail), memoryview(tail))
        if bytes(start) != b"PK\x03\x04":
            raise InputError(
                f"{label}: not a file of torch.save since torch 1.6; older ones are plain pickles or tar files, which"
                " are not opened: save the model as safetensors with the tool that made it"
            )
        _check_directory_size(bytes(tail), label)
        try:
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                _check_infos(infos, nbytes, label)
                for info in infos:
                    if info.filename.endswith(".pkl"):
                        _check_containers(archive.read(info), label)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise InputError(f"{label}: damaged or cut short: {error}") from error
    return nbytes


def _check_infos(infos: Sequence[zipfile.ZipInfo], nbytes: int, label: str) -> None:
    """Checks that nothing in the archive grows when it is unpacked."""
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise InputError(f"{label}: {shown(info.filename)} in it is compressed, which torch.save never does")
        if info.filename.endswith(".pkl") and info.file_size > _MAX_PICKLE:
            raise InputError(f"{label}: {shown(info.filename)} in it has {info.file_size} bytes, at most {_MAX_PICKLE}")
    if sum(info.file_size for info in infos) > nbytes:
        raise InputError(f"{label}: parts of the archive overlap")


def _check_containers(data: bytes, label: str) -> None:
    """Bounds the lists, mappings and marks of a pickle: one byte each makes an object of 56 bytes or more.

    What torch.save writes has about five in the 200 bytes for a tensor; bytes of other meaning are counted too.
    """
    number = sum(data.count(code) for code in (b"(", b"]", b"}"))
    if number > _MAX_CONTAINERS and number > len(data) // _BYTES_PER_CONTAINER:
        raise InputError(
            f"{label}: damaged: its pickle has {number} lists in {len(data)} bytes, more than tensors need"
        )


def _check_directory_size(tail: bytes, label: str) -> None:
    """Bounds the table of contents (PKWARE APPNOTE 4.3.14 and 4.3.16) before zipfile builds objects from it."""
    end, wide = tail[-22:], tail[-98:-42]  # at the very end, as torch writes them: no comment that could hide another
    size = int.from_bytes(end[12:16], "little")
    if wide.startswith(b"PK\x06\x06"):
        size = max(size if size < 0xFFFFFFFF else 0, int.from_bytes(wide[40:48], "little"))
    if not end.startswith(b"PK\x05\x06") or size > _MAX_DIRECTORY:
        raise InputError(f"{label}: damaged or cut short: no table of contents of at most {_MAX_DIRECTORY} bytes")


def _lazy(name: str, value: Any, label: str) -> LazyTensor:
    import torch

    where = f"{label}: {shown(name)}"
    if not isinstance(value, torch.Tensor):
        raise InputError(f"{where} is no tensor but {type(value).__name__}; only plain state dicts are opened")
    dtype = _NAMES.get(str(value.dtype).removeprefix("torch."))
    if dtype is None or value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise InputError(
            f"{where} is a tensor of {value.dtype}, {value.layout}; supported are dense {', '.join(_NAMES)}"
        )
    shape = tuple(value.shape)
    if math.prod(shape) * value.element_size() > value.untyped_storage().nbytes():
        raise InputError(f"{where} has shape {shape}, more values than the file holds for it")
    detached = value.detach()
    rows = shape[0] if shape else 1

    def read_rows(first: int, stop: int) -> Array:
        if not 0 <= first <= stop <= rows:
            raise IndexError(f"{name}: rows [{first}, {stop}) of {rows}")
        return _to_numpy(detached[first:stop] if shape else detached, DTYPES[dtype])

    return LazyTensor(name, shape, dtype, label, read_rows)


def _to_numpy(values: torch.Tensor, dtype: np.dtype[Any]) -> Array:
    """Copies out of the mapped file, also types that numpy does not know."""
    import torch

    shape = tuple(values.shape)
    plain = values.contiguous().reshape(-1).view(torch.uint8)
    return plain.numpy().copy().view(dtype).reshape(shape)

"""Opens GGUF files, and models split into several, without trusting a number in them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from quantpress.convert.files import inside, open_regular, shown
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.split import MAX_PARTS, SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, PartName
from quantpress.convert.gguf.table import Part, TensorInfo, read_part
from quantpress.quant.errors import InputError


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, or all parts of a split one, whose headers are read and whose data are not.

    Attributes:
        paths: the files, in the order of their parts.
        sizes: their bytes when they were opened.
        version: of the container.
        metadata: pairs of the first part, without `split.*`.
        tensors: name -> tensor, in the order of the files.
    """

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    version: int
    metadata: Mapping[str, MetadataValue] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    _files: tuple[BinaryIO, ...] = field(repr=False, default=())

    def __post_init__(self) -> None:
        weakref.finalize(self, _close, self._files)

    def read(self, tensor: TensorInfo, start: int, nbytes: int) -> bytes:
        """Gives `nbytes` bytes of a tensor's data from byte `start` on; safe to call from several threads.

        Raises:
            InputError: the file became shorter or cannot be read.
        """
        path = self.paths[tensor.part]
        try:
            data = os.pread(self._files[tensor.part].fileno(), nbytes, tensor.offset + start)
        except OSError as error:
            raise InputError(f"{path}: tensor {tensor.name!r} cannot be read: {error.strerror}") from error
        if len(data) != nbytes:
            raise InputError(f"{path}: the file ended inside tensor {tensor.name!r}; it changed while it was read")
        return data


def _close(files: tuple[BinaryIO, ...]) -> None:
    for file in files:
        file.close()


def open_gguf_file(path: Path | str) -> GgufFile:
    """Reads the header of a GGUF file, or of every part of a split one, and checks it against the size of the file.

    Args:
        path: the file; for a split model its first part, `...-00001-of-0000N.gguf`, or any other one.

    Raises:
        InputError: the file is not GGUF of version 2 or 3, is damaged, or a part is missing or of another model.
    """
    path = Path(path)
    named = _open_part(path, 0)
    files = [named.file]
    try:
        count = _split_value(path, named, SPLIT_COUNT, default=1)
        paths = [path] if count <= 1 else _part_paths(path, count)
        parts: list[Part] = []
        for number, each in enumerate(paths):
            parts.append(named if each == path and number == 0 else _open_part(_beside(path, each), number))
            files.append(parts[-1].file)
            if count > 1:
                _check_part(each, parts[-1], number, count)
        if parts[0] is not named:
            named.file.close()
        return _joined(paths, parts)
    except BaseException:
        _close(tuple(files))
        raise


def _joined(paths: list[Path], parts: list[Part]) -> GgufFile:
    metadata = parts[0].metadata
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        for tensor in part.tensors:
            if tensor.name in tensors:
                raise InputError(f"{paths[number]}: tensor {shown(tensor.name)} is in an earlier part as well")
            tensors[tensor.name] = tensor
    if len(parts) > 1:
        promised = _split_value(paths[0], parts[0], SPLIT_TENSORS, default=len(tensors))
        if promised != len(tensors):
            raise InputError(f"{paths[0]}: split.tensors.count is {promised}, the parts hold {len(tensors)} tensors")
    metadata = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    sizes = tuple(part.nbytes for part in parts)
    return GgufFile(tuple(paths), sizes, parts[0].version, metadata, tensors, tuple(part.file for part in parts))


def _check_part(path: Path, part: Part, number: int, count: int) -> None:
    found = (_split_value(path, part, SPLIT_NO), _split_value(path, part, SPLIT_COUNT))
    if found != (number, count):
        raise InputError(
            f"{path}: split.no and split.count are {found[0]} and {found[1]}, wanted {number} and {count}; "
            "open the first part, and keep the parts' names"
        )


def _split_value(path: Path, part: Part, key: str, default: int | None = None) -> int:
    kind, value = part.metadata.get(key, ("missing", default))
    if value is None:
        raise InputError(f"{path}: {key} is missing; this is not a part of a split model")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise InputError(f"{path}: {key} is {shown(value)} of type {kind}, a number is wanted")
    return value


def _part_paths(path: Path, count: int) -> list[Path]:
    name = PartName.of(path)
    if count > MAX_PARTS:
        raise InputError(f"{path}: split.count is {count}, at most {MAX_PARTS} parts are read")
    if name is None or name.count != count or not 1 <= name.number <= count:
        raise InputError(
            f"{path}: a part of {count}, and its name does not say which; name the parts ...-00001-of-{count:05d}.gguf"
            " and so on, and open the first"
        )
    paths = [path.with_name(each) for each in name.names()]
    lost = [each.name for each in paths if not os.path.lexists(each)]
    if lost:
        what = f"{lost[0]} is" if len(lost) == 1 else f"{lost[0]} and {len(lost) - 1} more parts are"
        raise InputError(f"{path}: {what} missing beside it; the model has {count} parts, put all into one folder")
    return paths


def _beside(named: Path, path: Path) -> Path:
    """Gives the place of a part; the one that a user named may be a link to anywhere, those it leads to may not."""
    return path if path == named else inside(path.parent, path.name)


def _open_part(path: Path, number: int) -> Part:
    file = open_regular(path)
    try:
        return read_part(path, file, number)
    except BaseException:
        file.close()
        raise

"""Splits a GGUF file into parts as llama.cpp's converter does, and names the parts as llama.cpp looks for them.

Facts: gguf-py/gguf/gguf_writer.py (`add_tensor_info`, `add_shard_kv_data`, `SHARD_NAME_FORMAT`) for where a part ends
and what it says of itself, convert_hf_to_gguf.py (`split_str_to_n_bytes`) for sizes, src/llama.cpp
(`llama_split_prefix`) for names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from quantpress.convert.atomic_files import check_all_replaceable
from quantpress.convert.files import shown
from quantpress.convert.gguf.container import MetadataValue
from quantpress.convert.gguf.file_plan import FilePlan, Slot
from quantpress.quant.errors import UsageError

__all__ = ["MAX_PARTS", "PartName", "SplitOptions", "check_parts", "part_paths", "split_files", "whole_path"]

MAX_PARTS = 1000
"""Of a model that is written or read: each is an open file for as long as the model is open."""

SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SIZE = re.compile(r"(?P<number>[0-9]+)(?P<unit>[kmgKMG]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_MAX_SIZE = 1 << 62  # bytes


@dataclass(frozen=True, slots=True)
class PartName:
    """What the name of a part says: `stem-00002-of-00003.gguf`; `number` counts from 1."""

    stem: str
    number: int
    count: int

    @classmethod
    def of(cls, path: Path) -> PartName | None:
        """Reads the name of a part; None where it is another kind of name."""
        match = _PART_NAME.fullmatch(path.name)
        return None if match is None else cls(match["stem"], int(match["number"]), int(match["count"]))

    def names(self) -> list[str]:
        """Gives the names of all parts of this model."""
        return [f"{self.stem}-{number:05d}-of-{self.count:05d}.gguf" for number in range(1, self.count + 1)]


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """Where a part ends: before the tensor with which it would exceed one of these; 0 for no limit.

    Attributes:
        max_size: bytes of tensors, without header and padding; a single tensor that has more is a part of its own.
        max_tensors: number of tensors.
    """

    max_size: int = 0
    max_tensors: int = 0

    @classmethod
    def of(cls, max_size: str | None, max_tensors: int | None) -> SplitOptions | None:
        """Reads options as a user gives them; None where none limits anything.

        Args:
            max_size: bytes as "300M" or "2G" (decimal, as llama.cpp has them), "500K" or a plain number; "0": no limit.
            max_tensors: number; 0: no limit.

        Raises:
            UsageError: they are not numbers of 0 or more.
        """
        if max_tensors is not None and max_tensors < 0:
            raise UsageError(f"--split-max-tensors {max_tensors}: a number of 0 (no limit) or more is wanted")
        options = cls(0 if max_size is None else _bytes_of(max_size), max_tensors or 0)
        return options if options.max_size or options.max_tensors else None


def _bytes_of(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    size = 0 if match is None or len(text) > 40 else int(match["number"]) * _UNITS[match["unit"].lower()]
    if match is None or len(text) > 40 or size > _MAX_SIZE:
        raise UsageError(f"--split-max-size {shown(text)}: whole bytes, kilo-, mega- or gigabytes, as in 300M or 2G")
    return size


def split_files(plan: FilePlan, options: SplitOptions | None) -> list[FilePlan]:
    """Divides the plan of a file into those of its parts; one that needs no dividing stays as it is.

    The first part has all of the metadata, each has `split.no` (from 0), `split.count` and `split.tensors.count`.

    Raises:
        UsageError: there would be more than `MAX_PARTS`.
    """
    groups = [] if options is None else list(_groups(plan, options))
    if len(groups) <= 1:
        return [plan]
    if len(groups) > MAX_PARTS:
        raise UsageError(f"the limits give {len(groups)} parts, at most {MAX_PARTS} are written; raise them")
    return [
        replace(plan, metadata={**(plan.metadata if number == 0 else {}), **keys}, slots=slots)
        for number, slots in enumerate(groups)
        for keys in (_keys(number, len(groups), len(plan.slots)),)
    ]


def _groups(plan: FilePlan, options: SplitOptions) -> Iterator[list[Slot]]:
    group: list[Slot] = []
    nbytes = 0
    for slot in plan.slots:
        full = options.max_tensors and len(group) >= options.max_tensors
        if group and (full or (options.max_size and nbytes + slot.nbytes > options.max_size)):
            yield group
            group, nbytes = [], 0
        group.append(slot)
        nbytes += slot.nbytes
    yield group


def _keys(number: int, count: int, tensors: int) -> dict[str, MetadataValue]:
    return {SPLIT_NO: ("uint16", number), SPLIT_COUNT: ("uint16", count), SPLIT_TENSORS: ("int32", tensors)}


def whole_path(path: Path) -> Path:
    """Gives the name of an output as a whole: `model.gguf` for itself and for any of its parts."""
    name = PartName.of(path)
    return path if name is None else path.with_name(f"{name.stem}.gguf")


def part_paths(path: Path, count: int) -> list[Path]:
    """Gives the files of an output.

    Args:
        path: the output, `model.gguf`, or its first part.
        count: number of parts; a single one is called `path` itself.

    Raises:
        UsageError: `path` is a part of another number of parts, or not the first one.
    """
    name = PartName.of(path)
    if name is None:
        if count == 1:
            return [path]
        stem = path.name[: -len(".gguf")] if path.name.lower().endswith(".gguf") else path.name
        name = PartName(stem, 1, count)
    elif (name.number, name.count) != (1, count):
        raise UsageError(f"{path}: the name of a part, and not of the first of {count}; name it {name.stem}.gguf")
    return [path.with_name(each) for each in name.names()]


def check_parts(path: Path, count: int, *, force: bool) -> None:
    """Checks that the files of an output may be written, before any work is done for them.

    Args:
        path: the output, or its first part.
        count: number of parts.
        force: replace existing parts.

    Raises:
        UsageError: one exists and `force` is not given; or parts of the same name and another count lie there, which
            are not replaced even then.
    """
    paths = part_paths(path, count)
    check_all_replaceable(whole_path(path), [each.name for each in paths], force=force)
    if count == 1:
        return
    name, folder = PartName.of(paths[0]), Path(os.path.realpath(path.parent))
    for other in sorted(folder.iterdir()) if folder.is_dir() else []:
        found = PartName.of(other)
        if found is not None and name is not None and found.stem == name.stem and found.count != count:
            raise UsageError(
                f"{other}: a part of {found.count} lies where {count} parts are to be written, and is not replaced even"
                " with --force; remove it or choose another output"
            )

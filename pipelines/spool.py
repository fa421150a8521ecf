"""What a long run has finished so far, on the disk: packed tensors step by step, and a journal of the steps.

A step is complete when its line stands in the journal. Each line has the hash of the step's file, so that nothing needs
to be synced: what a power cut or anybody else damaged is noticed and done again. A journal of another run, with other
inputs or options, is thrown away whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantpress.convert.atomic import output_errors
from quantpress.convert.checkpoint import DTYPES, Array, LazyTensor
from quantpress.convert.disk import remove
from quantpress.convert.safetensors_reader import Entry, open_shard
from quantpress.convert.safetensors_writer import encode_header
from quantpress.pipelines.hashing import hash_file
from quantpress.quant.errors import InputError

__all__ = ["Finished", "Spool"]

log = logging.getLogger(__name__)

_JOURNAL = "journal.jsonl"
_TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run has left.

    Attributes:
        key: what the run was.
        steps: finished step -> its record, in the order they were finished.
        tensors: all that was kept, by name; nothing is read.
    """

    key: str
    steps: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, LazyTensor] = field(repr=False)


class Spool:
    """The finished steps of one run."""

    def __init__(self, folder: Path, key: str) -> None:
        """Opens the folder, or makes it anew where it belongs to another run.

        Args:
            folder: a folder that nobody else works in; made if missing.
            key: what the run is: two runs with the same key give the same bytes.

        Raises:
            OutputError: the folder cannot be written.
        """
        self.folder, self._key = folder, key
        self._steps: dict[str, Mapping[str, Any]] = {}
        with output_errors(folder):
            lines = _read_journal(self._journal)
            if not lines or lines[0].get("key") != key:
                if len(lines) > 1:
                    log.warning("%s: another run's %d finished steps are thrown away", folder, len(lines) - 1)
                self.clear()
            else:
                self._load(lines[1:])

    @classmethod
    def finished_steps(cls, folder: Path, key: str) -> frozenset[str]:
        """Gives the steps that a folder's journal has for a run, and changes nothing."""
        lines = _read_journal(folder / _JOURNAL)
        if not lines or lines[0].get("key") != key:
            return frozenset()
        return frozenset(str(line.get("step")) for line in lines[1:])

    @classmethod
    def read_only(cls, folder: Path) -> Finished:
        """Gives what a run has left, and changes nothing; the files' hashes are not looked at.

        Raises:
            InputError: there is no journal, or a file of a step is missing.
        """
        lines = _read_journal(folder / _JOURNAL)
        if not lines:
            raise InputError(f"{folder}: the journal of what was finished is missing or damaged")
        steps = {str(line["step"]): line for line in lines[1:]}
        tensors = _tensors(folder, steps)
        return Finished(str(lines[0].get("key")), {step: line["record"] for step, line in steps.items()}, tensors)

    @property
    def steps(self) -> Mapping[str, Mapping[str, Any]]:
        """Finished step -> its record, in the order they were finished."""
        return {step: line["record"] for step, line in self._steps.items()}

    def add(self, step: str, tensors: Mapping[str, Array], record: Mapping[str, Any]) -> None:
        """Keeps what a step has made.

        Args:
            step: its name.
            tensors: name -> values as they will be stored.
            record: what else is known of it; plain values.

        Raises:
            OutputError: the disk is full.
        """
        with output_errors(self.folder):
            name = f"{len(self._steps):05d}.safetensors"
            line = {"step": step, "file": name, "sha256": _write(self.folder / name, tensors), "record": dict(record)}
            with self._journal.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
        self._steps[step] = line

    def tensors(self) -> dict[str, LazyTensor]:
        """Gives all tensors that were kept, by name; nothing is read."""
        return _tensors(self.folder, self._steps)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Says what a run that ends early leaves, and leaves nothing where nothing was finished."""
        try:
            yield
        except BaseException:
            if self._steps:
                log.warning("%s keeps what is finished; the same command goes on from there", self.folder)
            else:
                self.remove()
            raise

    def clear(self) -> None:
        """Forgets every step."""
        remove(self.folder)
        self._steps.clear()
        with output_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal.write_bytes(json.dumps({"key": self._key}).encode() + b"\n")

    def remove(self) -> None:
        """Removes the folder with all that is in it."""
        remove(self.folder)

    @property
    def _journal(self) -> Path:
        return self.folder / _JOURNAL

    def _load(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if not self._is_whole(line):
                log.warning("%s: step %s is damaged; it and all after it are done again", self.folder, line.get("step"))
                break
            self._steps[line["step"]] = line
        text = b"".join(json.dumps(line).encode() + b"\n" for line in ({"key": self._key}, *self._steps.values()))
        self._journal.with_suffix(".new").write_bytes(text)
        self._journal.with_suffix(".new").replace(self._journal)

    def _is_whole(self, line: Mapping[str, Any]) -> bool:
        if not {"step", "file", "sha256", "record"} <= line.keys():
            return False
        try:
            return bool(hash_file(self.folder / str(line["file"]))[0] == line["sha256"])
        except InputError:
            return False


def _tensors(folder: Path, steps: Mapping[str, Mapping[str, Any]]) -> dict[str, LazyTensor]:
    files = (folder / str(line["file"]) for line in steps.values())
    return {name: tensor for path in files for name, tensor in open_shard(path).tensors.items()}


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """Gives the whole lines; the last one is torn where a run was killed while it wrote it."""
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return []
    lines = [_parsed(line) for line in text.split(b"\n")[:-1]]
    torn = lines.index(None) if None in lines else len(lines)
    return [line for line in lines[:torn] if line is not None]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _write(path: Path, tensors: Mapping[str, Array]) -> str:
    """Writes tensors as a safetensors file and gives its hash."""
    ordered = sorted(tensors.items(), key=lambda pair: -pair[1].dtype.itemsize)  # every value is then aligned
    entries, position = list[Entry](), 0
    for name, values in ordered:
        entries.append(Entry(name, _TYPE_NAMES[values.dtype], values.shape, position, position + values.nbytes))
        position += values.nbytes
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in (encode_header(entries, {}), *(_bytes(values) for _, values in ordered)):
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def _bytes(values: Array) -> bytes | memoryview:
    flat: memoryview = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    return flat

"""What a layer's steps carry on, for every token of a calibration text: in memory up to a budget, on disk past it."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch

from quantpress.convert.atomic import output_errors
from quantpress.quant.errors import InputError

__all__ = ["ActivationStore", "Field", "read_floats", "write_floats"]

_FLOAT = 4  # bytes


def write_floats(descriptor: int, path: Path, values: torch.Tensor, offset: int) -> None:
    """Writes a contiguous float32 tensor at an offset in bytes; may be called from several threads.

    Raises:
        OutputError: disk full, failing device.
    """
    rest = values.numpy().data.cast("B")
    with output_errors(path):
        while rest:
            done = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[done:], offset + done


def read_floats(descriptor: int, path: Path, shape: tuple[int, int], offset: int) -> torch.Tensor:
    """Reads a float32 tensor from an offset in bytes; may be called from several threads.

    Raises:
        InputError: the file ends before, or the disk does not give the bytes.
    """
    # torch's own memory: products may differ in the last bit with the alignment of what they read
    values = torch.empty(shape, dtype=torch.float32)
    rest = values.numpy().data.cast("B")
    try:
        while rest:
            done = os.preadv(descriptor, [rest], offset)
            if done == 0:
                raise InputError(f"{path}: ends at byte {offset}, {len(rest)} more were expected")
            rest, offset = rest[done:], offset + done
    except OSError as error:
        raise InputError(f"{path}: cannot be read at byte {offset}: {error.strerror or error}") from error
    return values


class Field:
    """A float32 matrix with a row per token, whose first rows are in memory and whose other rows are in a file.

    Plain files and no mapped ones: pages of a mapped file count as memory of the process.

    Attributes:
        width: values per row; may be set anew, up to the greatest width, when none of the rows is needed any more.
    """

    def __init__(self, path: Path, tokens: int, width: int, held_bytes: int) -> None:
        """Takes `held_bytes` of memory, and makes the file if that is not enough for the greatest `width`."""
        self.width, self._path = width, path
        self._memory = torch.empty(min(held_bytes // _FLOAT, tokens * width), dtype=torch.float32)
        self._file = -1
        if self._memory.numel() < tokens * width:
            with output_errors(path):
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o600)

    @property
    def held(self) -> int:
        """Rows that are in memory."""
        return self._memory.numel() // self.width

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Gives rows `[start, stop)`, (n, width); a view of the memory where all of them are there."""
        held = self.held
        if stop <= held:
            return self._memory[start * self.width : stop * self.width].view(-1, self.width)
        middle = max(start, held)
        stored = read_floats(self._file, self._path, (stop - middle, self.width), middle * self.width * _FLOAT)
        return stored if middle == start else torch.cat((self.read(start, held), stored))

    def write(self, start: int, values: torch.Tensor) -> None:
        """Takes (n, width) float32 rows from row `start` on; several threads may write different rows."""
        kept = min(max(self.held - start, 0), len(values))
        if kept:
            self._memory[start * self.width : (start + kept) * self.width].view(kept, -1).copy_(values[:kept])
        if kept < len(values):
            rest = values[kept:].contiguous()
            write_floats(self._file, self._path, rest, (start + kept) * self.width * _FLOAT)

    def close(self) -> None:
        """Removes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._path.unlink(missing_ok=True)
            self._file = -1


class ActivationStore:
    """The fields of a calibration, which share one budget."""

    def __init__(self, folder: Path, tokens: int, budget: int | None) -> None:
        """Takes nothing yet.

        Args:
            folder: for the files; must exist.
            tokens: rows of every field.
            budget: bytes of memory for all fields; None for as much as they need.
        """
        self._folder, self._tokens, self._left = folder, tokens, budget
        self._fields: list[Field] = []

    def field(self, name: str, width: int) -> Field:
        """Makes a field; the first ones made are the first to get memory."""
        wanted = self._tokens * width * _FLOAT
        held = wanted if self._left is None else min(wanted, self._left)
        if self._left is not None:
            self._left -= held
        made = Field(self._folder / f"activations-{name}.f32", self._tokens, width, held)
        self._fields.append(made)
        return made

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for field in self._fields:
            field.close()

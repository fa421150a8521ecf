"""The inputs of a layer on disk, so that a calibration that was killed continues where it was.

They are kept and not computed again from the quantized layers before: what a second computation gives may differ in the
last bit, and a resumed run must write the bytes of an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch

from quantpress.convert.atomic import output_errors
from quantpress.convert.calibration.activations import read_floats, write_floats
from quantpress.convert.json_reader import read_json
from quantpress.quant.errors import InputError

__all__ = ["Chain", "ChainWriter", "Head", "load_chain", "remove_chain", "saved_inputs"]

_FLOAT = 4  # bytes
_STEP = 1024  # rows read at a time


def _paths(folder: Path, layer: int) -> tuple[Path, Path]:
    """Gives the names of the values and of the list of their hashes, which is written when all values are."""
    return folder / f"inputs-of-layer-{layer}.f32", folder / f"inputs-of-layer-{layer}.json"


@dataclass(frozen=True, slots=True)
class Head:
    """What the inputs of all layers have in common.

    Attributes:
        tokens: rows, one per token.
        width: values per row.
        windows_sha256: hash of the windows that they come from.
    """

    tokens: int
    width: int
    windows_sha256: str


@dataclass(frozen=True, slots=True)
class Chain:
    """The inputs of a layer, whole and checked.

    Attributes:
        path: file of float32 values, a row per token.
        head: how many and where from.
        layer: the layer that they go into.
    """

    path: Path
    head: Head
    layer: int

    def rows(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Gives first row and values, part by part."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            for start in range(0, self.head.tokens, _STEP):
                shape = (min(_STEP, self.head.tokens - start), self.head.width)
                yield start, read_floats(descriptor, self.path, shape, start * shape[1] * _FLOAT)
        finally:
            os.close(descriptor)


class ChainWriter:
    """Writes the inputs of a layer; several threads may write different rows."""

    def __init__(self, folder: Path, layer: int, head: Head) -> None:
        """Removes an older one of the same layer."""
        remove_chain(folder, layer)
        self._values, self._list = _paths(folder, layer)
        self._head, self._parts = head, list[tuple[int, int, str]]()
        self._file = -1

    def write(self, start: int, values: torch.Tensor) -> None:
        """Takes (n, width) contiguous float32 rows from row `start` on."""
        write_floats(self._file, self._values, values, start * self._head.width * _FLOAT)
        digest = hashlib.sha256(values.numpy().data.cast("B")).hexdigest()
        self._parts.append((start, start + len(values), digest))

    def __enter__(self) -> ChainWriter:
        """Makes the file."""
        with output_errors(self._values):
            self._file = os.open(self._values, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Makes it count, if all went well: only now will `load_chain` find it."""
        os.close(self._file)
        if error is not None:
            return
        content = json.dumps({**asdict(self._head), "parts": sorted(self._parts)})
        temporary = self._list.with_suffix(".tmp")
        with output_errors(self._list):
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(self._list)


def load_chain(folder: Path, layer: int) -> Chain | None:
    """Looks for the inputs of a layer and checks every byte.

    Args:
        folder: the one that was given to `calibrate`.
        layer: the layer to continue with.

    Returns:
        None where they are missing, cut off or damaged: the calibration must start anew.
    """
    values, listed = _paths(folder, layer)
    try:
        found = read_json(listed)
        parts = [(int(start), int(stop), str(digest)) for start, stop, digest in found["parts"]]
        head = Head(int(found["tokens"]), int(found["width"]), str(found["windows_sha256"]))
        chain = Chain(values, head, layer)
        whole = _undamaged(chain, parts)
    except (InputError, OSError, TypeError, ValueError, KeyError, MemoryError, OverflowError):
        return None
    return chain if whole else None


def saved_inputs(folder: Path, layer: int, head: Head) -> Iterator[tuple[int, torch.Tensor]]:
    """Gives the inputs of a layer that an earlier run has left, as `Chain.rows`.

    Raises:
        InputError: they are missing, damaged, or of another text.
    """
    chain = load_chain(folder, layer)
    if chain is None:
        raise InputError(f"{folder}: the inputs of layer {layer} are missing or damaged; start anew")
    if chain.head != head:
        raise InputError(f"{folder}: the inputs of layer {layer} are {chain.head}, wanted {head}; start anew")
    return chain.rows()


def remove_chain(folder: Path, layer: int) -> None:
    """Removes the inputs of a layer; the list of hashes first, so that no half of them counts."""
    values, listed = _paths(folder, layer)
    with output_errors(values):
        listed.unlink(missing_ok=True)
        values.unlink(missing_ok=True)


def _undamaged(chain: Chain, parts: list[tuple[int, int, str]]) -> bool:
    tokens, width = chain.head.tokens, chain.head.width
    if tokens < 1 or width < 1 or chain.path.stat().st_size != tokens * width * _FLOAT:
        return False
    end = 0
    descriptor = os.open(chain.path, os.O_RDONLY)
    try:
        for start, stop, digest in parts:
            if start != end or not start < stop <= tokens:
                return False
            values = read_floats(descriptor, chain.path, (stop - start, width), start * width * _FLOAT)
            if hashlib.sha256(values.numpy().data.cast("B")).hexdigest() != digest:
                return False
            end = stop
    finally:
        os.close(descriptor)
    return end == tokens

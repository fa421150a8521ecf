"""The file that holds a model's last hidden states on the windows of a judge, read one window at a time.

They are what the head makes logits of: exact, and smaller than the logits as the hidden size is than the vocabulary
(docs/pipelines.md has the figures of other forms). A safetensors file: `windows` (C, T) int32 token ids, `hidden`
(C, T - first, H) float32, and in its metadata what it was made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.atomic import new_file, output_errors
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.json_reader import parse_json
from quantpress.convert.safetensors_reader import Entry, open_shard
from quantpress.convert.safetensors_writer import encode_header
from quantpress.quant.errors import InputError

__all__ = ["KeptStates", "open_states", "write_states"]

_LABEL = "quantpress"  # of the metadata


@dataclass(frozen=True)
class KeptStates:
    """An open file of states.

    Attributes:
        path: the file.
        about: what it was made of; plain values.
        windows: the token ids, (T,) int32 each.
        hidden: (C, T - first, H) float32.
    """

    path: Path
    about: Mapping[str, Any]
    windows: tuple[NDArray[np.int32], ...]
    hidden: LazyTensor

    @property
    def first(self) -> int:
        """Position of the first state of each window."""
        return len(self.windows[0]) - self.hidden.shape[1]

    @cached_property
    def _places(self) -> Mapping[bytes, int]:
        return {window.tobytes(): number for number, window in enumerate(self.windows)}

    def has(self, window: NDArray[np.int32], first: int) -> bool:
        """Says whether the states of a window from a position on are kept."""
        return first == self.first and window.tobytes() in self._places

    def read(self, window: NDArray[np.int32]) -> NDArray[np.float32]:
        """Gives the states of a window that is kept, (T - first, H) float32.

        Raises:
            InputError: the file was changed or cut short since it was opened.
        """
        place = self._places[window.tobytes()]
        rows: NDArray[np.float32] = self.hidden.read_rows(place, place + 1)[0]
        return rows


def write_states(
    path: Path,
    windows: Sequence[NDArray[np.int32]],
    states: Iterable[NDArray[np.float32]],
    *,
    shape: tuple[int, int],
    about: Mapping[str, Any],
) -> None:
    """Writes the file; a half one never has its name.

    Args:
        path: the file; replaced if it is there.
        windows: windows of equal length, (T,) int32 each.
        states: of each window its states, in this order.
        shape: (T - first, H), of each of them.
        about: what it is made of; plain values.

    Raises:
        OutputError: the disk is full or may not be written.
    """
    tokens = np.stack(windows)
    middle, end = tokens.nbytes, tokens.nbytes + len(windows) * shape[0] * shape[1] * 4
    entries = [
        Entry("windows", "I32", tokens.shape, 0, middle),
        Entry("hidden", "F32", (len(windows), *shape), middle, end),
    ]
    header = encode_header(entries, {_LABEL: json.dumps(about, sort_keys=True)})
    temporary = path.with_name(path.name + ".part")
    with output_errors(path):
        temporary.unlink(missing_ok=True)
    with new_file(temporary, path) as file:
        file.write(header)
        file.write(tokens.tobytes())
        for values in states:
            if values.shape != shape or values.dtype != np.float32:
                raise ValueError(f"states of shape {values.shape} {values.dtype}, wanted {shape} float32")
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    with output_errors(path):
        temporary.replace(path)


def open_states(path: Path) -> KeptStates:
    """Opens a file of states; reads the windows only.

    Raises:
        InputError: there is none, or it is damaged.
    """
    shard = open_shard(path)
    about = parse_json(shard.metadata.get(_LABEL, "{}").encode(), name=str(path))
    forms = {name: (tensor.dtype, len(tensor.shape)) for name, tensor in shard.tensors.items()}
    if forms != {"windows": ("I32", 2), "hidden": ("F32", 3)} or not isinstance(about, dict) or not about:
        raise InputError(f"{path}: not a file of kept states; remove it, and it is made again")
    windows, hidden = shard.tensors["windows"], shard.tensors["hidden"]
    (count, length), (rows, states, _) = windows.shape, hidden.shape
    if not 0 < count == rows or not 0 < states <= length:
        raise InputError(
            f"{path}: states of shape {hidden.shape} for windows of shape {windows.shape}; remove the file"
        )
    return KeptStates(path, about, tuple(windows.read()), hidden)

"""The importance matrix: what an error in each column of a weight costs, as llama.cpp measures and stores it.

Source: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp. For a weight with input x the importance
of column k is the mean of x_k^2 over the tokens that were seen.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Array
from quantpress.convert.files import shown
from quantpress.convert.gguf.container import MetadataValue
from quantpress.quant.errors import InputError

__all__ = ["Importance", "ImportanceMatrix"]

_EMBEDDING = "token_embd.weight"
_NAME_BYTES = 127  # that llama-quantize keeps of a name in the metadata of its output


@dataclass(frozen=True, eq=False, slots=True)
class Importance:
    """What was seen of the inputs of one weight.

    Attributes:
        sums: (E, K) float32 sums of squares, a row per expert; E is 1 for a matrix. Files of the older form, and those
            of weights that are one matrix per head, hold (1, E * K).
        counts: (E,) float32 tokens that each saw; 0: nothing is known of that expert. One count may stand for all.
    """

    sums: Array
    counts: Array

    @property
    def unseen(self) -> int:
        """Experts that no token reached."""
        return int(np.count_nonzero(self.counts <= 0))


@dataclass(frozen=True, eq=False, slots=True)
class ImportanceMatrix:
    """All that a file holds.

    Attributes:
        entries: name of a tensor in GGUF -> what was seen.
        datasets: names of the texts.
        chunk_count: windows.
        chunk_size: tokens of a window.
        name: of the file, as GGUF's metadata names it.
    """

    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    name: str = ""

    @classmethod
    def measured(
        cls,
        sums: Mapping[str, NDArray[np.float64]],
        counts: Mapping[str, NDArray[np.int64]],
        *,
        tokens: int,
        length: int,
        dataset: str,
        name: str = "",
    ) -> ImportanceMatrix:
        """Makes it of sums that were measured in one run, see `calibration.powers`.

        Args:
            sums: name of a weight in GGUF -> (E, K) float64 sums of squares of its inputs.
            counts: the same names -> (E,) tokens that each of them saw.
            tokens: of the text.
            length: tokens of a window.
            dataset: name of the text.
            name: of the file.

        Raises:
            InputError: a sum is beyond float32.
        """
        entries = {}
        for weight, total in sums.items():
            if not total.max(initial=0) < np.finfo(np.float32).max:  # NaN too
                raise InputError(
                    f"{shown(weight)}: the squares of its inputs sum up to {total.max():g}, beyond float32"
                )
            entries[weight] = Importance(total.astype(np.float32), counts[weight].astype(np.float32))
        return cls(entries, (dataset,), tokens // length, length, name)

    def of(self, name: str, shape: Sequence[int]) -> NDArray[np.float32] | None:
        """Gives what an error of a column of a tensor costs, as llama-quantize computes it (float32).

        Args:
            name: of the tensor in GGUF.
            shape: in the file, outermost dimension first: (N, K) or (E, N, K).

        Returns:
            (E, K) float32, all 1 for experts that saw nothing; None where the matrix has no such tensor, and for an
            embedding of another width, which llama-quantize encodes without it too.

        Raises:
            InputError: the entry is of another size.
        """
        found = self.entries.get(name)
        if found is None or len(shape) < 2:
            return None
        experts, columns = math.prod(shape[:-2]), shape[-1]
        sums, counts = found.sums.reshape(-1), found.counts.reshape(-1)
        if sums.size != experts * columns or counts.size not in (1, experts):
            if name == _EMBEDDING:
                return None
            raise InputError(
                f"{self.name or 'importance matrix'}: the entry of {name} has {sums.size} values and {counts.size} "
                f"counts, the tensor has {experts} x {columns} columns; it was measured on another model"
            )
        seen = np.broadcast_to(counts.astype(np.float32), (experts,))[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            means = sums.reshape(experts, columns).astype(np.float32, copy=False) / seen
        return np.where(seen > 0, means, np.float32(1))

    def digest(self) -> str:
        """Gives the SHA-256 of all names and numbers, in hexadecimal."""
        found = hashlib.sha256()
        for name, entry in self.entries.items():
            found.update(f"{name} {entry.sums.shape} {entry.counts.shape};".encode())
            found.update(np.ascontiguousarray(entry.sums, np.float32).tobytes())
            found.update(np.ascontiguousarray(entry.counts, np.float32).tobytes())
        return found.hexdigest()

    def check_fits(self, names: Iterable[str], where: str) -> None:
        """Refuses a matrix that has nothing to say about a model, which llama-quantize passes over in silence.

        Args:
            names: of the model's tensors in GGUF.
            where: name of the model, for the message.

        Raises:
            InputError: none of them has an entry.
        """
        if not any(name in self.entries for name in names):
            first = shown(next(iter(self.entries), ""))
            raise InputError(
                f"{self.name or 'importance matrix'}: none of its {len(self.entries)} entries, such as {first}, is a "
                f"tensor of {where}; it was measured on another model"
            )

    def notes(self) -> tuple[str, ...]:
        """Says of which experts nothing is known: their columns count alike."""
        lines = []
        for name, entry in self.entries.items():
            if entry.unseen:
                lines.append(f"{name}: {entry.unseen} of {entry.counts.size} experts saw no token of the text")
        return tuple(lines)

    def metadata(self) -> dict[str, MetadataValue]:
        """Gives the pairs that llama-quantize adds to a file that was made with a matrix."""
        pairs: dict[str, MetadataValue] = {"quantize.imatrix.file": ("string", _cut(self.name))}
        if self.datasets:
            pairs["quantize.imatrix.dataset"] = ("string", _cut(self.datasets[0]))
        pairs["quantize.imatrix.entries_count"] = ("uint32", len(self.entries))
        if self.chunk_count > 0:
            pairs["quantize.imatrix.chunks_count"] = ("uint32", self.chunk_count)
        return pairs


def _cut(text: str) -> str:
    """Shortens a name as llama-quantize does, without half a character at the end."""
    raw = text.encode("utf-8", "replace")[:_NAME_BYTES]
    return raw.decode("utf-8", "ignore")

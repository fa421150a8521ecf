"""The importance matrix: what an error in each column of a weight costs, as llama.cpp measures and stores it.

Source: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp. For a weight with input x the importance
of column k is the mean of x_k^2 over the tokens that were seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantpress.convert.checkpoint import Array

__all__ = ["Importance", "ImportanceMatrix"]


@dataclass(frozen=True, eq=False, slots=True)
class Importance:
    """What was seen of the inputs of one weight.

    Attributes:
        sums: (E, K) float32 sums of squares, a row per expert; E is 1 for a matrix.
        counts: (E,) float32 tokens that each saw; 0: nothing is known of that expert.
    """

    sums: Array
    counts: Array


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

    def of(self, name: str, shape: Sequence[int]) -> Array | None:
        """Gives what an error of a column of a tensor costs.

        Args:
            name: of the tensor in GGUF.
            shape: in the file, outermost dimension first: (N, K) or (E, N, K).

        Returns:
            (E, K) float32, all 1 for experts that saw nothing; None where the matrix has no such tensor.

        Raises:
            InputError: the entry is of another size.
        """
        raise NotImplementedError

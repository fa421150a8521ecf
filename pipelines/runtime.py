"""What a judge needs from anything that runs a model: a vocabulary size and logits for a window of tokens."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Runtime"]


class Runtime(Protocol):
    """A loaded model that scores token windows; closed after use, best as a context manager.

    An implementation shares no packing or naming code with the exporter whose file it judges.
    """

    @property
    def name(self) -> str:
        """What ran the model, as reports print it: ``torch``, ``llama.cpp`` or ``onnxruntime``."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of logits per position (rows of the output matrix, padding included)."""
        ...

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Score one window from an empty state.

        Args:
            tokens: (n,) int32 token ids; the first one stands at position 0.
            first: first position whose logits are wanted, 0 <= first < n.

        Returns:
            (n - first, vocab_size) float32; row r predicts the token after position first + r.

        Raises:
            QuantpressError: the runtime failed; nothing can be said about the model.
        """
        ...

    def close(self) -> None:
        """Release the model; calling it twice is harmless."""
        ...

    def __enter__(self) -> Runtime:
        """Return the runtime itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the runtime."""
        ...

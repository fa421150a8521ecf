"""Rows of a weight that is quantized already, as blocks of ggml with the same codes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantpress.convert.checkpoint import Array
from quantpress.convert.gguf.rows import RowOrder
from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml.from_codes import FROM_CODES, blocks_of, holds
from quantpress.quant.ggml.types import ggml_type
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor

if TYPE_CHECKING:
    from quantpress.convert.quantized import LazyQuantized

__all__ = ["CodeRows", "codes_note"]


@dataclass
class CodeRows:
    """A quantized weight with its rows in GGUF's order; its codes are read once and let go with this object.

    Attributes:
        lazy: the weight, (N, K).
        order: how the rows are reordered.
        type: name of the type of the file.
    """

    lazy: LazyQuantized
    order: RowOrder
    type: str
    _whole: QuantizedTensor | None = field(default=None, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def blocks(self, start: int, stop: int) -> Array | None:
        """Gives rows `[start, stop)` of the file, (n, row bytes) uint8; None if the type cannot hold them exactly."""
        with self._lock:
            if self._whole is None:
                self._whole = self.lazy.read()
        try:
            return blocks_of(self._rows(self._whole, start, stop), self.type)
        except LayoutError:
            return None

    def _rows(self, whole: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
        def take(values: Array) -> Array:
            return self.order.read(lambda first, last: values[first:last], start, stop)

        zero = None if whole.zero is None else take(whole.zero)
        return QuantizedTensor(take(whole.codes), take(whole.scale), zero, whole.bits, whole.group_size, whole.g_idx)


def codes_note(form: QuantizedForm, kind: str) -> str:
    """Says that a block type cannot hold all codes of a form, and which can; empty where it can or is no block type."""
    if ggml_type(kind).block_size == 1 or holds(kind, form):
        return ""
    able = [name for name in FROM_CODES if holds(name, form)]
    advice = f"; {' or '.join(able)} would keep them" if able else ""
    return f"codes of {form} need not fit {kind} and are rounded again where they do not{advice}"

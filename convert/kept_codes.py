"""Codes kept on the disk for a while, between the run of a calibrated method and the file that they are written into.

No other program reads this: it holds every form that is made here, rows of Conv1D weights among them, and scales in any
type, so that what comes out is what went in, bit for bit. Codes of up to 4 bits lie two to a byte, the first in the low
bits; a row begins at a byte, so that rows may be read by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.quantized import LazyQuantized, PackedTensor, PackFormat
from quantpress.quant.errors import LayoutError
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor, group_count

__all__ = ["FORMAT", "KeptCodes", "kept"]


class KeptCodes:
    """The format; see `PackFormat`."""

    name = "codes"

    def check(self, form: QuantizedForm) -> None:
        """Refuses columns in an order of their own, which nothing that is made here has.

        Raises:
            LayoutError: such columns.
        """
        if form.ordered:
            raise LayoutError("codes are kept in the order of their groups")

    def planned(self, name: str, form: QuantizedForm) -> tuple[PackedTensor, ...]:
        """Gives the tensors that will be kept for a weight."""
        (rows, columns), groups = form.shape, group_count(form.shape[1], form.group_size)
        codes = PackedTensor(f"{name}.codes", (rows, -(-columns * _code_bits(form.bits) // 8)), "U8")
        scale = PackedTensor(f"{name}.scale", (rows, groups), form.scale_type)
        zero = PackedTensor(f"{name}.zero", (rows, groups), "U8")
        return (codes, scale) if form.symmetric else (codes, scale, zero)

    def pack(self, name: str, tensor: QuantizedTensor, form: QuantizedForm) -> dict[str, Array]:
        """Gives these tensors; nothing is rounded.

        Raises:
            LayoutError: what `check` refuses.
        """
        self.check(tensor.form)
        codes = tensor.codes
        if _code_bits(form.bits) == 4:
            codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
            codes = codes[:, ::2] | codes[:, 1::2] << np.uint8(4)
        parts = {f"{name}.codes": codes, f"{name}.scale": tensor.scale}
        if tensor.zero is not None:
            parts[f"{name}.zero"] = tensor.zero
        return parts

    def settings(
        self, forms: Mapping[str, QuantizedForm], left: Sequence[str], details: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Gives nothing: no configuration speaks of what is not read by others."""
        del forms, left, details
        return {}

    def files(self, settings: Mapping[str, Any]) -> dict[str, bytes]:
        """Gives nothing."""
        del settings
        return {}


FORMAT: PackFormat = KeptCodes()


def kept(name: str, form: QuantizedForm, parts: Mapping[str, LazyTensor]) -> LazyQuantized:
    """Gives a weight that was kept.

    Args:
        name: of the weight.
        form: what it was planned as.
        parts: all that is kept, by name; read when the codes are asked for.
    """
    codes, scale = parts[f"{name}.codes"], parts[f"{name}.scale"]
    zero = None if form.symmetric else parts[f"{name}.zero"]

    def read() -> QuantizedTensor:
        values = codes.read()
        if _code_bits(form.bits) == 4:
            values = np.stack((values & np.uint8(15), values >> np.uint8(4)), -1).reshape(len(values), -1)
            values = np.ascontiguousarray(values[:, : form.shape[1]])
        return QuantizedTensor(values, scale.read(), None if zero is None else zero.read(), form.bits, form.group_size)

    return LazyQuantized(name, form, codes.source, read)


def _code_bits(bits: int) -> int:
    return 4 if bits <= 4 else 8

"""A checkpoint's tensors as rows of the decoder's own form, without torch, read as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.gguf.rows import RowOrder, row_order
from quantpress.convert.onnx.linear import LinearWeight
from quantpress.convert.preflight import Binding, Preflight
from quantpress.convert.quantized import LazyQuantized
from quantpress.convert.recent import Recent
from quantpress.quant.errors import InputError
from quantpress.quant.floats import count_nonfinite, to_float32
from quantpress.quant.qtensor import QuantizedTensor

__all__ = ["WeightRows"]

_CHUNK_VALUES = 1 << 20  # values that one task reads and encodes: 2 MB of bf16, and a few MB beside it
_WHOLE = 2  # tensors that are read whole and kept: one that is being written, and the next one


@dataclass
class WeightRows:
    """Finds the tensors of a checkpoint by slot and layer.

    Attributes:
        source: where from.
        checked: its table bound to its tensors.
        allow_nonfinite: NaN and infinities are not refused.
        asked: slots and layers that were asked for.
    """

    source: Checkpoint
    checked: Preflight
    allow_nonfinite: bool = False
    asked: set[tuple[str, int]] = field(default_factory=set, repr=False)
    _bound: dict[tuple[str, int], Binding] = field(init=False, repr=False)
    _codes: Mapping[str, LazyQuantized] = field(init=False, repr=False)
    _whole: Recent[Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Sorts the table by slot and layer."""
        self._bound = {(row.slot, layer): (row, layer, tensor) for row, layer, tensor in self.checked.bindings}
        self._codes = self.checked.codes(self.source)
        self._whole = Recent(_WHOLE)

    def has(self, slot: str, layer: int = -1) -> bool:
        """Whether the model has such a tensor; a head that is tied is none."""
        return (slot, layer) in self._bound

    def vector(self, slot: str, layer: int = -1) -> tuple[LazyTensor, Callable[[], Array]]:
        """Gives a norm's weight or a bias, and what reads it as the decoder has it: (N,), float32 with an offset."""
        self.asked.add((slot, layer))
        row, _, tensor = self._bound[slot, layer]
        read = self._checking(tensor, self._reader(row, tensor), lambda: [(0, tensor.rows)])
        return tensor, partial(read, 0, tensor.rows)

    def matrix(self, slot: str, layer: int = -1, *, role_slot: str = "", name: str = "") -> LinearWeight:
        """Gives a weight of two dimensions.

        Args:
            slot: in the table.
            layer: its layer, -1 outside layers.
            role_slot: slot that it is used as, where another: "output.weight" of a head that is tied.
            name: what its initializers are called after; the checkpoint's name by default.
        """
        self.asked.add((slot, layer))
        row, _, tensor = self._bound[slot, layer]
        turned = row.layout is Layout.TRANSPOSED
        rows, columns = tensor.shape[::-1] if turned else tensor.shape
        order = _order(self.checked.spec, row, self.checked.hyper)
        ranges = partial(_row_ranges, rows, columns, order.block)
        codes = None if row.offset else self._codes.get(tensor.name)
        return LinearWeight(
            slot=role_slot or slot,
            layer=layer,
            name=name or tensor.name,
            shape=(rows, columns),
            dtype=tensor.dtype,
            source=tensor.source,
            read_rows=self._checking(tensor, self._reader(row, tensor), ranges),
            row_ranges=ranges,
            held=tensor.nbytes if turned else 0 if codes is None else rows * columns,
            codes=codes if codes is None or not order.moves else _reordered(codes, order),
            router=row.role is Role.ROUTER,
        )

    def _reader(self, row: TensorSpec, tensor: LazyTensor) -> Callable[[int, int], Array]:
        order = _order(self.checked.spec, row, self.checked.hyper)
        turned = row.layout is Layout.TRANSPOSED and len(tensor.shape) == 2
        read = partial(self._columns, tensor) if turned else tensor.exact_rows

        def rows(start: int, stop: int) -> Array:
            values = np.ascontiguousarray(order.read(read, start, stop))
            return to_float32(values) + np.float32(row.offset) if row.offset else values

        return rows

    def _columns(self, tensor: LazyTensor, start: int, stop: int) -> Array:
        """Gives columns of a tensor, which has to be read whole, as rows."""
        whole = self._whole.get(tensor.name, lambda: tensor.exact_rows(0, tensor.rows))
        images = whole.view(f"u{whole.itemsize}")  # numpy copies types that are not its own value by value
        return np.ascontiguousarray(images[:, start:stop].T).view(whole.dtype)

    def _checking(
        self, tensor: LazyTensor, read: Callable[[int, int], Array], ranges: Callable[[], list[tuple[int, int]]]
    ) -> Callable[[int, int], Array]:
        if self.allow_nonfinite:
            return read

        def checked(start: int, stop: int) -> Array:
            rows = read(start, stop)
            if count_nonfinite(rows):
                bad = sum(count_nonfinite(read(*part)) for part in ranges())
                raise InputError(
                    f"{tensor.source}: tensor {shown(tensor.name)}: {bad} of {tensor.size} values are NaN or infinite;"
                    " the checkpoint is damaged (--allow-nonfinite writes them anyway)"
                )
            return rows

        return checked


def _order(spec: ArchSpec, row: TensorSpec, hyper: Hyperparameters) -> RowOrder:
    """Gives the order of rows; that of llama.cpp where rows are not interleaved for its NORM rope."""
    return row_order(spec, replace(row, rotary=""), hyper)


def _row_ranges(rows: int, columns: int, block: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK_VALUES // max(1, columns) // block) * block
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _reordered(codes: LazyQuantized, order: RowOrder) -> LazyQuantized:
    def take(values: Array) -> Array:
        return order.read(lambda start, stop: values[start:stop], 0, len(values))

    def read() -> QuantizedTensor:
        whole = codes.read()
        zero = None if whole.zero is None else take(whole.zero)
        return replace(whole, codes=take(whole.codes), scale=take(whole.scale), zero=zero)

    return replace(codes, read=read)

"""The tensors that make up one quantized weight: checked by their headers, read when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.compressed_tensors.scheme import Scheme
from quantpress.convert.compressed_tensors.words import DENSE, layout_in, layout_of, unpack, words_of
from quantpress.convert.files import shown
from quantpress.convert.quantized import Streams
from quantpress.quant.errors import InputError
from quantpress.quant.floats import count_nonfinite
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor, group_count

__all__ = ["Parts", "open_weight"]

_SCALES = ("F16", "BF16", "F32")
_PER_WORD = 4  # bytes


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of a weight, whose shapes fit `form`.

    Attributes:
        form: what the weight is.
        weight: codes, in words (N, words) or as bytes (N, K).
        scale: one value, (N,) or (N, G).
        zero: words (words, G), or bytes of the shape of `scale`; None for symmetric codes.
        g_idx: (K,) group of each column, where they are not in the order of their groups.
        layout: how codes lie in words, for `unpack`.
    """

    form: QuantizedForm
    weight: LazyTensor
    scale: LazyTensor
    zero: LazyTensor | None
    g_idx: NDArray[np.int32] | None
    layout: str | None

    def read(self) -> QuantizedTensor:
        """Gives the weight.

        Raises:
            InputError: scales that are not finite, or codes beyond their bits.
        """
        form = self.form
        stored = self.weight.read()
        zeros = None if self.zero is None else self.zero.read()
        if self.weight.dtype == "I32":
            in_words = [stored] if zeros is None or zeros.dtype != np.int32 else [stored, zeros]
            layout = self.layout or layout_in(*in_words)
            codes = unpack(stored, form.bits, form.shape[1], layout)
        else:
            layout, codes = DENSE, _from_bytes(self.weight, stored, form.bits)
        zero = None if self.zero is None or zeros is None else self._zeros(self.zero, zeros, layout)
        return QuantizedTensor(codes, self._scale(), zero, form.bits, form.group_size, self.g_idx)

    @property
    def streamed(self) -> bool:
        """Whether the codes of a row are one stream of bits, columns in the order of their groups."""
        if self.g_idx is not None:
            return False
        if self.weight.dtype == "I32":
            return self.layout == DENSE
        return self.form.bits == 8 and self.form.shape[1] % _PER_WORD == 0

    def streams(self) -> Streams:
        """Gives the weight without unpacking its codes, where it is `streamed`.

        Raises:
            InputError: scales that are not finite, or zeros beyond their bits.
        """
        stored = self.weight.read()
        if self.weight.dtype != "I32":
            stored = _from_bytes(self.weight, stored, self.form.bits).view(np.int32)
        zero = None if self.zero is None else self._zeros(self.zero, self.zero.read(), DENSE)
        return Streams(
            np.ascontiguousarray(stored.T), np.ascontiguousarray(self._scale().T),
            None if zero is None else np.ascontiguousarray(zero.T),
        )  # fmt: skip

    def _scale(self) -> Array:
        scale = self.scale.read()
        if count := count_nonfinite(scale):
            raise InputError(
                f"{self.scale.source}: tensor {shown(self.scale.name, 200)} has {count} NaN or infinite values"
            )
        return self._spread(scale)

    def _zeros(self, tensor: LazyTensor, stored: Array, layout: str) -> Array:
        if stored.dtype != np.int32:
            return self._spread(_from_bytes(tensor, stored, self.form.bits))
        words = np.ascontiguousarray(stored.T)
        return np.ascontiguousarray(unpack(words, self.form.bits, self.form.shape[0], layout).T)

    def _spread(self, values: Array) -> Array:
        """Gives (N, G) of one value for all, one for each row, or of what is that already."""
        rows = self.form.shape[0]
        shaped = values.reshape(1, 1) if values.size == 1 else values.reshape(rows, -1)
        groups = group_count(self.form.shape[1], self.form.group_size)
        return np.ascontiguousarray(np.broadcast_to(shaped, (rows, groups)))


def open_weight(model: str, tensors: dict[str, LazyTensor], module: str, scheme: Scheme) -> Parts:
    """Takes the tensors of a weight out of `tensors` and checks that they fit each other and the config.

    Args:
        model: for messages.
        tensors: what no weight has taken yet.
        module: path of the layer; `weight_packed`, or `weight` with its scale, is there.
        scheme: what the config says about it.

    Raises:
        InputError: a part that is missing, of another type or shape, or that no such weight has.
    """
    name, packed = f"{module}.weight", f"{module}.weight_packed" in tensors
    if packed and name in tensors:
        raise InputError(f"{tensors[name].source}: tensor {shown(name, 200)} is there, and packed as well")
    weight = tensors.pop(f"{name}_packed" if packed else name)
    if len(weight.shape) != 2 or 0 in weight.shape or weight.dtype != ("I32" if packed else "I8"):
        raise _wrong(weight, f"{'I32' if packed else 'I8'} with two dimensions")
    shape_tensor = tensors.pop(f"{name}_shape", None)
    rows, columns = weight.shape
    if packed:
        columns = _columns(weight, _needed(model, shape_tensor, f"{name}_shape"))
    scale = _needed(model, tensors.pop(f"{name}_scale", None), f"{name}_scale")
    group = min(scheme.group_size or columns, columns)
    shapes = _shapes(scheme, rows, group_count(columns, group))
    if scale.dtype not in _SCALES or scale.shape not in shapes:
        raise _wrong(scale, f"F16, BF16 or F32 of shape {' or '.join(map(str, shapes))} ({scheme.group})")
    g_idx = _g_idx(tensors.pop(f"{name}_g_idx", None), scheme, columns, group)
    form = QuantizedForm(
        (rows, columns), scheme.bits, group, scheme.symmetric, scale.dtype, g_idx is not None, scheme.input_bits
    )
    layout = _layout(weight, weight.shape[1], columns, form) if packed else None
    zero = _open_zero(model, tensors.pop(f"{name}_zero_point", None), name, form, shapes)
    if zero is not None and zero.dtype == "I32":
        other = _layout(zero, zero.shape[0], rows, form)
        if None not in (layout, other) and layout != other:
            raise _wrong(zero, f"codes in words as {shown(weight.name, 200)} has them")
        layout = layout or other
    return Parts(form, weight, scale, zero, g_idx, layout)


def _needed(model: str, tensor: LazyTensor | None, name: str) -> LazyTensor:
    if tensor is None:
        raise InputError(f"{model}: tensor {shown(name, 200)} is missing beside the other parts of a quantized weight")
    return tensor


def _wrong(tensor: LazyTensor, wanted: str) -> InputError:
    return InputError(
        f"{tensor.source}: tensor {shown(tensor.name, 200)} is {tensor.dtype} of shape {tensor.shape}, wanted {wanted}"
    )


def _columns(weight: LazyTensor, shape: LazyTensor) -> int:
    if shape.dtype not in ("I64", "I32") or shape.shape != (2,):
        raise _wrong(shape, "two integers, I64 of shape (2,)")
    rows, columns = (int(value) for value in shape.read())
    if rows != weight.shape[0] or columns < 1:
        raise InputError(
            f"{shape.source}: tensor {shown(shape.name, 200)} says {rows} x {columns}, but {shown(weight.name, 200)}"
            f" has {weight.shape[0]} rows"
        )
    return columns


def _shapes(scheme: Scheme, rows: int, groups: int) -> tuple[tuple[int, ...], ...]:
    if scheme.strategy == "tensor":
        return (), (1,), (1, 1)
    return ((rows, groups),) if scheme.strategy == "group" else ((rows, 1), (rows,))


def _layout(tensor: LazyTensor, words: int, count: int, form: QuantizedForm) -> str | None:
    try:
        return layout_of(words, count, form.bits)
    except ValueError:
        raise _wrong(tensor, f"{words_of(count, form.bits)} words for {count} codes of {form.bits} bits") from None


def _open_zero(
    model: str, zero: LazyTensor | None, name: str, form: QuantizedForm, shapes: tuple[tuple[int, ...], ...]
) -> LazyTensor | None:
    """Checks the zero point: words along N, or bytes; symmetric weights may have one that says 0 everywhere."""
    if form.symmetric:
        if zero is not None and (zero.dtype != "I8" or zero.shape not in shapes or zero.read().any()):
            raise _wrong(zero, "none, for the config says that these weights are symmetric")
        return None
    zero = _needed(model, zero, f"{name}_zero_point")
    groups = group_count(form.shape[1], form.group_size)
    if zero.dtype == "I8" and zero.shape in shapes:
        return zero
    if zero.dtype != "I32" or len(zero.shape) != 2 or zero.shape[1] != groups:
        raise _wrong(zero, f"I32 of shape {(words_of(form.shape[0], form.bits), groups)}")
    return zero


def _g_idx(tensor: LazyTensor | None, scheme: Scheme, columns: int, group: int) -> NDArray[np.int32] | None:
    """Gives the groups of the columns, None where they are in order; -1 everywhere means that nothing was written."""
    if tensor is None:
        return None
    if tensor.dtype not in ("I32", "I64") or tensor.shape != (columns,) or not scheme.ordered:
        wanted = f"I32 of shape {(columns,)}" if scheme.ordered else "none, for the config has no actorder"
        raise _wrong(tensor, wanted)
    values = tensor.read()
    if (values == -1).all() or np.array_equal(values, np.arange(columns) // group):
        return None
    least, greatest, groups = int(values.min()), int(values.max()), group_count(columns, group)
    if not 0 <= least <= greatest < groups:
        raise InputError(
            f"{tensor.source}: tensor {shown(tensor.name, 200)} goes from {least} to {greatest}, there are {groups}"
            " groups"
        )
    return np.ascontiguousarray(values, np.int32)


def _from_bytes(tensor: LazyTensor, values: Array, bits: int) -> NDArray[np.uint8]:
    """Gives unsigned codes of signed bytes."""
    half = 1 << (bits - 1)
    if bits < 8 and values.size and not -half <= int(values.min()) <= int(values.max()) < half:
        raise InputError(
            f"{tensor.source}: tensor {shown(tensor.name, 200)} goes from {values.min()} to {values.max()}, wanted"
            f" {bits} bits, {-half} to {half - 1}"
        )
    codes: NDArray[np.uint8] = values.view(np.uint8) + np.uint8(half)
    return codes

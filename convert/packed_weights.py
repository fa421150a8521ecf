"""Linears of a quantized checkpoint that stay in codes while a model runs, by the decoder's slots."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from quantpress.convert.arch.fused_rows import FUSED
from quantpress.convert.arch.spec import Hyperparameters, Role, TensorSpec
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.model import Decoder
from quantpress.convert.preflight import Preflight, check_tied_head, preflight
from quantpress.convert.quantized import LazyQuantized
from quantpress.convert.weights import CheckpointWeights, as_torch, canonical
from quantpress.kernels.int8 import linear as _operators  # noqa: F401 - registers torch.ops.quantpress.w8a8_linear
from quantpress.kernels.int8.plain import LONGEST
from quantpress.kernels.linear import linear
from quantpress.kernels.packed import PackedWeight, reference_dequantize
from quantpress.kernels.tuning.tables import TuningError
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.packed import packed_streams, packed_weight
from quantpress.quant.qtensor import QuantizedForm, group_count

__all__ = ["Int8Linear", "PackedLinear", "PackedWeights", "form_bytes", "packed_decoder"]

_SCALE_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_ROLES = (Role.LINEAR, Role.HEAD)  # an embedding is looked up row by row, which the packed form does not give


@dataclass(frozen=True, eq=False, slots=True)
class PackedLinear:
    """A linear on a packed weight; a `layer.Linear`.

    Attributes:
        weight: (N, K), outputs in the decoder's order.
        deterministic: the same bits each time; see `quantpress.kernels.linear.linear`.
    """

    weight: PackedWeight
    deterministic: bool = True

    def run(self, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Gives (..., N) in the type of `values` (..., K); the bias (N,) is taken in that type.

        Raises:
            InputError: the user's file of launch parameters for this GPU is damaged.
        """
        wanted = bias if bias is None else bias.to(values.dtype)
        try:
            return linear(values, self.weight, wanted, deterministic=self.deterministic)
        except TuningError as error:
            raise InputError(str(error)) from error

    def dense(self) -> torch.Tensor:
        """Gives the weight itself, (N, K) float32."""
        return reference_dequantize(self.weight)


@dataclass(frozen=True, eq=False, slots=True)
class Int8Linear:
    """A linear whose inputs are rounded to int8 too, as W8A8 checkpoints are served; a `layer.Linear`.

    Attributes:
        codes: (N, K) int8, outputs in the decoder's order.
        scale: (N,) floating-point.
    """

    codes: torch.Tensor
    scale: torch.Tensor

    def run(self, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Gives (..., N) in the type of `values` (..., K); the bias is (N,)."""
        wanted = bias if bias is None else bias.to(values.dtype)
        found: torch.Tensor = torch.ops.quantpress.w8a8_linear(values, self.codes, self.scale, wanted)
        return found

    def dense(self) -> torch.Tensor:
        """Gives the weight itself, (N, K) float32."""
        return self.codes.float() * self.scale.float()[:, None]


def form_bytes(form: QuantizedForm) -> int:
    """Gives the bytes that a matrix of this form takes when it is packed for the kernels."""
    rows, columns = form.shape
    groups = group_count(columns, form.group_size)
    words = -(-columns * form.bits // 32) * 4 * rows
    return words + groups * rows * (_SCALE_BYTES[form.scale_type] + (not form.symmetric)) + 8 * columns * form.ordered


@dataclass(frozen=True)
class PackedWeights:
    """Reads the quantized linears of a checkpoint by the decoder's slots.

    Attributes:
        checkpoint: where from.
        checked: its tensors by the family's table.
        device: where the weights are kept.
        deterministic: of the products.
        as_served: round inputs where the form says so. Who rounds them by another way, as the judge's runtime does, or
            wants a yardstick, leaves it off.
    """

    checkpoint: Checkpoint
    checked: Preflight
    device: str | torch.device = "cpu"
    deterministic: bool = True
    as_served: bool = False
    _found: dict[tuple[str, int], tuple[TensorSpec, LazyQuantized]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Finds which weights are quantized; reads nothing."""
        quantized = self.checked.codes(self.checkpoint)
        found = {
            (row.slot, layer): (row, quantized[tensor.name])
            for row, layer, tensor in self.checked.bindings
            if tensor.name in quantized and row.role in _ROLES
        }
        object.__setattr__(self, "_found", found)

    def __call__(self, slot: str, layer: int) -> PackedLinear | Int8Linear | None:
        """Gives a linear in codes, None if it is not quantized or in a way that the kernels do not have.

        Raises:
            InputError: the file cannot be read.
            LayoutError: codes that make no sense.
        """
        if (slot, layer) not in self._found:
            return None
        row, lazy = self._found[slot, layer]
        if self.as_served and _rounds_inputs(lazy.form):
            return _int8(lazy, _order(row, self.checked.hyper), self.device)
        weight = _packed(lazy)
        if weight is None:
            return None
        return PackedLinear(_ordered(weight, _order(row, self.checked.hyper)).to(self.device), self.deterministic)

    def resident_bytes(self, width: int) -> int:
        """Gives the bytes of all weights: packed ones as they are, of others `width` bytes a value."""
        packed = {lazy.name: form_bytes(lazy.form) for _row, lazy in self._found.values()}
        stored = {*packed, *(self.checked.pieces[name].stored for name in packed if name in self.checked.pieces)}
        others = sum(tensor.size for name, tensor in self.checkpoint.tensors.items() if name not in stored)
        return sum(packed.values()) + width * others


def packed_decoder(
    checkpoint: Checkpoint,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    deterministic: bool = False,
    as_served: bool = True,
) -> Decoder:
    """Gives a decoder that keeps all weights on a device, those that are quantized in codes.

    Args:
        checkpoint: quantized or not.
        device: where to compute.
        dtype: to compute in, and of the weights that are not quantized.
        deterministic: see `PackedLinear`.
        as_served: round the inputs of linears to int8 where the checkpoint is made for that.

    Raises:
        InputError: it does not fit its family.
    """
    checked = preflight(checkpoint)
    check_tied_head(checked)
    weights = CheckpointWeights(checkpoint, checked.spec, checked.hyper)
    linears = PackedWeights(checkpoint, checked, device, deterministic, as_served)
    return Decoder(
        weights, checked.spec, checked.hyper, device=device, dtype=dtype, resident=True, linears=linears
    )  # fmt: skip


def _packed(lazy: LazyQuantized) -> PackedWeight | None:
    form = lazy.form
    if lazy.streams is not None:
        found = lazy.streams()
        return packed_streams(
            found.words, found.scale, found.zero, form.bits, form.group_size, columns=form.shape[1]
        )  # fmt: skip
    tensor = lazy.read()
    try:
        return packed_weight(tensor)
    except LayoutError:  # groups of uneven sizes: the decoder then takes the numbers that the codes stand for
        return None


def _rounds_inputs(form: QuantizedForm) -> bool:
    plain = form.bits == 8 and form.per_row and form.symmetric and not form.ordered
    return form.input_bits == 8 and plain and form.shape[1] <= LONGEST


def _int8(lazy: LazyQuantized, order: torch.Tensor | None, device: str | torch.device) -> Int8Linear:
    tensor = lazy.read()
    codes = as_torch((tensor.codes - np.uint8(128)).view(np.int8))
    scale = as_torch(np.ascontiguousarray(tensor.scale[:, 0]))
    if order is not None:
        codes, scale = codes[order], scale[order]
    return Int8Linear(codes.to(device), scale.to(device))


def _order(row: TensorSpec, hyper: Hyperparameters) -> torch.Tensor | None:
    """Gives where the outputs come from in the decoder's order, None where they stand in it; see `canonical`.

    Codes are (N, K) whatever way round a family stores its weights, so that Conv1D needs nothing.
    """
    if row.layout not in FUSED:
        return None
    return canonical(torch.arange(hyper.dims[row.shape[0]]), row, hyper)


def _ordered(weight: PackedWeight, order: torch.Tensor | None) -> PackedWeight:
    if order is None:
        return weight
    zero = weight.zero
    return replace(
        weight, words=weight.words[:, order].contiguous(), scale=weight.scale[:, order].contiguous(),
        zero=None if zero is None else zero[:, order].contiguous(),
    )  # fmt: skip

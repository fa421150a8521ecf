"""Weights that are stored as floats: rounded once to the type of the file, and refused where they are beyond it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from quantpress.convert.checkpoint import Array
from quantpress.convert.files import shown
from quantpress.convert.onnx.linear import LinearWeight
from quantpress.convert.onnx.stored import Piece, StoredGroup, StoredTensor
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.floats import count_nonfinite, to_bfloat16, to_float16, to_float32

__all__ = ["LABELS", "as_stored", "float_group", "own_type"]

LABELS = {"FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16"}
_CASTS: dict[str, Callable[[Array], Array]] = {"FLOAT": to_float32, "FLOAT16": to_float16, "BFLOAT16": to_bfloat16}
_OWN = {"F16": "FLOAT16", "BF16": "BFLOAT16", "F8_E4M3": "BFLOAT16", "F8_E5M2": "BFLOAT16"}  # bfloat16 holds both F8


def own_type(dtype: str, compute: str) -> str:
    """Gives the narrowest type that loses nothing of a weight on its way to the activations' type.

    Args:
        dtype: type in the checkpoint, a key of `DTYPES`.
        compute: "FLOAT" or "FLOAT16".
    """
    return "FLOAT16" if compute == "FLOAT16" else _OWN.get(dtype, "FLOAT")


def as_stored(rows: Array, dtype: str, where: str) -> Array:
    """Rounds values to the type they are stored in.

    Args:
        rows: any shape and float type.
        dtype: a key of `LABELS`.
        where: file and tensor, for the message.

    Returns:
        The same shape, C-contiguous.

    Raises:
        InputError: a finite value is beyond the type.
    """
    try:
        stored = _CASTS[dtype](rows)
    except LayoutError as error:
        raise InputError(f"{where}: {error}") from error
    if stored.dtype != rows.dtype and (lost := count_nonfinite(stored) - count_nonfinite(rows)) > 0:
        raise InputError(
            f"{where}: {lost} of these {rows.size} values are beyond {LABELS[dtype]}; store it as fp32 or bf16"
        )
    return stored


def float_group(weight: LinearWeight, dtype: str, note: str = "") -> StoredGroup:
    """Gives what stores a weight (N, K) in a float type, by rows."""

    def tasks() -> Iterator[Callable[[], Piece]]:
        return (partial(_piece, weight, dtype, start, stop) for start, stop in weight.row_ranges())

    tensor = StoredTensor(weight.name, dtype, weight.shape)
    return StoredGroup((tensor,), tasks, LABELS[dtype], weight.name, weight.held, note)


def _piece(weight: LinearWeight, dtype: str, start: int, stop: int) -> Piece:
    return (as_stored(weight.read_rows(start, stop), dtype, f"{weight.source}: tensor {shown(weight.name)}"),)

"""Quantizes rows on a GPU, for the types whose search or rounding has a kernel: the bytes of `codec.quantize_rows`.

Rows go to the device in their own type (2 bytes for a bfloat16 weight) and come back as blocks, so a search that costs
the processor a microsecond for ten weights costs little more than these two copies. Types without a kernel (F16, BF16,
F32, Q8_0, and Q4_0 to Q5_1 without importance) are rounded by the processor as fast as it reads them.

Not run on hardware yet: the kernels have been interpreted and compiled (see `quantpress.kernels.kquants.quantize` and
`quantpress.kernels.ggml.quantize`).
"""

from __future__ import annotations

import importlib.util
import threading
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.errors import OutputError
from quantpress.quant.floats import BFLOAT16, to_float32
from quantpress.quant.ggml.codec import beyond_half, quantize_rows
from quantpress.quant.ggml.types import GGMLType, ggml_type, row_bytes

if TYPE_CHECKING:
    import torch  # at run time it is loaded by the first call: importing this module stays cheap

__all__ = ["has_kernel", "quantize_rows_on_device", "searching_device"]

Floats: TypeAlias = NDArray[np.float32]
Bytes: TypeAlias = NDArray[np.uint8]

_HALVES: Final = MappingProxyType(
    {
        "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,),
        "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,),
        "Q5_1": (0, 2),
    }
)  # fmt: skip
"""Type -> where in a block its float16 scales are."""

_SEARCHED_BY_IMPORTANCE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
_ONE_AT_A_TIME = threading.Lock()  # Triton compiles at the first launch of a kernel, and threads would do it at once


def searching_device(device: str) -> str:
    """Gives the device to search on: the processor where no kernel can run, for its bytes are the same.

    Args:
        device: the one that a model is run on.
    """
    return device if device != "cpu" and importlib.util.find_spec("triton") is not None else "cpu"


def has_kernel(name: str, *, weighted: bool) -> bool:
    """Whether a type is quantized on the device.

    Args:
        name: of the type.
        weighted: whether there is an importance.
    """
    return name in _HALVES and (weighted or name not in _SEARCHED_BY_IMPORTANCE)


def quantize_rows_on_device(kind: GGMLType | str, array: NDArray[Any], importance: Floats | None, device: str) -> Bytes:
    """Quantizes rows of any real number type on a device; several threads may call it.

    Args:
        kind: target type, or its name; any that `quantize_rows` knows. Those without a kernel stay on the processor.
        array: (..., K), finite, K a multiple of the block.
        importance: (K,) float32, finite and not negative, or None.
        device: "cuda" or "cuda:1"; the processor's own only where the kernels are interpreted.

    Returns:
        (..., row bytes) uint8, C order.

    Raises:
        LayoutError: as `quantize_rows`, with its words.
        OutputError: torch or triton is not installed.
    """
    kind = ggml_type(kind) if isinstance(kind, str) else kind
    if array.ndim == 0 or not has_kernel(kind.name, weighted=importance is not None):
        return quantize_rows(kind, array, importance)
    shape = (*array.shape[:-1], row_bytes(kind, array.shape[-1]))
    if not array.size:
        return np.empty(shape, np.uint8)
    try:
        found, wild = _run(kind, array.reshape(-1, array.shape[-1]), importance, device)
    except ModuleNotFoundError as error:
        raise OutputError(
            f"quantizing on a GPU needs {error.name}: pip install 'quantpress[gpu]', or use --device cpu"
        ) from error
    if wild:
        raise beyond_half(kind, wild, found.size // kind.block_bytes)
    return found.reshape(shape)


def _run(kind: GGMLType, rows: NDArray[Any], importance: Floats | None, device: str) -> tuple[Bytes, int]:
    """Gives the blocks, and how many of them need a scale beyond float16."""
    import torch

    from quantpress.kernels.ggml import quantize as blocks
    from quantpress.kernels.kquants import quantize as kquants

    values = _tensor(rows).to(device)
    weight = None
    if importance is not None:
        weight = torch.from_numpy(np.require(importance, np.float32, ["C", "W"])).to(device)
    with _ONE_AT_A_TIME:
        run = blocks.quantize if kind.name in blocks.TYPES else kquants.quantize
        out = run(values, kind.name, weight)
        wild = _count_wild(out.view(-1, kind.block_bytes), kind.name)
    return out.cpu().numpy(), wild


def _tensor(rows: NDArray[Any]) -> torch.Tensor:
    import torch

    if rows.dtype == BFLOAT16:
        return torch.from_numpy(np.require(rows.view(np.int16), requirements=["C", "W"])).view(torch.bfloat16)
    if rows.dtype not in (np.dtype(np.float32), np.dtype(np.float16)) or not rows.dtype.isnative:
        rows = to_float32(rows)
    return torch.from_numpy(np.require(rows, requirements=["C", "W"]))


def _count_wild(blocks: torch.Tensor, name: str) -> int:
    """Counts blocks (B, bytes) with a scale that is infinite or NaN: all bits of its exponent are set."""
    import torch

    wild = torch.zeros(len(blocks), dtype=torch.bool, device=blocks.device)
    for place in _HALVES[name]:
        wild |= (blocks[:, place + 1] & 0x7C) == 0x7C
    return int(wild.sum()) if _HALVES[name] else 0

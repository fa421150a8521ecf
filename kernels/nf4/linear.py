"""A linear layer on a matrix in bitsandbytes' 4-bit types, as an operator of torch and a module.

`torch.ops.quantpress.nf4_linear` knows its output without running (a fake), so `torch.compile` keeps it as one node and
CUDA graphs capture it. On CUDA it runs the kernels, on processors it dequantizes blocks of outputs in plain torch and
multiplies in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from quantpress.kernels.nf4.matmul import check_input, check_nf4

__all__ = ["Nf4Linear", "nf4_linear"]

_BLOCK = 1 << 20  # weights that are dequantized at a time on a processor: 4 MiB of float32


@torch.library.custom_op(
    "quantpress::nf4_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor absmax, Tensor levels, Tensor? bias, int rows, int columns, int blocksize,"
    " ScalarType? rounding) -> Tensor",
)
def nf4_linear(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, bias: torch.Tensor | None,
    rows: int, columns: int, blocksize: int, rounding: torch.dtype | None,
) -> torch.Tensor:  # fmt: skip
    """Computes x W^T + bias with `W = level[code] * absmax`; here for tensors that are not on a GPU.

    Args:
        x: (..., K) float16, bfloat16 or float32.
        packed: (ceil(N * K / 2),) uint8, two codes each, the first in the high half.
        absmax: (ceil(N * K / blocksize),) float32.
        levels: (16,) float32.
        bias: (N,) of the type of `x`.
        rows: N.
        columns: K.
        blocksize: values that share an absmax: 32, 64, ... 4096.
        rounding: float16 or bfloat16, to which weights are rounded whatever the type of `x` is; None: on a processor
            they are not, on CUDA see `quantpress.kernels.nf4.matmul`.

    Returns:
        (..., N) of the type of `x`; sums are in float32.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    check_nf4(packed, absmax, levels, rows, columns, blocksize)
    flat = x.reshape(-1, x.shape[-1] if x.dim() else 1).contiguous()
    check_input(flat, bias, rows, columns, rounding)
    if x.device != packed.device:
        raise ValueError(f"the weight is on {packed.device}, x is on {x.device}")
    result = torch.empty((len(flat), rows), dtype=x.dtype, device=x.device)
    wide, step = flat.float(), max(_BLOCK // columns, 1)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        weight = _values(packed, absmax, levels, start * columns, stop * columns, blocksize).view(-1, columns)
        if rounding is not None:
            weight = weight.to(rounding).float()
        result[:, start:stop] = F.linear(wide, weight, None if bias is None else bias[start:stop].float())
    return result.view(*x.shape[:-1], rows)


@nf4_linear.register_kernel("cuda")
def _on_cuda(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, bias: torch.Tensor | None,
    rows: int, columns: int, blocksize: int, rounding: torch.dtype | None,
) -> torch.Tensor:  # fmt: skip
    from quantpress.kernels.nf4.matmul import nf4_matmul

    flat = x.reshape(-1, x.shape[-1]).contiguous()
    result = nf4_matmul(flat, packed, absmax, levels, rows, columns, blocksize, bias, rounding=rounding)
    return result.view(*x.shape[:-1], rows)


@nf4_linear.register_fake
def _fake(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, bias: torch.Tensor | None,
    rows: int, columns: int, blocksize: int, rounding: torch.dtype | None,
) -> torch.Tensor:  # fmt: skip
    del packed, absmax, levels, bias, columns, blocksize, rounding
    return x.new_empty((*x.shape[:-1], rows))


def _values(
    packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, first: int, last: int, blocksize: int
) -> torch.Tensor:
    """Gives values [first, last) of a matrix in one row, float32; whole blocks are read, two codes at a time."""
    byte = torch.arange(256, device=levels.device)
    pairs = torch.stack((levels[byte >> 4], levels[byte & 15]), 1)
    block = first // blocksize
    start = block * blocksize
    stored = packed[start // 2 : -(-last // 2)]
    values = pairs.index_select(0, stored.to(torch.int32)).view(-1)
    whole = len(values) // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(absmax[block : block + whole, None])
    if whole * blocksize < len(values):
        values[whole * blocksize :] *= absmax[block + whole]
    return values[first - start : last - start]


class Nf4Linear(nn.Module):
    """x W^T + bias on a matrix in 4-bit levels; inference only.

    The parts of the weight are buffers: `.to(device)` and `state_dict` take them along. `.half()` and `.to(dtype)`
    change the bias only; absmax and levels stay in float32.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    levels: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self, packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, rows: int, columns: int, blocksize: int,
        bias: torch.Tensor | None = None, *, rounding: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Keeps the tensors as they are; see `nf4_linear`.

        Raises:
            ValueError: parts that do not fit each other.
        """
        super().__init__()
        check_nf4(packed, absmax, levels, rows, columns, blocksize)
        self.in_features, self.out_features, self.blocksize, self.rounding = columns, rows, blocksize, rounding
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", absmax)
        self.register_buffer("levels", levels)
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gives (..., N) for (..., K) in the type of `x`: float16, bfloat16 or float32."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        result: torch.Tensor = torch.ops.quantpress.nf4_linear(
            x, self.packed, self.absmax, self.levels, bias, self.out_features, self.in_features, self.blocksize,
            self.rounding,
        )  # fmt: skip
        return result

    def extra_repr(self) -> str:
        """What `print(model)` says."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, blocksize={self.blocksize}, rounding={self.rounding}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Nf4Linear:
        kept = {"absmax": self.absmax, "levels": self.levels}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in kept.items():
            changed = getattr(self, name)
            if changed.dtype != torch.float32:
                setattr(self, name, values.to(changed.device))
        return self

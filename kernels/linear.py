"""A linear layer on a packed weight, as one operator of torch: what `QuantLinear` and the decoder call.

`torch.ops.quantpress.packed_linear` knows its output without running (a fake), so `torch.compile` keeps it as one node
and CUDA graphs capture it. On CUDA it runs the kernels (`quantpress.kernels.dispatch`), on processors it dequantizes
blocks of outputs that stay in the cache and multiplies in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quantpress.kernels.packed import PackedWeight, reference_codes

__all__ = ["linear", "packed_linear", "reference_linear"]

_BLOCK = 1 << 21  # weights that are dequantized at a time on a processor: 8 MiB of float32


def linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, deterministic: bool = False
) -> torch.Tensor:
    """Computes x W^T + bias.

    Args:
        x: (..., K) float16, bfloat16 or float32.
        weight: (N, K), on the device of `x`.
        bias: (N,) of the type of `x`.
        deterministic: the same bits each time, whatever else runs on the device; also where torch is told so by
            `torch.use_deterministic_algorithms`.

    Returns:
        (..., N) of the type of `x`; sums are in float32.
    """
    result: torch.Tensor = torch.ops.quantpress.packed_linear(
        x, weight.words, weight.scale, weight.zero, weight.order, bias, weight.columns, weight.bits, weight.group_size,
        deterministic,
    )  # fmt: skip
    return result


def reference_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes the same in float64 and rounds once; (..., N) of the type of `x`."""
    from quantpress.kernels.packed import reference_dequantize

    dense = reference_dequantize(weight, torch.float64)
    return F.linear(x.double(), dense, None if bias is None else bias.double()).to(x.dtype)


@torch.library.custom_op(
    "quantpress::packed_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor? order, Tensor? bias, int columns, int bits,"
    " int group_size, bool deterministic) -> Tensor",
)
def packed_linear(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, order: torch.Tensor | None,
    bias: torch.Tensor | None, columns: int, bits: int, group_size: int, deterministic: bool,
) -> torch.Tensor:  # fmt: skip
    """The operator behind `linear`, on the fields of a `PackedWeight`; here for tensors that are not on a GPU.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    del deterministic  # a processor always adds in the same order
    weight = PackedWeight(words, scale, zero, order, columns, bits, group_size)
    flat = _flat(x, weight, bias)
    ordered = flat if order is None else flat.index_select(1, order)
    result = torch.empty((len(flat), weight.rows), dtype=x.dtype, device=x.device)
    step, wide = max(_BLOCK // columns, 1), ordered.float()
    for start in range(0, weight.rows, step):
        part = slice(start, start + step)
        sums = wide @ _block(weight, part)
        if bias is not None:
            sums += bias[part].float()
        result[:, part] = sums
    return result.view(*x.shape[:-1], weight.rows)


@packed_linear.register_kernel("cuda")
def _on_cuda(
    x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, order: torch.Tensor | None,
    bias: torch.Tensor | None, columns: int, bits: int, group_size: int, deterministic: bool,
) -> torch.Tensor:  # fmt: skip
    from quantpress.kernels.dispatch import matmul

    weight = PackedWeight(words, scale, zero, order, columns, bits, group_size)
    always = deterministic or torch.are_deterministic_algorithms_enabled()
    return matmul(_flat(x, weight, bias), weight, bias, deterministic=always).view(*x.shape[:-1], weight.rows)


@packed_linear.register_fake
def _fake(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, *rest: object) -> torch.Tensor:
    del words, rest
    return x.new_empty((*x.shape[:-1], scale.shape[1]))


def _flat(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32) or x.dim() < 1 or x.shape[-1] != weight.columns:
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}, wanted a float type and {weight.columns} columns")
    for name, tensor in (("weight", weight.words), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x is on {x.device}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (weight.rows,)):
        raise ValueError(f"bias is {bias.dtype} of shape {tuple(bias.shape)}, wanted {x.dtype} of {(weight.rows,)}")
    return x.reshape(-1, weight.columns).contiguous()


def _block(weight: PackedWeight, part: slice) -> torch.Tensor:
    """Gives the outputs `part` as (K, n) float32, places along K as they are stored: scale * (code - zero)."""
    values = _codes(weight, part).float()
    groups, size, columns = weight.groups, weight.group_size, weight.columns
    scale = weight.scale[:, part].float()
    zero = None if weight.zero is None else weight.zero[:, part].float()
    whole = columns // size * size
    if whole:
        even = values[:whole].view(whole // size, size, -1)
        even -= 1 << (weight.bits - 1) if zero is None else zero[: whole // size, None]
        even *= scale[: whole // size, None]
    if whole < columns:
        values[whole:] -= 1 << (weight.bits - 1) if zero is None else zero[groups - 1]
        values[whole:] *= scale[groups - 1]
    return values


def _codes(weight: PackedWeight, part: slice) -> torch.Tensor:
    if 32 % weight.bits:
        return reference_codes(weight, part.start, part.stop)
    words = weight.words[:, part]
    shifts = torch.arange(0, 32, weight.bits, dtype=torch.int32, device=words.device)
    codes = (words[:, None, :] >> shifts[None, :, None]).bitwise_and_((1 << weight.bits) - 1)
    return codes.view(-1, words.shape[1])[: weight.columns]

"""Other people's products with quantized matrices, on the same codes, for `kernels.py`.

Each is left out where its package is not installed or where it has no kernel for a product.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Protocol

import torch

from quantpress.kernels.launch import Problem
from quantpress.kernels.packed import PackedWeight, reference_codes
from quantpress.kernels.tuning.products import DTYPES

Runs = list[Callable[[], torch.Tensor]]


class Peer(Protocol):
    """A library's product."""

    name: str

    def version(self) -> str | None:
        """Version of its package; None where it is not installed."""
        ...

    def runs(self, problem: Problem, x: torch.Tensor, weights: Sequence[PackedWeight]) -> Runs | None:
        """Gives the product with each weight; None for products that it has no kernel for."""
        ...


def _installed(package: str) -> str | None:
    return metadata.version(package) if importlib.util.find_spec(package) else None


def _codes(weight: PackedWeight) -> torch.Tensor:
    return reference_codes(weight).T.contiguous()


class Tinygemm:
    """torch's own product with 4-bit codes: `_weight_int4pack_mm`, in bfloat16."""

    name = "tinygemm"

    def version(self) -> str | None:
        """Torch's."""
        return str(torch.__version__)

    def runs(self, problem: Problem, x: torch.Tensor, weights: Sequence[PackedWeight]) -> Runs | None:
        """As `Peer.runs`."""
        fits = problem.bits == 4 and problem.dtype == "bfloat16" and problem.group_size in (32, 64, 128, 256)
        if not fits or problem.columns % 128 or problem.rows % 8:
            return None
        made: Runs = []
        for weight in weights:
            codes = _codes(weight)
            packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)  # noqa: SLF001
            scale = weight.scale.float()
            # its weights are (code - 8) * scale + zero
            zero = torch.zeros_like(scale) if weight.zero is None else scale * (8 - weight.zero.float())
            both = torch.stack([scale, zero], -1).to(torch.bfloat16)
            product = torch.ops.aten._weight_int4pack_mm  # noqa: SLF001 - it has no other name
            made.append(functools.partial(product, x, packed, problem.group_size, both))
        return made


class GemLite:
    """GemLite's Triton kernels; what its autotuner measures is done before ours are timed."""

    name = "gemlite"

    def version(self) -> str | None:
        """Of the package."""
        return _installed("gemlite")

    def runs(self, problem: Problem, x: torch.Tensor, weights: Sequence[PackedWeight]) -> Runs | None:
        """As `Peer.runs`."""
        if problem.bits == 3 or problem.dtype == "float32" or problem.columns % 32 or problem.rows % 32:
            return None
        gemlite: Any = importlib.import_module("gemlite")
        kind = gemlite.DType.BF16 if problem.dtype == "bfloat16" else gemlite.DType.FP16
        made: Runs = []
        for weight in weights:
            layer = gemlite.GemLiteLinear(
                problem.bits, problem.group_size, problem.columns, problem.rows, input_dtype=kind, output_dtype=kind
            )
            scale = weight.scale.T.reshape(-1, 1).to(x.dtype)
            middle = 1 << (problem.bits - 1)
            zero = middle if weight.zero is None else weight.zero.T.reshape(-1, 1).to(x.dtype)
            layer.pack(_codes(weight), scale, zero, None)
            made.append(functools.partial(layer, x))
        return made


class GptqModel:
    """GPTQModel's Triton path: weights are dequantized by a kernel, then multiplied by torch."""

    name = "gptqmodel"

    def version(self) -> str | None:
        """Of the package."""
        return _installed("gptqmodel")

    def runs(self, problem: Problem, x: torch.Tensor, weights: Sequence[PackedWeight]) -> Runs | None:
        """As `Peer.runs`."""
        if problem.bits == 3 or problem.dtype == "float32" or problem.columns % 32 or problem.rows % 32:
            return None
        product: Any = importlib.import_module("gptqmodel.nn_modules.triton_utils.dequant").quant_matmul
        group = torch.arange(problem.columns, device=x.device, dtype=torch.int32) // problem.group_size
        made: Runs = []
        for weight in weights:
            middle = torch.full_like(weight.scale, 1 << (problem.bits - 1)) if weight.zero is None else weight.zero
            given = (weight.words, weight.scale.half(), _pack_rows(middle.int(), problem.bits), group)
            made.append(functools.partial(product, x, *given, problem.bits, 32, (1 << problem.bits) - 1))
        return made


def _pack_rows(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs (G, N) zeros as GPTQ's `qzeros`, (G, N * bits / 32)."""
    each = 32 // bits
    shifts = torch.arange(0, 32, bits, device=zero.device, dtype=torch.int64)
    words = (zero.long().view(len(zero), -1, each) << shifts).sum(-1)
    return (words - ((words >> 31) << 32)).int()


PEERS: tuple[Peer, ...] = (Tinygemm(), GemLite(), GptqModel())


def wrong(found: torch.Tensor, problem: Problem, x: torch.Tensor, weight: PackedWeight) -> str | None:
    """Says by how much a peer's product is off, as a share of the greatest value; None if that is roundings.

    Peers round weights and scales to 16 bits, some also products with zeros; a hundredth is more than that adds up to.
    """
    from quantpress.kernels.packed import reference_dequantize

    dense = reference_dequantize(weight, torch.float32, 0, min(64, problem.rows))
    wanted = x.float() @ dense.T
    off = float((found[:, :64].float() - wanted).abs().max() / wanted.abs().max())
    return None if off < 0.02 else f"off by {off:.2g} of the greatest value"


def dense_runs(problem: Problem, x: torch.Tensor, count: int) -> Runs:
    """Gives cuBLAS's product with as many dense weights of the type of `x`."""
    shape = (problem.rows, problem.columns)
    weights = [torch.randn(shape, device=x.device).to(DTYPES[problem.dtype]) for _ in range(count)]
    return [functools.partial(torch.nn.functional.linear, x, weight) for weight in weights]

"""Says what an adapter does to each module, from the adapter alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.lora.adapter import Adapter, AdapterModule
from quantpress.convert.lora.config import AdapterConfig

__all__ = ["ModuleRecord", "describe"]

_Float64 = npt.NDArray[np.float64]
_BLOCK = 1 << 20  # values of a product that are made at a time


@dataclass(frozen=True, slots=True)
class ModuleRecord:
    """What an adapter does to one module.

    Attributes:
        path: the module in the base.
        kind: "lora", "dora", "embedding", "adalora", "loha", "lokr", "expert", "tokens" or "whole".
        rank, alpha, scale: what the delta is made with; None for "tokens" and "whole", and where the base must say
            which of several parameters is meant.
        shapes: part -> shape of its tensor.
        delta_norm: Frobenius norm of what is added, scale included; None where nothing is added. For DoRA that is the
            low-rank part before the rows are scaled to their magnitudes.
    """

    path: str
    kind: str
    rank: int | None
    alpha: float | None
    scale: float | None
    shapes: Mapping[str, tuple[int, ...]]
    delta_norm: float | None


def describe(adapter: Adapter) -> list[ModuleRecord]:
    """Reads an adapter's tensors and sums up each module, in the order of the file.

    Raises:
        InputError: a file changed or cannot be read.
    """
    return [_record(module, adapter.config) for module in adapter.modules]


def _record(module: AdapterModule, config: AdapterConfig) -> ModuleRecord:
    kind = _kind(module, config)
    shapes = {part: tensor.shape for part, tensor in module.parts.items()}
    if kind in ("tokens", "whole"):
        return ModuleRecord(module.path, kind, None, None, None, shapes, None)
    place = module.path
    if kind == "expert":
        parameters = config.parameters_of(module.path)
        places = [f"{module.path}.{parameter}" for parameter in parameters]
        if len({(config.rank_of(place), config.scale_of(place)) for place in places}) > 1:
            return ModuleRecord(module.path, kind, None, None, None, shapes, None)
        place = places[0]
    rank, scale = config.rank_of(place), config.scale_of(place)
    norm = abs(scale) * _norm(kind, module.parts, rank)
    return ModuleRecord(module.path, kind, rank, config.alpha_of(place), scale, shapes, norm)


def _kind(module: AdapterModule, config: AdapterConfig) -> str:
    parts = module.parts
    if "lora_magnitude_vector" in parts:
        return "dora"
    if "lora_embedding_A" in parts:
        return "embedding"
    if "lora_A" in parts and config.parameters_of(module.path):
        whole = parts["lora_A"].shape[0] == config.rank_of(module.path) and config.targets(module.path)
        return "lora" if whole else "expert"
    if config.kind in ("LOHA", "LOKR") and any(part.startswith(("hada_", "lokr_")) for part in parts):
        return config.kind.lower()
    if "lora_A" in parts:
        return config.kind.lower()
    return "tokens" if "trainable_tokens_delta" in parts else "whole"


def _norm(kind: str, parts: Mapping[str, LazyTensor], rank: int) -> float:
    """Frobenius norm of the delta without its scale."""
    values = {part: _float64(tensor) for part, tensor in parts.items() if part not in ("weight", "bias")}
    if kind == "loha":
        return _hadamard_norm(*(values[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b")))
    if kind == "lokr":
        return _factor_norm(values, "lokr_w1") * _factor_norm(values, "lokr_w2")
    suffix = "_embedding" if "lora_embedding_A" in values else ""
    left, right = values[f"lora{suffix}_B"], values[f"lora{suffix}_A"]
    if kind == "adalora":
        right = right * values["lora_E"]
    if kind == "expert":
        # PEFT: lora/layer.py ParamWrapper: rows of A are (expert, rank), columns of B are (rank, expert).
        experts = right.shape[0] // rank
        pairs = zip(right.reshape(experts, rank, -1), np.moveaxis(left.reshape(-1, rank, experts), 2, 0), strict=True)
        return math.sqrt(sum(_product_norm(low, high) ** 2 for high, low in pairs))
    return _product_norm(left, right)


def _product_norm(left: _Float64, right: _Float64) -> float:
    """Gives ||left @ right||_F, (N, r) by (r, K), as sqrt(sum((left^T left) * (right right^T))): r^2 (N + K) steps."""
    return math.sqrt(max(0.0, float(np.sum((left.T @ left) * (right @ right.T)))))


def _factor_norm(values: Mapping[str, _Float64], part: str) -> float:
    """||w||, where w is stored or is a product; the norm of a Kronecker product is the product of the norms."""
    if part in values:
        return float(np.linalg.norm(values[part]))
    return _product_norm(values[f"{part}_a"], values[f"{part}_b"])


def _hadamard_norm(w1_a: _Float64, w1_b: _Float64, w2_a: _Float64, w2_b: _Float64) -> float:
    """||(w1_a @ w1_b) * (w2_a @ w2_b)||, a block of rows at a time."""
    step = max(1, _BLOCK // max(1, w1_b.shape[1]))
    total = 0.0
    for start in range(0, w1_a.shape[0], step):
        rows = slice(start, start + step)
        total += float(np.sum(np.square((w1_a[rows] @ w1_b) * (w2_a[rows] @ w2_b))))
    return math.sqrt(total)


def _float64(tensor: LazyTensor) -> _Float64:
    return tensor.read().astype(np.float64)

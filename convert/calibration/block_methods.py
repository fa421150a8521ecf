"""GPTQ for GGUF as a `LayerMethod`: finds the blocks of a file's types, not codes of a grid of our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from quantpress.convert.calibration.methods import FEW_TOKENS
from quantpress.convert.calibration.site import Site, SiteResult
from quantpress.quant.block_gptq import block_gptq_shared
from quantpress.quant.errors import InputError
from quantpress.quant.ggml.block_parts import BLOCK_GRIDS
from quantpress.quant.ggml.blocks import BlockTensor
from quantpress.quant.ggml.codec import quantize_rows
from quantpress.quant.ggml.types import ggml_type
from quantpress.quant.gptq import GptqOptions, GptqReport

__all__ = ["KquantGptqMethod"]

Array = NDArray[Any]


@dataclass(slots=True)
class KquantGptqMethod:
    """GPTQ inside the blocks of ggml's types, site after site.

    Types that store blocks and that GPTQ finds no codes of are quantized as they are without a method, with the inputs'
    powers as importance; weights of F32, F16 and BF16 are left alone and not in the result. A site that saw no token is
    quantized plainly too, and the report says `tokens: 0`; for few tokens see `methods.GptqMethod`.

    Attributes:
        kind_of: name of a weight in the checkpoint -> name of the type it is to have, as ggml spells it.
        options: order and damping.
        threads: workers; the bytes do not depend on it.
        drift: share of the inputs' drift that weights make up for before they are quantized, see `quant.drift`.
        device: where to compute; only "cpu" for now.
    """

    kind_of: Callable[[str], str]
    options: GptqOptions = field(default_factory=GptqOptions)
    threads: int = 1
    drift: float = 0.0
    device: str = "cpu"
    sequential: bool = field(default=True, init=False)

    @property
    def wants(self) -> frozenset[str]:
        """The Hessian, and the drift where weights make up for it."""
        return frozenset({"hessian", "drift"} if self.drift else {"hessian"})

    def quantize(self, sites: Sequence[Site], plain: Mapping[str, Array]) -> SiteResult:
        """Quantizes the weights of sites; nothing else changes.

        Raises:
            InputError: a Hessian that cannot be worked with; the caller adds the layer's and the weight's name.
            LayoutError: a scale that a type cannot hold.
        """
        del plain
        quantized: dict[str, BlockTensor] = {}
        reports: dict[str, Mapping[str, Any]] = {}
        for site in sites:
            for slot, (tensor, report) in self._site(site).items():
                quantized[slot], reports[slot] = tensor, report
        return SiteResult(quantized, {}, reports)

    def _site(self, site: Site) -> dict[str, tuple[BlockTensor, dict[str, Any]]]:
        kinds = {slot: self.kind_of(site.names[slot]) for slot in site.weights}
        kinds = {slot: kind for slot, kind in kinds.items() if ggml_type(kind).block_size > 1}
        found: dict[str, tuple[BlockTensor, dict[str, Any]]] = {}
        chosen = [slot for slot, kind in kinds.items() if kind in BLOCK_GRIDS and site.tokens]
        if chosen:
            if site.hessian is None:
                raise InputError("GPTQ needs the Hessian of the inputs")
            results = block_gptq_shared(
                [site.weights[slot] for slot in chosen], site.hessian, [kinds[slot] for slot in chosen], self.options,
                drift=site.drift, share=self.drift, threads=self.threads,
            )  # fmt: skip
            few = {"few_tokens": True} if site.tokens * FEW_TOKENS < len(site.hessian) else {}
            for slot, (tensor, report) in zip(chosen, results, strict=True):
                found[slot] = tensor, {"type": kinds[slot], **_figures(report), "tokens": site.tokens, **few}
        for slot, kind in kinds.items():
            if slot not in found:
                found[slot] = self._plain(site, slot, kind)
        return {slot: found[slot] for slot in kinds}

    def _plain(self, site: Site, slot: str, kind: str) -> tuple[BlockTensor, dict[str, Any]]:
        importance = None if site.hessian is None or not site.tokens else site.hessian.diagonal().copy()
        data = quantize_rows(kind, site.weights[slot], importance)
        return BlockTensor(kind, data), {"type": kind, "method": "plain", "tokens": site.tokens}


def _figures(report: GptqReport) -> dict[str, Any]:
    return {
        "loss": report.loss,
        "relative_loss": report.relative_loss,
        "damping": report.damping,
        "dead_columns": report.dead,
    }

"""The methods that need a model's activations, as `LayerMethod`: GPTQ, AWQ and SmoothQuant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from quantpress.convert.calibration.site import Site, SiteResult
from quantpress.quant.errors import InputError
from quantpress.quant.gptq import GptqOptions, GptqReport, factorize, gptq_shared
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor

__all__ = ["FEW_TOKENS", "GptqMethod"]

Array = NDArray[Any]

FEW_TOKENS = 8  # a site is reported where it saw fewer tokens than its columns divided by this


@dataclass(slots=True)
class GptqMethod:
    """GPTQ, site after site: one factor and one run for all matrices of a site.

    A site that saw no token (an expert that the calibration text never reached) is rounded to nearest, and the report
    says `tokens: 0`. One that saw fewer than K / `FEW_TOKENS` tokens is quantized as ever, and the report says
    `few_tokens: True`.

    Attributes:
        grid_of: name of a weight in the checkpoint -> its grid.
        options: order and damping.
        threads: workers; the bytes do not depend on it.
    """

    grid_of: Callable[[str], Grid]
    options: GptqOptions = field(default_factory=GptqOptions)
    threads: int = 1
    sequential: bool = field(default=True, init=False)
    wants: frozenset[str] = field(default=frozenset({"hessian"}), init=False)

    def quantize(self, sites: Sequence[Site], plain: Mapping[str, Array]) -> SiteResult:
        """Quantizes the weights of sites; nothing else changes.

        Raises:
            InputError: a Hessian that cannot be worked with; the caller adds the layer's and the weight's name.
            LayoutError: a scale that the stored type cannot hold.
        """
        del plain
        quantized: dict[str, QuantizedTensor] = {}
        reports: dict[str, Mapping[str, Any]] = {}
        for site in sites:
            for slot, (tensor, report) in self._site(site).items():
                quantized[slot], reports[slot] = tensor, report
        return SiteResult(quantized, {}, reports)

    def _site(self, site: Site) -> dict[str, tuple[QuantizedTensor, dict[str, Any]]]:
        grids = {slot: self.grid_of(site.names[slot]) for slot in site.weights}
        if not site.weights:
            return {}
        if not site.tokens:
            return {
                slot: (round_to_nearest(weight, grids[slot], self.threads), {"tokens": 0})
                for slot, weight in site.weights.items()
            }
        if site.hessian is None:
            raise InputError("GPTQ needs the Hessian of the inputs")
        factor = factorize(site.hessian, self.options, self.threads)
        results = gptq_shared(list(site.weights.values()), factor, list(grids.values()), self.threads)
        few = {"few_tokens": True} if site.tokens * FEW_TOKENS < len(site.hessian) else {}
        return {
            slot: (tensor, {**_figures(report), "tokens": site.tokens, **few})
            for slot, (tensor, report) in zip(site.weights, results, strict=True)
        }


def _figures(report: GptqReport) -> dict[str, Any]:
    return {
        "loss": report.loss,
        "relative_loss": report.relative_loss,
        "damping": report.damping,
        "dead_columns": report.dead,
    }

"""The methods that need a model's activations, as `LayerMethod`: GPTQ, AWQ and SmoothQuant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.calibration.folding import Folding
from quantpress.convert.calibration.site import Site, SiteResult
from quantpress.quant import drift
from quantpress.quant.awq import SearchedScale, scaled_power, search_scale
from quantpress.quant.errors import InputError
from quantpress.quant.gptq import GptqOptions, GptqReport, factorize, gptq_shared
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor
from quantpress.quant.smooth import ALPHA, migration_scale

__all__ = ["FEW_TOKENS", "AwqMethod", "GptqMethod", "SmoothMethod"]

Array = NDArray[Any]

FEW_TOKENS = 8  # a site is reported where it saw fewer tokens than its columns divided by this


@dataclass(slots=True)
class GptqMethod:
    """GPTQ, site after site: one factor and one run for all matrices of a site.

    A site that saw no token (an expert that the calibration text never reached) is rounded to nearest, and the report
    says `tokens: 0`. One that saw fewer than K / `FEW_TOKENS` tokens is quantized as ever, and the report says
    `few_tokens: True`: the damping holds the directions that no token showed, so the error on other inputs still falls
    below that of rounding to nearest, but by less and less (simulated with the Hessians of a small Llama, int4, of what
    RTN leaves: 61 % with K / 16 tokens, 78 % with K / 32, 88 % with K / 64; some 10 % with plenty).

    Attributes:
        grid_of: name of a weight in the checkpoint -> its grid.
        options: order and damping.
        threads: workers; the bytes do not depend on it.
        drift: share of the inputs' drift that weights make up for before they are quantized, see `quant.drift`; with 0
            the source's weights need not be run beside the others.
        device: where to compute, as torch names it; codes of a GPU may differ from the processor's at near ties.
    """

    grid_of: Callable[[str], Grid]
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
        results = self._run(list(site.weights.values()), site.hessian, site.drift, list(grids.values()))
        few = {"few_tokens": True} if site.tokens * FEW_TOKENS < len(site.hessian) else {}
        return {
            slot: (tensor, {**_figures(report), "tokens": site.tokens, **few})
            for slot, (tensor, report) in zip(site.weights, results, strict=True)
        }

    def _run(
        self, weights: Sequence[NDArray[np.float32]], hessian: NDArray[np.float32], moved: NDArray[np.float32] | None,
        grids: Sequence[Grid],
    ) -> list[tuple[QuantizedTensor, GptqReport]]:  # fmt: skip
        if self.device != "cpu":
            from quantpress.quant import gptq_cuda

            return gptq_cuda.gptq_shared_on_device(
                weights, hessian, grids, self.options, drift=moved, share=self.drift, device=self.device,
                threads=self.threads,
            )  # fmt: skip
        factor = factorize(hessian, self.options, self.threads)
        if moved is not None:
            weights = drift.made_up(weights, factor, moved, self.drift, self.threads)
        return gptq_shared(weights, factor, grids, self.threads)


def _figures(report: GptqReport) -> dict[str, Any]:
    return {
        "loss": report.loss,
        "relative_loss": report.relative_loss,
        "damping": report.damping,
        "dead_columns": report.dead,
    }


@dataclass(slots=True)
class AwqMethod:
    """AWQ, layer after layer.

    The scale of what experts read from a norm is found with the inputs of all tokens, and that of an expert's down
    projection with the squares of its own inputs in the place of their Hessian. An expert that saw no token is rounded
    to nearest, with the scale of the norm.

    Where nothing can be folded (the operation before is no norm and no linear, or a linear that is left alone reads the
    same input) weights are rounded with a clip search weighted by the inputs, and the report says `folded: False`.

    Attributes:
        grid_of: name of a weight in the checkpoint -> its grid; its clip search weighs errors by the inputs' squares.
        threads: workers; the bytes do not depend on it.
        head_dim: values per head; without it the attention's output is not scaled where query heads share a value head.
    """

    grid_of: Callable[[str], Grid]
    threads: int = 1
    head_dim: int | None = None
    sequential: bool = field(default=False, init=False)
    wants: frozenset[str] = field(default=frozenset({"hessian", "mean_abs"}), init=False)

    def quantize(self, sites: Sequence[Site], plain: Mapping[str, Array]) -> SiteResult:
        """Scales and quantizes the weights of a layer.

        Raises:
            InputError: statistics that were not gathered.
            LayoutError: a scale that the stored type cannot hold.
        """
        folding = Folding(sites, plain, self.head_dim)
        quantized: dict[str, QuantizedTensor] = {}
        reports: dict[str, Mapping[str, Any]] = {}
        searched: dict[int, tuple[NDArray[np.float32] | None, SearchedScale | None]] = {}
        for group in reversed(folding.groups()):
            found: list[SearchedScale] = []

            def search(
                tie: NDArray[np.int64] | None, group: Sequence[Site] = group, found: list[SearchedScale] = found
            ) -> NDArray[np.float32]:
                found.append(self._search(group, folding, tie))
                return found[0].scale

            scale = folding.fold(group, search)
            searched |= {id(site): (scale, found[0] if found else None) for site in group}
        for site in sites:
            scale, best = searched[id(site)]
            for slot in site.weights:
                quantized[slot] = self._round(site, slot, folding.weights[slot], scale)
                reports[slot] = {"tokens": site.tokens, **_search_figures(best)}
        return SiteResult(quantized, folding.changed, reports)

    def _search(self, group: Sequence[Site], folding: Folding, tie: NDArray[np.int64] | None) -> SearchedScale:
        seen = _seen_most(group)
        spread = _spread(seen)
        if spread is None or seen.mean_abs is None:
            raise InputError("AWQ needs the Hessian, or the power, and the mean of the inputs")
        weights = [folding.weights[slot] for site in group for slot in site.weights]
        grids = [self.grid_of(site.names[slot]) for site in group for slot in site.weights]
        return search_scale(weights, grids, seen.mean_abs, spread, tie=tie, threads=self.threads)

    def _round(
        self, site: Site, slot: str, weight: NDArray[np.float32], scale: NDArray[np.float32] | None
    ) -> QuantizedTensor:
        importance, spread = None, _spread(site)
        if spread is not None:
            unscaled = np.ones(weight.shape[1], np.float32)
            importance = scaled_power(spread, unscaled if scale is None else scale)
        return round_to_nearest(weight, self.grid_of(site.names[slot]), self.threads, importance=importance)


def _seen_most(group: Sequence[Site]) -> Site:
    """Gives the site with the most tokens: of experts that read the same norm the one that all tokens go to."""
    return max(group, key=lambda site: site.tokens)


def _spread(site: Site) -> NDArray[np.float32] | None:
    """Gives the Hessian, or where only that is known its diagonal; None where no token was seen."""
    if not site.tokens or site.hessian is not None or site.power is None:
        return site.hessian if site.tokens else None
    diagonal: NDArray[np.float32] = (site.power / site.tokens).astype(np.float32)
    return diagonal


def _search_figures(found: SearchedScale | None) -> dict[str, Any]:
    if found is None:
        return {"folded": False}
    return {"folded": True, "alpha": found.alpha, "sampled_loss": found.loss, "unscaled_loss": found.unscaled}


@dataclass(slots=True)
class SmoothMethod:
    """SmoothQuant, layer after layer: scales that even out inputs and weights, then round to nearest.

    Attributes:
        grid_of: name of a weight in the checkpoint -> its grid, int8 per row as a rule.
        threads: workers; the bytes do not depend on it.
        alpha: share of the difficulty that moves from the inputs into the weights.
        head_dim: values per head; without it the attention's output is not scaled where query heads share a value head.
    """

    grid_of: Callable[[str], Grid]
    threads: int = 1
    alpha: float = ALPHA
    head_dim: int | None = None
    sequential: bool = field(default=False, init=False)
    wants: frozenset[str] = field(default=frozenset({"max_abs"}), init=False)

    def quantize(self, sites: Sequence[Site], plain: Mapping[str, Array]) -> SiteResult:
        """Scales and quantizes the weights of a layer.

        Raises:
            InputError: statistics that were not gathered.
            LayoutError: a scale that the stored type cannot hold.
        """
        folding = Folding(sites, plain, self.head_dim)
        folded: dict[str, bool] = {}
        for group in reversed(folding.groups()):

            def search(tie: NDArray[np.int64] | None, group: Sequence[Site] = group) -> NDArray[np.float32]:
                greatest = [site.max_abs for site in group if site.max_abs is not None]
                if not greatest:
                    raise InputError("SmoothQuant needs the greatest inputs")
                weights = [folding.weights[slot] for site in group for slot in site.weights]
                return migration_scale(weights, np.maximum.reduce(greatest), alpha=self.alpha, tie=tie)

            scale = folding.fold(group, search)
            folded |= dict.fromkeys((slot for site in group for slot in site.weights), scale is not None)
        names = {slot: site.names[slot] for site in sites for slot in site.weights}
        quantized = {
            slot: round_to_nearest(folding.weights[slot], self.grid_of(name), self.threads)
            for slot, name in names.items()
        }
        return SiteResult(quantized, folding.changed, {slot: {"folded": folded[slot]} for slot in names})

"""Walks through a model layer by layer with a calibration text and lets a method quantize what it finds.

For a sequential method each step of a layer (q, k and v; attention output; gate and up; down) sees the inputs that the
weights quantized before it give: "true sequential" in the code of Frantar et al. (arXiv 2210.17323). Yet every step is
computed once, because what it leaves is carried on (`layer.State`) instead of being computed anew from the layer's
input.

Each expert sees the tokens that the router sends there, in the layer as it is quantized so far. Experts are looked at
in rounds of as many as there is memory for their statistics; how many that is changes no result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.calibration.activations import ActivationStore
from quantpress.convert.calibration.chain import ChainWriter, Head, remove_chain, saved_inputs
from quantpress.convert.calibration.embedded import first_inputs
from quantpress.convert.calibration.hessian import Statistics, finite
from quantpress.convert.calibration.layer_weights import LayerWeights, ModelWeights
from quantpress.convert.calibration.passes import Pair, Passes
from quantpress.convert.calibration.powers import HeadInput, PowerSums
from quantpress.convert.calibration.rounds import Round, rounds_of
from quantpress.convert.calibration.site import Coded, LayerMethod, LayerResult, Site, SiteResult
from quantpress.convert.calibration.watch import Watch
from quantpress.convert.calibration.windows import windows_sha256
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.layer import DOWN, STEPS, Layer
from quantpress.convert.model import Decoder
from quantpress.convert.preflight import preflight
from quantpress.convert.traits import Place, places_of
from quantpress.quant.errors import InputError, LayoutError

__all__ = ["calibrate"]

Progress = Callable[[int, int], None]
_POWER = frozenset({"power"})
_SHOWN = 4  # names that a message gives of many


def calibrate(
    checkpoint: Checkpoint, windows: Sequence[NDArray[np.int32]], method: LayerMethod, *,
    targets: Callable[[str], bool], threads: int, folder: Path, device: str = "cpu", max_memory: int | None = None,
    precision: str = "f32", first_layer: int = 0, powers: bool = False, embedding: LazyTensor | None = None,
    progress: Progress | None = None,
) -> Iterator[LayerResult]:  # fmt: skip
    """Quantizes a model's layers one after the other.

    Peak memory is the weights of a layer and what the method takes, `max_memory` for activations, what the slices under
    way need, and the statistics of one input or of `rounds.STATISTICS_BYTES` of experts, however many layers, experts
    and windows there are. The results are the same bytes for any number of
    threads, any budget, and wherever a run was resumed.

    Args:
        checkpoint: the model; its tensors are read as exact as they are known, a layer at a time.
        windows: (T,) int32 token ids, all of the same length.
        method: what to make of the layers.
        targets: says of a linear weight's name whether it is to be quantized.
        threads: number of threads to compute with.
        folder: an existing folder for activations that do not fit, which are removed at the end, and for the inputs of
            the layer to come, which stay as long as a run could be resumed from them.
        device: where to compute.
        max_memory: bytes of memory for activations; None for as much as they need.
        precision: of the products of the forward pass and of the statistics, one of `precision.PRECISIONS`.
        first_layer: layer to begin with. If it is not 0, the folder must hold its inputs: see `load_chain`.
        powers: measure the sum of squared inputs of every linear weight and of the head, targets or not:
            `LayerResult.powers`.
        embedding: the token embedding as the quantized model has it, where it is quantized too.
        progress: told the steps that are done and how many there are.

    Yields:
        A result per layer, once the inputs of the next layer are saved. When the caller asks for the next result, it
        must have stored this one: a later run can then begin with the layer after it.

    Raises:
        InputError: the model does not fit its family or lacks a token, activations that are not finite, inputs of
            `first_layer` that are missing or were made otherwise; and what the method says of a weight.
        LayoutError: what the method says of a weight.
        OutputError: activations cannot be written.
    """
    if not windows or len({len(window) for window in windows}) != 1:
        raise InputError("calibration wants at least one window, and all of the same length")
    checked = preflight(checkpoint)
    weights = ModelWeights(checked)
    decoder = Decoder(weights, checked.spec, checked.hyper, device=device)
    length = len(windows[0])
    with Workers(threads) as workers, ActivationStore(folder, len(windows) * length, max_memory) as store:
        both = "drift" in method.wants
        passes = Passes(decoder, store, workers, windows=len(windows), length=length, both=both, precision=precision)
        last = HeadInput.of_model(weights, decoder.device) if powers else None
        walk = _Walk(
            checkpoint.name, decoder, passes, workers, method, targets, precision == "bf16", powers, last, max_memory
        )
        head = Head(len(windows) * length, passes.chain_width, windows_sha256(windows))
        passes.begin(
            saved_inputs(folder, first_layer, head) if first_layer else first_inputs(weights, windows, embedding, both)
        )
        layers, steps = checked.hyper.layers, len(STEPS)
        for number in range(first_layer, layers):
            tell = partial(_tell, progress, (number - first_layer) * steps, (layers - first_layer) * steps)
            chain = ChainWriter(folder, number + 1, head) if number + 1 < layers else None
            yield walk.layer(number, weights.layer(number, decoder.device), chain, tell)
            remove_chain(folder, number)


def _tell(progress: Progress | None, before: int, total: int, steps: int) -> None:
    if progress is not None:
        progress(before + steps, total)


@dataclass
class _Found:
    """What a method has made of a layer so far, by slot."""

    quantized: dict[str, Coded] = field(default_factory=dict)
    changed: dict[str, Array] = field(default_factory=dict)
    reports: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    powers: PowerSums = field(default_factory=PowerSums)
    seconds: float = 0.0

    def add(self, result: SiteResult) -> None:
        self.quantized.update(result.quantized)
        self.changed.update(result.changed)
        self.reports.update(result.reports)


@dataclass(frozen=True)
class _Walk:
    """What stays the same from layer to layer."""

    name: str
    decoder: Decoder
    passes: Passes
    workers: Workers
    method: LayerMethod
    targets: Callable[[str], bool]
    narrow: bool
    powers: bool = False
    head: HeadInput | None = None
    max_memory: int | None = None

    def layer(
        self, number: int, loaded: LayerWeights, chain: ChainWriter | None, tell: Callable[[int], None]
    ) -> LayerResult:
        """Quantizes a layer, and leaves the next one's inputs unless it is the last one."""
        pair = self._pair(number, loaded)
        found, sites, finished = _Found(), list[Site](), 0
        self.workers.take_seconds()
        for each in self._rounds(number, loaded):
            after = each.step - 1 if each.step > finished else None
            finished = each.step
            tell(each.step)
            sites += self._sites(pair, loaded, after, each, found)  # no name: a Hessian would outlive the next pass
            if sites and self.method.sequential:
                result = self._quantize(sites, loaded, found)
                loaded.apply(result.quantized, result.changed)
                pair = self._again(pair, loaded, result)
        if sites:
            self._quantize(sites, loaded, found)  # not applied: the next layer sees what the source's weights give
        if chain is not None:
            with chain:
                self.passes.run(pair, after=DOWN, chain=chain)
        elif self.head is not None:
            self._head_power(pair, self.head, found)
        tell(len(STEPS))
        return self._result(number, loaded, found)

    def _rounds(self, number: int, loaded: LayerWeights) -> list[Round]:
        """Gives what is looked at together, at least one round for each step."""
        places = places_of(self.decoder.traits(number))
        return rounds_of(
            places, self.decoder.hyper.dims, self.method, lambda slot: self.targets(loaded.name(slot)),
            powers=self.powers, max_memory=self.max_memory,
        )  # fmt: skip

    def _pair(self, number: int, loaded: LayerWeights) -> Pair:
        """Gives the layer as it is now, and if the method wants drift the same with the source's weights."""

        def of(weights: Mapping[str, torch.Tensor]) -> Layer:
            attention = torch.bfloat16 if self.narrow else None
            return Layer(number, self.decoder.traits(number), self.decoder.hyper, weights, attention_type=attention)

        layer = of(loaded.narrow(loaded.values) if self.narrow else loaded.values)
        if "drift" not in self.method.wants:
            return Pair(layer)
        return Pair(layer, layer if self.narrow else of(loaded.copies(self.targets)))

    def _again(self, pair: Pair, loaded: LayerWeights, result: SiteResult) -> Pair:
        """Gives the layer with what `apply` has changed; that of the source stays."""
        if not self.narrow:
            return pair  # computes with `loaded.values`, which `apply` overwrites
        weights = {**pair.layer.weights, **loaded.narrow((*result.quantized, *result.changed))}
        return replace(pair, layer=replace(pair.layer, weights=weights))

    def _head_power(self, pair: Pair, head: HeadInput, found: _Found) -> None:
        """Finishes the last layer and measures what the head sees of it."""
        statistics = Statistics(_POWER, head.columns, self.decoder.device)
        self.passes.run(pair, after=DOWN, watch=Watch.hidden(head.of, statistics))
        seen = statistics.finish(partial(self.workers.submit, "hessian"))
        if not finite(seen):
            raise InputError(f"{self.name}: {head.name}: its inputs are not finite")
        found.powers.add(head.name, seen["power"], statistics.tokens)

    def _sites(self, pair: Pair, loaded: LayerWeights, after: int | None, each: Round, found: _Found) -> Iterator[Site]:
        """Finishes the step before and looks at the inputs of places; gives those that have something to quantize."""
        dims, device = self.decoder.hyper.dims, self.decoder.device
        more = _POWER if self.powers else frozenset()
        statistics = [
            Statistics(each.wants[place] | more, dims[place.columns], device, narrow=self.narrow)
            for place in each.places
        ]
        if statistics or after is not None:
            watch = Watch.of(each.places, statistics) if statistics else None
            self.passes.run(pair, after=after, step=each.step, watch=watch)
        for place in each.places:
            site = self._site(pair.layer.index, loaded, place, each.wants[place], statistics.pop(0), found)
            if site is not None:
                yield site

    def _site(
        self, layer: int, loaded: LayerWeights, place: Place, wants: frozenset[str], statistics: Statistics,
        found: _Found,
    ) -> Site | None:  # fmt: skip
        names = {slot: loaded.name(slot) for slot in place.slots}
        chosen = [slot for slot in place.slots if self.targets(names[slot])]
        seen = statistics.finish(partial(self.workers.submit, "hessian"))
        if not finite(seen):
            slot = (chosen or place.slots)[0]
            where = f"layer {layer}: {slot} ({shown(names[slot])})"
            raise InputError(f"{self.name}: {where}: its inputs are not finite")
        if self.powers:
            found.powers.of_place(layer, place, seen["power"], statistics.tokens)
            if "power" not in wants:
                del seen["power"]
        if not chosen and not wants:
            return None
        routers = tuple(slot for slot in place.slots if loaded.is_router(slot))
        return Site(
            layer=layer,
            weights={slot: loaded.weight(slot) for slot in chosen},
            names={slot: names[slot] for slot in chosen},
            tokens=statistics.tokens,
            **seen,
            before=place.before,
            routers=routers,
            left={slot: loaded.weight(slot) for slot in place.slots if slot not in (*chosen, *routers)},
            read_back=loaded.read_back,
        )

    def _quantize(self, sites: list[Site], loaded: LayerWeights, found: _Found) -> SiteResult:
        """Lets the method work on sites, and forgets them."""
        started = time.perf_counter()
        try:
            result = self.method.quantize(sites, loaded.plain())
        except (InputError, LayoutError) as error:
            names = _few([shown(name) for site in sites for name in site.names.values()])
            raise type(error)(f"{self.name}: layer {sites[0].layer}: {names}: {error}") from error
        found.add(result)
        found.seconds += time.perf_counter() - started
        sites.clear()
        return result

    def _result(self, number: int, loaded: LayerWeights, found: _Found) -> LayerResult:
        seconds = self.workers.take_seconds()
        return LayerResult(
            layer=number,
            quantized=dict(loaded.stored_codes(found.quantized)),
            changed=dict(loaded.stored_plain(found.changed)),
            reports={loaded.name(slot): report for slot, report in found.reports.items()},
            seconds={
                "forward": seconds.get("forward", 0.0),
                "hessian": seconds.get("hessian", 0.0),
                "quantize": found.seconds,
            },
            powers=found.powers.sums,
            counts=found.powers.counts,
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")

"""Walks through a model layer by layer with a calibration text and lets a method quantize what it finds.

For a sequential method each step of a layer (q, k and v; attention output; gate and up; down) sees the inputs that the
weights quantized before it give: "true sequential" in the code of Frantar et al. (arXiv 2210.17323). Yet every step is
computed once, because what it leaves is carried on (`layer.State`) instead of being computed anew from the layer's
input.
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
from quantpress.convert.calibration.chain import ChainWriter, Head, load_chain, remove_chain
from quantpress.convert.calibration.embedded import embedded
from quantpress.convert.calibration.hessian import Statistics, finite
from quantpress.convert.calibration.layer_weights import LayerWeights, ModelWeights
from quantpress.convert.calibration.passes import Pair, Passes
from quantpress.convert.calibration.powers import HeadInput
from quantpress.convert.calibration.site import Coded, LayerMethod, LayerResult, Site, SiteResult
from quantpress.convert.calibration.windows import windows_sha256
from quantpress.convert.calibration.workers import Workers
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.gguf.importance_names import layer_name
from quantpress.convert.layer import DOWN, QKV, STEPS, Layer, steps_of
from quantpress.convert.model import Decoder
from quantpress.convert.preflight import preflight
from quantpress.quant.errors import InputError, LayoutError

__all__ = ["calibrate"]

Progress = Callable[[int, int], None]
_POWER = frozenset({"power"})


def calibrate(
    checkpoint: Checkpoint, windows: Sequence[NDArray[np.int32]], method: LayerMethod, *,
    targets: Callable[[str], bool], threads: int, folder: Path, device: str = "cpu", max_memory: int | None = None,
    precision: str = "f32", first_layer: int = 0, powers: bool = False, embedding: LazyTensor | None = None,
    progress: Progress | None = None,
) -> Iterator[LayerResult]:  # fmt: skip
    """Quantizes a model's layers one after the other.

    Peak memory is the weights of a layer and what the method takes, `max_memory` for activations, and what the slices
    under way need, however many layers and windows there are. The results are the same bytes for any number of
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
        last = HeadInput(weights, decoder.device) if powers else None
        walk = _Walk(checkpoint.name, decoder, passes, workers, method, targets, precision == "bf16", last)
        head = Head(len(windows) * length, passes.chain_width, windows_sha256(windows))
        passes.begin(_saved(folder, first_layer, head) if first_layer else _first(weights, windows, embedding, both))
        layers, steps = checked.hyper.layers, len(STEPS)
        for number in range(first_layer, layers):
            tell = partial(_tell, progress, (number - first_layer) * steps, (layers - first_layer) * steps)
            chain = ChainWriter(folder, number + 1, head) if number + 1 < layers else None
            yield walk.layer(number, weights.layer(number, decoder.device), chain, tell)
            remove_chain(folder, number)


def _tell(progress: Progress | None, before: int, total: int, steps: int) -> None:
    if progress is not None:
        progress(before + steps, total)


def _first(
    weights: ModelWeights, windows: Sequence[NDArray[np.int32]], embedding: LazyTensor | None, both: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Gives the first layer's inputs; where two streams begin otherwise, side by side."""
    device = torch.device("cpu")
    inputs = embedded(weights, windows, device, embedding)
    if embedding is None or not both:
        yield from inputs
        return
    for (start, values), (_, own) in zip(inputs, embedded(weights, windows, device), strict=True):
        yield start, torch.cat((values, own), dim=1)


def _saved(folder: Path, layer: int, head: Head) -> Iterator[tuple[int, torch.Tensor]]:
    chain = load_chain(folder, layer)
    if chain is None:
        raise InputError(f"{folder}: the inputs of layer {layer} are missing or damaged; start anew")
    if chain.head != head:
        raise InputError(f"{folder}: the inputs of layer {layer} are {chain.head}, wanted {head}; start anew")
    return chain.rows()


@dataclass
class _Found:
    """What a method has made of a layer so far, by slot."""

    quantized: dict[str, Coded] = field(default_factory=dict)
    changed: dict[str, Array] = field(default_factory=dict)
    reports: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    powers: dict[str, NDArray[np.float64]] = field(default_factory=dict)
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
    head: HeadInput | None = None

    def layer(
        self, number: int, loaded: LayerWeights, chain: ChainWriter | None, tell: Callable[[int], None]
    ) -> LayerResult:
        """Quantizes a layer, and leaves the next one's inputs unless it is the last one."""
        pair = self._pair(number, loaded)
        found, sites = _Found(), list[Site]()
        self.workers.take_seconds()
        for step in STEPS:
            tell(step)
            sites += self._site(pair, loaded, step, found)  # no name for it, or its Hessian would outlive the next pass
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
            found.powers[self.head.name] = self._head_power(pair, self.head)
        tell(len(STEPS))
        return self._result(number, loaded, found)

    def _pair(self, number: int, loaded: LayerWeights) -> Pair:
        """Gives the layer as it is now, and if the method wants drift the same with the source's weights."""

        def of(weights: Mapping[str, torch.Tensor]) -> Layer:
            attention = torch.bfloat16 if self.narrow else None
            return Layer(number, self.decoder.traits, self.decoder.hyper, weights, attention_type=attention)

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

    def _head_power(self, pair: Pair, head: HeadInput) -> NDArray[np.float64]:
        """Finishes the last layer and measures what the head sees of it."""
        statistics = Statistics(_POWER, self.passes.widths[QKV], self.decoder.device)
        self.passes.run(pair, after=DOWN, statistics=statistics, head=head.of)
        seen = statistics.finish(partial(self.workers.submit, "hessian"))
        if not finite(seen):
            raise InputError(f"{self.name}: {head.name}: its inputs are not finite")
        return seen["power"]

    def _site(self, pair: Pair, loaded: LayerWeights, step: int, found: _Found) -> tuple[Site, ...]:
        """Finishes the step before and looks at the inputs of a step; gives nothing where there is no target."""
        slots = steps_of(self.decoder.traits)[step]
        names = {slot: loaded.name(slot) for slot in slots}
        chosen = [slot for slot in slots if self.targets(names[slot])]
        wants = (self.method.wants if chosen else frozenset()) | (_POWER if self.head is not None else frozenset())
        statistics = None
        if chosen or wants:
            statistics = Statistics(wants, self.passes.widths[step], self.decoder.device, narrow=self.narrow)
        after = step - 1 if step else None
        if statistics is not None or after is not None:
            self.passes.run(pair, after=after, step=step, statistics=statistics)
        if statistics is None:
            return ()
        seen = statistics.finish(partial(self.workers.submit, "hessian"))
        if not finite(seen):
            slot = (chosen or slots)[0]
            where = f"layer {pair.layer.index}: {slot} ({shown(names[slot])})"
            raise InputError(f"{self.name}: {where}: its inputs are not finite")
        if self.head is not None:
            power = seen["power"] if "power" in self.method.wants else seen.pop("power")
            found.powers |= {layer_name(pair.layer.index, slot): power for slot in slots}
        if not chosen:
            return ()
        site = Site(
            layer=pair.layer.index,
            weights={slot: loaded.weight(slot) for slot in chosen},
            names={slot: names[slot] for slot in chosen},
            tokens=statistics.tokens,
            **seen,
            left={slot: loaded.weight(slot) for slot in slots if slot not in chosen},
            read_back=loaded.read_back,
        )
        return (site,)

    def _quantize(self, sites: list[Site], loaded: LayerWeights, found: _Found) -> SiteResult:
        """Lets the method work on sites, and forgets them."""
        started = time.perf_counter()
        try:
            result = self.method.quantize(sites, loaded.plain())
        except (InputError, LayoutError) as error:
            names = ", ".join(shown(name) for site in sites for name in site.names.values())
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
            powers=found.powers,
        )

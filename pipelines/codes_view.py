"""A model whose weights are codes that lie in no checkpoint: kept in a folder of ours, or found when they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.kept_codes import FORMAT
from quantpress.convert.quantized import LazyQuantized, PackFormat, with_quantized
from quantpress.pipelines.quantize_codes import WeightsJob
from quantpress.pipelines.quantize_plan import PlannedWeight
from quantpress.pipelines.quantize_recipe import Recipe
from quantpress.pipelines.quantize_stage import Quantize
from quantpress.pipelines.quantize_weights import made
from quantpress.quant.errors import UsageError
from quantpress.quant.qtensor import QuantizedTensor

__all__ = ["Codes", "found_when_read", "unread", "view_with"]


@dataclass(frozen=True, kw_only=True)
class Codes(Quantize):
    """The stage `quantize` as it is asked for codes alone, which something else writes.

    Attributes:
        made_for: what the codes are for; a finished layer belongs to a run with the same options only.
    """

    name: ClassVar[str] = "codes"
    version: ClassVar[int] = 1

    made_for: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, source: Checkpoint) -> Recipe:
        """Gives the settings of the weights.

        Raises:
            UsageError: the model has codes already.
        """
        if source.quantized and source.adapted is None:
            origin = source.codes_origin
            kind = source.format if origin is None else f"by {origin.details['method']}"
            raise UsageError(
                f"--method {self.method}: {source.name} is quantized already ({kind}), and its codes are kept as they"
                " are; to quantize anew give the model it was made from"
            )
        return super().recipe(source)

    def pack_format(self, recipe: Recipe) -> PackFormat:
        """Gives a format that holds all that is made."""
        del recipe
        return FORMAT


def view_with(
    job: WeightsJob,
    parts: Mapping[str, LazyTensor],
    codes: Callable[[PlannedWeight], LazyQuantized],
    *,
    dtype: str,
) -> Checkpoint:
    """Gives a model whose weights are codes.

    Args:
        job: the model and what was planned for it.
        parts: plain tensors that have changed, by name; others are passed over.
        codes: gives a weight's codes.
        dtype: type that the weights have for who reads them plainly.
    """
    source, weights = job.source, job.weights.weights
    plain = {name: parts.get(name, tensor) for name, tensor in source.tensors.items() if name not in weights}
    quantized = {name: codes(weight) for name, weight in weights.items()}
    view = with_quantized(source, plain, quantized, dtype=dtype, kind=source.format)
    return dataclasses.replace(view, tensors={name: view.tensors[name] for name in source.tensors})


def found_when_read(
    job: WeightsJob, weight: PlannedWeight, threads: int, reports: dict[str, Mapping[str, Any]] | None = None
) -> LazyQuantized:
    """Gives a weight whose codes a method that needs no text finds whenever they are read.

    Args:
        job: says how.
        weight: of the source.
        threads: workers; the codes do not depend on it.
        reports: takes in what the method says of the weight.
    """

    def read() -> QuantizedTensor:
        codes, report = made(weight, job.recipe, threads)
        if reports is not None:
            reports[weight.name] = report
        return codes

    return LazyQuantized(weight.name, weight.form, weight.tensor.source, read)


def unread(weight: PlannedWeight) -> LazyQuantized:
    """Gives a weight whose form is known and whose codes are not there yet."""

    def read() -> QuantizedTensor:
        raise AssertionError(f"{weight.name} is planned only")

    return LazyQuantized(weight.name, weight.form, weight.tensor.source, read)

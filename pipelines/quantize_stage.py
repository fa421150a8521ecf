"""Writes a checkpoint whose linear weights are quantized, in a format that transformers and vLLM load."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.quantized import PackFormat
from quantpress.pipelines.job_stage import JobStage
from quantpress.pipelines.quantize_formats import find_format
from quantpress.pipelines.quantize_job import QuantizeJob
from quantpress.pipelines.quantize_plan import own_scale_type
from quantpress.pipelines.quantize_recipe import CALIBRATED, Asked, Recipe, fill_recipe, scale_type_of
from quantpress.quant.errors import UnknownFamilyError, UsageError
from quantpress.quant.grid import Grid

_DEFAULT_METHOD = "gptq"
_GRID_OPTIONS = (
    "bits", "group_size", "symmetric", "clip_search", "activation_bits", "skip", "override", "calibration",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Quantize(JobStage):
    """Options of the stage; None where it depends on others, see `fill_recipe`.

    Attributes:
        output: the folder; may hold `{ftype}` and `{name}`.
        method: "rtn", "hqq", "gptq", "awq", "smoothquant" or "llm_int8"; None: GPTQ, or of a quantized source the
            codes as they are.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; -1 for a whole row.
        symmetric: no zeros are stored.
        format: "gptq", "gptq_v2", "awq", "compressed-tensors" or "bitsandbytes".
        scale_type: "F16", "BF16" or "F32".
        clip_search: choose ranges by squared error.
        activation_bits: 8 to have inputs rounded too.
        skip: regular expressions of weights that stay as they are.
        override: `REGEX=key:value,...`; the first that is found wins.
        calibration: UTF-8 text; None for the built-in one.
        samples, sequence_length, seed: windows of that text.
        act_order, damping: of GPTQ.
        drift: share of the inputs' drift that GPTQ makes up for, 0 takes half the time; None: all of it where that is
            a matter of seconds, as it is for small models, else nothing; nothing at 8 bits.
        calibration_dtype: "f32" or "bf16", how products of the calibration are computed; None: bf16 where the
            processor has units for it.
    """

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = 2

    output: Path
    method: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    format: str | None = None
    scale_type: str | None = None
    clip_search: bool | None = None
    activation_bits: int | None = None
    skip: tuple[str, ...] = ()
    override: tuple[str, ...] = ()
    calibration: Path | None = None
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    act_order: bool = True
    damping: float = 0.01
    drift: float | None = None
    calibration_dtype: str | None = None

    @property
    def runs_model(self) -> bool:
        """Whether the model is run on a device before anything can be written."""
        return self.method is None or self.method in CALIBRATED

    def resolved(self, source: Checkpoint) -> Quantize:
        """Fills in what depends on the source.

        Raises:
            UsageError: options that do not go together.
            UnknownFamilyError: a method that runs the model, and there is no table for it.
        """
        recipe = self.recipe(source)
        if recipe.method is None:
            return dataclasses.replace(self, format=recipe.format, scale_type=recipe.grid.scale_type)
        grid = recipe.grid
        filled = dataclasses.replace(
            self,
            method=recipe.method,
            bits=grid.bits,
            group_size=grid.group_size,
            symmetric=grid.symmetric,
            format=recipe.format,
            scale_type=grid.scale_type,
            clip_search=grid.clip_search,
            activation_bits=recipe.input_bits,
        )
        if recipe.method not in CALIBRATED:
            if self.calibration is not None:
                raise UsageError(f"--calibration {self.calibration}: --method {recipe.method} reads no text")
            return filled
        from quantpress.pipelines.quantize_calibration import chosen_precision, sequence_length

        try:
            length = sequence_length(source, self.sequence_length)
        except UnknownFamilyError as error:
            raise UnknownFamilyError(
                f"{source.name}: {error}; --method {recipe.method} runs the model, which --method rtn and hqq need not"
            ) from error
        drift = self._drift(source) if recipe.method == "gptq" else None
        precision = chosen_precision(self.calibration_dtype)
        return dataclasses.replace(filled, sequence_length=length, drift=drift, calibration_dtype=precision)

    def _drift(self, source: Checkpoint) -> float:
        """Gives the share of drift that GPTQ makes up for."""
        from quantpress.pipelines.quantize_calibration import drift_share

        if self.drift is None and self.bits == 8:
            return 0.0  # so little drift that it is lost among what bfloat16 rounds, which would be made up for too
        return drift_share(source, self)

    def recipe(self, source: Checkpoint) -> Recipe:
        """Gives the settings of the weights.

        Raises:
            UsageError: options that do not go together.
        """
        if source.quantized and source.adapted is None:
            return self._repacking(source)
        asked = Asked(
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            scale_type=self.scale_type,
            clip_search=self._clip_search(source),
            form=self.format,
            input_bits=self.activation_bits,
            skip=self.skip,
            overrides=self.override,
        )
        return fill_recipe(self.method or _DEFAULT_METHOD, asked, own_scale_type(source))

    def pack_format(self, recipe: Recipe) -> PackFormat:
        """Gives the format that the weights are packed in."""
        return find_format(recipe.format)

    def _clip_search(self, source: Checkpoint) -> bool | None:
        """GPTQ gains from a clip search where it makes up for drift, and not where it does not."""
        if self.clip_search is None and (self.method or _DEFAULT_METHOD) == "gptq":
            return self._drift(source) > 0
        return self.clip_search

    def _repacking(self, source: Checkpoint) -> Recipe:
        found = f"{source.name} is quantized already ({source.format})"
        if self.method is not None:
            raise UsageError(
                f"--method {self.method}: {found}; without --method its codes are written in another --format as they"
                " are, and to quantize anew give the model it was made from"
            )
        given = [name for name in _GRID_OPTIONS if getattr(self, name) not in (None, ())]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')}: {found}, and its codes are kept as they are")
        if self.format is None:
            raise UsageError(f"{found}; give the --format that its codes are to be written in")
        find_format(self.format)
        kept = next(iter(source.quantized.values())).form.scale_type
        return Recipe(None, self.format, Grid(scale_type=self.scale_type or scale_type_of(self.format, kept)))

    def job(self, source: Checkpoint) -> QuantizeJob:
        """Gives the job of this stage on a source."""
        return QuantizeJob(self.resolved(source), source)

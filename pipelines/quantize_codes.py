"""The weights of one model on their way to codes: what is planned for them, what that takes, and the work itself."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.experts_apart import experts_apart
from quantpress.convert.preflight import Preflight, preflight
from quantpress.pipelines.default_text import BUILT_IN_NOTE
from quantpress.pipelines.hashing import hash_file
from quantpress.pipelines.machine import peak_memory
from quantpress.pipelines.merge_stage import merge_records
from quantpress.pipelines.quantize_plan import main_type, plan_weights
from quantpress.pipelines.quantize_recipe import CALIBRATED
from quantpress.pipelines.safetensors_stage import checked_or_unknown
from quantpress.pipelines.sidecar import environment
from quantpress.pipelines.spool import Spool
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import UnknownFamilyError

if TYPE_CHECKING:
    from quantpress.pipelines.quantize_calibration import Calibration
    from quantpress.pipelines.quantize_stage import Quantize

__all__ = ["WeightsJob", "hashed"]

_QUIET = ("head", "--skip", "not quantized in the source", "not a part that is quantized")
_PLACES = ("output", "calibration")  # options that say where something lies, not what it is


class WeightsJob:
    """Options with the model whose weights they are for.

    Attributes:
        stage: with every default filled in.
        source: the model.
        recipe: what the weights become.
        format: how codes are packed.
        checked: the model's table, or why there is none.
        weights: what is quantized, and why others are not.
    """

    def __init__(self, stage: Quantize, source: Checkpoint) -> None:
        """Plans; reads headers only.

        Args:
            stage: with every default filled in.
            source: the model.

        Raises:
            QuantpressError: the source cannot be quantized in this way.
        """
        self.stage = stage
        self.recipe = stage.recipe(source)
        self.format = stage.pack_format(self.recipe)
        self.source, self.checked = _with_single_experts(source)
        self.weights = plan_weights(self.source, self.recipe, self.format)

    @property
    def ftype(self) -> str:
        """Name of what most values are quantized to."""
        return main_type(self.weights.forms.values())

    @property
    def judged_as(self) -> str:
        """Type whose parity limits hold for what keeps the codes."""
        if self.recipe.format == "bitsandbytes" or self.ftype == "w8a8":
            return "W8A8"  # inputs are rounded, also where codes are kept
        return self.ftype.upper() if self.recipe.method is not None else "F32"

    @property
    def hyper(self) -> Hyperparameters:
        """Sizes of a model of a known family."""
        assert isinstance(self.checked, Preflight), "methods that go by layers are refused for unknown families"
        return self.checked.hyper

    @property
    def details(self) -> dict[str, Any]:
        """How the codes are made, as `PackFormat.settings` wants it; what is not known is left out."""
        method, origin = self.recipe.method, self.source.codes_origin
        if method is None:
            return {} if origin is None else dict(origin.details)
        if method != "gptq":
            return {"method": method}
        order, damping = self.stage.act_order, self.stage.damping
        return {"method": method, "act_order": order, "damping": damping, "true_sequential": True}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know beforehand."""
        notes = [] if isinstance(self.checked, Preflight) else [f"{self.checked}; weights are told by their names"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.weights.left.items():
            if reason not in _QUIET:
                reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            many = f"{len(names)} weights stay as they are, first {names[0]}"
            notes.append(f"{many if len(names) > 1 else f'{names[0]} stays as it is'}: {reason}")
        if self.recipe.method in CALIBRATED and self.stage.calibration is None:
            notes.append(BUILT_IN_NOTE)
        return tuple(notes)

    @property
    def packed_bytes(self) -> int:
        """Bytes of all packed weights."""
        return sum(weight.nbytes for weight in self.weights.weights.values())

    def needs(self) -> tuple[int, int]:
        """Estimates bytes of memory, and of temporary files beside the packed weights."""
        if self.recipe.method in CALIBRATED:
            from quantpress.pipelines.quantize_calibration import needs

            return needs(self.source, self.stage)
        # codes as bytes, their words, and of what is stored as (K, N) the values in float32
        held = (weight.tensor.size * (6 if weight.transposed else 2) for weight in self.weights.weights.values())
        return peak_memory(max(held)), 0

    def calibration(self) -> Calibration | None:
        """Reads and cuts the text; None for a method that reads none.

        Raises:
            InputError: the text or the tokenizer cannot be used, or the text is too short for one window.
        """
        if self.recipe.method not in CALIBRATED:
            return None
        from quantpress.pipelines.quantize_calibration import Calibration

        return Calibration.of(self.source, self.stage)

    def quantize(self, spool: Spool, context: RunContext, calibration: Calibration | None) -> None:
        """Quantizes the weights that the spool lacks, and keeps them there.

        Raises:
            InputError, LayoutError: what the method says of a weight.
            OutputError: the disk is full.
        """
        if calibration is None:
            from quantpress.pipelines.quantize_weights import quantize_weights

            quantize_weights(self.source, self.weights, self.recipe, self.format, spool, context)
        else:
            from quantpress.pipelines.quantize_layers import quantize_layers

            quantize_layers(self, calibration, spool, context)

    def described(self, context: RunContext) -> dict[str, Any]:
        """Gives all that the codes depend on but the contents of the source's files."""
        described = dict(self.stage.describe())
        options = {name: value for name, value in described["options"].items() if name not in _PLACES}
        text, origin = self.stage.calibration, self.source.codes_origin
        return {
            **described,
            "options": options,
            "merged": merge_records(self.source),
            "calibration": None if text is None else hash_file(text)[0],
            "environment": environment(context.device),
            "codes": None if origin is None else origin.key,
        }


def hashed(record: dict[str, Any]) -> str:
    """Gives the SHA-256 of plain values, in hexadecimal."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _with_single_experts(source: Checkpoint) -> tuple[Checkpoint, Preflight | UnknownFamilyError]:
    """Gives the model with its experts one by one, as formats store them, and its table."""
    checked = checked_or_unknown(source)
    if isinstance(checked, UnknownFamilyError):
        return source, checked
    apart = experts_apart(source, checked)
    return (source, checked) if apart is source else (apart, preflight(apart))

"""Which base a QLoRA adapter is merged into: the model's own weights, or what the 4-bit training saw of them.

The adapter learned to correct a base that had been rounded to 4 bits. Merged into the weights before that rounding, it
corrects errors that are not there; merged into the rounded ones, the model keeps the rounding for good. Neither is
better for every model, so "auto" measures both against the model as it was trained: the dequantized base with the
adapter run beside it, unmerged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from quantpress.convert.bitsandbytes import QUANTIZED_TYPES
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import MAX_SMALL_FILE, inside, read_bounded
from quantpress.convert.hf_folder import MODEL_CARD
from quantpress.convert.qlora import dequantized_base, detect_training_quantization
from quantpress.pipelines.merge_stage import run_lazy
from quantpress.pipelines.sidecar import rounded
from quantpress.pipelines.stage import RunContext, Stage
from quantpress.quant.errors import ParityError, UsageError

if TYPE_CHECKING:
    from quantpress.convert.lora.adapter import Adapter
    from quantpress.pipelines.judging import JudgeOptions
    from quantpress.pipelines.verification import Reference

__all__ = ["BASES", "QloraBase", "adapter_texts", "base_stages", "choose_base", "qlora_notes"]

log = logging.getLogger(__name__)

BASES = ("fp16", "dequantized")


@dataclass(frozen=True, kw_only=True)
class QloraBase(Stage):
    """Options of the stage that stands before the adapters.

    Attributes:
        base: "fp16", the weights as they are, or "dequantized", as the training saw them.
        quant_type: "nf4", "fp4" or "int8", the training's type.
        double_quant: whether the training's scales were quantized too.
        fp16_kld, dequantized_kld: what was measured for this choice, mean KL divergence in nats per token from the
            model as it was trained; None where nothing was.
    """

    name: ClassVar[str] = "qlora_base"
    version: ClassVar[int] = 1

    base: str
    quant_type: str = "nf4"
    double_quant: bool = True
    fp16_kld: float | None = None
    dequantized_kld: float | None = None

    def run(self, source: Checkpoint, context: RunContext) -> Checkpoint:
        """Gives the base; reads headers only.

        Raises:
            UsageError: `base` is neither of the two, or the model has no other weights than quantized ones.
        """
        del context
        if self.base not in BASES:
            raise UsageError(f"qlora_base: base is {self.base!r}, wanted one of {', '.join(BASES)}")
        if self.base == "fp16":
            return source
        return dequantized_base(source, quant_type=self.quant_type, double_quant=self.double_quant)

    def summary(self) -> str:
        """What was measured and taken, in one line."""
        if self.fp16_kld is None or self.dequantized_kld is None:
            return f"merged into the {self.base} base"
        return (
            f"merged into the {self.base} base: mean KL divergence from the model as it was trained is"
            f" {self.fp16_kld:.3g} on the fp16 base and {self.dequantized_kld:.3g} on the dequantized one"
        )


def base_stages(
    source: Checkpoint,
    base: str | None,
    measure: Callable[[], QloraBase],
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
) -> list[QloraBase]:
    """Gives the stage that stands before the adapters, or none where the model is taken as it is.

    Args:
        source: the model.
        base: "fp16", "dequantized", "auto" or None, which is "fp16" without being asked for.
        measure: makes the choice of "auto"; see `choose_base`.
        quant_type: "nf4", "fp4" or "int8".
        double_quant: whether the training's scales were quantized too.

    Raises:
        UsageError: "fp16" of a model that bitsandbytes quantized: its 16-bit weights are not there.
    """
    kinds = sorted(set(source.storage_types.values()) & QUANTIZED_TYPES)
    if kinds:
        if base == "fp16":
            raise UsageError(
                f"--qlora-base fp16: {source.name} holds {' and '.join(kinds)} weights by bitsandbytes, its 16-bit"
                " weights are not there; give the model that was quantized, or --qlora-base dequantized"
            )
        log.info("%s: quantized by bitsandbytes; its dequantized values are the base", source.name)
        return []
    if base == "auto":
        return [measure()]
    return [] if base is None else [QloraBase(base=base, quant_type=quant_type, double_quant=double_quant)]


def qlora_notes(source: Checkpoint) -> tuple[str, ...]:
    """Says which adapters of a merged checkpoint look as if they had been trained on a quantized base that is not here.

    For runs in which nobody said what base is meant.
    """
    if source.adapted is None or set(source.storage_types.values()) & QUANTIZED_TYPES:
        return ()
    notes = []
    for each in source.adapted.applied:
        kind = detect_training_quantization(each.adapter.config.raw, adapter_texts(each.adapter))
        if kind is not None:
            notes.append(
                f"{each.adapter.name}: seems to have been trained on a base that bitsandbytes held as {kind}, and was"
                " merged into the model's own weights; --qlora-base auto measures which of the two fits better"
            )
    return tuple(dict.fromkeys(notes))


def adapter_texts(adapter: Adapter) -> dict[str, bytes]:
    """The model card beside an adapter, where trainers write down how the base was loaded."""
    card = inside(adapter.files[0].path.parent, MODEL_CARD) if adapter.files else None
    return {MODEL_CARD: read_bounded(card, MAX_SMALL_FILE)} if card is not None and card.is_file() else {}


def choose_base(
    source: Checkpoint,
    adapters: Sequence[Stage],
    context: RunContext,
    judge: JudgeOptions,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
) -> QloraBase:
    """Merges into both bases, runs both, and takes the one that speaks more like the model as it was trained.

    Args:
        source: the model, in 16 or 32 bit.
        adapters: the stages that merge.
        context: what the run may use.
        judge: text, windows and device; limits are not used.
        quant_type: "nf4", "fp4" or "int8".
        double_quant: whether the training's scales were quantized too.

    Raises:
        InputError: the text cannot be used, or adapter and base do not fit.
        ParityError: nothing could be measured, or values are not finite.
    """
    from quantpress.pipelines.verification import Reference

    stages = {name: QloraBase(base=name, quant_type=quant_type, double_quant=double_quant) for name in BASES}
    merged = {name: run_lazy(source, [stage, *adapters], context) for name, stage in stages.items()}
    reference = Reference(merged["dequantized"], judge, context.progress)
    klds = {name: _mean_kld(reference, checkpoint, judge, context, name) for name, checkpoint in merged.items()}
    chosen = QloraBase(
        base=min(BASES, key=lambda name: klds[name]),
        quant_type=quant_type,
        double_quant=double_quant,
        fp16_kld=rounded(klds["fp16"]),
        dequantized_kld=rounded(klds["dequantized"]),
    )
    log.info("%s", chosen.summary())
    return chosen


def _mean_kld(reference: Reference, merged: Checkpoint, judge: JudgeOptions, context: RunContext, name: str) -> float:
    """Mean KL divergence of a merged model from the reference, on the reference's windows, in torch."""
    from quantpress.pipelines.parity import compare
    from quantpress.pipelines.torch_runtime import TorchRuntime

    windows, first = reference.windows, reference.context // 2
    reference.runtime.prepare(windows, first, progress=partial(context.progress, "trained base + adapter"))
    with TorchRuntime.of_checkpoint(merged, device=judge.device, max_memory=judge.max_memory) as candidate:
        candidate.prepare(windows, first, progress=partial(context.progress, f"{name} base"))
        parity = compare(
            reference.runtime,
            candidate,
            windows,
            judge.limits("F32", merged.parameters),
            text_sha256=reference.text.sha256,
            vocabulary=reference.vocabulary,
        )
    if not parity.tokens:
        raise ParityError(f"--qlora-base auto: the {name} base could not be measured: {parity.reason}")
    return parity.mean_kld

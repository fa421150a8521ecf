"""What files are judged with, by the kind of the source: a decoder's next tokens, an encoder's vectors."""

from __future__ import annotations

from typing import TypeAlias

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.encoder_reference import EncoderReference
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.reference import Reference

__all__ = ["AnyReference", "reference_for"]

AnyReference: TypeAlias = Reference | EncoderReference


def reference_for(source: Checkpoint, options: JudgeOptions, progress: Progress = no_progress) -> AnyReference:
    """Makes a source ready for judging.

    Args:
        source: the model; where adapters were merged into it, the yardstick is its base with them beside it.
        options: how to judge.
        progress: told how far the work has come.

    Raises:
        InputError: the text or the tokenizer cannot be used, the family is not known, or base and adapters cannot be
            run unmerged.
        UsageError: the windows are longer than the model was made for.
    """
    if find_arch(source.config).kind == "encoder":
        return EncoderReference(source, options, progress)
    return Reference(source, options, progress)

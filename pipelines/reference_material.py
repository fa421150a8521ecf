"""What the hidden states that a judge keeps of a source depend on, beside the source itself; found without torch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.windows import read_text, window_sizes

__all__ = ["reference_material", "shareable_base", "sized"]

_FORM = 1  # raised when other figures, or figures in another form, are kept


def reference_material(judge: JudgeOptions, source: Checkpoint) -> dict[str, Any]:
    """Gives what kept states depend on, for a key; limits and the candidate's runtime are not among it.

    Args:
        judge: how files are to be judged.
        source: the model, adapted or not; what its files hold is not in the result.

    Raises:
        InputError: the text cannot be read, or the model is of no known family.
        UsageError: the windows are longer than the model was made for.
    """
    chosen = sized(judge, source)
    return {
        "form": _FORM,
        "text_sha256": read_text(chosen.text).sha256,
        "context": chosen.context,
        "chunks": chosen.chunks,
        "tokenizer_sha256": _hash_of(source.tokenizer_files),
        "runtime": "torch",
        "precision": "float32",
        "device": chosen.device.partition(":")[0],
    }


def sized(judge: JudgeOptions, source: Checkpoint) -> JudgeOptions:
    """Gives the options with the length and the number of windows that a source's defaults come to.

    Raises:
        InputError: the model is of no known family.
        UsageError: the windows are longer than the model was made for.
    """
    made_for = find_arch(source.config).read_config(source.config).context
    context, chunks = window_sizes(judge, name=source.name, made_for=made_for, parameters=source.parameters)
    return dataclasses.replace(judge, context=context, chunks=chunks)


def shareable_base(judge: JudgeOptions, source: Checkpoint) -> Checkpoint | None:
    """Gives the base of an adapted source where what is kept of the base alone serves the source too.

    That is so where both are judged on the same windows: an adapter may bring another tokenizer. The base is then to be
    judged by `sized(judge, source)`.
    """
    if source.adapted is None or not source.adapted.applied:
        return None
    base, chosen = source.adapted.base, sized(judge, source)
    return base if reference_material(chosen, base) == reference_material(chosen, source) else None


def _hash_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{len(name)} {name} {len(files[name])} ".encode())
        digest.update(files[name])
    return digest.hexdigest()

"""What a GGUF file will hold: metadata and the plan of its tensors, from headers alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantpress.convert.gguf.general import general_metadata
from quantpress.convert.gguf.overrides import override, read_metadata_file
from quantpress.convert.gguf.plan import TensorPlan, plan_tensors
from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.pipelines.stage import shortened

if TYPE_CHECKING:
    from quantpress.convert.checkpoint import Checkpoint
    from quantpress.convert.gguf.importance import ImportanceMatrix
    from quantpress.convert.preflight import Preflight
    from quantpress.pipelines.gguf_stage import Gguf

__all__ = ["GgufContent", "Metadata", "plan_content"]

Metadata = dict[str, tuple[str, Any]]
_PRE = "tokenizer.ggml.pre=str:"


@dataclass(frozen=True, slots=True)
class GgufContent:
    """Planned tensors and metadata.

    Attributes:
        tensors: in the order of the file.
        metadata: pairs in the order of the file.
        notes: what a user should know.
    """

    tensors: TensorPlan
    metadata: Metadata
    notes: tuple[str, ...]


def plan_content(
    source: Checkpoint, checked: Preflight, stage: Gguf, importance: ImportanceMatrix | None
) -> GgufContent:
    """Checks everything that can be checked before a weight is read.

    Args:
        source: the model; weights that it has codes of keep them where their type can hold them.
        checked: its table.
        stage: with every default filled in.
        importance: what errors cost, where that is known before.

    Raises:
        UsageError: options that do not exist or do not fit the model.
        InputError: the model, its tokenizer or a file of metadata cannot be used.
    """
    spec, hyper = checked.spec, checked.hyper
    spec.gguf_check(hyper, source.config)
    tensors = plan_tensors(
        checked.bindings, spec, hyper, stage.types(), quantized=source.quantized, importance=importance,
        has_importance=importance is not None or stage.runs_model,
    )  # fmt: skip
    if stage.vocab_only:
        tensors = dataclasses.replace(tensors, tensors=())
    vocab, vocab_notes = _vocabulary(source, hyper.vocab, stage.override_kv)
    metadata: Metadata = general_metadata(
        source,
        spec.gguf,
        parameters=tensors.parameters,
        file_type=tensors.file_type,
        quantized=tensors.quantized,
        name=stage.model_name or "",
    )
    for key, value in spec.gguf_metadata(hyper, source.config).items():
        metadata[f"{spec.gguf}.{key}"] = value
    metadata |= vocab
    if importance is not None and not stage.vocab_only:
        metadata |= importance.metadata()
    if stage.metadata is not None:
        metadata |= read_metadata_file(stage.metadata)
    metadata = override(metadata, stage.override_kv)
    changed = tuple(f"{tensor.name}: {tensor.note}" for tensor in tensors.tensors if tensor.note)
    notes = (*spec.gguf_notes(hyper, source.config), *vocab_notes, *shortened(changed))
    return GgufContent(tensors, metadata, notes)


def _vocabulary(source: Checkpoint, rows: int, overridden: tuple[str, ...]) -> tuple[Metadata, tuple[str, ...]]:
    """Keeps a GGUF source's vocabulary as it is; builds it from the tokenizer's files otherwise."""
    kept = {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
    if kept:
        return kept, ()
    files = TokenizerFiles(source.tokenizer_files, name=source.name)
    pre = next((text.removeprefix(_PRE) for text in overridden if text.startswith(_PRE)), None)
    plan = plan_vocab(files, vocab_size=rows, model_type=str(source.config.get("model_type")), pre=pre)
    return plan.metadata, plan.notes

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
from quantpress.quant.ggml.types import ggml_type

if TYPE_CHECKING:
    from quantpress.convert.checkpoint import Checkpoint
    from quantpress.convert.gguf.importance import ImportanceMatrix
    from quantpress.convert.preflight import Preflight
    from quantpress.pipelines.gguf_stage import Gguf

__all__ = ["GgufContent", "Metadata", "plan_content"]

Metadata = dict[str, tuple[str, Any]]
_PRE = "tokenizer.ggml.pre=str:"
_UNWEIGHTED = ("Q8_0", "TQ1_0", "TQ2_0", "MXFP4")  # block types that llama.cpp encodes without an importance
_EMBEDDING = "token_embd.weight"  # no linear layer reads its columns: llama-imatrix measures it only where it is tied


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
        checked.bindings, spec, hyper, stage.types(), quantized=checked.codes(source), importance=importance,
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
        metadata[key if key.startswith("tokenizer.") else f"{spec.gguf}.{key}"] = value
    metadata |= vocab
    if importance is not None and not stage.vocab_only:
        metadata |= importance.metadata()
    if stage.metadata is not None:
        metadata |= read_metadata_file(stage.metadata)
    metadata = override(metadata, stage.override_kv)
    changed = tuple(f"{tensor.name}: {tensor.note}" for tensor in tensors.tensors if tensor.note)
    notes = (*spec.gguf_notes(hyper, source.config), *vocab_notes, *shortened(changed))
    if importance is not None and not stage.runs_model:
        notes = (*notes, *_without_importance(tensors, importance))
    return GgufContent(tensors, metadata, notes)


def _without_importance(tensors: TensorPlan, importance: ImportanceMatrix) -> tuple[str, ...]:
    """Says which weights are encoded as if there were no importance matrix, though their types look at one."""
    weighted = [t for t in tensors.tensors if ggml_type(t.type).block_size > 1 and t.type not in _UNWEIGHTED]
    named = importance.name or "the importance matrix"
    if not weighted:
        return (f"{named} changes nothing: no tensor gets a type that is encoded with one",) if tensors.tensors else ()
    missing = [t.name for t in weighted if t.importance is None and t.name != _EMBEDDING]
    return (f"{named} has no entry for {len(missing)} weights, first {missing[0]}",) if missing else ()


def _vocabulary(source: Checkpoint, rows: int, overridden: tuple[str, ...]) -> tuple[Metadata, tuple[str, ...]]:
    """Keeps a GGUF source's vocabulary as it is; builds it from the tokenizer's files otherwise."""
    kept = {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
    if kept:
        return kept, ()
    files = TokenizerFiles(source.tokenizer_files, name=source.name)
    pre = next((text.removeprefix(_PRE) for text in overridden if text.startswith(_PRE)), None)
    plan = plan_vocab(files, vocab_size=rows, model_type=str(source.config.get("model_type")), pre=pre)
    return plan.metadata, (*plan.notes, *plan.apart.values())

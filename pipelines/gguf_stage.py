"""Writes a checkpoint as one GGUF file."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from quantpress.convert.atomic import check_replaceable
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.gguf.export import WriteResult, write_gguf
from quantpress.convert.gguf.general import general_metadata
from quantpress.convert.gguf.mixture import TypeOptions
from quantpress.convert.gguf.overrides import override, read_metadata_file
from quantpress.convert.gguf.plan import TensorPlan, plan_tensors
from quantpress.convert.gguf.vocab import plan_vocab
from quantpress.convert.preflight import check_tied_head, preflight
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.pipelines.machine import peak_memory
from quantpress.pipelines.merge_stage import merged_names
from quantpress.pipelines.stage import (
    Artifact,
    BuildingStage,
    OutputFile,
    Plan,
    PlannedTensor,
    RunContext,
    TensorResult,
    fill_name,
    shortened,
)

log = logging.getLogger(__name__)

Metadata = dict[str, tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Gguf(BuildingStage):
    """Options of the stage; names and meanings are llama.cpp's (INTERFACE: convert).

    Attributes:
        output: the file; may hold `{ftype}` and `{name}`.
        outtype: type of the matrices, or "auto".
        tensor_types: pairs of a regular expression and a type; the first that is found in a GGUF name wins.
        output_tensor_type, token_embedding_type: types of these two.
        leave_output_tensor: keep the head in the type it is stored in.
        pure: every matrix gets `outtype`.
        override_kv: `KEY=TYPE:VALUE` texts that replace metadata.
        metadata: JSON file with `general.*` metadata.
        vocab_only: write no tensor.
        model_name: replaces the name of the model.
    """

    name: ClassVar[str] = "gguf"
    version: ClassVar[int] = 1

    output: Path
    outtype: str = "auto"
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    leave_output_tensor: bool = False
    pure: bool = False
    override_kv: tuple[str, ...] = ()
    metadata: Path | None = None
    vocab_only: bool = False
    model_name: str | None = None

    def plan(self, source: Checkpoint) -> Plan:
        """Says what would be written, without reading a weight."""
        tensors, metadata, notes = self._prepare(source)
        file = tensors.file(metadata)
        merged = merged_names(source)
        return Plan(
            output=self._path(source, tensors.outtype),
            tensors=tuple(
                PlannedTensor(t.name, t.shape, t.type, t.nbytes, t.note, merged=t.source.name in merged)
                for t in tensors.tensors
            ),
            output_bytes=file.nbytes(),
            peak_memory=peak_memory(max((t.source.nbytes for t in tensors.tensors if t.transposed), default=0)),
            notes=notes,
        )

    def run(self, source: Checkpoint, context: RunContext) -> Artifact:
        """Writes the file."""
        tensors, metadata, notes = self._prepare(source)
        path = self._path(source, tensors.outtype)
        check_replaceable(path, force=context.force)
        check_tied_head(preflight(source))
        for note in notes:
            log.warning("%s: %s", path.name, note)
        written = write_gguf(
            path,
            metadata,
            tensors,
            threads=context.threads,
            force=context.force,
            allow_nonfinite=context.allow_nonfinite,
            progress=context.progress,
        )
        return Artifact(
            path=path,
            kind="gguf",
            ftype=tensors.outtype,
            outputs=(OutputFile(path.name, written.sha256, written.nbytes),),
            tensors=tuple(
                TensorResult(t.name, t.type, t.nbytes, t.relative_error, source=planned.source.name)
                for t, planned in zip(written.tensors, tensors.tensors, strict=True)
            ),
            notes=(*notes, *_kept_codes(tensors, written)),
        )

    def _prepare(self, source: Checkpoint) -> tuple[TensorPlan, Metadata, tuple[str, ...]]:
        """Checks everything that can be checked before a weight is read."""
        checked = preflight(source)
        spec, hyper = checked.spec, checked.hyper
        spec.gguf_check(hyper, source.config)
        tensors = plan_tensors(checked.bindings, spec, hyper, self._types(), quantized=source.quantized)
        if self.vocab_only:
            tensors = dataclasses.replace(tensors, tensors=())
        vocab, vocab_notes = self._vocabulary(source, hyper.vocab)
        metadata: Metadata = general_metadata(
            source,
            spec.gguf,
            parameters=tensors.parameters,
            file_type=tensors.file_type,
            quantized=tensors.quantized,
            name=self.model_name or "",
        )
        for key, value in spec.gguf_metadata(hyper, source.config).items():
            metadata[f"{spec.gguf}.{key}"] = value
        metadata |= vocab
        if self.metadata is not None:
            metadata |= read_metadata_file(self.metadata)
        metadata = override(metadata, self.override_kv)
        changed = tuple(f"{tensor.name}: {tensor.note}" for tensor in tensors.tensors if tensor.note)
        return tensors, metadata, (*spec.gguf_notes(hyper, source.config), *vocab_notes, *shortened(changed))

    def _types(self) -> TypeOptions:
        return TypeOptions(
            outtype=self.outtype,
            tensor_types=self.tensor_types,
            output_tensor_type=self.output_tensor_type,
            token_embedding_type=self.token_embedding_type,
            leave_output_tensor=self.leave_output_tensor,
            pure=self.pure,
        )

    def _vocabulary(self, source: Checkpoint, rows: int) -> tuple[Metadata, tuple[str, ...]]:
        """Keeps a GGUF source's vocabulary as it is; builds it from the tokenizer's files otherwise."""
        kept = {key: value for key, value in source.metadata.items() if key.startswith("tokenizer.")}
        if kept:
            return kept, ()
        files = TokenizerFiles(source.tokenizer_files, name=source.name)
        plan = plan_vocab(files, vocab_size=rows, model_type=str(source.config.get("model_type")), pre=self._pre())
        return plan.metadata, plan.notes

    def _pre(self) -> str | None:
        prefix = "tokenizer.ggml.pre=str:"
        return next((text.removeprefix(prefix) for text in self.override_kv if text.startswith(prefix)), None)

    def _path(self, source: Checkpoint, ftype: str) -> Path:
        return fill_name(self.output, {"ftype": ftype, "name": self.model_name or Path(source.name).name})


def _kept_codes(plan: TensorPlan, written: WriteResult) -> tuple[str, ...]:
    """Says how many weights of a quantized source have the codes in the file that they have there."""
    if not any(tensor.codes for tensor in plan.tensors):
        return ()
    kept, able = (
        sum(map(bool, found)) for found in ((t.kept for t in written.tensors), (t.codes for t in plan.tensors))
    )
    return (f"{kept} of {able} quantized weights keep the source's codes and scales bit for bit",)

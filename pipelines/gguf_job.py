"""One run of the stage that writes GGUF: plans, has blocks found where a method does that, and writes the file."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.gguf.export import TensorOutcome, WriteResult, write_gguf
from quantpress.convert.gguf.importance import ImportanceMatrix
from quantpress.convert.gguf.plan import PlannedTensor as GgufTensor
from quantpress.convert.gguf.plan import TensorPlan
from quantpress.convert.gguf.split import SplitOptions, check_parts, part_paths, split_files
from quantpress.convert.preflight import Preflight, check_tied_head, preflight
from quantpress.pipelines.gguf_content import GgufContent, plan_content
from quantpress.pipelines.hashing import hash_file
from quantpress.pipelines.machine import peak_memory
from quantpress.pipelines.merge_stage import merged_names
from quantpress.pipelines.stage import (
    Artifact,
    OutputFile,
    Plan,
    PlannedTensor,
    RunContext,
    TensorResult,
    fill_name,
)
from quantpress.quant.ggml.on_device import searching_device

if TYPE_CHECKING:
    from quantpress.convert.gguf.file_plan import FilePlan
    from quantpress.pipelines.gguf_blocks import GgufBlocks, MadeBlocks
    from quantpress.pipelines.gguf_stage import Gguf

__all__ = ["GgufJob"]

log = logging.getLogger(__name__)


class GgufJob:
    """A stage with its source."""

    def __init__(self, stage: Gguf, source: Checkpoint) -> None:
        """Takes a stage that is `resolved`."""
        self.stage = stage
        self.source = dataclasses.replace(source, quantized={}) if stage.runs_model and source.quantized else source

    @property
    def output(self) -> Path:
        """The file, or the first of several."""
        return self._files[0]

    @property
    def plan(self) -> Plan:
        """What would be written."""
        content, finder = self._content, self._finder
        merged = merged_names(self.source)
        held = max((t.held_bytes for t in content.tensors.tensors), default=0)
        memory = peak_memory(held)
        return Plan(
            output=self.output,
            tensors=tuple(
                PlannedTensor(
                    t.name, t.shape, t.type, t.nbytes, t.note, merged=any(each.name in merged for each in t.sources)
                )
                for t in content.tensors.tensors
            ),
            output_bytes=sum(part.nbytes() for part in self._parts),
            peak_memory=memory if finder is None else max(memory, finder.peak_memory),
            notes=self._notes,
            work_bytes=0 if finder is None else finder.work_bytes,
        )

    def check_output(self, context: RunContext) -> None:
        """Checks that the output may be written.

        Raises:
            UsageError: something is there that may not be replaced.
        """
        if self._finder is None:
            check_parts(self.output, len(self._files), force=context.force)
        else:
            self._finder.check_output(context)

    @contextlib.contextmanager
    def session(self, context: RunContext) -> Iterator[Artifact]:
        """Does the work; what took long is kept on the disk until the block has ended well."""
        self.check_output(context)
        check_tied_head(self._checked)
        for note in self._notes:
            log.warning("%s: %s", self.output.name, note)
        tensors = self._content.tensors
        if self._finder is None:
            written = self._write(tensors, context, force=context.force)
            yield self._artifact(tensors, written)
            return
        with self._finder.session(context, self.plan.output_bytes) as made:
            tensors = _with_found(tensors, made)
            written = self._write(tensors, context, force=made.force, held=True)
            made.work.mark_written()
            yield self._artifact(tensors, written, made)

    @cached_property
    def _checked(self) -> Preflight:
        return preflight(self.source)

    @cached_property
    def _importance(self) -> ImportanceMatrix | None:
        """What errors cost, where that is known before the run."""
        path = self.stage.imatrix
        if path is None:
            return self.source.importance
        from quantpress.convert.gguf.importance_file import read_importance

        return read_importance(path)

    @property
    def _mixture(self) -> dict[str, Any]:
        """What the sidecar says of how types were chosen."""
        tensors, found = self._content.tensors, self._importance
        record: dict[str, Any] = {"rules": tensors.rules}
        if found is not None and tensors.tensors:
            record["importance"] = {
                "file": found.name, "datasets": list(found.datasets), "entries": len(found.entries),
                "chunks": found.chunk_count,
            }  # fmt: skip
            if self.stage.imatrix is not None:
                record["importance"]["sha256"] = hash_file(self.stage.imatrix)[0]
        return record

    @cached_property
    def _content(self) -> GgufContent:
        content = plan_content(self.source, self._checked, self.stage, self._importance)
        if self._importance is not None and content.tensors.tensors:
            self._importance.check_fits((tensor.name for tensor in content.tensors.tensors), self.source.name)
        return content

    @cached_property
    def _split(self) -> SplitOptions | None:
        return SplitOptions.of(self.stage.split_max_size, self.stage.split_max_tensors)

    @cached_property
    def _parts(self) -> list[FilePlan]:
        return split_files(self._content.tensors.file(self._content.metadata), self._split)

    @cached_property
    def _files(self) -> tuple[Path, ...]:
        """The files that will be written, the one that is opened first."""
        return tuple(part_paths(self._name, len(self._parts)))

    @property
    def _name(self) -> Path:
        values = {"name": self.stage.model_name or Path(self.source.name).name}
        if "{ftype}" in str(self.stage.output):
            values["ftype"] = self._content.tensors.outtype
        return fill_name(self.stage.output, values)

    @cached_property
    def _finder(self) -> GgufBlocks | None:
        """What finds blocks before the first byte is written."""
        if not self.stage.runs_model:
            return None
        from quantpress.pipelines.gguf_blocks import GgufBlocks

        return GgufBlocks(self.stage, self.source, self._checked, self._content.tensors, self._files)

    @property
    def _notes(self) -> tuple[str, ...]:
        found = () if self._finder is None else self._finder.notes
        importance = () if self._importance is None else self._importance.notes()
        return (*self._content.notes, *importance, *found)

    def _write(self, tensors: TensorPlan, context: RunContext, *, force: bool, held: bool = False) -> WriteResult:
        return write_gguf(
            self.output,
            self._content.metadata,
            tensors,
            threads=context.threads,
            split=self._split,
            force=force,
            held=held,
            allow_nonfinite=context.allow_nonfinite,
            device=searching_device(context.device),
            progress=context.progress,
        )

    def _artifact(self, tensors: TensorPlan, written: WriteResult, made: MadeBlocks | None = None) -> Artifact:
        work = None if made is None else made.work
        reports = {} if work is None else work.reports
        return Artifact(
            path=self.output,
            kind="gguf",
            ftype=tensors.outtype,
            outputs=tuple(OutputFile(path.name, file.sha256, file.nbytes) for path, file in written.files.items()),
            tensors=tuple(
                _result(t, planned, reports.get(planned.source.name, {}))
                for t, planned in zip(written.tensors, tensors.tensors, strict=True)
            ),
            notes=(*self._notes, *(() if work is None else work.notes), *_kept_codes(tensors, written)),
            calibration={} if work is None else work.calibrated,
            timings={} if work is None else work.timings,
            mixture=self._mixture,
        )


def _with_found(plan: TensorPlan, made: MadeBlocks) -> TensorPlan:
    """Gives a plan that writes the blocks that were found, and the others by what was measured."""

    def filled(tensor: GgufTensor) -> GgufTensor:
        found = [source.name in made.blocks for source in tensor.sources]
        tensor = tensor.with_blocks(made.blocks) if any(found) else tensor
        if all(found) or tensor.importance is not None:
            return tensor  # nothing is left to encode, or the user's own file says what errors cost
        return dataclasses.replace(tensor, importance=made.importance.of(tensor.name, tensor.shape))

    return dataclasses.replace(plan, tensors=tuple(map(filled, plan.tensors)))


def _result(tensor: TensorOutcome, planned: GgufTensor, report: Mapping[str, Any]) -> TensorResult:
    return TensorResult(
        tensor.name, tensor.type, tensor.nbytes, tensor.relative_error, dict(report), source=planned.source.name
    )


def _kept_codes(plan: TensorPlan, written: WriteResult) -> tuple[str, ...]:
    """Says how many weights of a quantized source have the codes in the file that they have there."""
    if not any(tensor.keeps_codes for tensor in plan.tensors):
        return ()
    kept, able = sum(t.kept for t in written.tensors), sum(t.keeps_codes for t in plan.tensors)
    return (f"{kept} of {able} quantized weights keep the source's codes and scales bit for bit",)

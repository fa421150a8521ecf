"""One run of `quantize`: plans, quantizes into a spool beside the output, and writes the folder from there."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.convert.atomic import check_replaceable, held_output, require_space, work_folder
from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.files import open_regular
from quantpress.convert.preflight import Preflight, check_tied_head
from quantpress.convert.quantized import PackedTensor
from quantpress.convert.safetensors_writer import planned_tensors, write_checkpoint
from quantpress.pipelines.merge_stage import merged_names
from quantpress.pipelines.quantize_codes import WeightsJob, hashed
from quantpress.pipelines.quantize_work import WRITTEN, Spooled
from quantpress.pipelines.spool import Spool
from quantpress.pipelines.stage import (
    Artifact,
    OutputFile,
    Plan,
    PlannedTensor,
    RunContext,
    TensorResult,
    fill_name,
)

if TYPE_CHECKING:
    from quantpress.pipelines.quantize_stage import Quantize

__all__ = ["QuantizeJob", "fingerprint"]

log = logging.getLogger(__name__)

_SETTINGS = "quantization_config"  # key of config.json
_HEAD = 1 << 20  # bytes of an input that its fingerprint hashes beside size and time: configurations, headers
_QUIET = ("head", "--skip", "not quantized in the source", "not a part that is quantized")
_WAIT = 1.0  # seconds for another run on the same output; it may take hours


class QuantizeJob(WeightsJob):
    """A stage with its source."""

    def __init__(self, stage: Quantize, source: Checkpoint) -> None:
        """Plans; reads headers only.

        Args:
            stage: with every default filled in.
            source: the model.

        Raises:
            QuantpressError: the source cannot be quantized in this way.
        """
        super().__init__(stage, source)
        self.settings = self.format.settings(self.weights.forms, self.weights.unquantized, self.details)

    @property
    def plan(self) -> Plan:
        """What would be written."""
        view = self._view(
            {part.name: _unread(part) for weight in self.weights.weights.values() for part in weight.parts}
        )
        merged, tensors = merged_names(self.source), list[PlannedTensor]()
        stored = {name: (dtype, nbytes) for name, _, dtype, nbytes in planned_tensors(view)}
        for name, tensor in self.source.tensors.items():
            if name in self.weights.weights:
                weight = self.weights.weights[name]
                kind, nbytes, note = str(weight.form), weight.nbytes, ""
            else:
                (kind, nbytes), note = stored[name], self.weights.left.get(name, "")
            tensors.append(PlannedTensor(name, tensor.shape, kind, nbytes, note, name in merged))
        memory, work = self.needs()
        total = sum(nbytes for _, nbytes in stored.values())
        return Plan(self.output, tuple(tensors), total, memory, self.notes, self.packed_bytes + work)

    @property
    def output(self) -> Path:
        """The folder."""
        return fill_name(self.stage.output, {"ftype": self.ftype, "name": Path(self.source.name).name})

    def check_output(self, context: RunContext) -> None:
        """Checks that the output may be written.

        Raises:
            UsageError: something is there, and neither --force is given nor did a killed run of this job leave it.
        """
        check_replaceable(self.output, force=context.force or self._is_unproved(context))

    @contextlib.contextmanager
    def session(self, context: RunContext) -> Iterator[Artifact]:
        """Does the work; what is finished is kept on the disk until the block has ended well."""
        plan = self.plan
        if isinstance(self.checked, Preflight):
            check_tied_head(self.checked)
        self.check_output(context)
        for note in plan.notes:
            log.warning("%s", note)
        with self.spooled(context, plan.output_bytes + plan.work_bytes) as work:
            files = write_checkpoint(
                self._view(work.spool.tensors()), plan.output, force=work.force, progress=context.progress,
                allow_nonfinite=context.allow_nonfinite, threads=context.threads, held=True,
            )  # fmt: skip
            outputs = tuple(
                OutputFile(path.relative_to(plan.output).as_posix(), file.sha256, file.nbytes)
                for path, file in files.items()
            )
            work.mark_written()
            yield self._artifact(plan, outputs, work)

    @contextlib.contextmanager
    def spooled(self, context: RunContext, nbytes: int) -> Iterator[Spooled]:
        """Holds the output, quantizes what is not finished, and gives all of it; the block writes the output.

        What is finished is kept on the disk until the block has ended well.

        Args:
            context: what the run may use.
            nbytes: of the output and of all that is kept until then.

        Raises:
            UsageError: the output exists, and no killed run of this job left it.
            BusyError: another run is writing it.
            InputError, LayoutError: what the method says of a weight, or of the text.
            OutputError: the disk has no room.
        """
        with held_output(self.output, wait=_WAIT) as target:
            force = context.force or self._is_unproved(context)
            check_replaceable(target, force=force)
            calibration = self.calibration()
            if calibration is not None and calibration.note:
                log.warning("%s", calibration.note)
            require_space(target, nbytes)
            spool = Spool(work_folder(target), self._key(context))
            with spool.kept():
                self.quantize(spool, context, calibration)
                yield Spooled(spool, force, calibration)
            spool.remove()

    def _artifact(self, plan: Plan, outputs: tuple[OutputFile, ...], work: Spooled) -> Artifact:
        reports = work.reports
        return Artifact(
            path=plan.output,
            kind="safetensors",
            ftype=self.ftype,
            outputs=outputs,
            tensors=tuple(_result(tensor, reports.get(tensor.name, {})) for tensor in plan.tensors),
            notes=(*plan.notes, *work.notes),
            judged_as=self.judged_as,
            calibration=work.calibrated,
            timings=work.timings,
        )

    def _view(self, parts: Mapping[str, LazyTensor]) -> Checkpoint:
        """The checkpoint as it will be written; `parts` holds packed tensors, and plain ones that have changed."""
        tensors: dict[str, LazyTensor] = {}
        for name, tensor in self.source.tensors.items():
            if name in self.weights.weights:
                tensors |= {part.name: parts[part.name] for part in self.weights.weights[name].parts}
            else:
                tensors[name] = parts.get(name, tensor)
        return replace(
            self.source,
            config={**self.source.config, _SETTINGS: self.settings},
            tensors=tensors,
            tokenizer_files={**self.source.tokenizer_files, **self.format.files(self.settings)},
        )

    def _is_unproved(self, context: RunContext) -> bool:
        """Whether what stands at the output is of this very job, which was killed before it was proved."""
        output = Path(self.output).resolve()
        if not output.is_dir() or (output / "quantpress.json").exists():
            return False
        return WRITTEN in Spool.finished_steps(work_folder(output), self._key(context))

    def _key(self, context: RunContext) -> str:
        """Names the job: two with the same key give the same bytes."""
        inputs = [fingerprint(file.path) for file in self.source.files]
        return hashed({**self.described(context), "inputs": inputs})


def fingerprint(path: Path) -> list[str | int]:
    """Gives what tells a file from another of its name without reading all of it: size, time, how it begins."""
    status = path.stat()
    with open_regular(path) as file:
        head = hashlib.sha256(file.read(_HEAD)).hexdigest()
    return [path.name, status.st_size, status.st_mtime_ns, head]


def _unread(part: PackedTensor) -> LazyTensor:
    def read_rows(start: int, stop: int) -> Any:
        raise AssertionError(f"{part.name} is planned only: rows [{start}, {stop})")

    return LazyTensor(part.name, part.shape, part.dtype, "", read_rows)


def _result(tensor: PlannedTensor, report: Mapping[str, Any]) -> TensorResult:
    figures = dict(report)
    return TensorResult(tensor.name, tensor.type, tensor.nbytes, figures.pop("relative_error", None), figures)

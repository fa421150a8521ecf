"""One run of `quantize`: plans, quantizes into a spool beside the output, and writes the folder from there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.atomic import check_replaceable, held_output, require_space, work_folder
from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.files import open_regular
from quantpress.convert.preflight import Preflight, check_tied_head
from quantpress.convert.quantized import PackedTensor
from quantpress.convert.safetensors_writer import planned_tensors, write_checkpoint
from quantpress.pipelines.default_text import BUILT_IN_NOTE
from quantpress.pipelines.machine import peak_memory
from quantpress.pipelines.merge_stage import merge_records, merged_names
from quantpress.pipelines.quantize_plan import main_type, plan_weights
from quantpress.pipelines.quantize_recipe import CALIBRATED
from quantpress.pipelines.quantize_work import WRITTEN, Spooled
from quantpress.pipelines.safetensors_stage import checked_or_unknown
from quantpress.pipelines.sidecar import environment
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
    from quantpress.pipelines.quantize_calibration import Calibration
    from quantpress.pipelines.quantize_stage import Quantize

__all__ = ["QuantizeJob"]

log = logging.getLogger(__name__)

_SETTINGS = "quantization_config"  # key of config.json
_HEAD = 1 << 20  # bytes of an input that its fingerprint hashes beside size and time: configurations, headers
_QUIET = ("head", "--skip", "not quantized in the source", "not a part that is quantized")
_WAIT = 1.0  # seconds for another run on the same output; it may take hours


class QuantizeJob:
    """A stage with its source."""

    def __init__(self, stage: Quantize, source: Checkpoint) -> None:
        """Plans; reads headers only.

        Args:
            stage: with every default filled in.
            source: the model.

        Raises:
            QuantpressError: the source cannot be quantized in this way.
        """
        self.stage, self.source = stage, source
        self.recipe = stage.recipe(source)
        self.format = stage.pack_format(self.recipe)
        self.checked = checked_or_unknown(source)
        self.weights = plan_weights(source, self.recipe, self.format)
        self.settings = self.format.settings(self.weights.forms, self.weights.unquantized, self._details())

    @property
    def plan(self) -> Plan:
        """What would be written."""
        view = self._view(
            {part.name: _unread(part) for weight in self.weights.weights.values() for part in weight.parts}
        )
        merged, tensors, packed = merged_names(self.source), list[PlannedTensor](), 0
        stored = {name: (dtype, nbytes) for name, _, dtype, nbytes in planned_tensors(view)}
        for name, tensor in self.source.tensors.items():
            if name in self.weights.weights:
                weight = self.weights.weights[name]
                packed += weight.nbytes
                kind, nbytes, note = str(weight.form), weight.nbytes, ""
            else:
                (kind, nbytes), note = stored[name], self.weights.left.get(name, "")
            tensors.append(PlannedTensor(name, tensor.shape, kind, nbytes, note, name in merged))
        memory, work = self._needs()
        total = sum(nbytes for _, nbytes in stored.values())
        return Plan(self.output, tuple(tensors), total, memory, self._notes(), packed + work)

    @property
    def output(self) -> Path:
        """The folder."""
        return fill_name(self.stage.output, {"ftype": self.ftype, "name": Path(self.source.name).name})

    @property
    def ftype(self) -> str:
        """Name of what most values are quantized to."""
        return main_type(self.weights.forms.values())

    @property
    def hyper(self) -> Hyperparameters:
        """Sizes of a model of a known family."""
        assert isinstance(self.checked, Preflight), "methods that go by layers are refused for unknown families"
        return self.checked.hyper

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
            calibration = self._calibration()
            if calibration is not None and calibration.note:
                log.warning("%s", calibration.note)
            require_space(target, nbytes)
            spool = Spool(work_folder(target), self._key(context))
            with spool.kept():
                self._quantize(spool, context, calibration)
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
            judged_as=self._judged_as(),
            calibration=work.calibrated,
            timings=work.timings,
        )

    def _judged_as(self) -> str:
        if self.recipe.format == "bitsandbytes" or self.ftype == "w8a8":
            return "W8A8"  # inputs are rounded, also where codes are kept
        return self.ftype.upper() if self.recipe.method is not None else "F32"

    def _details(self) -> dict[str, Any]:
        method = self.recipe.method
        details: dict[str, Any] = {"method": method}
        if method == "gptq":
            details |= {"act_order": self.stage.act_order, "damping": self.stage.damping, "true_sequential": True}
        return {key: value for key, value in details.items() if value is not None}

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

    def _needs(self) -> tuple[int, int]:
        """Bytes of memory, and of temporary files beside the packed weights."""
        if self.recipe.method in CALIBRATED:
            from quantpress.pipelines.quantize_calibration import needs

            return needs(self.source, self.stage)
        # codes as bytes, their words, and of what is stored as (K, N) the values in float32
        held = (weight.tensor.size * (6 if weight.transposed else 2) for weight in self.weights.weights.values())
        return peak_memory(max(held)), 0

    def _notes(self) -> tuple[str, ...]:
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

    def _calibration(self) -> Calibration | None:
        if self.recipe.method not in CALIBRATED:
            return None
        from quantpress.pipelines.quantize_calibration import Calibration

        return Calibration.of(self.source, self.stage)

    def _quantize(self, spool: Spool, context: RunContext, calibration: Calibration | None) -> None:
        if calibration is None:
            from quantpress.pipelines.quantize_weights import quantize_weights

            quantize_weights(self.source, self.weights, self.recipe, self.format, spool, context)
        else:
            from quantpress.pipelines.quantize_layers import quantize_layers

            quantize_layers(self, calibration, spool, context)

    def _is_unproved(self, context: RunContext) -> bool:
        """Whether what stands at the output is of this very job, which was killed before it was proved."""
        output = Path(self.output).resolve()
        if not output.is_dir() or (output / "quantpress.json").exists():
            return False
        return WRITTEN in Spool.finished_steps(work_folder(output), self._key(context))

    def _key(self, context: RunContext) -> str:
        """Names the job: two with the same key give the same bytes."""
        described = dict(self.stage.describe())
        options = {name: value for name, value in described["options"].items() if name not in ("output", "calibration")}
        text = self.stage.calibration
        record = {
            **described,
            "options": options,
            "merged": merge_records(self.source),
            "calibration": None if text is None else hashlib.sha256(text.read_bytes()).hexdigest(),
            "environment": environment(context.device),
            "inputs": [_fingerprint(file.path) for file in self.source.files],
        }
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> list[str | int]:
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

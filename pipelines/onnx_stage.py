"""Writes a checkpoint as an ONNX model: a folder that onnxruntime and onnxruntime-genai run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.onnx.options import OnnxOptions
from quantpress.pipelines.job_stage import JobStage
from quantpress.pipelines.onnx_codes import filled
from quantpress.pipelines.onnx_job import QUANTIZED, OnnxJob, keeps_codes, type_of_codes
from quantpress.quant.errors import UsageError

__all__ = ["METHODS", "Onnx"]

METHODS = ("rtn", "hqq", "gptq", "awq")
_CALIBRATED = ("gptq", "awq")  # they run the model on a text
_ZEROS = ("awq", "hqq")  # they gain from zero points
_COMPUTE = {"fp16": "fp16"}
_BLOCK_SIZE = 32  # as onnxruntime-genai's model builder has it


@dataclass(frozen=True, kw_only=True)
class Onnx(JobStage):
    """Options of the stage; None where it depends on others or on the source, see `resolved`.

    Attributes:
        output: the folder; may hold `{ftype}` and `{name}`.
        precision, compute_type, int8, block_size, symmetric, accuracy_level, standard_ops, opset, output_tensor_type,
            token_embedding_type: as `OnnxOptions`. Without `precision` a quantized model keeps its codes, any other is
            written in fp32.
        method: "rtn", "hqq", "gptq" or "awq": how the codes of int4 and weight-only int8 are found.
        calibration: UTF-8 text for GPTQ, AWQ and static int8; None for the built-in one.
        samples, sequence_length, seed: windows of that text.
        act_order, damping, drift, calibration_dtype: as `Quantize`.
    """

    name: ClassVar[str] = "onnx"
    version: ClassVar[int] = 2

    output: Path
    precision: str | None = None
    compute_type: str | None = None
    int8: str = "weight-only"
    block_size: int | None = None
    symmetric: bool | None = None
    accuracy_level: int = 0
    standard_ops: bool = False
    opset: int = 23
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    method: str | None = None
    calibration: Path | None = None
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    act_order: bool = True
    damping: float = 0.01
    drift: float | None = None
    calibration_dtype: str | None = None

    @property
    def runs_model(self) -> bool:
        """Whether the model is run on a device before anything can be written."""
        return self.method in _CALIBRATED or self.int8 == "static"

    def resolved(self, source: Checkpoint) -> Onnx:
        """Fills in what depends on the source and on other options; what has no meaning then is None.

        Raises:
            UsageError: options that do not exist or do not go together.
        """
        kept = keeps_codes(source)
        precision = self.precision or (_precision_of(source) if kept else "fp32")
        found: dict[str, Any] = {
            "precision": precision,
            "compute_type": self.compute_type or _COMPUTE.get(precision, "fp32"),
        }
        if kept and precision in QUANTIZED and self.int8 != "weight-only":
            raise UsageError(f"--int8 {self.int8}: {source.name} is quantized already; its codes are kept weight-only")
        if precision not in QUANTIZED or self.int8 != "weight-only":
            self._refuse_method("is for --precision int4 and weight-only int8")
        elif kept:
            self._refuse_method(
                f"{source.name} is quantized already ({source.format}), and its codes are kept as they are; to quantize"
                " anew give the model it was made from"
            )
        else:
            found |= self._filled_method()
        stage = dataclasses.replace(self, **found)
        stage.options()
        if stage.runs_model:
            from quantpress.pipelines.quantize_calibration import sequence_length

            stage = dataclasses.replace(stage, sequence_length=sequence_length(source, self.sequence_length))
            return filled(stage, source) if stage.method in _CALIBRATED else stage
        if self.calibration is not None:
            raise UsageError(
                f"--calibration {self.calibration}: only --method gptq and awq and --int8 static read a text"
            )
        return stage

    def _filled_method(self) -> dict[str, Any]:
        """How codes are found."""
        method = self.method or METHODS[0]
        if method not in METHODS:
            raise UsageError(f"--method {method}: must be one of {', '.join(METHODS)}")
        symmetric = method not in _ZEROS if self.symmetric is None else self.symmetric
        return {"method": method, "block_size": self.block_size or _BLOCK_SIZE, "symmetric": symmetric}

    def _refuse_method(self, reason: str) -> None:
        """Refuses to be told how codes are found where none are."""
        given = {"--method": self.method, "--block-size": self.block_size}
        for flag, value in given.items():
            if value is not None:
                raise UsageError(f"{flag} {value}: {reason}")
        if self.symmetric is not None:
            raise UsageError(f"{'--symmetric' if self.symmetric else '--asymmetric'}: {reason}")

    def options(self) -> OnnxOptions:
        """Gives what the graph's builders take; of a stage that is `resolved`.

        Raises:
            UsageError: options that do not exist or do not go together.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(OnnxOptions)}
        return OnnxOptions(**{name: value for name, value in values.items() if value is not None})

    def job(self, source: Checkpoint) -> OnnxJob:
        """Gives the job of this stage on a source."""
        return OnnxJob(self.resolved(source), source)

    def target(self, source: Checkpoint) -> Path:
        """Gives the output with its name filled in."""
        return self.job(source).output


def _precision_of(source: Checkpoint) -> str:
    """Names the codes of a quantized model; "int4" stands for those of 2 and 3 bits too."""
    return "int4" if type_of_codes(source) in ("INT2", "INT3", "INT4") else "int8"

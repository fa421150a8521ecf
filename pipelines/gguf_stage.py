"""Writes a checkpoint as a GGUF file, or as several that belong together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.gguf.mixture import TypeOptions
from quantpress.pipelines.gguf_job import GgufJob
from quantpress.pipelines.job_stage import JobStage
from quantpress.quant.errors import UsageError

__all__ = ["METHODS", "Gguf"]

METHODS = ("rtn", "gptq")


@dataclass(frozen=True, kw_only=True)
class Gguf(JobStage):
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
        imatrix: importance matrix, llama.cpp's file of either form; None for what a stage before has measured.
        method: "rtn" to round each weight by itself, "gptq" to make up for errors on a text, inside the types' blocks.
        calibration: UTF-8 text for GPTQ; None for the built-in one.
        samples, sequence_length, seed: windows of that text.
        act_order, damping, drift, calibration_dtype: of GPTQ, as `Quantize`.
        split_max_size: bytes of tensors in a file, "500M" or "2G" in decimal units; None for one file.
        split_max_tensors: how many tensors a file holds at most; None for one file.
    """

    name: ClassVar[str] = "gguf"
    version: ClassVar[int] = 2

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
    imatrix: Path | None = None
    method: str | None = None
    calibration: Path | None = None
    samples: int = 128
    sequence_length: int | None = None
    seed: int = 0
    act_order: bool = True
    damping: float = 0.01
    drift: float | None = None
    calibration_dtype: str | None = None
    split_max_size: str | None = None
    split_max_tensors: int | None = None

    @property
    def runs_model(self) -> bool:
        """Whether the model is run on a device before anything can be written."""
        return self.method == "gptq"

    def resolved(self, source: Checkpoint) -> Gguf:
        """Fills in what depends on the source and on other options.

        Raises:
            UsageError: options that do not exist or do not go together.
            UnknownFamilyError: there is no table for the model.
        """
        method = METHODS[0] if self.method is None else self.method.lower()
        if method not in METHODS:
            raise UsageError(f"--method {self.method}: GGUF takes one of {', '.join(METHODS)}")
        if method != "gptq":
            if self.calibration is not None:
                raise UsageError(f"--calibration {self.calibration}: only --method gptq reads a text")
            return dataclasses.replace(self, method=method)
        if self.vocab_only:
            raise UsageError("--method gptq: --vocab-only writes no weight")
        if source.quantized and source.adapted is None:
            raise UsageError(
                f"--method gptq: {source.name} is quantized already ({source.format}), and its codes are kept where the"
                " file can hold them; to quantize anew give the model it was made from"
            )
        from quantpress.pipelines.quantize_calibration import chosen_precision, drift_share, sequence_length

        return dataclasses.replace(
            self,
            method=method,
            sequence_length=sequence_length(source, self.sequence_length),
            drift=drift_share(source, self),
            calibration_dtype=chosen_precision(self.calibration_dtype),
        )

    def target(self, source: Checkpoint) -> Path:
        """Gives the output with its name filled in: of several files the one that is opened."""
        split = self.split_max_size is not None or self.split_max_tensors is not None
        return self.job(source).output if split or "{" in str(self.output) else self.output

    def types(self) -> TypeOptions:
        """Gives the options that choose types."""
        return TypeOptions(
            outtype=self.outtype,
            tensor_types=self.tensor_types,
            output_tensor_type=self.output_tensor_type,
            token_embedding_type=self.token_embedding_type,
            leave_output_tensor=self.leave_output_tensor,
            pure=self.pure,
        )

    def job(self, source: Checkpoint) -> GgufJob:
        """Gives the job of this stage on a source."""
        return GgufJob(self.resolved(source), source)

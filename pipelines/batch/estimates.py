"""What stages take, by arithmetic: for `--dry-run`, and so that not more runs at once than a machine holds."""

from __future__ import annotations

import math

from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.batch.tasks import Estimate
from quantpress.pipelines.imatrix_stage import Imatrix
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.stage import Plan, PreparingStage, Stage
from quantpress.pipelines.windows import DEFAULT_CONTEXT, default_chunks
from quantpress.quant.ggml.search import SEARCHED

__all__ = ["building", "preparing", "reference"]

_BYTES_PER_SECOND = 150e6  # read, converted and written: a disk of a laptop, two processors
_OPERATIONS_PER_SECOND = 4e10  # of two processors; a GPU has a thousand times as many
_SEARCHED_PER_SECOND = 4e7  # weights of GGUF's types whose scales are searched, on two processors
_GPU = 500.0
_START = 2.0  # seconds until torch is there
_BASE_BYTES = 700 << 20  # of a process that runs models in torch and llama.cpp, beside weights
_FLOAT = 4


def preparing(stage: PreparingStage, source: Checkpoint, *, gpu: bool) -> Estimate:
    """Estimates work that is kept in the cache."""
    memory, work, kept = stage.needs(source)
    if isinstance(stage, Imatrix):
        operations = 2.0 * source.parameters * stage.text_tokens(source)
    else:  # passes; GPTQ's own products
        operations = 3.0 * 2 * source.parameters * _calibration_tokens(stage) + 4096.0 * source.parameters
    return Estimate(_seconds(operations, gpu=gpu) + _stream(source), memory, work + kept, kept, gpu)


def reference(judge: JudgeOptions, source: Checkpoint, *, gpu: bool) -> Estimate:
    """Estimates a run of the source on the judge's text; its weights are streamed where they do not fit."""
    seconds = _seconds(2.0 * source.parameters * _judged_tokens(judge, source), gpu=gpu) + _stream(source)
    return Estimate(seconds, _BASE_BYTES + _largest(source), 64 << 20, 0, gpu)


def building(plan: Plan, stage: Stage, source: Checkpoint, judge: JudgeOptions | None, *, gpu: bool) -> Estimate:
    """Estimates an output, with its proof where `judge` is given."""
    runs = bool(getattr(stage, "runs_model", False))
    seconds, memory = _stream(source) + plan.output_bytes / _BYTES_PER_SECOND, plan.peak_memory
    seconds += sum(math.prod(t.shape) for t in plan.tensors if t.type in SEARCHED) / _SEARCHED_PER_SECOND
    if runs:
        operations = 3.0 * 2 * source.parameters * _calibration_tokens(stage) + 4096.0 * source.parameters
        seconds += _seconds(operations, gpu=gpu)
    if judge is not None:
        seconds += _seconds(2.0 * source.parameters * _judged_tokens(judge, source), gpu=False)
        memory = max(memory, _BASE_BYTES + plan.output_bytes + 2 * _largest(source))
    return Estimate(seconds, memory, plan.output_bytes + plan.work_bytes, plan.output_bytes, gpu and runs)


def _calibration_tokens(stage: Stage) -> int:
    return int(getattr(stage, "samples", 0) or 0) * int(getattr(stage, "sequence_length", 0) or DEFAULT_CONTEXT)


def _judged_tokens(judge: JudgeOptions, source: Checkpoint) -> int:
    return (judge.chunks or default_chunks(source.parameters)) * (judge.context or DEFAULT_CONTEXT)


def _seconds(operations: float, *, gpu: bool) -> float:
    return _START + operations / (_OPERATIONS_PER_SECOND * (_GPU if gpu else 1.0))


def _stream(source: Checkpoint) -> float:
    return sum(tensor.nbytes for tensor in source.tensors.values()) / _BYTES_PER_SECOND


def _largest(source: Checkpoint) -> int:
    """Bytes of the largest tensor in float32: mostly the head or the embedding."""
    return max((tensor.size for tensor in source.tensors.values()), default=0) * _FLOAT

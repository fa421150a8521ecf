"""The functions of `import quantpress as qp` that write files; no prints, no global state, progress by callback."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.pipelines.cancel import cancellable
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.imatrix_file import ImatrixFile
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.machine import available_threads
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.quantize_stage import Quantize
from quantpress.pipelines.runner import Pressed, press
from quantpress.pipelines.safetensors_stage import Safetensors
from quantpress.pipelines.stage import BuildingStage, RunContext


def export_gguf(
    model: Checkpoint | Path | str,
    output: Path | str,
    *,
    outtype: str = "auto",
    tensor_types: Sequence[tuple[str, str]] = (),
    imatrix: Path | str | None = None,
    method: str | None = None,
    calibration: Path | str | None = None,
    verify: bool = False,
    judge: JudgeOptions | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    device: str = "cpu",
    max_memory: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Pressed:
    """Writes a model as a GGUF file, in one pass with bounded memory, and a sidecar beside it.

    A call with method "gptq" that is interrupted goes on at the layer where it was when it is made again.

    Args:
        model: an open checkpoint, merged or not, a folder, a GGUF file or a Hub id.
        output: the file; may hold `{ftype}` and `{name}`.
        outtype: a type or mixture of llama.cpp's, "q4_k_m", "f16" and so on in any case, or "auto".
        tensor_types: pairs of a regular expression and a type; the first that is found in a GGUF name wins.
        imatrix: importance matrix, llama.cpp's file of either form.
        method: "rtn", each weight by itself, or "gptq", on a text; None for "rtn".
        calibration: UTF-8 text for GPTQ; None for a built-in one.
        verify: run the file and compare it with the model.
        judge: how to judge, where `verify` is set.
        force: replace an existing file.
        allow_nonfinite: write NaN and infinities instead of refusing them.
        device: where the model runs for a calibration, "cpu" or "cuda".
        max_memory: bytes that activations may take before they go to the disk; None for half of what is free.
        threads: worker threads; the bytes do not depend on it.
        progress: told how far the work has come.
        cancel: set from another thread, stops the work; nothing half written is left.
        options: further fields of `Gguf`: output_tensor_type, pure, samples, split_max_size, model_name and so on.

    Returns:
        What was written and, with `verify`, the verdict.

    Raises:
        QuantpressError: an input, an option or the output cannot be used; `ParityError` if the verdict is not passed,
            `CancelledError` once `cancel` is set.
    """
    stage = Gguf(
        output=Path(output), outtype=outtype, tensor_types=tuple(tensor_types), method=method,
        imatrix=None if imatrix is None else Path(imatrix),
        calibration=None if calibration is None else Path(calibration), **options,
    )  # fmt: skip
    context = RunContext(
        progress=cancellable(progress, cancel),
        threads=threads or available_threads(), device=device, max_memory=max_memory, force=force,
        allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    return _pressed(model, stage, context, judge or JudgeOptions() if verify else None)


def export_onnx(
    model: Checkpoint | Path | str,
    output: Path | str,
    *,
    precision: str | None = None,
    method: str | None = None,
    calibration: Path | str | None = None,
    verify: bool = False,
    judge: JudgeOptions | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    device: str = "cpu",
    max_memory: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Pressed:
    """Writes a model as an ONNX folder that onnxruntime and onnxruntime-genai run, and a sidecar in it.

    Args:
        model: an open checkpoint, merged or not, a folder, a GGUF file or a Hub id.
        output: the folder; may hold `{ftype}` and `{name}`.
        precision: "fp32", "fp16", "bf16", "int8" or "int4"; None for fp32, or of a quantized model for its codes as
            they are.
        method: "rtn", "hqq", "gptq" or "awq", how codes are found; None for "rtn".
        calibration: UTF-8 text for what runs the model; None for a built-in one.
        verify: run the folder in onnxruntime and compare it with the model.
        judge: how to judge, where `verify` is set.
        force: replace an existing folder.
        allow_nonfinite: write NaN and infinities where floats are stored instead of refusing them.
        device: where the model runs for a calibration, "cpu" or "cuda".
        max_memory: bytes that activations may take before they go to the disk; None for half of what is free.
        threads: worker threads; the bytes do not depend on it.
        progress: told how far the work has come.
        cancel: set from another thread, stops the work; nothing half written is left.
        options: further fields of `Onnx`: block_size, symmetric, int8, compute_type, standard_ops, opset and so on.

    Raises:
        QuantpressError: an input, an option or the output cannot be used; `ParityError` if the verdict is not passed,
            `CancelledError` once `cancel` is set.
    """
    stage = Onnx(
        output=Path(output), precision=precision, method=method,
        calibration=None if calibration is None else Path(calibration), **options,
    )  # fmt: skip
    context = RunContext(
        progress=cancellable(progress, cancel),
        threads=threads or available_threads(), device=device, max_memory=max_memory, force=force,
        allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    return _pressed(model, stage, context, judge or JudgeOptions() if verify else None)


def export_safetensors(
    model: Checkpoint | Path | str,
    output: Path | str,
    *,
    dtype: str | None = None,
    verify: bool = False,
    judge: JudgeOptions | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    threads: int | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Pressed:
    """Writes a model as a Hugging Face folder, in its own types or cast to one, and a sidecar in it.

    Args:
        model: an open checkpoint, merged or not, a folder, a GGUF file or a Hub id.
        output: the folder.
        dtype: "f32", "f16" or "bf16" for all floating-point tensors; None keeps each tensor's type.
        verify: run the folder in torch and compare it with the model.
        judge: how to judge, where `verify` is set.
        force: replace an existing folder.
        allow_nonfinite: write NaN and infinities instead of refusing them.
        threads: worker threads.
        progress: told how far the work has come.
        cancel: set from another thread, stops the work; nothing half written is left.

    Raises:
        QuantpressError: an input, an option or the output cannot be used; `ParityError` if the verdict is not passed,
            `CancelledError` once `cancel` is set.
    """
    stage = Safetensors(output=Path(output), dtype=dtype)
    context = RunContext(
        progress=cancellable(progress, cancel),
        threads=threads or available_threads(),
        force=force,
        allow_nonfinite=allow_nonfinite,
    )
    return _pressed(model, stage, context, judge or JudgeOptions() if verify else None)


def quantize(
    model: Checkpoint | Path | str,
    output: Path | str,
    *,
    method: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    format: str | None = None,  # noqa: A002 - the name of the flag and of the stage's option
    calibration: Path | str | None = None,
    verify: bool = False,
    judge: JudgeOptions | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    device: str = "cpu",
    max_memory: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Pressed:
    """Writes a model with quantized linear weights as a Hugging Face folder, and a sidecar in it.

    A call that is interrupted goes on at the layer where it was when it is made again.

    Args:
        model: an open checkpoint, merged or not, a folder, a GGUF file or a Hub id.
        output: the folder; may hold `{ftype}` and `{name}`.
        method: "rtn", "hqq", "gptq", "awq", "smoothquant" or "llm_int8"; None for GPTQ, or of a quantized model for
            its codes as they are, in another format.
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale; -1 for a whole row.
        format: "gptq", "gptq_v2", "awq", "compressed-tensors" or "bitsandbytes".
        calibration: UTF-8 text for the methods that run the model; None for a built-in one.
        verify: run the folder in torch and compare it with the model.
        judge: how to judge, where `verify` is set.
        force: replace an existing folder.
        allow_nonfinite: write NaN and infinities of tensors that are not quantized instead of refusing them.
        device: where the model runs, "cpu" or "cuda".
        max_memory: bytes that activations may take before they go to the disk; None for half of what is free.
        threads: worker threads; the bytes do not depend on it.
        progress: told how far the work has come.
        cancel: set from another thread, stops the work; nothing half written is left.
        options: further fields of `Quantize`: symmetric, samples, sequence_length, skip, override and so on.

    Raises:
        QuantpressError: an input, an option or the output cannot be used; `ParityError` if the verdict is not passed,
            `CancelledError` once `cancel` is set.
    """
    stage = Quantize(
        output=Path(output), method=method, bits=bits, group_size=group_size, format=format,
        calibration=None if calibration is None else Path(calibration), **options,
    )  # fmt: skip
    context = RunContext(
        progress=cancellable(progress, cancel),
        threads=threads or available_threads(), device=device, max_memory=max_memory, force=force,
        allow_nonfinite=allow_nonfinite,
    )  # fmt: skip
    return _pressed(model, stage, context, judge or JudgeOptions() if verify else None)


def imatrix(
    model: Checkpoint | Path | str,
    output: Path | str,
    *,
    text: Path | str | None = None,
    context: int | None = None,
    chunks: int | None = None,
    calibration_dtype: str | None = None,
    force: bool = False,
    device: str = "cpu",
    max_memory: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> Pressed:
    """Runs a model on a text and writes how much each input of its weights is used, in llama.cpp's GGUF form.

    Args:
        model: an open checkpoint, merged or not, a folder, a GGUF file or a Hub id.
        output: the file; may hold `{name}`.
        text: UTF-8 text; None for a built-in one.
        context: tokens of a chunk; None for 512.
        chunks: at most so many chunks; None for the whole text.
        calibration_dtype: "f32" or "bf16", how products are computed; None: bf16 where the processor has units for it.
        force: replace an existing file.
        device: where the model runs, "cpu" or "cuda".
        max_memory: bytes that activations may take before they go to the disk; None for half of what is free.
        threads: worker threads; the bytes do not depend on it.
        progress: told how far the work has come.
        cancel: set from another thread, stops the work; nothing half written is left.

    Raises:
        QuantpressError: an input, an option or the output cannot be used; `CancelledError` once `cancel` is set.
    """
    stage = ImatrixFile(
        output=Path(output), text=None if text is None else Path(text), context=context, chunks=chunks,
        calibration_dtype=calibration_dtype,
    )  # fmt: skip
    run = RunContext(
        progress=cancellable(progress, cancel),
        threads=threads or available_threads(), device=device, max_memory=max_memory, force=force,
    )  # fmt: skip
    return _pressed(model, stage, run, None)


def _pressed(
    model: Checkpoint | Path | str, stage: BuildingStage, context: RunContext, judge: JudgeOptions | None
) -> Pressed:
    pressed = press(model, stage, context, judge=judge)
    pressed.require_parity()
    return pressed

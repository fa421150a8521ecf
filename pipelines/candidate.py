"""A file that is to be judged: what runs it, and what type it is of."""

from __future__ import annotations

import logging
from pathlib import Path

from quantpress.convert.arch.registry import find_gguf_arch
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.gguf.container import plain_metadata
from quantpress.convert.gguf.reader import open_gguf_file
from quantpress.convert.gguf.split import PartName
from quantpress.convert.onnx.read_folder import is_onnx
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.llama_cpp import LlamaCppRuntime
from quantpress.pipelines.llama_cpp_find import HOW_TO_INSTALL, find_llama_cpp
from quantpress.pipelines.machine import available_threads
from quantpress.pipelines.quantize_plan import main_type
from quantpress.pipelines.runtime import Runtime
from quantpress.pipelines.torch_runtime import TorchRuntime
from quantpress.quant.errors import OutputError, UsageError

__all__ = ["check_runtime", "first_part", "ftype_of", "open_runtime"]

log = logging.getLogger(__name__)

_RUNS = {"torch": "checkpoints and GGUF files", "llama.cpp": "GGUF files", "onnxruntime": "ONNX models"}
# storage types of bitsandbytes -> type whose limits hold: LLM.int8() rounds inputs too
_BITSANDBYTES = {"int8": "W8A8", "nf4": "INT4", "fp4": "INT4"}


def check_runtime(model: Checkpoint | Path, runtime: str) -> None:
    """Checks that a runtime runs files of this kind.

    Raises:
        UsageError: it does not; the message says which one does.
    """
    fitting: tuple[str, ...] = ("auto", "torch")
    kind = "a checkpoint"
    if isinstance(model, Path) and is_onnx(model):
        kind, fitting = "an ONNX model", ("auto", "onnxruntime")
    elif isinstance(model, Path) and model.suffix.lower() == ".gguf":
        kind, fitting = "a GGUF file", ("auto", "llama.cpp", "torch")
    if runtime not in fitting:
        name = model.name if isinstance(model, Checkpoint) else str(model)
        raise UsageError(
            f"--runtime {runtime}: runs {_RUNS[runtime]} only, {shown(name, 200)} is {kind}; use --runtime {fitting[1]}"
        )


def open_runtime(model: Checkpoint | Path, options: JudgeOptions, *, context: int) -> Runtime:
    """Loads a model into the runtime that was asked for, or into the one it is made for.

    Raises:
        UsageError: the runtime cannot run files of this kind.
        OutputError: the runtime is not installed.
        InputError: the file is refused by the runtime.
    """
    check_runtime(model, options.runtime)
    device, memory = options.device, options.max_memory
    if isinstance(model, Path) and is_onnx(model):
        from quantpress.pipelines.onnx_seq2seq import open_onnx_runtime

        return open_onnx_runtime(model, threads=options.threads, device=device)
    if isinstance(model, Path) and model.suffix.lower() != ".gguf":
        model = open_checkpoint(model)
    if isinstance(model, Checkpoint):
        return TorchRuntime.of_checkpoint(model, device=device, max_memory=memory, as_served=True)
    model = first_part(model)
    if options.runtime != "torch":
        if find_llama_cpp() is not None:
            return _in_llama_cpp(model, context=context, threads=options.threads or available_threads())
        if options.runtime == "llama.cpp":
            raise OutputError(f"--runtime llama.cpp: not found; {HOW_TO_INSTALL}")
        log.warning("llama.cpp is not installed: reading %s back with the gguf package instead", model.name)
    return TorchRuntime.of_gguf(model, device=device, max_memory=memory)


def _in_llama_cpp(path: Path, *, context: int, threads: int) -> Runtime:
    """Loads a GGUF file into what runs models of its kind."""
    metadata = plain_metadata(dict(open_gguf_file(path).metadata))
    arch = str(metadata.get("general.architecture"))
    if find_gguf_arch(arch, metadata).kind != "encoder_decoder":
        return LlamaCppRuntime(path, context=context, threads=threads)
    from quantpress.pipelines.seq2seq_runtime import LlamaCppSeq2Seq

    start = int(metadata.get(f"{arch}.decoder_start_token_id", 0))
    return LlamaCppSeq2Seq(path, context=context, threads=threads, start=start)


def first_part(path: Path) -> Path:
    """Gives the file that runtimes open a split model by, for any part of it."""
    name = PartName.of(path)
    return path if name is None or name.number == 1 else open_gguf_file(path).paths[0]


def ftype_of(artifact: Path) -> str:
    """Gives the type that an artifact is named after, for its default limits.

    Raises:
        InputError: it cannot be opened.
    """
    if is_onnx(artifact):
        from quantpress.convert.onnx.precision import precision_of
        from quantpress.convert.onnx.read import open_onnx

        return precision_of(open_onnx(artifact)).ftype
    from quantpress.convert.gguf.file_types import FILE_TYPES

    checkpoint = open_checkpoint(artifact)
    if checkpoint.quantized:
        return main_type(lazy.form for lazy in checkpoint.quantized.values())
    if "general.file_type" in checkpoint.metadata:
        number = checkpoint.metadata["general.file_type"][1]
        return next((name for name, value in FILE_TYPES.items() if value == number), "F32")
    kinds = set(checkpoint.storage_types.values())
    if kinds & _BITSANDBYTES.keys():
        return next(name for kind, name in _BITSANDBYTES.items() if kind in kinds)
    return max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes).dtype

"""What an ONNX model holds, told from its graph; no weight is read and no runtime is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.onnx.precision import OnnxPrecision, precision_of
from quantpress.convert.onnx.read import OnnxModel, OnnxValue, model_facts, open_onnx
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.pipelines.inspection import architecture_of, tokenizer_of
from quantpress.quant.errors import InputError

__all__ = ["inspect_onnx"]


def inspect_onnx(path: Path | str) -> dict[str, Any]:
    """Describes an ONNX model.

    Returns:
        Plain values for JSON, with the keys that `inspect` gives for other models where they make sense.

    Raises:
        InputError: it cannot be opened.
    """
    model = open_onnx(path)
    precision = precision_of(model)
    config = model.folder.config
    return {
        "model": model.name,
        "format": "onnx",
        "architecture": architecture_of(config),
        "parameters": sum(precision.parameters.values()),
        "bytes": sum(file.nbytes for file in model.files),
        "tensors": len(model.tensors),
        "tensor_types": {
            kind: {"tensors": count, "parameters": precision.parameters[kind]}
            for kind, count in precision.weights.items()
        },
        "tokenizer": tokenizer_of(TokenizerFiles(model.folder.tokenizer_files, name=model.name)),
        "quantization": _quantization(precision),
        "family": _family(model),
        "context": model.folder.context,
        **model_facts(model),
        "inputs": _values(model.inputs),
        "outputs": _values(model.outputs),
        "files": [file.path.name for file in model.files],
        "genai_config": bool(model.folder.genai),
        "problem": None,
    }


def _quantization(precision: OnnxPrecision) -> dict[str, Any] | None:
    if not precision.main.startswith("INT"):
        return None
    kind, _, group = precision.main.partition(" g")
    return {
        "format": "onnx",
        "bits": int(kind.removeprefix("INT")),
        "group_size": int(group) if group else -1,
        "activations": precision.activations or "not rounded",
        "compute_type": precision.compute,
    }


def _family(model: OnnxModel) -> str | None:
    if not model.folder.config:
        return None
    try:
        return find_arch(model.folder.config).family
    except InputError:
        return None


def _values(values: tuple[OnnxValue, ...]) -> dict[str, str]:
    """Name -> type and shape; of keys and values those of the first layer stand for all."""
    shown = {}
    for value in values:
        if value.name.startswith(("past_key_values.", "present.")) and ".0." not in value.name:
            continue
        shape = "?" if value.shape is None else ", ".join(str(size) or "?" for size in value.shape)
        shown[value.name] = f"{value.dtype} ({shape})"
    return shown

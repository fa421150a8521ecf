"""What a model file holds, told from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.gguf.file_types import FILE_TYPES
from quantpress.convert.gguf.mixture import TypeOptions
from quantpress.convert.gguf.mixture_rules import NEEDS_IMPORTANCE
from quantpress.convert.gguf.plan import plan_tensors
from quantpress.convert.gguf.stacks import stack_experts
from quantpress.convert.hub import download, is_hub_id
from quantpress.convert.onnx.read_folder import is_onnx
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import Preflight, preflight
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.quant.errors import InputError, LayoutError

KV_BYTES = 2  # llama.cpp and most servers keep keys and values in 16 bit unless told otherwise
ADAPTER_CONFIG = "adapter_config.json"


def inspect(model: Checkpoint | Path | str) -> dict[str, Any]:
    """Describes a model (INTERFACE: inspect).

    Args:
        model: folder, GGUF file, ONNX folder or file, Hub id, open checkpoint, or the folder or Hub id of an adapter.

    Returns:
        Plain values for JSON. `problem` says why a model could not be converted; None if nothing speaks against it.

    Raises:
        InputError: the files cannot be opened.
    """
    if not isinstance(model, Checkpoint) and _is_adapter(model):
        from quantpress.pipelines.adapter_inspection import inspect_adapter

        return inspect_adapter(model)
    if not isinstance(model, Checkpoint) and is_onnx(model):
        from quantpress.pipelines.onnx_inspection import inspect_onnx

        return inspect_onnx(model)
    source = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    report = {
        "model": source.name,
        "format": source.format,
        "architecture": architecture_of(source.config),
        "parameters": source.parameters,
        "bytes": sum(file.nbytes for file in source.files),
        "tensors": len(source.tensors),
        "tensor_types": tensor_types(source.tensors.values(), source.storage_types),
        "tokenizer": tokenizer_of(TokenizerFiles(source.tokenizer_files, name=source.name)),
        "quantization": _quantization(source),
    }
    try:
        checked = preflight(source)
    except InputError as error:
        return report | {"problem": str(error)}
    return report | _sizes(checked) | {"problem": None}


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """Gives the first class that a config.json names; None where it names none."""
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list | tuple) and classes else None
    return first if isinstance(first, str) else None


def tensor_types(
    tensors: Iterable[LazyTensor], storage_types: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, int]]:
    """Counts tensors and their values by the type that they are stored in."""
    kinds: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        kind = storage_types.get(tensor.name, tensor.dtype)
        kinds[kind] += 1
        sizes[kind] += tensor.size
    return {kind: {"tensors": kinds[kind], "parameters": sizes[kind]} for kind in sorted(kinds)}


def _is_adapter(model: Path | str) -> bool:
    folder = Path(model)
    if not folder.exists() and is_hub_id(str(model)):
        folder = download(str(model))
        if (folder / "config.json").is_file():  # some models have an adapter beside them
            return False
    return (folder / ADAPTER_CONFIG).is_file()


def tokenizer_of(files: TokenizerFiles) -> dict[str, Any] | None:
    """Says what kind of tokenizer the files are; None without one."""
    if files.tokenizer_json is not None:
        return {"kind": files.tokenizer_json["model"].get("type"), "file": "tokenizer.json"}
    if "tokenizer.model" in files:
        return {"kind": "SentencePiece", "file": "tokenizer.model"}
    return None


def _quantization(source: Checkpoint) -> Any:
    """What a quantizer made of the weights: the form of most of them, or what config.json says where none is known."""
    if not source.quantized:
        return source.config.get("quantization_config")
    forms = [lazy.form for lazy in source.quantized.values()]
    kinds = Counter(str(form) for form in forms)
    main = next(form for form in forms if str(form) == kinds.most_common(1)[0][0])
    report = {
        "format": source.format,
        "bits": main.bits,
        "group_size": -1 if main.per_row else main.group_size,
        "symmetric": main.symmetric,
        "scale_type": main.scale_type,
        "weights": len(forms),
    }
    if main.input_bits is not None:
        report["activation_bits"] = main.input_bits
    others = {kind: count for kind, count in kinds.items() if kind != str(main)}
    return report | ({"others": others} if others else {})


def _sizes(checked: Preflight) -> dict[str, Any]:
    hyper = checked.hyper
    encoder = {"kind": checked.spec.kind, "pooling": hyper.pooling or None} if checked.spec.kind == "encoder" else {}
    return {
        "family": checked.spec.family,
        **encoder,
        "layers": hyper.layers,
        "hidden_size": hyper.hidden,
        "heads": hyper.heads,
        "kv_heads": hyper.kv_heads,
        "vocabulary": hyper.vocab,
        "context": hyper.context,
        "kv_cache_bytes_per_token": kv_cache_bytes(hyper) if hyper.causal else 0,
        "estimated_bytes": estimated_bytes(checked),
    }


def kv_cache_bytes(hyper: Hyperparameters) -> int:
    """Gives the bytes of keys and values, in 16 bit, that one token of context takes."""
    return 2 * hyper.layers * hyper.kv_heads * hyper.head_dim * KV_BYTES


def estimated_bytes(checked: Preflight) -> dict[str, int]:
    """Gives the bytes of all tensors in a GGUF file of each type."""
    sizes, bindings = {}, stack_experts(checked.bindings)
    for ftype in FILE_TYPES:
        try:
            plan = plan_tensors(
                bindings,
                checked.spec,
                checked.hyper,
                TypeOptions(outtype=ftype),
                has_importance=ftype in NEEDS_IMPORTANCE,
            )
        except LayoutError:
            continue
        sizes[ftype] = sum(tensor.nbytes for tensor in plan.tensors)
    return sizes

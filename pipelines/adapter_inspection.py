"""What an adapter holds, told from its folder alone, without a base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantpress.convert.lora.adapter import open_adapter
from quantpress.convert.lora.config import AdapterConfig
from quantpress.convert.lora.description import describe
from quantpress.convert.qlora import detect_training_quantization
from quantpress.pipelines.inspection import tensor_types
from quantpress.pipelines.qlora_choice import adapter_texts


def inspect_adapter(folder: Path | str) -> dict[str, Any]:
    """Describes an adapter (INTERFACE: inspect); its tensors are read for their norms.

    Args:
        folder: of the adapter, or a Hub id.

    Returns:
        Plain values for JSON; `modules` has one record per module, with the norm of what is added to it.

    Raises:
        InputError: it cannot be opened or is of a kind that cannot be merged.
    """
    adapter = open_adapter(folder)
    config = adapter.config
    return {
        "model": Path(adapter.name).name,
        "format": "adapter",
        "type": config.kind,
        "rank": config.rank,
        "alpha": config.alpha,
        "scale": config.scale_of("") if config.rank else None,
        **_settings(config),
        "base": config.base_model or None,
        "base_quantization": detect_training_quantization(config.raw, adapter_texts(adapter)),
        "tensors": len(adapter.tensors),
        "parameters": sum(tensor.size for tensor in adapter.tensors),
        "bytes": sum(file.nbytes for file in adapter.files),
        "tensor_types": tensor_types(adapter.tensors),
        "tokenizer_files": sorted(adapter.tokenizer_files),
        "modules": [asdict(record) for record in describe(adapter)],
    }


def _settings(config: AdapterConfig) -> dict[str, Any]:
    """What decides where the adapter goes and how strongly."""
    return {
        "rslora": config.rslora,
        "dora": config.dora,
        "targets": _plain(config.target_modules),
        "excluded": _plain(config.exclude_modules),
        "target_parameters": list(config.target_parameters),
        "layers": _plain(config.layers_to_transform),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "modules_to_save": list(config.modules_to_save),
        "trainable_tokens": {name: len(ids) for name, ids in config.trainable_tokens.items()},
        "bias": config.bias,
        "lora_bias": config.lora_bias,
        "fan_in_fan_out": config.fan_in_fan_out,
    }


def _plain(value: str | tuple[Any, ...] | None) -> Any:
    return list(value) if isinstance(value, tuple) else value

"""Opens whatever a quantizer wrote into a model folder, by what its configuration says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.packed_parts import SETTINGS

__all__ = ["SETTINGS_FILES", "older_weights", "opened", "settings_beside"]

SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
"""Where AutoGPTQ and AutoAWQ kept their configuration before config.json had it."""


def settings_beside(read: Callable[[str], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Gives the configuration of packed weights that config.json does not speak of.

    Args:
        read: gives the contents of a file of the folder, None if there is none.

    Returns:
        What `quantization_config` would say, or None if no file says it.
    """
    for file, method in zip(SETTINGS_FILES, ("gptq", "awq"), strict=True):
        if (settings := read(file)) is not None:
            return {"quant_method": method, **settings}
    return None


def older_weights(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Gives names that AutoGPTQ had for the file of weights (auto_gptq: modeling/_base.py save_quantized).

    Args:
        settings: contents of quantize_config.json.
    """
    usual = f"gptq_model-{settings.get('bits')}bit-{settings.get('group_size')}g"
    names = (settings.get("model_file_base_name"), usual)
    return tuple(f"{name}.safetensors" for name in names if isinstance(name, str) and name)


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """Gives a checkpoint whose quantized tensors are read as the numbers they stand for.

    Args:
        checkpoint: as its files say; what is not quantized, or in a way that is unknown here, is returned as it is.

    Raises:
        InputError: parts that are missing or do not fit each other or the configuration.
    """
    if not _described(checkpoint.config):
        return checkpoint
    from quantpress.convert import mxfp4
    from quantpress.convert.awq import reader as awq
    from quantpress.convert.bitsandbytes import dequantized
    from quantpress.convert.compressed_tensors import reader as compressed_tensors
    from quantpress.convert.gptq import reader as gptq

    if mxfp4.is_mxfp4(checkpoint.config):
        return mxfp4.opened(checkpoint)
    if gptq.is_gptq(checkpoint.config):
        return gptq.opened(checkpoint)
    if awq.is_awq(checkpoint.config):
        return awq.opened(checkpoint)
    if compressed_tensors.is_compressed_tensors(checkpoint.config):
        return compressed_tensors.opened(checkpoint)
    return dequantized(checkpoint)


def _described(config: Mapping[str, Any]) -> bool:
    return bool(config.get(SETTINGS))

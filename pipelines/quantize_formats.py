"""Finds how a format packs quantized weights, by the name that `--format` has for it."""

from __future__ import annotations

import importlib

from quantpress.convert.quantized import PackFormat
from quantpress.quant.errors import UsageError

__all__ = ["find_format"]

# name -> module under quantpress.convert and the name in it
_HOMES = {
    "gptq": ("gptq.pack", "GPTQ_V1"),
    "gptq_v2": ("gptq.pack", "GPTQ_V2"),
    "awq": ("awq.pack", "FORMAT"),
    "compressed-tensors": ("compressed_tensors.pack", "FORMAT"),
    "bitsandbytes": ("bitsandbytes_pack", "FORMAT"),
}


def find_format(name: str) -> PackFormat:
    """Gives the format of a name.

    Raises:
        UsageError: there is none.
    """
    if name not in _HOMES:
        raise UsageError(f"--format {name}: must be one of {', '.join(_HOMES)}")
    module, attribute = _HOMES[name]
    found: PackFormat = getattr(importlib.import_module(f"quantpress.convert.{module}"), attribute)
    return found

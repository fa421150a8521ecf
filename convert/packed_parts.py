"""What the readers and writers of packed checkpoints share: parts of a module, values of a configuration, scales."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.quant_state import STATE_TYPES
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.floats import to_float32
from quantpress.quant.qtensor import BITS, QuantizedForm

__all__ = [
    "SETTINGS",
    "Parts",
    "bits_of",
    "flag_of",
    "group_size_of",
    "half_scales",
    "is_packed_by",
    "plain_dtype",
    "producer",
    "read_finite",
    "refuse_rounded_inputs",
    "word_modules",
]

SETTINGS = "quantization_config"
"""Key of config.json under which quantizers describe what they did."""

_SCALES = ("F16", "BF16", "F32")


class Parts:
    """Tensors of a checkpoint, from which those of quantized modules are taken one by one."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.model = checkpoint.name
        self.left = dict(checkpoint.tensors)

    def modules(self, suffix: str) -> list[str]:
        """Gives what stands before `suffix` in the names that end with it, in the file's order."""
        return [name.removesuffix(suffix) for name in self.left if name.endswith(suffix)]

    def take(self, name: str) -> LazyTensor:
        """Takes a tensor.

        Raises:
            InputError: it is missing.
        """
        if (tensor := self.left.pop(name, None)) is None:
            raise InputError(
                f"{self.model}: tensor {shown(name)} is missing beside the other parts of a quantized weight"
            )
        return tensor

    def take_optional(self, name: str) -> LazyTensor | None:
        """Takes a tensor, or gives None if there is none."""
        return self.left.pop(name, None)

    def take_words(self, name: str) -> LazyTensor:
        """Takes a matrix of 32-bit words.

        Raises:
            InputError: it is missing, or is something else.
        """
        tensor = self.take(name)
        if tensor.dtype != "I32" or len(tensor.shape) != 2:
            raise InputError(
                f"{tensor.source}: tensor {shown(name)} is {tensor.dtype} of shape {tensor.shape}, wanted a matrix of"
                " I32"
            )
        return tensor

    def take_scales(self, name: str) -> LazyTensor:
        """Takes a matrix of scales.

        Raises:
            InputError: it is missing, or is something else.
        """
        tensor = self.take(name)
        if tensor.dtype not in _SCALES or len(tensor.shape) != 2 or 0 in tensor.shape:
            raise InputError(
                f"{tensor.source}: tensor {shown(name)} is {tensor.dtype} of shape {tensor.shape}, wanted a matrix of"
                f" {', '.join(_SCALES)}"
            )
        return tensor

    def refuse_twice(self, weights: Iterable[str]) -> None:
        """Refuses a weight that is there in codes and in numbers.

        Raises:
            InputError: there is one.
        """
        for name in weights:
            if name in self.left:
                raise InputError(f"{self.model}: {shown(name)} is there twice, as codes and as numbers")


def is_packed_by(config: Mapping[str, Any], method: str) -> bool:
    """Whether a config.json says that a method packed the weights."""
    settings = config.get(SETTINGS)
    return isinstance(settings, Mapping) and settings.get("quant_method") == method


def word_modules(checkpoint: Checkpoint, method: str) -> tuple[Parts, list[str], str]:
    """Finds the modules whose weights are words in a tensor `....qweight`.

    Args:
        checkpoint: whose config.json names the method.
        method: "gptq" or "awq".

    Returns:
        All tensors, the names of the modules in the file's order, and where the settings stand, for messages.

    Raises:
        InputError: there is none.
    """
    parts = Parts(checkpoint)
    names = parts.modules(".qweight")
    where = f"{checkpoint.name}: {SETTINGS}"
    if not names:
        raise InputError(f"{where} says quant_method {method}, but no tensor is named ....qweight")
    return parts, names, where


def bits_of(value: Any, where: str, key: str = "bits") -> int:
    """Gives a number of bits of a configuration.

    Raises:
        InputError: another value.
    """
    if type(value) is not int or value not in BITS:
        raise InputError(f"{where}: {key} is {shown(value)}, wanted {', '.join(map(str, BITS))}")
    return value


def group_size_of(value: Any, where: str, key: str = "group_size") -> int:
    """Gives a group size of a configuration, -1 for a whole row.

    Raises:
        InputError: another value.
    """
    if type(value) is not int or (value != -1 and value < 1):
        raise InputError(f"{where}: {key} is {shown(value)}, wanted a positive number, or -1 for a whole row")
    return value


def flag_of(value: Any, where: str, key: str) -> bool:
    """Gives a truth value of a configuration.

    Raises:
        InputError: another value.
    """
    if type(value) is not bool:
        raise InputError(f"{where}: {key} is {shown(value)}, wanted true or false")
    return value


def plain_dtype(config: Mapping[str, Any]) -> str:
    """Gives the type of weights that config.json names; float16 if it names none, which the scales have."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    return STATE_TYPES.get(dtype, "F16") if isinstance(dtype, str) else "F16"


def read_finite(tensor: LazyTensor) -> Array:
    """Reads scales.

    Raises:
        InputError: some are not finite.
    """
    scales = tensor.read()
    finite = np.isfinite(to_float32(scales))
    if not finite.all():
        count = int(np.count_nonzero(~finite))
        raise InputError(f"{tensor.source}: tensor {shown(tensor.name)} has {count} NaN or infinite values")
    return scales


def half_scales(scale: Array, name: str) -> Array:
    """Gives scales as float16, in which GPTQ and AWQ store them.

    Raises:
        LayoutError: float16 does not hold one of them exactly.
    """
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    wrong = to_float32(half) != to_float32(scale)
    wrong |= ~np.isfinite(half)
    if wrong.any():
        first = float(to_float32(scale[wrong][:1])[0])
        raise LayoutError(
            f"{shown(name)}: {int(np.count_nonzero(wrong))} scales, first {first:.6g}, are not float16 numbers; give"
            " --format compressed-tensors, or quantize the model with scales in float16"
        )
    return half


def refuse_rounded_inputs(name: str, form: QuantizedForm) -> None:
    """Refuses what only compressed-tensors describes.

    Raises:
        LayoutError: the inputs are quantized too, or the scales are in float32.
    """
    if form.input_bits is not None:
        raise LayoutError(f"{name} has no quantized inputs; give --format compressed-tensors")
    if form.scale_type == "F32":
        raise LayoutError(f"{name} keeps scales in float16, found float32; give --format compressed-tensors")


def producer() -> str:
    """Gives this package and its version, as the `quantizer` entry of `meta` wants them."""
    from importlib import metadata

    try:
        return f"quantpress:{metadata.version('quantpress')}"
    except metadata.PackageNotFoundError:
        return "quantpress:0"

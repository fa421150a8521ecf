"""Writes int8 rows as bitsandbytes' LLM.int8() stores them: `X.weight` of int8, `X.SCB` and `X.weight_format`.

`SCB` is a row's greatest magnitude, in float32, and a weight is `code * SCB / 127` (bitsandbytes: nn/modules.py,
Linear8bitLt). Which columns of the inputs stay in 16 bits is decided while the model runs, by `llm_int8_threshold`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Array
from quantpress.convert.quantized import PackedTensor, PackFormat
from quantpress.quant.errors import LayoutError
from quantpress.quant.floats import to_float32
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor

__all__ = ["FORMAT", "THRESHOLD", "Bitsandbytes"]

THRESHOLD = 6.0
"""Inputs of this magnitude and above make their column an outlier (LLM.int8(), arXiv 2208.07339, section 3.2)."""

_GREATEST = np.float32(127)
_ONE_127TH = np.float32(1 / 127)


class Bitsandbytes:
    """The format `bitsandbytes`, in 8 bits; see `PackFormat`."""

    name = "bitsandbytes"

    def check(self, form: QuantizedForm) -> None:
        """Refuses everything but symmetric int8 with a scale per row.

        Raises:
            LayoutError: it is something else.
        """
        if form.bits != 8 or not form.per_row or not form.symmetric or form.ordered or form.input_bits is not None:
            raise LayoutError(
                f"bitsandbytes stores symmetric int8 with one scale per row, found {form}; give --bits 8 --group-size"
                " -1, or another --format"
            )

    def planned(self, name: str, form: QuantizedForm) -> tuple[PackedTensor, ...]:
        """Gives the tensors that will be stored for a weight."""
        return (
            PackedTensor(name, form.shape, "I8"),
            PackedTensor(f"{name.removesuffix('weight')}SCB", form.shape[:1], "F32"),
            PackedTensor(f"{name}_format", (), "U8"),
        )

    def pack(self, name: str, tensor: QuantizedTensor, form: QuantizedForm) -> dict[str, Array]:
        """Gives these tensors.

        Raises:
            LayoutError: what `check` refuses, or a scale whose 127-fold is beyond float32.
        """
        self.check(form)
        self.check(tensor.form)
        return {
            name: tensor.codes.view(np.int8) ^ np.int8(-128),  # code - 128
            f"{name.removesuffix('weight')}SCB": _absmax(to_float32(tensor.scale[:, 0])),
            f"{name}_format": np.zeros((), np.uint8),  # rows, the only layout in use
        }

    def settings(
        self, forms: Mapping[str, QuantizedForm], left: Sequence[str], details: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Gives `quantization_config` (transformers: utils/quantization_config.py, BitsAndBytesConfig).

        Args:
            forms: weight name -> form.
            left: names of weights that stay as they are; `lm_head` always does.
            details: not told.
        """
        del details
        modules = [name.removesuffix(".weight") for name in left]
        if "lm_head" not in modules and "lm_head.weight" not in forms:
            modules.append("lm_head")
        return {
            "quant_method": self.name,
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": THRESHOLD,
            "llm_int8_skip_modules": modules,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
        }

    def files(self, settings: Mapping[str, Any]) -> dict[str, bytes]:
        """Gives nothing: config.json says it all."""
        del settings
        return {}


FORMAT: PackFormat = Bitsandbytes()


def _absmax(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gives the SCB of each row: 127 scales, exact for scales of 16 bits.

    LLM.int8() takes the greatest magnitude after a weight was rounded to float16, so where a float16 number divided by
    127 is the scale, that number it was.
    """
    with np.errstate(over="ignore"):
        wide = scale * _GREATEST
        half = to_float32(wide.astype(np.float16))
    divided, multiplied = half / _GREATEST == scale, half * _ONE_127TH == scale
    absmax: NDArray[np.float32] = np.where(divided | multiplied, half, wide)
    if not np.isfinite(absmax).all():
        raise LayoutError("a scale is so large that its row's greatest magnitude is beyond float32")
    return absmax

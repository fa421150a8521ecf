"""Writes GPTQ checkpoints, version 1 and 2, as AutoGPTQ, GPTQModel, transformers and vLLM read them.

For a module of N outputs and K inputs: `qweight` int32 (K * bits / 32, N), codes packed along K; `qzeros` int32
(G, N * bits / 32), zeros packed along N, less one in version 1; `scales` float16 (G, N); `g_idx` int32 (K,), the group
of each input. Codes fill words as a stream of bits, low bits first (AutoGPTQ: nn_modules/qlinear/qlinear_cuda.py;
GPTQModel: nn_modules/qlinear/__init__.py). Both allocate K // 32 and N // 32 times `bits` words, so K and N are
multiples of 32 for every number of bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantpress.convert.checkpoint import Array
from quantpress.convert.files import shown
from quantpress.convert.gptq.settings import written_settings
from quantpress.convert.packed_parts import half_scales, refuse_rounded_inputs
from quantpress.convert.quantized import PackedTensor
from quantpress.quant.errors import LayoutError
from quantpress.quant.packing import pack_stream
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor, group_count

__all__ = ["GPTQ_V1", "GPTQ_V2", "GptqFormat"]

_STEP = 32  # rows and columns that fill whole words whatever the number of bits


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """One of the two versions of the format; see `PackFormat` for the methods.

    Attributes:
        name: "gptq" or "gptq_v2", which is also what `checkpoint_format` says.
        offset: what is subtracted from a zero before it is stored, 1 in version 1.
    """

    name: str
    offset: int

    def check(self, form: QuantizedForm) -> None:
        """Says whether a matrix of this form can be stored.

        Raises:
            LayoutError: rows or columns that do not fill words, quantized inputs, scales in float32.
        """
        refuse_rounded_inputs("GPTQ", form)
        for size, what in zip(form.shape, ("rows", "columns"), strict=True):
            if size % _STEP or not size:
                raise LayoutError(
                    f"GPTQ packs {_STEP} rows and {_STEP} columns into whole words; {size} {what} are no multiple of it"
                )

    def planned(self, name: str, form: QuantizedForm) -> tuple[PackedTensor, ...]:
        """Gives the tensors that will be stored for the weight `name`."""
        module, (rows, columns), bits = name.removesuffix(".weight"), form.shape, form.bits
        groups = group_count(columns, form.group_size)
        return (
            PackedTensor(f"{module}.g_idx", (columns,), "I32"),
            PackedTensor(f"{module}.qweight", (columns // 32 * bits, rows), "I32"),
            PackedTensor(f"{module}.qzeros", (groups, rows // 32 * bits), "I32"),
            PackedTensor(f"{module}.scales", (groups, rows), "F16"),
        )

    def pack(self, name: str, tensor: QuantizedTensor, form: QuantizedForm) -> dict[str, Array]:
        """Gives these tensors.

        Raises:
            LayoutError: a zero of 0 in version 1, or scales that float16 does not hold.
        """
        self.check(form)
        zeros = tensor.zeros()
        if self.offset and not zeros.all():
            raise LayoutError(
                f"{shown(name)}: {int(np.count_nonzero(zeros == 0))} groups have a zero of 0, which GPTQ version 1"
                " cannot store: it keeps zeros less one; give --format gptq_v2"
            )
        g_idx = tensor.g_idx
        if g_idx is None:
            g_idx = np.arange(tensor.columns, dtype=np.int32) // np.int32(tensor.group_size)
        stored = np.ascontiguousarray((zeros - np.uint8(self.offset)).T)
        parts = (
            g_idx.astype(np.int32),
            np.ascontiguousarray(pack_stream(tensor.codes, tensor.bits).T),
            pack_stream(stored, tensor.bits),
            np.ascontiguousarray(half_scales(tensor.scale, name).T),
        )
        return {planned.name: part for planned, part in zip(self.planned(name, form), parts, strict=True)}

    def settings(
        self, forms: Mapping[str, QuantizedForm], left: Sequence[str], details: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Gives `quantization_config` of config.json; every mixture of forms can be described."""
        return written_settings(self.name, forms, left, details)

    def files(self, settings: Mapping[str, Any]) -> dict[str, bytes]:
        """Gives quantize_config.json, which AutoGPTQ and GPTQModel read before config.json."""
        text = json.dumps(dict(settings), indent=2, ensure_ascii=False)
        return {"quantize_config.json": f"{text}\n".encode()}


GPTQ_V1 = GptqFormat("gptq", 1)
GPTQ_V2 = GptqFormat("gptq_v2", 0)

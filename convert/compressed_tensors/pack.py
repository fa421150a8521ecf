"""Writes quantized matrices as compressed-tensors stores them: `pack-quantized`, or `int-quantized` with int8 inputs.

`pack-quantized` holds unsigned codes in 32-bit words along K, `weight_packed` (N, words), beside `weight_scale` (N, G)
and, where there are zeros, `weight_zero_point`, packed along N: (words, G). `int-quantized` holds signed codes, one per
byte, as `weight` (N, K), and is what the library chooses as soon as inputs are quantized too (compressed-tensors:
compressors/pack_quantized/base.py, compressors/naive_quantized/base.py, compressors/format.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quantpress.convert.checkpoint import Array
from quantpress.convert.compressed_tensors.words import pack_dense, words_of
from quantpress.convert.quantized import PackedTensor, PackFormat
from quantpress.quant.errors import LayoutError
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor, group_count

__all__ = ["FORMAT", "CompressedTensors"]

_Kind = tuple[int, int | None, bool, bool]
"""What a config group tells apart: bits, group size (None for a row), symmetric, inputs of 8 bits."""


class CompressedTensors:
    """The format `compressed-tensors`; see `PackFormat`."""

    name = "compressed-tensors"

    def check(self, form: QuantizedForm) -> None:
        """Refuses groups that do not divide a row, and columns in an order of their own.

        Raises:
            LayoutError: one of these.
        """
        if form.ordered:
            raise LayoutError(
                "columns that are not in the order of their groups (act-order without static groups) cannot be stored:"
                " compressed-tensors reads weight_g_idx no more since 0.20; write gptq or gptq_v2"
            )
        if not form.per_row and form.shape[1] % form.group_size:
            raise LayoutError(
                f"compressed-tensors divides rows into equal groups; {form.shape[1]} columns do not divide by"
                f" {form.group_size}: take a group size that does, or whole rows"
            )
        if form.input_bits not in (None, 8):
            raise LayoutError(f"inputs of {form.input_bits} bits are not written; only 8")

    def planned(self, name: str, form: QuantizedForm) -> tuple[PackedTensor, ...]:
        """Gives the tensors that will be stored for a weight."""
        (rows, columns), module = form.shape, name.removesuffix(".weight")
        groups = group_count(columns, form.group_size)
        scale = PackedTensor(f"{module}.weight_scale", (rows, groups), form.scale_type)
        if form.input_bits:
            stored = [PackedTensor(f"{module}.weight", (rows, columns), "I8"), scale]
            zero = PackedTensor(f"{module}.weight_zero_point", (rows, groups), "I8")
            return (*stored, *([] if form.symmetric else [zero]))
        packed = PackedTensor(f"{module}.weight_packed", (rows, words_of(columns, form.bits)), "I32")
        zero = PackedTensor(f"{module}.weight_zero_point", (words_of(rows, form.bits), groups), "I32")
        shape = PackedTensor(f"{module}.weight_shape", (2,), "I64")
        return (packed, scale, *([] if form.symmetric else [zero]), shape)

    def pack(self, name: str, tensor: QuantizedTensor, form: QuantizedForm) -> dict[str, Array]:
        """Gives these tensors; nothing is rounded.

        Raises:
            LayoutError: what `check` refuses.
        """
        self.check(form)
        if tensor.g_idx is not None:
            self.check(tensor.form)
        module = name.removesuffix(".weight")
        if form.input_bits:
            offset = np.uint8(1 << (tensor.bits - 1))
            stored = {f"{module}.weight": (tensor.codes - offset).view(np.int8), f"{module}.weight_scale": tensor.scale}
            if tensor.zero is not None:
                stored[f"{module}.weight_zero_point"] = (tensor.zero - offset).view(np.int8)
            return stored
        stored = {
            f"{module}.weight_packed": pack_dense(tensor.codes, tensor.bits),
            f"{module}.weight_scale": tensor.scale,
        }
        if tensor.zero is not None:
            words = pack_dense(np.ascontiguousarray(tensor.zero.T), tensor.bits)
            stored[f"{module}.weight_zero_point"] = np.ascontiguousarray(words.T)
        stored[f"{module}.weight_shape"] = np.array(tensor.codes.shape, np.int64)
        return stored

    def settings(
        self, forms: Mapping[str, QuantizedForm], left: Sequence[str], details: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Gives `quantization_config`: the commonest form for all linear layers, others by the names of their modules.

        Args:
            forms: weight name -> form.
            left: names of weights that stay as they are. Every one that a reader may take for a linear layer must be
                here, routers and other models' layers too: the library goes by the class `Linear`. Names of other
                weights do no harm. `lm_head` is always left, for a tied head has no tensor of its own.
            details: `act_order` is noted; columns are in the order of their groups all the same.
        """
        kinds = {name: _kind(form) for name, form in forms.items()}
        ranked = [kind for kind, _ in Counter(kinds.values()).most_common()]
        layouts = {_layout(kind) for kind in ranked}
        groups: dict[str, Any] = {}
        for number, kind in enumerate(ranked):
            targets = ["Linear"]
            if number:
                targets = [name.removesuffix(".weight") for name, found in kinds.items() if found == kind]
            groups[f"group_{number}"] = _group(kind, targets, act_order=bool(details.get("act_order")))
            if len(layouts) > 1:
                groups[f"group_{number}"]["format"] = _layout(kind)
        modules = [name.removesuffix(".weight") for name in left]
        if "lm_head" not in modules and "lm_head.weight" not in forms:
            modules.append("lm_head")
        return {
            "quant_method": self.name,
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": modules,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def files(self, settings: Mapping[str, Any]) -> dict[str, bytes]:
        """Gives nothing: config.json says it all."""
        del settings
        return {}


FORMAT: PackFormat = CompressedTensors()


def _kind(form: QuantizedForm) -> _Kind:
    return form.bits, None if form.per_row else form.group_size, form.symmetric, form.input_bits is not None


def _layout(kind: _Kind) -> str:
    return "int-quantized" if kind[3] else "pack-quantized"


def _group(kind: _Kind, targets: list[str], *, act_order: bool) -> dict[str, Any]:
    bits, group_size, symmetric, rounded_inputs = kind
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }
    if act_order:
        weights["actorder"] = "weight"
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if rounded_inputs else None,
        "output_activations": None,
    }

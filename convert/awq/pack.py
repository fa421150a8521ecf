"""Writes AWQ checkpoints of the kind "gemm", as AutoAWQ, GPTQModel, transformers and vLLM read them.

For a module of N outputs and K inputs: `qweight` int32 (K, N / 8), codes of 4 bits packed along N; `qzeros` int32
(G, N / 8), packed alike, the zeros themselves; `scales` float16 (G, N). Of eight neighbours a word holds, from its low
bits up, number 0, 2, 4, 6, 1, 3, 5 and 7 (AutoAWQ: modules/linear/gemm.py from_linear, utils/packing_utils.py).

In GPT-NeoX, AutoAWQ also divides what comes out of the activation, by `mlp.act.scales`, and transformers computes with
whatever memory holds if that tensor is missing (transformers: integrations/awq.py replace_quantization_scales). It is
stored as ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Array
from quantpress.convert.files import shown
from quantpress.convert.gptq.settings import in_layer, module_rules
from quantpress.convert.packed_parts import half_scales, producer, refuse_rounded_inputs
from quantpress.convert.quantized import PackedTensor
from quantpress.quant.errors import LayoutError
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor

__all__ = ["BITS", "FORMAT", "PER_WORD", "AwqFormat", "activation_scales", "packed_words", "unpacked_words"]

BITS = 4
PER_WORD = 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which neighbour each place of a word holds, low bits first
_BEFORE_ACTIVATION = re.compile(r"((?:gpt_neox\.)?layers\.\d+\.mlp)\.dense_h_to_4h\.weight")
_GROUP_SIZES = (32, 64, 128)  # what the kernels of vLLM and GPTQModel have; besides whole rows


def activation_scales(name: str) -> str | None:
    """Gives the name of the tensor that scales what follows the weight `name`, None for all but some of GPT-NeoX."""
    found = _BEFORE_ACTIVATION.fullmatch(name)
    return f"{found[1]}.act.scales" if found else None


def packed_words(fields: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Packs (M, N) uint8 below 16 into (M, N / 8) int32; N is a multiple of 8."""
    blocks = fields.reshape(fields.shape[0], -1, PER_WORD)
    words = np.zeros(blocks.shape[:2], np.uint32)
    for place, column in enumerate(_ORDER):
        words |= blocks[:, :, column].astype(np.uint32) << np.uint32(BITS * place)
    return words.view(np.int32)


def unpacked_words(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Gives back (M, N) uint8 of (M, N / 8) int32; see `packed_words`."""
    values = np.ascontiguousarray(words).view(np.uint32)
    fields = np.empty((*values.shape, PER_WORD), np.uint8)
    for place, column in enumerate(_ORDER):
        fields[:, :, column] = (values >> np.uint32(BITS * place)) & np.uint32(15)
    return fields.reshape(values.shape[0], values.shape[1] * PER_WORD)


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """The format; see `PackFormat` for the methods."""

    name: str = "awq"

    def check(self, form: QuantizedForm) -> None:
        """Says whether a matrix of this form can be stored.

        Raises:
            LayoutError: other than 4 bits, a group size that readers lack, a shorter last group, columns in an order
                of their own, or rows that do not fill words.
        """
        refuse_rounded_inputs("AWQ", form)
        rows, columns = form.shape
        if form.bits != BITS:
            raise LayoutError(f"AWQ stores 4 bits, found {form.bits}; give --format gptq_v2 or compressed-tensors")
        if form.ordered:
            raise LayoutError("AWQ stores columns in the order of their groups, found g_idx; give --format gptq_v2")
        if not form.per_row and form.group_size not in _GROUP_SIZES:
            raise LayoutError(
                f"AWQ stores groups of 32, 64 or 128 columns or whole rows, found {form.group_size}; give --format"
                " gptq_v2 or compressed-tensors"
            )
        if not form.per_row and columns % form.group_size:
            raise LayoutError(f"AWQ has no shorter last group: {columns} columns in groups of {form.group_size}")
        if rows % PER_WORD or not rows:
            raise LayoutError(f"AWQ packs {PER_WORD} rows into a word; {rows} is no multiple of it")

    def planned(self, name: str, form: QuantizedForm) -> tuple[PackedTensor, ...]:
        """Gives the tensors that will be stored for the weight `name`."""
        module, (rows, columns) = name.removesuffix(".weight"), form.shape
        groups = columns // form.group_size
        parts = (
            PackedTensor(f"{module}.qweight", (columns, rows // PER_WORD), "I32"),
            PackedTensor(f"{module}.qzeros", (groups, rows // PER_WORD), "I32"),
            PackedTensor(f"{module}.scales", (groups, rows), "F16"),
        )
        scales = activation_scales(name)
        return parts if scales is None else (*parts, PackedTensor(scales, (rows,), "F16"))

    def pack(self, name: str, tensor: QuantizedTensor, form: QuantizedForm) -> dict[str, Array]:
        """Gives these tensors.

        Raises:
            LayoutError: scales that float16 does not hold.
        """
        self.check(form)
        parts: list[Array] = [
            packed_words(np.ascontiguousarray(tensor.codes.T)),
            packed_words(np.ascontiguousarray(tensor.zeros().T)),
            np.ascontiguousarray(half_scales(tensor.scale, name).T),
        ]
        if activation_scales(name) is not None:
            parts.append(np.ones(tensor.rows, np.float16))
        return {planned.name: part for planned, part in zip(self.planned(name, form), parts, strict=True)}

    def settings(
        self, forms: Mapping[str, QuantizedForm], left: Sequence[str], details: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Gives `quantization_config` of config.json.

        `zero_point` is always true, for the zeros are stored and vLLM's fast kernel takes no other files; `meta` says
        whether all of them are 8.

        Raises:
            LayoutError: groups of different sizes, or a name that readers would take for another one.
        """
        group_size = _one_group_size(forms)
        modules = [weight.removesuffix(".weight") for weight in left]
        quantized: dict[str, dict[str, Any]] = {weight.removesuffix(".weight"): {} for weight in forms}
        _refuse_ambiguous(modules, quantized)
        meta = {"quantizer": [producer()], "symmetric": all(form.symmetric for form in forms.values())}
        if details.get("method"):
            meta["method"] = details["method"]
        settings = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": group_size,
            "zero_point": True,
            "modules_to_not_convert": modules or None,
            "meta": meta,
        }
        if rules := module_rules(quantized, [module for module in modules if in_layer(module)]):
            settings["dynamic"] = rules  # GPTQModel does not look at modules_to_not_convert
        return settings

    def files(self, settings: Mapping[str, Any]) -> dict[str, bytes]:
        """Gives nothing: readers of AWQ look into config.json."""
        del settings
        return {}


def _one_group_size(forms: Mapping[str, QuantizedForm]) -> int:
    """Gives the group size that holds for all weights; a whole row is any group of its length."""
    sizes = {form.group_size: weight for weight, form in forms.items() if not form.per_row}
    lengths = {form.shape[1]: weight for weight, form in forms.items() if form.per_row}
    if not sizes:
        return -1 if lengths else 128
    if len(sizes) == 1 and lengths.keys() <= sizes.keys():
        return next(iter(sizes))
    found = [f"{size} ({shown(weight)})" for size, weight in sizes.items()]
    found += [f"a row of {length} ({shown(weight)})" for length, weight in lengths.items() if length not in sizes]
    raise LayoutError(f"AWQ has one group size for all weights, found {found[0]} and {found[1]}; give --format gptq_v2")


def _refuse_ambiguous(left: Sequence[str], quantized: Iterable[str]) -> None:
    """AutoAWQ and vLLM leave out every module whose path holds one of these texts anywhere."""
    for text in left:
        if hit := next((module for module in quantized if text in module), None):
            raise LayoutError(
                f"AWQ names {shown(text)} as not quantized, and readers would leave out {shown(hit)} too; quantize"
                " both, or give --format gptq_v2"
            )


FORMAT = AwqFormat()

"""Opens AWQ checkpoints of the kind "gemm", by AutoAWQ, GPTQModel or this package; the layout is told in pack.py.

Which modules are quantized is read from the tensors, how from `quantization_config`; the two must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.awq.pack import BITS, PER_WORD, activation_scales, unpacked_words
from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.packed_parts import (
    SETTINGS,
    Parts,
    flag_of,
    group_size_of,
    is_packed_by,
    plain_dtype,
    read_finite,
    word_modules,
)
from quantpress.convert.quantized import LazyQuantized, Streams, with_quantized
from quantpress.quant.errors import InputError
from quantpress.quant.packed import pack_down
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor, group_count

__all__ = ["is_awq", "opened"]


def is_awq(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the weights are AWQ's."""
    return is_packed_by(config, "awq")


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """Gives a checkpoint whose AWQ weights are read as the numbers they stand for, with their codes beside.

    Args:
        checkpoint: as its files say; any other checkpoint is returned as it is.

    Raises:
        InputError: parts that are missing or do not fit each other or the configuration, or another layout than gemm.
    """
    if not is_awq(checkpoint.config):
        return checkpoint
    parts, names, where = word_modules(checkpoint, "awq")
    group_size, symmetric = _read_settings(checkpoint.config[SETTINGS], where)
    modules = [_Module.take(parts, name, group_size, symmetric) for name in names]
    quantized = {f"{module.name}.weight": module.lazy() for module in modules}
    parts.refuse_twice(quantized)
    _drop_activation_scales(parts, quantized)
    return with_quantized(checkpoint, parts.left, quantized, dtype=plain_dtype(checkpoint.config), kind="awq")


def _drop_activation_scales(parts: Parts, weights: Iterable[str]) -> None:
    """Drops scales of activations, which are 1 in files made here.

    Raises:
        InputError: they are not: AutoAWQ moved scales from the next weight into them, and the model computes with them.
    """
    for name in filter(None, map(activation_scales, weights)):
        scales = parts.take_optional(name)
        if scales is not None and not (scales.read() == 1).all():
            raise InputError(
                f"{scales.source}: tensor {shown(name)} scales an activation by other numbers than 1, which only AWQ's"
                " own modules compute; give the unquantized model"
            )


def _read_settings(settings: Mapping[str, Any], where: str) -> tuple[int, bool]:
    """Gives the group size, and whether every zero is 8."""
    kind = next((settings[key] for key in ("version", "checkpoint_format", "format") if settings.get(key)), "gemm")
    if not isinstance(kind, str) or kind.lower() != "gemm" or settings.get("backend") == "llm-awq":
        raise InputError(f"{where}: the layout of the weights is {shown(kind)}, wanted gemm")
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if type(bits) is not int or bits != BITS:
        raise InputError(f"{where}: bits is {shown(bits)}, wanted {BITS}")
    size = settings.get("group_size", settings.get("q_group_size"))
    if size is None:
        raise InputError(f"{where}: group_size is missing")
    meta = settings.get("meta")
    symmetric = isinstance(meta, Mapping) and meta.get("symmetric") is True
    symmetric = symmetric or not flag_of(settings.get("zero_point", True), where, "zero_point")
    return group_size_of(size, where), symmetric


@dataclass(frozen=True, slots=True)
class _Module:
    """The tensors of a module, whose shapes fit each other."""

    name: str
    group_size: int
    symmetric: bool
    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor

    @classmethod
    def take(cls, parts: Parts, name: str, group_size: int, symmetric: bool) -> _Module:
        qweight, qzeros = parts.take_words(f"{name}.qweight"), parts.take_words(f"{name}.qzeros")
        columns = qweight.shape[0]
        size = columns if group_size == -1 else min(group_size, columns)
        module = cls(name, size, symmetric, qweight, qzeros, parts.take_scales(f"{name}.scales"))
        module._check()
        return module

    def _check(self) -> None:
        columns, words = self.qweight.shape
        groups, rows = group_count(columns, max(self.group_size, 1)), words * PER_WORD
        wanted = ((self.qweight, (columns, words)), (self.qzeros, (groups, words)), (self.scales, (groups, rows)))
        for tensor, shape in wanted:
            if tensor.shape != shape or 0 in shape:
                raise InputError(
                    f"{tensor.source}: tensor {shown(tensor.name)} is {tensor.dtype} of shape {tensor.shape}, wanted"
                    f" shape {shape} for {rows} outputs of {columns} inputs in groups of {self.group_size}"
                )

    def lazy(self) -> LazyQuantized:
        columns, words = self.qweight.shape
        form = QuantizedForm((words * PER_WORD, columns), BITS, self.group_size, self.symmetric, self.scales.dtype)
        return LazyQuantized(f"{self.name}.weight", form, self.qweight.source, self.read, self.streams)

    def read(self) -> QuantizedTensor:
        codes = np.ascontiguousarray(unpacked_words(self.qweight.read()).T)
        scales = np.ascontiguousarray(read_finite(self.scales).T)
        zeros = self._zeros()
        zero = None if zeros is None else np.ascontiguousarray(zeros.T)
        return QuantizedTensor(codes, scales, zero, BITS, self.group_size)

    def streams(self) -> Streams:
        words = pack_down(unpacked_words(self.qweight.read()), BITS)
        return Streams(words, read_finite(self.scales), self._zeros())

    def _zeros(self) -> NDArray[np.uint8] | None:
        """The zero of each group, (G, N), None where it is 8 for all.

        Raises:
            InputError: the configuration says that it is, and it is not.
        """
        zeros = unpacked_words(self.qzeros.read())
        if self.symmetric and (zeros != 1 << (BITS - 1)).any():
            raise InputError(
                f"{self.qzeros.source}: tensor {shown(self.qzeros.name)} has zeros from {zeros.min()} to {zeros.max()},"
                f" wanted 8 everywhere because {SETTINGS} says that the weights are symmetric"
            )
        return None if self.symmetric else np.ascontiguousarray(zeros)

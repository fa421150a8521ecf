"""Opens GPTQ checkpoints of version 1 and 2, whoever wrote them: AutoGPTQ, GPTQModel, optimum, or this package.

Which modules are quantized is read from the tensors, how from `quantization_config`; the two must agree. The layout is
told in pack.py. Three things are not as the configuration says in files that exist, and are looked at:

* Version 2 in a file that says version 1, or the other way round: the zeros of symmetric weights tell them apart.
* `g_idx` of zeros where several groups exist means that columns are in order (exllamav2: ext.py make_q_matrix).
* AutoGPTQ gave every module a bias. One of zeros that the family does not know is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.gptq.rules import ModuleSettings, read_settings
from quantpress.convert.packed_parts import SETTINGS, Parts, is_packed_by, plain_dtype, read_finite, word_modules
from quantpress.convert.quantized import LazyQuantized, Streams, with_quantized
from quantpress.quant.errors import InputError
from quantpress.quant.packing import unpack_stream
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor, group_count

__all__ = ["is_gptq", "opened"]

log = logging.getLogger(__name__)

_NAMES = {1: "gptq", 2: "gptq_v2"}


def is_gptq(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the weights are GPTQ's."""
    return is_packed_by(config, "gptq")


def opened(checkpoint: Checkpoint) -> Checkpoint:
    """Gives a checkpoint whose GPTQ weights are read as the numbers they stand for, with their codes beside.

    Args:
        checkpoint: as its files say; any other checkpoint is returned as it is.

    Raises:
        InputError: parts that are missing or do not fit each other or the configuration.
    """
    if not is_gptq(checkpoint.config):
        return checkpoint
    parts, names, where = word_modules(checkpoint, "gptq")
    rules = read_settings(checkpoint.config[SETTINGS], where, len(names))
    modules = [_Module.take(parts, name, rules.of(name)) for name in names]
    version = _true_version(modules, rules.version, checkpoint.name)
    quantized = {module.weight: module.lazy(version) for module in modules}
    parts.refuse_twice(quantized)
    _drop_empty_biases(checkpoint, parts, names)
    return with_quantized(checkpoint, parts.left, quantized, dtype=plain_dtype(checkpoint.config), kind=_NAMES[version])


@dataclass(frozen=True, slots=True)
class _Module:
    """The tensors of a module, whose shapes fit each other."""

    name: str
    settings: ModuleSettings
    qweight: LazyTensor
    qzeros: LazyTensor
    scales: LazyTensor
    g_idx: LazyTensor | None

    @classmethod
    def take(cls, parts: Parts, name: str, settings: ModuleSettings) -> _Module:
        qweight, qzeros = parts.take_words(f"{name}.qweight"), parts.take_words(f"{name}.qzeros")
        module = cls(
            name, settings, qweight, qzeros, parts.take_scales(f"{name}.scales"), parts.take_optional(f"{name}.g_idx")
        )
        module._check()
        return module

    @property
    def weight(self) -> str:
        return f"{self.name}.weight"

    @property
    def rows(self) -> int:
        return self.scales.shape[1]

    @property
    def columns(self) -> int:
        return self.qweight.shape[0] * 32 // self.settings.bits

    @property
    def group_size(self) -> int:
        size = self.settings.group_size
        return self.columns if size == -1 else min(size, self.columns)

    @property
    def groups(self) -> int:
        return group_count(self.columns, self.group_size)

    def _check(self) -> None:
        bits = self.settings.bits
        if self.qweight.shape[0] * 32 % bits or not self.qweight.shape[0]:
            self._refuse(self.qweight, f"whole codes of {bits} bits in its columns")
        if self.qweight.shape[1] != self.rows:
            self._refuse(self.qweight, f"{self.rows} columns, one for each of the module's scales")
        if self.scales.shape[0] != self.groups:
            size = self.settings.group_size
            self._refuse(self.scales, f"{self.groups} rows: {self.columns} inputs of {bits} bits in groups of {size}")
        if self.rows * bits % 32 or self.qzeros.shape != (self.groups, self.rows * bits // 32):
            self._refuse(self.qzeros, f"{(self.groups, self.rows * bits / 32)} for {self.rows} zeros of {bits} bits")
        if self.g_idx is not None and (self.g_idx.dtype != "I32" or self.g_idx.shape != (self.columns,)):
            self._refuse(self.g_idx, f"I32 of shape {(self.columns,)}")

    def _refuse(self, tensor: LazyTensor, wanted: str) -> None:
        raise InputError(
            f"{tensor.source}: tensor {shown(tensor.name)} is {tensor.dtype} of shape {tensor.shape}, wanted {wanted};"
            f" {SETTINGS} may say another number of bits or another group size than the weights have"
        )

    def order(self) -> NDArray[np.int32] | None:
        """The group of each column, None where columns are in order.

        Raises:
            InputError: a group that does not exist, or an order although the configuration says there is none.
        """
        if self.g_idx is None:
            return None
        g_idx = self.g_idx.read()
        if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < self.groups:
            raise InputError(
                f"{self.g_idx.source}: tensor {shown(self.g_idx.name)} goes from {g_idx.min()} to {g_idx.max()},"
                f" wanted 0 to {self.groups - 1}"
            )
        usual = np.arange(self.columns, dtype=np.int32) // np.int32(self.group_size)
        if np.array_equal(g_idx, usual) or not g_idx.any():
            return None
        if not self.settings.ordered:
            raise InputError(
                f"{self.g_idx.source}: tensor {shown(self.g_idx.name)} orders the columns, but desc_act is false in"
                f" {SETTINGS}; set it to true if that is how the weights were made"
            )
        return np.ascontiguousarray(g_idx)

    def zeros(self, version: int) -> NDArray[np.uint8]:
        """The zero of each group, (G, N); what version 1 took away is added."""
        bits, words = self.settings.bits, self.qzeros.read()
        if version == 2:
            return unpack_stream(words, bits, self.rows)
        if bits == 3:  # fields of 3 bits lie across words
            return (unpack_stream(words, bits, self.rows) + np.uint8(1)) & np.uint8(7)
        # GPTQModel takes 1 from every field of a word at once, so a zero of 0 borrows from the next one, and only the
        # same addition gives all of them back (utils/model.py convert_gptq_v2_to_v1_format_module).
        ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
        return unpack_stream((words.view(np.uint32) + ones).view(np.int32), bits, self.rows)

    def lazy(self, version: int) -> LazyQuantized:
        settings = self.settings
        ordered = settings.ordered and self.order() is not None
        form = QuantizedForm(
            (self.rows, self.columns), settings.bits, self.group_size, settings.symmetric, self.scales.dtype, ordered
        )
        streams = None if ordered else partial(self.streams, version)
        return LazyQuantized(self.weight, form, self.qweight.source, partial(self.read, version), streams)

    def read(self, version: int) -> QuantizedTensor:
        bits = self.settings.bits
        codes = unpack_stream(np.ascontiguousarray(self.qweight.read().T), bits, self.columns)
        scales = np.ascontiguousarray(read_finite(self.scales).T)
        zero = self._zero(version)
        placed = None if zero is None else np.ascontiguousarray(zero.T)
        return QuantizedTensor(codes, scales, placed, bits, self.group_size, self.order())

    def streams(self, version: int) -> Streams:
        return Streams(self.qweight.read(), read_finite(self.scales), self._zero(version))

    def _zero(self, version: int) -> NDArray[np.uint8] | None:
        """The zero of each group, (G, N), None where it is the same for all.

        Raises:
            InputError: the configuration says that it is, and it is not.
        """
        zeros = self.zeros(version)
        if not self.settings.symmetric:
            return zeros
        self._refuse_asymmetric(zeros)
        return None

    def _refuse_asymmetric(self, zeros: NDArray[np.uint8]) -> None:
        wanted = 1 << (self.settings.bits - 1)
        if (zeros != wanted).any():
            raise InputError(
                f"{self.qzeros.source}: tensor {shown(self.qzeros.name)} has zeros from {zeros.min()} to {zeros.max()},"
                f" wanted {wanted} everywhere because sym is true in {SETTINGS}; set it to false if the weights are"
                " asymmetric"
            )


def _true_version(modules: list[_Module], said: int, model: str) -> int:
    """Finds out which version the zeros of a symmetric module are in; where nothing tells, what the file says."""
    module = next((module for module in modules if module.settings.symmetric), None)
    if module is None:
        return said
    zeros = module.zeros(2)
    usual = 1 << (module.settings.bits - 1)
    found = {usual - 1: 1, usual: 2}.get(int(zeros.flat[0]), said) if (zeros == zeros.flat[0]).all() else said
    if found != said:
        log.warning(
            "%s: checkpoint_format says %s, but symmetric zeros are stored as %s stores them: read as %s",
            model, _NAMES[said], _NAMES[found], _NAMES[found],
        )  # fmt: skip
    return found


def _drop_empty_biases(checkpoint: Checkpoint, parts: Parts, modules: list[str]) -> None:
    """Drops biases of zeros that the model's family has no place for."""
    config = {key: value for key, value in checkpoint.config.items() if key != SETTINGS}
    try:
        arch = find_arch(config)
        hyper = arch.read_config(config)
    except InputError:
        return  # preflight will say what is wrong, or nothing needs a family
    if hyper.layers > len(checkpoint.tensors):
        return
    known = {name for row, layer in arch.rows(hyper) for name in arch.names(row, layer)}
    for module in modules:
        name = f"{module}.bias"
        bias = parts.left.get(name)
        if bias is not None and name not in known and len(bias.shape) == 1 and not bias.read().any():
            del parts.left[name]

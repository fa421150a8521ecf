"""Quantized weights of a checkpoint, as every format opens them and every format writes them.

A format is a folder beside this file: a `FORMAT` that packs codes into its tensors, and an `opened` that takes them
out again. Nothing is rounded on the way: what a format cannot hold exactly it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from quantpress.convert.bitsandbytes import transposed
from quantpress.convert.checkpoint import DTYPES, Array, Checkpoint, LazyTensor
from quantpress.convert.linears import linear_weights
from quantpress.convert.recent import Recent
from quantpress.quant.qtensor import QuantizedForm, QuantizedTensor

__all__ = ["CodesOrigin", "LazyQuantized", "PackFormat", "PackedTensor", "Streams", "with_quantized"]


@dataclass(frozen=True, slots=True)
class LazyQuantized:
    """A quantized matrix whose form is known and whose codes are read on demand.

    Attributes:
        name: of the weight in Hugging Face's spelling, `model.layers.0.self_attn.q_proj.weight`.
        form: what it is made of; `shape` is (N, K) whatever way round the family stores its weights.
        source: the file it comes from, for messages.
        read: gives all of it; may be called twice and from several threads.
        streams: gives the same as the kernels read it, no code unpacked; None where the file keeps it otherwise.
    """

    name: str
    form: QuantizedForm
    source: str
    read: Callable[[], QuantizedTensor] = field(repr=False)
    streams: Callable[[], Streams] | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False, slots=True)
class Streams:
    """A quantized matrix in the layout of GPTQ's `qweight`, which is the one that the kernels read.

    Attributes:
        words: (K * bits / 32, N) int32, a stream of bits down each column.
        scale: (G, N) in the type it is stored in.
        zero: (G, N) uint8, None for symmetric codes.
    """

    words: Array
    scale: Array
    zero: Array | None


@dataclass(frozen=True, slots=True)
class CodesOrigin:
    """Where codes come from that no file of the source holds.

    Attributes:
        key: tells them apart from all that other options, texts or models give.
        details: what `PackFormat.settings` says of how they were made.
    """

    key: str
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor that a format stores for a weight; `dtype` is a key of `DTYPES`."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class PackFormat(Protocol):
    """How a format stores quantized matrices: `convert/gptq`, `convert/awq`, `convert/compressed_tensors`."""

    @property
    def name(self) -> str:
        """As `--format` calls it."""
        ...

    def check(self, form: QuantizedForm) -> None:
        """Says whether a matrix of this form can be stored.

        Raises:
            LayoutError: it cannot, with the reason and what would do.
        """
        ...

    def planned(self, name: str, form: QuantizedForm) -> tuple[PackedTensor, ...]:
        """Gives the tensors that will be stored for the weight `name` (`....q_proj.weight`)."""
        ...

    def pack(self, name: str, tensor: QuantizedTensor, form: QuantizedForm) -> dict[str, Array]:
        """Gives these tensors, in the order of `planned`.

        Raises:
            LayoutError: values that the format cannot hold (a zero of 0 in GPTQ v1, a scale too small for its type).
        """
        ...

    def settings(
        self, forms: Mapping[str, QuantizedForm], left: Sequence[str], details: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Gives `quantization_config` of config.json.

        Args:
            forms: weight name -> form, for all that are quantized. Those that differ from the commonest form are
                listed one by one where the format can.
            left: names of linear weights, heads included, that are not quantized.
            details: how it was made, for `meta` and the like: `method`, `act_order`, `damping`, ...

        Raises:
            LayoutError: a mixture that the format cannot describe.
        """
        ...

    def files(self, settings: Mapping[str, Any]) -> dict[str, bytes]:
        """Gives what else belongs in the folder: file name -> bytes (`quantize_config.json`)."""
        ...


def with_quantized(
    checkpoint: Checkpoint,
    tensors: Mapping[str, LazyTensor],
    quantized: Mapping[str, LazyQuantized],
    *,
    dtype: str,
    kind: str,
) -> Checkpoint:
    """Gives a checkpoint whose quantized weights are read as the numbers they stand for, and kept as codes beside.

    Args:
        checkpoint: as its files say.
        tensors: what is not quantized, in the file's order.
        quantized: weight name -> codes.
        dtype: type that the weights have for who reads them plainly, "F16" or "BF16"; `wide_rows` gives them exactly.
        kind: name of the format, for `Checkpoint.format`.

    Returns:
        Without `quantization_config` in its config, for its tensors are not quantized any more.
    """
    recent: Recent[Array] = Recent(2)
    opened = {name: _dequantized(lazy, dtype, recent) for name, lazy in quantized.items()}
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    for name, swapped in linear_weights(config, opened).items():
        if swapped:
            opened[name] = transposed(opened[name], recent)
    types = {name: str(lazy.form) for name, lazy in quantized.items()}
    return replace(
        checkpoint,
        config=config,
        tensors={**tensors, **opened},
        quantized=dict(quantized),
        storage_types={**checkpoint.storage_types, **types},
        format=kind,
    )


def _dequantized(lazy: LazyQuantized, dtype: str, recent: Recent[Array]) -> LazyTensor:
    def whole() -> Array:
        return recent.get((lazy.name, "values"), lambda: lazy.read().dequantize())

    def wide_rows(start: int, stop: int) -> Array:
        if not 0 <= start <= stop <= lazy.form.shape[0]:
            raise IndexError(f"{lazy.name}: rows [{start}, {stop}) of {lazy.form.shape[0]}")
        return whole()[start:stop]

    def read_rows(start: int, stop: int) -> Array:
        with np.errstate(over="ignore"):
            return wide_rows(start, stop).astype(DTYPES[dtype])

    return LazyTensor(lazy.name, lazy.form.shape, dtype, lazy.source, read_rows, wide_rows)

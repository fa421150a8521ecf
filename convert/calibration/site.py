"""What calibration gathers at a place of a layer, and what a method makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quantpress.quant.ggml.blocks import BlockTensor
from quantpress.quant.qtensor import QuantizedTensor

__all__ = ["Coded", "LayerMethod", "LayerResult", "Site", "SiteResult"]

Array = NDArray[Any]
Coded: TypeAlias = "QuantizedTensor | BlockTensor"


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """The linears of a layer that read the same input: q, k and v; the attention's output; gate and up; down.

    Gate and up, and down, of an expert are sites of their own, which see the tokens that the router sends there; what
    all tokens go to beside them is another.

    Attributes:
        layer: number of the layer.
        weights: slot ("attn_q.weight") -> (N, K) float32, in the decoder's form; those that are to be quantized.
        names: slot -> name in the checkpoint.
        tokens: tokens that were seen; where there were none, what would be a mean over them is None.
        hessian: (K, K) float32, X^T X / tokens, symmetric; None where the method did not want it. The method may
            overwrite it.
        drift: (K, K) float32, (X' - X)^T X / tokens, where X' is what the same inputs are with the source's weights in
            all layers and steps before; None where not wanted.
        mean_abs: (K,) float32 mean of |x| per input column; None where not wanted.
        max_abs: (K,) float32 greatest |x| per input column; None where not wanted.
        ends: (2,) float32 least and greatest x; None where not wanted.
        counts: (65536,) int64 values x in each bin of `ranges.binned`; None where not wanted.
        power: (K,) float64 sum of x^2 over the tokens, per input column; None where not wanted.
        before: what the input comes from, see `traits.Place`: a norm or a linear that a scale can be taken back in.
            Sites with the same norm read the same input, an expert's a part of its rows.
        routers: slots, among the plain tensors, of matrices that read the same input and are never quantized: a scale
            on the input is taken out of their columns.
        left: slot -> (N, K) float32 weight of every linear that reads the same input and is not to be quantized: a
            scale on the input would have to be taken out of it too.
        read_back: (slot of a plain tensor, its values in the decoder's form) -> the values that will be read when it
            has been stored, rounded to its type. What a method puts into `SiteResult.changed` goes through this first.
    """

    layer: int
    weights: Mapping[str, NDArray[np.float32]]
    names: Mapping[str, str]
    tokens: int
    hessian: NDArray[np.float32] | None = None
    drift: NDArray[np.float32] | None = None
    mean_abs: NDArray[np.float32] | None = None
    max_abs: NDArray[np.float32] | None = None
    ends: NDArray[np.float32] | None = None
    counts: NDArray[np.int64] | None = None
    power: NDArray[np.float64] | None = None
    before: str = ""
    routers: tuple[str, ...] = ()
    left: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    read_back: Callable[[str, Array], NDArray[np.float32]] = field(default=lambda _slot, values: values, repr=False)


@dataclass(frozen=True, eq=False, slots=True)
class SiteResult:
    """What a method made of one or all sites of a layer.

    Attributes:
        quantized: slot -> codes or blocks in the decoder's form, (N, K).
        changed: slot -> plain tensor whose values changed (a norm that a scale was folded into), in the decoder's form
            and as it will be read back: already rounded to the type it is stored in.
        reports: slot -> figures for the sidecar: `loss`, `damping`, `dead_columns`, ...; no times.
    """

    quantized: Mapping[str, Coded]
    changed: Mapping[str, Array] = field(default_factory=dict)
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class LayerResult:
    """A finished layer, by the names of the checkpoint.

    Attributes:
        layer: its number.
        quantized: weight name -> codes or blocks, (N, K).
        changed: name of a plain tensor -> new values, as the checkpoint stores them.
        reports: weight name -> figures.
        seconds: "forward", "hessian" (all statistics) and "quantize" -> seconds; those of the first two are what the
            threads worked, divided by their number.
        powers: name of a linear weight in GGUF -> (E, K) float64 sums of squares of its inputs over the tokens that
            each expert saw (1 where it is one matrix), as it was when the layer's weights before it were quantized;
            with the last layer the head's too. Empty where `calibrate` was not asked for them.
        counts: the same names -> (E,) these tokens.
    """

    layer: int
    quantized: Mapping[str, Coded]
    changed: Mapping[str, Array]
    reports: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    powers: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    counts: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)


class LayerMethod(Protocol):
    """A method that needs a model's activations.

    Attributes:
        sequential: called for one site after the other, each seeing the inputs that the quantized weights before it
            give (GPTQ); else once per layer with all sites, and the next layer sees what the source's weights give
            (AWQ, SmoothQuant).
        wants: of "hessian", "drift", "mean_abs", "max_abs", "ends", "counts", "power"; "drift" runs the source's
            weights beside the others. A method that is called once per layer gets "power" of experts instead of
            "hessian": all of theirs at once would be too much.
    """

    sequential: bool

    @property
    def wants(self) -> frozenset[str]:
        """See above."""
        ...

    def quantize(self, sites: Sequence[Site], plain: Mapping[str, Array]) -> SiteResult:
        """Quantizes the weights of one site (sequential) or of all sites of a layer.

        Args:
            sites: in the order of the computation.
            plain: slot -> float32 values of the layer's norms and biases, in the decoder's form.

        Raises:
            InputError: numbers that cannot be worked with; the caller adds the layer's and the weight's name.
        """
        ...

"""What every layer of a graph reads: the builder, the weights, the model's sizes and where the tokens stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from quantpress.convert.arch.spec import Hyperparameters, Rope
from quantpress.convert.onnx.expert_stacks import ExpertStacks
from quantpress.convert.onnx.graph import GraphBuilder
from quantpress.convert.onnx.norms import Norm
from quantpress.convert.onnx.places import Places
from quantpress.convert.onnx.rotary import RotaryTable
from quantpress.convert.traits import Traits

__all__ = ["Frame", "GraphWeights", "Turn", "ropes_of"]


class GraphWeights(Protocol):
    """Puts weights and what multiplies with them into a graph.

    Slots are the decoder's (`attn_q.weight`); a layer of -1 stands for none. All values are in the builder's type of
    activations.
    """

    def vector(self, slot: str, layer: int = -1) -> ir.Value | None:
        """Gives a norm's weight (its offset added) or bias, (n,) or (heads, n); None where the model has none."""
        ...

    def linear(self, values: ir.Value, slot: str, layer: int) -> ir.Value:
        """Multiplies (..., K) with a weight and adds its bias if it has one: (..., N)."""
        ...

    def embed(self, ids: ir.Value) -> ir.Value:
        """Gives the rows of the token embedding for (B, S) int64 ids: (B, S, embedding), not scaled."""
        ...

    def rows(self, slot: str, index: ir.Value) -> ir.Value:
        """Gives the rows of learned positions or of token types for (B, S) int64: (B, S, hidden)."""
        ...

    def expert_stacks(self, layer: int) -> ExpertStacks | None:
        """Gives the experts of a layer, gate and up by turns; None where one operator cannot take them all."""
        ...

    def head(self, values: ir.Value) -> ir.Value:
        """Multiplies (B, S, embedding) with the head, tied or not: (B, S, vocab), not capped."""
        ...


@dataclass(frozen=True, slots=True)
class Turn:
    """How layers of one kind turn q and k.

    Attributes:
        table: cosines and sines.
        rows: (B, S) int64 row of the table for each token; None where GroupQueryAttention finds it itself.
    """

    table: RotaryTable
    rows: ir.Value | None


@dataclass(frozen=True, slots=True)
class Frame:
    """What every layer reads.

    Attributes:
        builder: the graph.
        weights: of the model.
        kinds: traits of the layers with experts (True) and without.
        hyper: sizes and scales.
        places: where the tokens stand.
        turns: how q and k are turned, of layers with a window that have rotary settings of their own (True) and of the
            others (False); those that no layer needs are missing.
    """

    builder: GraphBuilder
    weights: GraphWeights
    kinds: Mapping[bool, Traits]
    hyper: Hyperparameters
    places: Places
    turns: Mapping[bool, Turn]

    @property
    def shape(self) -> tuple[str, str, int]:
        """Shape of hidden states."""
        return ("batch_size", "sequence_length", self.hyper.hidden)

    def traits(self, layer: int) -> Traits:
        """Gives the kind of a layer."""
        return self.kinds[self.hyper.has_experts(layer)]

    def slides(self, layer: int) -> bool:
        """Whether a layer sees a window of tokens only."""
        return bool(self.hyper.sliding_layers) and self.hyper.sliding_layers[layer]

    def turn(self, layer: int) -> Turn | None:
        """Gives how a layer turns q and k; None where no position turns them."""
        if self.hyper.rope_layers and not self.hyper.rope_layers[layer]:
            return None
        return self.turns.get(self.slides(layer) and self.hyper.rope_local is not None)

    def norm(self, slot: str, layer: int) -> Norm:
        """Gives a norm by its slot without ".weight"; one that has no weights is of hidden states (OLMo)."""
        weight = self.weights.vector(f"{slot}.weight", layer)
        if weight is None:
            weight = self.builder.constant(np.ones(self.hyper.hidden, self.builder.numpy_type))
        name = f"/{slot}" if layer < 0 else f"/layers.{layer}/{slot}"
        bias = self.weights.vector(f"{slot}.bias", layer)
        kind = next(iter(self.kinds.values())).norm
        return Norm(kind, self.hyper.norm_eps, weight, bias, name)


def ropes_of(hyper: Hyperparameters) -> dict[bool, Rope]:
    """Gives the rotary settings that layers without (False) and with (True) settings of their own for a window use."""
    found: dict[bool, Rope] = {}
    for layer in range(hyper.layers):
        if hyper.rope_layers and not hyper.rope_layers[layer]:
            continue
        local = hyper.rope_local is not None and bool(hyper.sliding_layers) and hyper.sliding_layers[layer]
        rope = hyper.rope_local if local else hyper.rope
        if rope is not None:
            found[local] = rope
    return found

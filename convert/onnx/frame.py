"""What every layer of a graph reads: the builder, the weights, the model's sizes and where the tokens stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from quantpress.convert.arch.spec import Hyperparameters, Rope
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
        """Gives a norm's weight (its offset added) or bias, (n,); None where the model has none."""
        ...

    def linear(self, values: ir.Value, slot: str, layer: int) -> ir.Value:
        """Multiplies (B, S, K) with a weight and adds its bias if it has one: (B, S, N)."""
        ...

    def embed(self, ids: ir.Value) -> ir.Value:
        """Gives the rows of the token embedding for (B, S) int64 ids: (B, S, hidden), not scaled."""
        ...

    def positions(self, index: ir.Value) -> ir.Value:
        """Gives the rows of learned positions for (B, S) int64 positions: (B, S, hidden)."""
        ...

    def head(self, values: ir.Value) -> ir.Value:
        """Multiplies (B, S, hidden) with the head, tied or not: (B, S, vocab), not capped."""
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
        traits: kind of its layers.
        hyper: sizes and scales.
        places: where the tokens stand.
        turns: how q and k are turned, of layers with a window that have rotary settings of their own (True) and of the
            others (False); None where positions are learned.
    """

    builder: GraphBuilder
    weights: GraphWeights
    traits: Traits
    hyper: Hyperparameters
    places: Places
    turns: Mapping[bool, Turn | None]

    @property
    def shape(self) -> tuple[str, str, int]:
        """Shape of hidden states."""
        return ("batch_size", "sequence_length", self.hyper.hidden)

    def slides(self, layer: int) -> bool:
        """Whether a layer sees a window of tokens only."""
        return bool(self.hyper.sliding_layers) and self.hyper.sliding_layers[layer]

    def turn(self, layer: int) -> Turn | None:
        """Gives how a layer turns q and k; None where positions are learned."""
        return self.turns[self.slides(layer) and self.hyper.rope_local is not None]

    def norm(self, slot: str, layer: int) -> Norm:
        """Gives a norm by its slot without ".weight"."""
        weight = self.weights.vector(f"{slot}.weight", layer)
        assert weight is not None, "every table has the weights of its norms"
        name = f"/{slot}" if layer < 0 else f"/layers.{layer}/{slot}"
        bias = self.weights.vector(f"{slot}.bias", layer)
        return Norm(self.traits.norm, self.hyper.norm_eps, weight, bias, name)


def ropes_of(hyper: Hyperparameters) -> dict[bool, Rope | None]:
    """Gives the rotary settings of layers without (False) and with (True) settings of their own for a window."""
    ropes = {False: hyper.rope}
    return ropes if hyper.rope_local is None else {**ropes, True: hyper.rope_local}

"""What the places of a layer read, for some tokens: all of them, or those that a router sends to an expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quantpress.convert.arch.spec import Experts
from quantpress.convert.experts import assigned, routed
from quantpress.convert.latent import latent_input, query_input
from quantpress.convert.layer import DOWN, UP, Layer, State
from quantpress.convert.traits import Place

__all__ = ["Inputs", "inputs_of"]

Inputs = tuple[torch.Tensor, "torch.Tensor | None"]
"""(n, K) what a place reads, and the same with the source's weights; None where these are not run."""


def inputs_of(step: int, places: Sequence[Place], layers: Sequence[Layer], states: Sequence[State]) -> Iterator[Inputs]:
    """Gives the inputs of places of one step.

    Tokens go to the experts that the first stream's router chooses. The second stream's may choose others: an expert
    whose inner values it lacks for a token is given those of the first, as if the two did not differ there.

    Args:
        step: of all places.
        places: one or more.
        layers: with the weights to compute with; after it, if both are run, with the source's.
        states: what the steps before have left of each.
    """
    begun = [layer.begin(step, state).flatten(0, 1) for layer, state in zip(layers, states, strict=True)]
    parts, other = [], None
    if any(place.expert >= 0 for place in places):
        experts = _experts(layers[0])
        routes = routed(layers[0], begun[0]) if step == UP else states[0]["routes"].flatten(0, 1)
        parts = assigned(routes[:, : experts.used], experts.count)
        other = _Other.of(layers[1], states[1]) if len(layers) > 1 and step == DOWN else None
    for place in places:
        if place.expert < 0:
            found = [_whole(place, layer, values) for layer, values in zip(layers, begun, strict=True)]
            yield found[0], found[1] if len(found) > 1 else None
        elif step == UP:
            token, _ = parts[place.expert]
            yield begun[0][token], begun[1][token] if len(begun) > 1 else None
        else:
            token, which = parts[place.expert]
            values = _split(layers[0], begun[0])[token, which]
            yield values, None if other is None else other.inner(place.expert, token, values)


def _whole(place: Place, layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """Gives what all tokens bring to a place."""
    if place.input == "query":
        return query_input(layer, values).float()
    if place.input == "latent":
        return latent_input(layer, values).float()
    if place.input == "shared":
        return values[:, _experts(layer).used * _experts(layer).intermediate :]
    return values


def _experts(layer: Layer) -> Experts:
    assert layer.hyper.experts is not None, "the layer has experts"
    return layer.hyper.experts


def _split(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """Gives the inner values of each token's experts, (n, used, intermediate)."""
    experts = _experts(layer)
    return values[:, : experts.used * experts.intermediate].view(len(values), experts.used, -1)


@dataclass(frozen=True, eq=False, slots=True)
class _Other:
    """Where the source's stream sends its tokens, and what its experts have made of them."""

    chosen: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, layer: Layer, state: State) -> _Other:
        chosen = state["routes"].flatten(0, 1)[:, : _experts(layer).used]
        return cls(chosen, _split(layer, state["inner"].flatten(0, 1)))

    def inner(self, expert: int, token: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Gives the inner values of an expert for tokens; `values` where there are none."""
        hit = self.chosen[token] == expert
        row, which = hit.nonzero(as_tuple=True)
        found = values.clone()
        found[row] = self.values[token[row], which]
        return found

"""The names that an importance matrix has for what a decoder computes, and the sizes of their inputs."""

from __future__ import annotations

import re

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role
from quantpress.convert.traits import Place, places_of, traits_of

__all__ = ["EMBEDDING", "head_name", "is_measured", "layer_name", "measured_sizes"]

EMBEDDING = "token_embd.weight"

_EXPERT = re.compile(r"(?<=_exps)\.\d+(?=\.)")


def layer_name(layer: int, slot: str) -> str:
    """Gives the name in GGUF of a layer's weight; all experts of a layer have the same."""
    return f"blk.{layer}.{_EXPERT.sub('', slot)}"


def is_measured(place: Place) -> bool:
    """Whether the inputs of a place are those that llama.cpp multiplies with its weights.

    It multiplies the latent of keys and values with queries and with the attention's output instead.
    """
    return place.input != "latent"


def head_name(spec: ArchSpec, hyper: Hyperparameters) -> str:
    """Gives the name in GGUF of the head, the embedding's where it stands for the head; "" if the model has none."""
    tied = spec.gguf_head == "never" or (spec.gguf_head == "optional" and hyper.tied)
    role = Role.EMBEDDING if tied else Role.HEAD
    return next((row.gguf for row in spec.present(hyper) if row.role is role), "") if spec.kind == "decoder" else ""


def measured_sizes(spec: ArchSpec, hyper: Hyperparameters) -> dict[str, tuple[int, int]]:
    """Gives experts (1 for a plain matrix) and columns of every weight that is measured.

    They come in the order of the computation, the head last. An embedding that is not the head too comes first: it has
    no inputs, and what its errors cost is found otherwise.
    """
    dims, head = hyper.dims, head_name(spec, hyper)
    sizes = {EMBEDDING: (1, dims["embedding"])} if head else {}
    for layer in range(hyper.layers):
        for place in filter(is_measured, places_of(traits_of(spec, hyper, layer))):
            for slot in place.slots:
                name = layer_name(layer, slot)
                sizes[name] = (max(place.expert + 1, 1), dims[place.columns])
    return {**sizes, head: (1, dims["embedding"])} if head else sizes

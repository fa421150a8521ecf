"""The names that an importance matrix has for what a decoder computes, and the widths of their inputs."""

from __future__ import annotations

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role
from quantpress.convert.traits import steps_of, traits_of

__all__ = ["EMBEDDING", "head_name", "layer_name", "measured_widths"]

EMBEDDING = "token_embd.weight"


def layer_name(layer: int, slot: str) -> str:
    """Gives the name in GGUF of a layer's weight."""
    return f"blk.{layer}.{slot}"


def head_name(spec: ArchSpec, hyper: Hyperparameters) -> str:
    """Gives the name in GGUF of the head, which is the embedding's where the file has no head of its own."""
    tied = spec.gguf_head == "never" or (spec.gguf_head == "optional" and hyper.tied)
    return next(row.gguf for row in spec.tensors if row.role is (Role.EMBEDDING if tied else Role.HEAD))


def measured_widths(spec: ArchSpec, hyper: Hyperparameters) -> dict[str, int]:
    """Gives the columns of every weight that is measured, in the order of the computation, the head last.

    An embedding that is not the head too comes first: it has no inputs, and what its errors cost is found otherwise.
    """
    dims, widths = hyper.dims, {EMBEDDING: hyper.dims["hidden"]}
    per_step = (dims["hidden"], dims["q"], dims["hidden"], dims["ffn"])
    for layer in range(hyper.layers):
        for slots, width in zip(steps_of(traits_of(spec, hyper)), per_step, strict=True):
            widths |= {layer_name(layer, slot): width for slot in slots}
    return {**widths, head_name(spec, hyper): dims["hidden"]}

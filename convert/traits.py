"""What kind of layer a family's table and a config.json describe, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters

__all__ = ["Traits", "steps_of", "traits_of"]


@dataclass(frozen=True, slots=True)
class Traits:
    """What kind of layer a table describes.

    Attributes:
        slots: names of a layer's weights.
        norm: "rms" or "layer".
        fused_qkv: q, k and v are rows of one matrix.
        gate: "" for a plain MLP, "separate", or "fused" where gate and up are rows of one matrix.
        head_norms: q and k are normalized per head.
        post_norms: attention and MLP outputs are normalized before they join the residual.
    """

    slots: tuple[str, ...]
    norm: str
    fused_qkv: bool
    gate: str
    head_norms: bool
    post_norms: bool


def traits_of(spec: ArchSpec, hyper: Hyperparameters) -> Traits:
    """Reads the kind of layer off the family's table."""
    rows = {row.slot: row for row in spec.tensors if row.per_layer and (not row.flag or row.flag in hyper.flags)}
    gate = "separate" if "ffn_gate.weight" in rows else ""
    return Traits(
        slots=tuple(rows),
        norm=spec.norm,
        fused_qkv="attn_qkv.weight" in rows,
        gate="fused" if rows["ffn_up.weight"].shape[0] == "ffn2" else gate,
        head_norms="attn_q_norm.weight" in rows,
        post_norms="post_attention_norm.weight" in rows,
    )


def steps_of(traits: Traits) -> tuple[tuple[str, ...], ...]:
    """Gives the weights of each step (qkv, attention's output, up, down), in the order in which they are used."""
    qkv = ("attn_qkv.weight",) if traits.fused_qkv else ("attn_q.weight", "attn_k.weight", "attn_v.weight")
    up = ("ffn_up.weight", "ffn_gate.weight") if traits.gate == "separate" else ("ffn_up.weight",)
    return qkv, ("attn_output.weight",), up, ("ffn_down.weight",)

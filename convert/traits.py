"""What kind of layer a family's table and a config.json describe, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, TensorSpec
from quantpress.quant.errors import InputError

__all__ = ["Place", "Traits", "places_of", "steps_of", "traits_of"]

_HEAD_NORMS = {("head_dim",): "each", ("heads", "head_dim"): "own", ("q",): "whole"}


@dataclass(frozen=True, slots=True)
class Traits:
    """What kind of layer a table describes.

    Attributes:
        slots: names of a layer's weights, those of all its experts too.
        norm: "rms" or "layer".
        fused_qkv: q, k and v are rows of one matrix.
        gate: "" for a plain MLP, "separate", or "fused" where gate and up are rows of one matrix; of one expert where
            the layer has experts.
        head_norms: how q and k are normalized: "" not at all, "each" per head with the same weights, "own" per head
            with weights of its own, "whole" over all heads together.
        post_norms: attention and MLP outputs are normalized before they join the residual.
        attention_norm: what the attention's input is normalized by: "attn_norm", "attn_norm_2" (Falcon), "" nothing.
        mlp_norm: the same of the MLP: "ffn_norm", "attn_norm" where both share one, "" nothing.
        sum_norms: the residual itself is normalized after attention and MLP have joined it (BERT, OPT-350m).
        sinks: heads have a score of their own that takes a share of the softmax (gpt-oss).
        experts: the layer has experts in the place of an MLP.
        latent: keys and values are made from a few values per token (`Latent`).
        clipped: q, k and v are clamped.
        clipped_gate: what experts multiply is clamped (`Experts.limit`).
    """

    slots: tuple[str, ...]
    norm: str
    fused_qkv: bool
    gate: str
    head_norms: str
    post_norms: bool
    attention_norm: str
    mlp_norm: str
    sum_norms: bool
    sinks: bool
    experts: bool
    latent: bool
    clipped: bool = False
    clipped_gate: bool = False


def traits_of(spec: ArchSpec, hyper: Hyperparameters, layer: int = 0) -> Traits:
    """Reads the kind of a layer off the family's table.

    Raises:
        InputError: the model is an encoder with a decoder beside it, whose layers are not of one kind.
    """
    if spec.kind == "encoder_decoder":
        raise InputError(
            f"{spec.family}: an encoder with a decoder beside it; methods that look at what goes through the layers do "
            "not know it: use rtn or hqq, and no importance matrix"
        )
    rows = {row.slot: row for row in spec.layer_rows(hyper, layer)}
    experts = hyper.has_experts(layer)
    post_norms, sum_norms = "post_attention_norm.weight" in rows, "attn_output_norm.weight" in rows
    # a norm without weights is in no table (OLMo): it is there unless norms stand elsewhere
    before = "attn_norm.weight" in rows or not (post_norms or sum_norms)
    return Traits(
        slots=tuple(rows),
        norm=spec.norm,
        fused_qkv="attn_qkv.weight" in rows,
        gate=_gate(rows, experts),
        head_norms=_HEAD_NORMS[rows["attn_q_norm.weight"].shape] if "attn_q_norm.weight" in rows else "",
        post_norms=post_norms,
        attention_norm=("attn_norm_2" if "attn_norm_2.weight" in rows else "attn_norm") if before else "",
        mlp_norm=_mlp_norm(rows, hyper) if before else "",
        sum_norms=sum_norms,
        sinks="attn_sinks.weight" in rows,
        experts=experts,
        latent="attn_kv_a_mqa.weight" in rows,
        clipped=hyper.clip_qkv is not None,
        clipped_gate=hyper.experts is not None and hyper.experts.limit is not None,
    )


def _gate(rows: Mapping[str, TensorSpec], experts: bool) -> str:
    up, gate = ("ffn_up_exps.0.weight", "ffn_gate_exps.0.weight") if experts else ("ffn_up.weight", "ffn_gate.weight")
    if rows[up].shape[0] in ("ffn2", "expert_ffn2") and not rows[up].part:
        return "fused"
    return "separate" if gate in rows else ""


def _mlp_norm(rows: Mapping[str, TensorSpec], hyper: Hyperparameters) -> str:
    return "attn_norm" if hyper.parallel_residual and "ffn_norm.weight" not in rows else "ffn_norm"


@dataclass(frozen=True, slots=True)
class Place:
    """Linears of a layer that read the same input.

    Attributes:
        step: when they run: 0 with q, k and v, 1 with the attention's output, 2 with gate and up, 3 with down.
        slots: names of their weights, in the order in which they are used; those of routers too.
        columns: symbolic size of the input, a key of `Hyperparameters.dims`.
        before: what the input comes from, where a scale on it could be taken back there: a norm ("ffn_norm") or a
            linear whose rows it is linear in ("attn_v"); "" where there is none, or others read it too.
        input: "" for what the step begins with; "query" or "latent" for what attention over a latent makes of it;
            "shared" for what the MLP reads that every token goes to, beside experts.
        expert: number of the expert whose tokens alone come here; -1: all tokens do.
    """

    step: int
    slots: tuple[str, ...]
    columns: str
    before: str = ""
    input: str = ""
    expert: int = -1


def places_of(traits: Traits) -> tuple[Place, ...]:
    """Gives the places of a layer, in the order of the computation."""
    return (*_attention_places(traits), *(_mixture_places(traits) if traits.experts else _mlp_places(traits)))


def _attention_places(traits: Traits) -> tuple[Place, ...]:
    norm = _norm(traits, traits.attention_norm)
    if traits.latent:
        return _latent_places(traits, norm)
    qkv = ("attn_qkv",) if traits.fused_qkv else ("attn_q", "attn_k", "attn_v")
    value = "" if traits.clipped else qkv[-1]
    return _place(0, qkv, "hidden", norm), _place(1, ("attn_output",), "attended", value)


def _latent_places(traits: Traits, norm: str) -> tuple[Place, ...]:
    low = "attn_q_a.weight" in traits.slots
    first = ("attn_q_a" if low else "attn_q", "attn_kv_a_mqa")
    second = [_place(0, ("attn_q_b",), "query_rank", _norm(traits, "attn_q_a_norm"), "query")] if low else []
    heads = _place(0, ("attn_k_b", "attn_v_b"), "rank", _norm(traits, "attn_kv_a_norm"), "latent")
    return _place(0, first, "hidden", norm), *second, heads, _place(1, ("attn_output",), "attended", "attn_v_b")


def _mlp_places(traits: Traits) -> tuple[Place, ...]:
    up = ("ffn_up", "ffn_gate") if traits.gate == "separate" else ("ffn_up",)
    before = "ffn_up" if traits.gate else ""  # an activation is not linear
    return _place(2, up, "hidden", _norm(traits, traits.mlp_norm)), _place(3, ("ffn_down",), "ffn", before)


def _mixture_places(traits: Traits) -> tuple[Place, ...]:
    norm = _norm(traits, traits.mlp_norm)
    count = sum(slot.startswith("ffn_down_exps.") and slot.endswith(".weight") for slot in traits.slots)
    shared = "ffn_up_shexp.weight" in traits.slots
    kinds = ("ffn_up", "ffn_gate") if traits.gate == "separate" else ("ffn_up",)
    before = bool(traits.gate) and not traits.clipped_gate
    every = ["ffn_gate_inp", *(f"{kind}_shexp" for kind in kinds if shared)]
    if "ffn_gate_inp_shexp.weight" in traits.slots:
        every.append("ffn_gate_inp_shexp")
    places = [_place(2, tuple(every), "hidden", norm)]
    for expert in range(count):
        slots = tuple(f"{kind}_exps.{expert}" for kind in kinds)
        places.append(_place(2, slots, "hidden", norm, expert=expert))
    if shared:
        places.append(_place(3, ("ffn_down_shexp",), "shared_ffn", "ffn_up_shexp" if before else "", "shared"))
    for expert in range(count):
        source = f"ffn_up_exps.{expert}" if before else ""
        places.append(_place(3, (f"ffn_down_exps.{expert}",), "expert_ffn", source, expert=expert))
    return tuple(places)


def _place(step: int, names: tuple[str, ...], columns: str, before: str, given: str = "", *, expert: int = -1) -> Place:
    return Place(step, tuple(f"{name}.weight" for name in names), columns, before, given, expert)


def _norm(traits: Traits, name: str) -> str:
    """Gives a norm that a scale can be taken back in: one with weights."""
    return name if f"{name}.weight" in traits.slots else ""


def steps_of(traits: Traits) -> tuple[tuple[str, ...], ...]:
    """Gives the weights of each step (qkv, attention's output, up, down), in the order in which they are used."""
    places = places_of(traits)
    return tuple(tuple(slot for place in places if place.step == step for slot in place.slots) for step in range(4))

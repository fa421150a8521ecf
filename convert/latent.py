"""Queries, keys and values of attention over a latent, in torch.

Source: arXiv 2405.04434 (DeepSeek-V2), section 2.1 and appendix C; transformers' modeling_deepseek_v2.py. Keys and
values are made in full: that is what the absorbed form of other programs equals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantpress.convert.rope import turn

if TYPE_CHECKING:
    from quantpress.convert.layer import Layer, Turns

__all__ = ["latent_heads", "latent_input", "query_input"]


def latent_heads(layer: Layer, values: torch.Tensor, turns: Turns) -> tuple[torch.Tensor, ...]:
    """Gives queries, keys and values, turned by their positions.

    Args:
        layer: with weights.
        values: (B, T, hidden), normalized.
        turns: cosine and sine of the tokens' positions.

    Returns:
        (B, heads, T, head_dim) twice and (B, heads, T, value).
    """
    latent, rope = layer.hyper.latent, layer.hyper.rope
    assert latent is not None, "the layer's attention is over a latent"
    assert rope is not None, "positions turn a part of every head"
    query = layer.heads(_query(layer, values), latent.plain + latent.turned)
    low, shared = _latent(layer, values)
    key = layer.heads(layer.linear("attn_k_b", low), latent.plain)
    value = layer.heads(layer.linear("attn_v_b", low), latent.value)
    plain, turned = query.tensor_split((latent.plain,), dim=-1)
    turned, shared = (turn(each, *turns, interleaved=rope.interleaved) for each in (turned, shared.unsqueeze(1)))
    shared = shared.expand(-1, key.shape[1], -1, -1)
    return torch.cat((plain, turned), dim=-1), torch.cat((key, shared), dim=-1), value


def latent_input(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """Gives what keys and values are made from, (..., rank), of what the attention reads."""
    return _latent(layer, values)[0]


def query_input(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """Gives what queries are made from, (..., query_rank), of what the attention reads."""
    return layer.norm("attn_q_a_norm", layer.linear("attn_q_a", values))


def _latent(layer: Layer, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives the normalized latent, and the values of all keys that positions turn."""
    assert layer.hyper.latent is not None, "the layer's attention is over a latent"
    low, shared = layer.linear("attn_kv_a_mqa", values).tensor_split((layer.hyper.latent.rank,), dim=-1)
    return layer.norm("attn_kv_a_norm", low), shared


def _query(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    if "attn_q.weight" in layer.traits.slots:
        return layer.linear("attn_q", values)
    return layer.linear("attn_q_b", query_input(layer, values))

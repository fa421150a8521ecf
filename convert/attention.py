"""Causal attention with grouped heads, sliding windows, softcaps and a cache of keys and values, in torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F


class Store(Protocol):
    """Where the attention keeps keys and values of earlier tokens."""

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Adds the newest tokens of a layer.

        Args:
            layer: its number.
            keys: (B, kv_heads, T, head_dim), turned by their positions.
            values: (B, kv_heads, T, head_dim).

        Returns:
            Keys and values of all tokens, and for a single new token what is added to its scores where they are not all
            seen, (1, Tk): 0 for keys that are, minus infinity for others. None: their number says what is seen.
        """
        ...


@dataclass
class Cache:
    """Keys and values of the tokens seen so far, per layer.

    Attributes:
        keys: layer -> (B, kv_heads, T, head_dim), already turned by their positions.
        values: layer -> (B, kv_heads, T, head_dim).
        length: tokens that every layer has seen.
    """

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    length: int = 0

    def extend(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Adds the newest tokens of a layer and gives all of them; see `Store`."""
        if layer in self.keys:
            keys = torch.cat((self.keys[layer], keys), dim=2)
            values = torch.cat((self.values[layer], values), dim=2)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values, None


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Gives which keys each query may see; the last query stands at the last key.

    Args:
        queries: number of queries.
        keys: number of keys, at least as many.
        window: keys a query sees, its own included; None for all before it.
        device: of the result.

    Returns:
        (queries, keys) bool; None where that is all keys for a single query, or plain causal order.
    """
    bounded = window is not None and keys > window
    if not bounded and (queries == 1 or queries == keys):
        return None
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    seen = key <= query
    return seen & (key > query - window) if window is not None else seen


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Computes softmax(cap(scale * q k^T)) v over the keys that each query may see.

    Args:
        query: (B, heads, Tq, head_dim); its last token stands at the last key.
        key: (B, kv_heads, Tk, head_dim); consecutive query heads share one.
        value: (B, kv_heads, Tk, head_dim).
        scale: factor on q·k.
        window: keys a query sees, its own included.
        softcap: scores become `softcap * tanh(score / softcap)`, before the mask.

    Returns:
        (B, heads, Tq, head_dim).
    """
    queries, keys = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    mask = visible(queries, keys, window, query.device)
    if softcap is None:
        causal = mask is None and queries > 1
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / softcap) * softcap
    if mask is None and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


def attend_next(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Computes attention of one token per text over a store of fixed size.

    Query heads that share a key head stand where the tokens of a text would: no key is copied, and each is read once.

    Args:
        query: (B, heads, 1, head_dim).
        key: (B, kv_heads, Tk, head_dim).
        value: (B, kv_heads, Tk, head_dim).
        bias: (1, Tk) in the type of `query`, added to the capped scores.
        scale: factor on q·k.
        softcap: as for `attend`.

    Returns:
        (B, heads, 1, head_dim).
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    if softcap is None:
        found = F.scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scale)
    else:
        scores = torch.tanh(grouped @ key.transpose(2, 3) * scale / softcap) * softcap + bias
        found = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
    return found.reshape(query.shape)

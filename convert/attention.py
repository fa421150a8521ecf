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


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of q·k before and in the softmax.

    Attributes:
        scale: factor on q·k.
        window: keys a query sees, its own included; None for all before it.
        softcap: scores become `softcap * tanh(score / softcap)`, before the mask.
        causal: a query sees no key after its own.
        slopes: (heads,) float32, what a score loses per token of distance (ALiBi); None: nothing.
        sinks: (heads,) float32, scores that take part in the softmax and have no value; None: there are none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    causal: bool = True
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


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


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Computes softmax(scores(q k^T)) v over the keys that each query may see.

    Args:
        query: (B, heads, Tq, head_dim); its last token stands at the last key.
        key: (B, kv_heads, Tk, head_dim); consecutive query heads share one.
        value: (B, kv_heads, Tk, value_dim).
        scores: how.

    Returns:
        (B, heads, Tq, value_dim).
    """
    queries, keys = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    mask = visible(queries, keys, scores.window, query.device) if scores.causal else None
    plain = scores.softcap is None and scores.slopes is None and scores.sinks is None
    if plain:
        causal = scores.causal and mask is None and queries > 1
        scale = scores.scale
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    if scores.causal and mask is None and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    found = _capped(query @ key.transpose(2, 3) * scores.scale, scores.softcap)
    if scores.slopes is not None:
        found = found + _distances(queries, keys, scores.slopes).to(found.dtype)
    if mask is not None:
        found = found.masked_fill(~mask, float("-inf"))
    return _softmax(found, scores.sinks).to(query.dtype) @ value


def attend_next(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scores: Scores
) -> torch.Tensor:
    """Computes attention of one token per text over a store of fixed size.

    Query heads that share a key head stand where the tokens of a text would: no key is copied, and each is read once.

    Args:
        query: (B, heads, 1, head_dim).
        key: (B, kv_heads, Tk, head_dim).
        value: (B, kv_heads, Tk, value_dim).
        bias: (1, Tk) in the type of `query`, added to the capped scores.
        scores: how; what may be seen is in `bias`.

    Returns:
        (B, heads, 1, value_dim).
    """
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    if scores.slopes is not None:
        # by place instead of distance: a softmax does not see what is added to all scores of a query
        places = torch.arange(key.shape[2], dtype=torch.float32, device=key.device)
        bias = bias + (scores.slopes.view(key.shape[1], -1, 1) * places).to(bias.dtype)
    if scores.softcap is None and scores.sinks is None:
        found = F.scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scores.scale)
    else:
        capped = _capped(grouped @ key.transpose(2, 3) * scores.scale, scores.softcap) + bias
        sinks = None if scores.sinks is None else scores.sinks.view(key.shape[1], -1)
        share = capped if sinks is None else capped.unsqueeze(3)
        weights = _softmax(share, sinks)
        found = (weights if sinks is None else weights.squeeze(3)).to(query.dtype) @ value
    return found.reshape(query.shape[0], query.shape[1], 1, value.shape[-1])


def _capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    return scores if cap is None else torch.tanh(scores / cap) * cap


def _distances(queries: int, keys: int, slopes: torch.Tensor) -> torch.Tensor:
    """Gives what ALiBi takes from scores, (heads, queries, keys) float32; 0 at the query's own place."""
    query = torch.arange(keys - queries, keys, dtype=torch.float32, device=slopes.device)[:, None]
    key = torch.arange(keys, dtype=torch.float32, device=slopes.device)[None, :]
    return -slopes[:, None, None] * (query - key).abs()


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Gives weights in float32; sinks, (heads,) or what broadcasts to all dimensions but two, take their share."""
    if sinks is None:
        return scores.softmax(dim=-1, dtype=torch.float32)
    column = sinks.to(scores.dtype)[..., None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), dim=-1).softmax(dim=-1, dtype=torch.float32)[..., :-1]

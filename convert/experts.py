"""Mixtures of experts in torch: each token goes to a few of a layer's MLPs.

What is carried from step to step is rectangular, so that tokens can be cut into slices anywhere: the inner values of a
token's experts one after another, then those of the shared MLP; and its routes, which experts with which weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantpress.convert.arch.spec import Experts

if TYPE_CHECKING:
    from quantpress.convert.layer import Layer

__all__ = ["assigned", "down", "route", "routed", "up"]


def route(
    scores: torch.Tensor, experts: Experts, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses experts.

    Args:
        scores: (n, experts) what the router gives, in float32.
        experts: how.
        bias: (experts,) added to the scores for choosing, but not to weights (DeepSeek-V3).

    Returns:
        Numbers of the experts (n, used) int64, and their weights (n, used) float32.
    """
    if experts.gating == "softmax_chosen":
        best, chosen = scores.topk(experts.used, dim=-1)
        return chosen, best.softmax(dim=-1) * experts.scale
    shares = scores.sigmoid() if experts.gating == "sigmoid" else scores.softmax(dim=-1)
    chosen = _eligible(shares if bias is None else shares + bias, experts).topk(experts.used, dim=-1).indices
    weights = shares.gather(-1, chosen)
    if experts.normalized:
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / (total + 1e-20 if experts.gating == "sigmoid" else total)
    return chosen, weights * experts.scale


def _eligible(shares: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Keeps the scores of the best groups of experts; others are never chosen."""
    if experts.groups == 1:
        return shares
    grouped = shares.view(shares.shape[0], experts.groups, -1)
    best = grouped.topk(experts.group_top, dim=-1).values.sum(dim=-1).topk(experts.groups_used, dim=-1).indices
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=shares.device).scatter_(1, best, True)
    return grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)


def assigned(chosen: torch.Tensor, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sorts tokens by the experts that they go to.

    Args:
        chosen: (n, used) numbers of experts.
        count: of experts.

    Returns:
        For each expert its tokens, in rising order, and which of their experts it is, from 0; int64.
    """
    flat = chosen.reshape(-1).long()
    sizes = torch.bincount(flat, minlength=count).tolist()
    order = flat.argsort(stable=True)
    return [(part // chosen.shape[1], part % chosen.shape[1]) for part in torch.split(order, sizes)]


def routed(layer: Layer, values: torch.Tensor) -> torch.Tensor:
    """Chooses experts.

    Args:
        layer: with weights of its routers.
        values: (n, hidden) what the mixture reads.

    Returns:
        (n, 2 * used + 1) float32: numbers of the experts, their weights, and the weight of the shared MLP.
    """
    experts = _experts(layer)
    scores, bias = layer.linear("ffn_gate_inp", values).float(), layer.weights.get("exp_probs_b.bias")
    chosen, weights = route(scores, experts, bias if bias is None else bias.float())
    share = torch.ones(values.shape[0], 1, device=values.device)
    if experts.shared_gate:
        share = layer.linear("ffn_gate_inp_shexp", values).float().sigmoid()
    return torch.cat((chosen.float(), weights, share), dim=-1)


def up(layer: Layer, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses experts and runs their first half.

    Args:
        layer: with weights of all its experts.
        values: (B, T, hidden).

    Returns:
        (B, T, used * intermediate + shared) what their down projections read; (B, T, 2 * used + 1) float32, see
        `routed`.
    """
    experts = _experts(layer)
    flat = values.reshape(-1, values.shape[-1])
    routes = routed(layer, flat)
    inner = flat.new_zeros(flat.shape[0], experts.used, experts.intermediate)
    for expert, (token, place) in enumerate(assigned(routes[:, : experts.used], experts.count)):
        if len(token):
            inner[token, place] = layer.activated(flat[token], "_exps", f".{expert}").to(inner.dtype)
    parts = [inner.flatten(1)]
    if experts.shared:
        parts.append(layer.activated(flat, "_shexp").to(inner.dtype))
    return torch.cat(parts, dim=-1).view(*values.shape[:-1], -1), routes.view(*values.shape[:-1], -1)


def down(layer: Layer, inner: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
    """Runs the second half of a mixture: (B, T, hidden) from what `up` gave."""
    experts = _experts(layer)
    flat, table = inner.reshape(-1, inner.shape[-1]), routes.reshape(-1, routes.shape[-1])
    used, width = experts.used, experts.used * experts.intermediate
    chosen, weights, share = table[:, :used], table[:, used : 2 * used], table[:, 2 * used :]
    split = flat[:, :width].view(-1, used, experts.intermediate)
    total = flat.new_zeros(flat.shape[0], layer.hyper.hidden)
    for expert, (token, place) in enumerate(assigned(chosen, experts.count)):
        if len(token):
            given = layer.linear(f"ffn_down_exps.{expert}", split[token, place])
            total.index_add_(0, token, (given * weights[token, place, None].to(given.dtype)).to(total.dtype))
    if experts.shared:
        given = layer.linear("ffn_down_shexp", flat[:, width:])
        total = total + given * share.to(given.dtype)
    return total.view(*inner.shape[:-1], -1)


def _experts(layer: Layer) -> Experts:
    experts = layer.hyper.experts
    assert experts is not None, "the layer has experts"
    return experts

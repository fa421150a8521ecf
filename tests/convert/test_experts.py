"""Choosing experts against the routers of transformers' own models, and what experts compute token by token."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quantpress.convert import experts
from quantpress.convert.arch.spec import Experts, Hyperparameters
from quantpress.convert.layer import DOWN, UP, Layer
from quantpress.convert.traits import Traits

HIDDEN, COUNT, USED, INNER, SHARED = 24, 8, 3, 16, 20
BASE: dict[str, Any] = {"hidden_size": HIDDEN, "num_experts_per_tok": USED, "num_attention_heads": 4}

# family, class of its router, keys of its configuration, what we call them
ROUTERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": ("mixtral", "MixtralTopKRouter", {"num_local_experts": COUNT}, {"normalized": True}),
    "qwen2": ("qwen2_moe", "Qwen2MoeTopKRouter", {"num_experts": COUNT, "norm_topk_prob": False}, {}),
    "qwen3": ("qwen3_moe", "Qwen3MoeTopKRouter", {"num_experts": COUNT, "norm_topk_prob": True}, {"normalized": True}),
    "olmoe": ("olmoe", "OlmoeTopKRouter", {"num_experts": COUNT, "norm_topk_prob": False}, {}),
    "granite": ("granitemoe", "GraniteMoeTopKRouter", {"num_local_experts": COUNT}, {"gating": "softmax_chosen"}),
    "gpt-oss": ("gpt_oss", "GptOssTopKRouter", {"num_local_experts": COUNT}, {"gating": "softmax_chosen"}),
    "deepseek2": (
        "deepseek_v2", "DeepseekV2TopkRouter",
        {"n_routed_experts": COUNT, "topk_method": "greedy", "routed_scaling_factor": 2.5}, {"scale": 2.5},
    ),
    "deepseek2-groups": (
        "deepseek_v2", "DeepseekV2TopkRouter",
        {"n_routed_experts": COUNT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
         "routed_scaling_factor": 16.0},
        {"scale": 16.0, "groups": 4, "groups_used": 2},
    ),
    "deepseek3": (
        "deepseek_v3", "DeepseekV3TopkRouter",
        {"n_routed_experts": COUNT, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
         "routed_scaling_factor": 2.5},
        {"scale": 2.5, "groups": 4, "groups_used": 2, "group_top": 2, "gating": "sigmoid", "normalized": True},
    ),
}  # fmt: skip


def settings(**options: Any) -> Experts:
    return Experts(COUNT, USED, INNER, (True,), **options)


def router(name: str) -> tuple[Any, Experts]:
    family, kind, keys, ours = ROUTERS[name]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    config = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    settings_class = next(
        value for key, value in vars(config).items() if key.endswith("Config") and value.__module__ == config.__name__
    )
    found = getattr(module, kind)(settings_class(**BASE, **keys))
    generator = torch.Generator().manual_seed(3)
    for values in (*found.parameters(), *found.buffers()):
        values.data = torch.randn(values.shape, generator=generator)
    return found, settings(**ours)


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_experts_and_their_weights_are_those_of_transformers(name: str) -> None:
    theirs, ours = router(name)
    hidden = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(1))
    logits, weights, chosen = theirs(hidden)
    found, given = experts.route(logits.float(), ours, getattr(theirs, "e_score_correction_bias", None))
    order, other = found.argsort(dim=-1), chosen.argsort(dim=-1)  # some choose without an order
    assert torch.equal(found.gather(-1, order), chosen.gather(-1, other))
    # the same few float32 operations: a softmax over 8 values, a sum of 3, two factors
    torch.testing.assert_close(given.gather(-1, order), weights.gather(-1, other), rtol=1e-6, atol=0)


def test_experts_of_groups_that_are_not_looked_at_are_never_chosen() -> None:
    """A bias can take scores below the 0 that others were given by older code."""
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.5]])
    bias = torch.tensor([-2.0, -2.0, -4.0, -4.0])
    few = Experts(4, 2, 1, (True,), gating="sigmoid", groups=2, groups_used=1, group_top=2)
    assert experts.route(scores, few, bias)[0].tolist() == [[0, 1]]


def test_tokens_are_sorted_by_their_experts() -> None:
    chosen = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
    found = experts.assigned(chosen.float(), 4)
    assert [token.tolist() for token, _ in found] == [[0, 1, 3], [1, 2], [0, 2, 3], []]
    assert [place.tolist() for _, place in found] == [[1, 0, 0], [1, 1], [0, 0, 1], []]


def mixture(**options: Any) -> Layer:
    """A layer of which only the mixture is run."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"ffn_gate_inp.weight": (COUNT, HIDDEN)}
    for expert in range(COUNT):
        shapes |= {f"ffn_{kind}_exps.{expert}.weight": (INNER, HIDDEN) for kind in ("gate", "up")}
        shapes[f"ffn_down_exps.{expert}.weight"] = (HIDDEN, INNER)
    if options.get("shared"):
        shapes |= {f"ffn_{kind}_shexp.weight": (SHARED, HIDDEN) for kind in ("gate", "up")}
        shapes |= {"ffn_down_shexp.weight": (HIDDEN, SHARED), "ffn_gate_inp_shexp.weight": (1, HIDDEN)}
    weights = {slot: torch.randn(shape, generator=generator) / 4 for slot, shape in shapes.items()}
    traits = Traits(
        slots=tuple(weights), norm="rms", fused_qkv=False, gate="separate", head_norms="", post_norms=False,
        attention_norm="", mlp_norm="", sum_norms=False, sinks=False, experts=True, latent=False,
    )  # fmt: skip
    hyper = Hyperparameters(
        layers=1, hidden=HIDDEN, heads=1, kv_heads=1, head_dim=HIDDEN, intermediate=INNER, vocab=8, context=8,
        norm_eps=1e-5, activation="silu", attention_scale=1.0, experts=settings(**options),
    )  # fmt: skip
    return Layer(0, traits, hyper, weights)


@pytest.mark.parametrize("options", [{}, {"shared": SHARED, "shared_gate": True}], ids=["experts", "shared"])
def test_a_mixture_is_the_weighted_sum_of_mlps_of_each_token(options: dict[str, Any]) -> None:
    layer = mixture(**options)
    hidden = torch.randn(2, 13, HIDDEN, generator=torch.Generator().manual_seed(2))
    inner, routes = experts.up(layer, hidden)
    found = experts.down(layer, inner, routes)
    wide = {slot: weight.double() for slot, weight in layer.weights.items()}

    def mlp(x: torch.Tensor, kind: str, expert: str = "") -> torch.Tensor:
        gate, up, down = (wide[f"ffn_{part}_{kind}{expert}.weight"] for part in ("gate", "up", "down"))
        return down @ (F.silu(gate @ x) * (up @ x))

    for x, y in zip(hidden.flatten(0, 1).double(), found.flatten(0, 1), strict=True):
        shares = (wide["ffn_gate_inp.weight"] @ x).softmax(0)
        wanted = sum(shares[e] * mlp(x, "exps", f".{e}") for e in shares.topk(USED).indices.tolist())
        if options:
            wanted = wanted + (wide["ffn_gate_inp_shexp.weight"] @ x).sigmoid() * mlp(x, "shexp")
        # sums of 24 products in float32, three after another, of values about 1
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_weights_in_a_narrower_type_compute_in_it_and_add_up_in_the_wider_one() -> None:
    layer = mixture(shared=SHARED, shared_gate=True)
    hidden = torch.randn(1, 40, HIDDEN, generator=torch.Generator().manual_seed(2))
    wide, routes = experts.up(layer, hidden)
    narrow = {slot: weight if "inp" in slot else weight.to(torch.bfloat16) for slot, weight in layer.weights.items()}
    other = Layer(0, layer.traits, layer.hyper, narrow)
    inner, same = experts.up(other, hidden)
    assert inner.dtype == torch.float32
    assert torch.equal(routes, same)
    # bfloat16 rounds what goes in and out by 2^-9 of itself; sums of 24 products grow that a few times
    torch.testing.assert_close(inner, wide, rtol=0.05, atol=0.05)
    torch.testing.assert_close(experts.down(other, inner, same), experts.down(layer, wide, routes), rtol=0.05, atol=0.1)


def test_steps_give_what_running_the_mixture_gives() -> None:
    layer = mixture(shared=SHARED, shared_gate=True)
    hidden = torch.randn(1, 9, HIDDEN, generator=torch.Generator().manual_seed(2))
    state = layer.finish(UP, {"hidden": hidden}, layer.begin(UP, {"hidden": hidden}))
    assert state["inner"].shape == (1, 9, USED * INNER + SHARED)
    assert state["routes"].shape == (1, 9, 2 * USED + 1)
    whole = layer.finish(DOWN, state, layer.begin(DOWN, state))["hidden"]
    parts = []
    for start in range(0, 9, 4):  # tokens may be cut anywhere
        cut = {name: values[:, start : start + 4] for name, values in state.items()}
        parts.append(layer.finish(DOWN, cut, layer.begin(DOWN, cut))["hidden"])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-6)

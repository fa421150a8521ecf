"""What the config.json of a decoder says in the words that Llama's has made usual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.llama import flags, read_sizes
from quantpress.convert.arch.rotary import read_rope, rope_settings, whole_rope
from quantpress.quant.errors import InputError

__all__ = ["read_decoder", "sliding_window"]


def read_decoder(
    config: fields.Config,
    *,
    context: int,
    tied: bool = False,
    biases: Sequence[str] = (),
    implemented: Sequence[str] = (),
    partial: float | None = None,
) -> dict[str, Any]:
    """Reads sizes, context, activation, rotary positions, the tied head and flags of biases.

    Args:
        config: the config.json, with the family's own defaults put under it.
        context: default of `max_position_embeddings`.
        tied: default of `tie_word_embeddings`.
        biases: keys that switch rows of the table; other keys of biases are refused.
        implemented: keys of `fields.NEUTRAL` that the family reads itself.
        partial: default of `partial_rotary_factor`; None: positions turn whole heads, and no key changes that.

    Returns:
        Keyword arguments of `Hyperparameters`.

    Raises:
        InputError: a key is absurd, or asks for what is not implemented.
    """
    fields.refuse_others(config, *implemented)
    for key in ("attention_bias", "mlp_bias"):
        if key not in biases:
            fields.refuse(config, {key: (False, None)})
    sizes = read_sizes(config)
    length = fields.size(config, "max_position_embeddings", context)
    if partial is None:
        rope = whole_rope(config, head_dim=sizes["head_dim"], context=length)
    else:
        rope = read_rope(
            rope_settings(config),
            config,
            head_dim=sizes["head_dim"],
            context=length,
            theta=fields.number(config, "rope_theta", 10000.0, low=1.0),
            partial=fields.number(config, "partial_rotary_factor", partial, high=1.0),
        )
    return {
        **sizes,
        "context": length,
        "activation": fields.activation(config, "hidden_act", "silu"),
        "rope": rope,
        "tied": fields.flag(config, "tie_word_embeddings", tied),
        "flags": flags(config, *biases),
    }


def sliding_window(config: fields.Config, layers: int, *, usual: Sequence[bool], window: int) -> dict[str, Any]:
    """Reads which layers slide, by `layer_types`, and over how many tokens.

    Args:
        config: the config.json.
        layers: their number.
        usual: which slide where `layer_types` is missing.
        window: default of `sliding_window`.

    Returns:
        Keyword arguments of `Hyperparameters`; none if no layer slides.

    Raises:
        InputError: layers slide over a window that is null.
    """
    sliding = fields.layer_kinds(config, layers) or tuple(usual)
    if not any(sliding):
        return {}
    if "sliding_window" in config and config["sliding_window"] is None:
        raise InputError("config.json: 'sliding_window' is null, but layers slide")
    return {"sliding_window": fields.size(config, "sliding_window", window), "sliding_layers": sliding}

"""Rows that tables of several families share. A table is data: these only spare repeating it."""

from __future__ import annotations

from quantpress.convert.arch.spec import Role, TensorSpec

_BLOCK = "blk.{layer}."


def trunk(prefix: str, offset: float = 0.0) -> tuple[TensorSpec, ...]:
    """Embedding, last norm and head of the families named after Llama."""
    embedding = f"{prefix}embed_tokens.weight"
    return (
        TensorSpec(embedding, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
        TensorSpec(f"{prefix}norm.weight", "output_norm.weight", ("hidden",), Role.NORM, offset=offset),
        TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=embedding),
    )


def separate_attention(
    layer: str, *, bias: str | None, output_bias: str | None, rotary: bool = False, offset: float = 0.0
) -> tuple[TensorSpec, ...]:
    """The norm before attention, separate q, k, v and the output projection.

    Args:
        layer: start of the names, with `{layer}`.
        bias: flag that switches the biases of q, k, v on; "" if they are always there, None if never.
        output_bias: the same for the output projection; None if it never has one.
        rotary: whether rows of q and k change places in GGUF (`gguf_rope="norm"`).
        offset: added to norm weights.
    """
    attention, rows = f"{layer}self_attn.", []
    rows.append(TensorSpec(f"{layer}input_layernorm.weight", f"{_BLOCK}attn_norm.weight", ("hidden",), Role.NORM))
    if offset:
        rows = [TensorSpec(row.hf, row.gguf, row.shape, row.role, offset=offset) for row in rows]
    for part, width, heads in (("q", "q", "heads"), ("k", "kv", "kv_heads"), ("v", "kv", "")):
        turned = heads if rotary else ""
        name, gguf = f"{attention}{part}_proj", f"{_BLOCK}attn_{part}"
        rows.append(TensorSpec(f"{name}.weight", f"{gguf}.weight", (width, "hidden"), Role.LINEAR, rotary=turned))
        if bias is not None:
            rows.append(TensorSpec(f"{name}.bias", f"{gguf}.bias", (width,), Role.BIAS, rotary=turned, flag=bias))
    output, gguf = f"{attention}o_proj", f"{_BLOCK}attn_output"
    rows.append(TensorSpec(f"{output}.weight", f"{gguf}.weight", ("hidden", "q"), Role.LINEAR))
    if output_bias is not None:
        rows.append(TensorSpec(f"{output}.bias", f"{gguf}.bias", ("hidden",), Role.BIAS, flag=output_bias))
    return tuple(rows)


def head_norms(layer: str, offset: float = 0.0) -> tuple[TensorSpec, ...]:
    """Norms of each head of q and k, before rotary positions."""
    return tuple(
        TensorSpec(
            f"{layer}self_attn.{part}_norm.weight",
            f"{_BLOCK}attn_{part}_norm.weight",
            ("head_dim",),
            Role.NORM,
            offset=offset,
        )
        for part in ("q", "k")
    )


def gated_mlp(
    layer: str, *, bias: str | None = None, norm: str = "post_attention_layernorm", offset: float = 0.0
) -> tuple[TensorSpec, ...]:
    """The norm before the MLP and its gate, up and down projections.

    Args:
        layer: start of the names, with `{layer}`.
        bias: flag that switches biases on; None if there never are any.
        norm: what the checkpoint calls the norm.
        offset: added to norm weights.
    """
    rows = [TensorSpec(f"{layer}{norm}.weight", f"{_BLOCK}ffn_norm.weight", ("hidden",), Role.NORM, offset=offset)]
    for part, shape in (("gate", ("ffn", "hidden")), ("up", ("ffn", "hidden")), ("down", ("hidden", "ffn"))):
        name, gguf = f"{layer}mlp.{part}_proj", f"{_BLOCK}ffn_{part}"
        rows.append(TensorSpec(f"{name}.weight", f"{gguf}.weight", shape, Role.LINEAR))
        if bias is not None:
            rows.append(TensorSpec(f"{name}.bias", f"{gguf}.bias", shape[:1], Role.BIAS, flag=bias))
    return tuple(rows)

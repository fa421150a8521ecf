"""DistilBERT: BERT without token types, under names of its own.

Sources: transformers' modeling_distilbert.py; llama.cpp's conversion/bert.py, which writes it as BERT.
"""

from __future__ import annotations

from quantpress.convert.arch import fields
from quantpress.convert.arch.encoder_rows import (
    check_gguf,
    config_from_gguf,
    head_flags,
    head_rows,
    linear_rows,
    metadata,
    norm_rows,
    pooling,
    refuse_decoders,
)
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec

__all__ = ["DISTILBERT", "read_distilbert"]

_LAYER = "distilbert.transformer.layer.{layer}."
_EMBEDDINGS = "distilbert.embeddings."
_EMBEDDING = f"{_EMBEDDINGS}word_embeddings.weight"
_EPSILON = 1e-12  # written in the code of its norms, not in config.json

_HEAD = head_rows(
    "vocab_transform", "vocab_layer_norm", "vocab_projector.weight", ("vocab_projector.bias",) * 2, _EMBEDDING
)
_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    TensorSpec(
        f"{_EMBEDDINGS}position_embeddings.weight", "position_embd.weight", ("positions", "hidden"), Role.POSITION
    ),
    *norm_rows(f"{_EMBEDDINGS}LayerNorm", "token_embd_norm"),
    *linear_rows(f"{_LAYER}attention.q_lin", "attn_q", ("q", "hidden")),
    *linear_rows(f"{_LAYER}attention.k_lin", "attn_k", ("kv", "hidden")),
    *linear_rows(f"{_LAYER}attention.v_lin", "attn_v", ("kv", "hidden")),
    *linear_rows(f"{_LAYER}attention.out_lin", "attn_output", ("hidden", "q")),
    *norm_rows(f"{_LAYER}sa_layer_norm", "blk.{layer}.attn_output_norm"),
    *linear_rows(f"{_LAYER}ffn.lin1", "ffn_up", ("ffn", "hidden")),
    *linear_rows(f"{_LAYER}ffn.lin2", "ffn_down", ("hidden", "ffn")),
    *norm_rows(f"{_LAYER}output_layer_norm", "blk.{layer}.layer_output_norm"),
    *_HEAD,
)


def read_distilbert(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` distilbert (transformers: DistilBertConfig).

    Sinusoidal positions are stored in the checkpoint as any others, so that key changes nothing.
    """
    refuse_decoders(config)
    hidden, heads = fields.size(config, "dim"), fields.size(config, "n_heads")
    head_dim = fields.head_size(hidden, heads, "n_heads")
    return Hyperparameters(
        layers=fields.size(config, "n_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "hidden_dim"),
        vocab=fields.size(config, "vocab_size"),
        context=fields.size(config, "max_position_embeddings", 512),
        norm_eps=_EPSILON,
        activation=fields.activation(config, "activation", "gelu"),
        attention_scale=head_dim**-0.5,
        tied=fields.flag(config, "tie_word_embeddings", True),
        flags=head_flags(config),
        causal=False,
        pooling=pooling(config),
    )


DISTILBERT = ArchSpec(
    family="distilbert",
    classes=("DistilBertModel", "DistilBertForMaskedLM"),
    model_types=("distilbert",),
    gguf="bert",
    prefix="distilbert.",
    norm="layer",
    gguf_rope="",
    tensors=_TABLE,
    ignored=(f"{_EMBEDDINGS}position_ids", *(row.hf for row in _HEAD)),
    read_config=read_distilbert,
    gguf_metadata=metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=config_from_gguf,
    gguf_check=check_gguf,
    gguf_head="never",
    kind="encoder",
)

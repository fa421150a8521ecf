"""BERT and RoBERTa, and what is trained from them: MiniLM, BGE, E5, GTE, XLM-RoBERTa, CamemBERT.

Sources: transformers' modeling_bert.py and modeling_roberta.py (positions begin behind the id of the padding token);
llama.cpp's src/models/bert.cpp, which computes the last hidden states and pools them: the head for masked tokens, the
pooler and classifiers have no place in its file.
"""

from __future__ import annotations

from dataclasses import replace

from quantpress.convert.arch import fields
from quantpress.convert.arch.encoder_rows import (
    MASKED_HEAD,
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
from quantpress.quant.errors import InputError

__all__ = ["BERT", "ROBERTA", "read_bert", "read_roberta"]

TYPES = "token_types"
_UNUSED = ("embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias")  # no hidden state depends on them


def _rows(prefix: str, head: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Gives the table; `prefix` stands before all names but the head's."""
    layer = f"{prefix}encoder.layer.{{layer}}."
    embeddings, tables = f"{prefix}embeddings.", ("positions", "hidden")
    return (
        TensorSpec(f"{embeddings}word_embeddings.weight", "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
        TensorSpec(f"{embeddings}position_embeddings.weight", "position_embd.weight", tables, Role.POSITION),
        TensorSpec(
            f"{embeddings}token_type_embeddings.weight", "token_types.weight", ("token_types", "hidden"), Role.POSITION,
            flag=TYPES,
        ),
        *norm_rows(f"{embeddings}LayerNorm", "token_embd_norm"),
        *linear_rows(f"{layer}attention.self.query", "attn_q", ("q", "hidden")),
        *linear_rows(f"{layer}attention.self.key", "attn_k", ("kv", "hidden")),
        *linear_rows(f"{layer}attention.self.value", "attn_v", ("kv", "hidden")),
        *linear_rows(f"{layer}attention.output.dense", "attn_output", ("hidden", "q")),
        *norm_rows(f"{layer}attention.output.LayerNorm", "blk.{layer}.attn_output_norm"),
        *linear_rows(f"{layer}intermediate.dense", "ffn_up", ("ffn", "hidden")),
        *linear_rows(f"{layer}output.dense", "ffn_down", ("hidden", "ffn")),
        *norm_rows(f"{layer}output.LayerNorm", "blk.{layer}.layer_output_norm"),
        *head,
    )  # fmt: skip


def read_bert(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` bert (transformers: BertConfig)."""
    refuse_decoders(config)
    hidden, heads = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    head_dim = fields.head_size(hidden, heads)
    types = 0 if config.get("type_vocab_size") == 0 else fields.size(config, "type_vocab_size", 2)
    return Hyperparameters(
        layers=fields.size(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "intermediate_size"),
        vocab=fields.size(config, "vocab_size"),
        context=fields.size(config, "max_position_embeddings", 512),
        norm_eps=fields.number(config, "layer_norm_eps", 1e-12, high=1.0),
        activation=fields.activation(config, "hidden_act", "gelu"),
        attention_scale=head_dim**-0.5,
        tied=fields.flag(config, "tie_word_embeddings", True),
        flags=head_flags(config) | ({TYPES} if types else frozenset()),
        token_types=types,
        causal=False,
        pooling=pooling(config),
    )


def read_roberta(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` roberta, xlm-roberta or camembert (transformers: RobertaConfig).

    `max_position_embeddings` counts rows of the table, of which those up to the padding token's id are not used.
    """
    hyper = read_bert(config)
    offset = 1 + (fields.size(config, "pad_token_id", 1) if config.get("pad_token_id") != 0 else 0)
    if hyper.context <= offset:
        raise InputError(
            f"config.json: 'max_position_embeddings' is {hyper.context}, of which {offset} rows are before the first"
            " token"
        )
    if MASKED_HEAD in hyper.flags and hyper.activation != "gelu":
        raise InputError(f"config.json: 'hidden_act' is {config['hidden_act']!r}; RoBERTa's head computes gelu")
    return replace(hyper, context=hyper.context - offset, position_offset=offset)


_BERT_EMBEDDING = "bert.embeddings.word_embeddings.weight"
_ROBERTA_EMBEDDING = "roberta.embeddings.word_embeddings.weight"
_BERT_HEAD = head_rows(
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder.weight",
    ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    _BERT_EMBEDDING,
)
_ROBERTA_HEAD = head_rows(
    "lm_head.dense",
    "lm_head.layer_norm",
    "lm_head.decoder.weight",
    ("lm_head.bias", "lm_head.decoder.bias"),
    _ROBERTA_EMBEDDING,
)

BERT = ArchSpec(
    family="bert",
    classes=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
    model_types=("bert",),
    gguf="bert",
    prefix="bert.",
    norm="layer",
    gguf_rope="",
    tensors=_rows("bert.", _BERT_HEAD),
    ignored=(
        *(f"bert.{name}" for name in _UNUSED),
        *(row.hf for row in _BERT_HEAD),
        "cls.predictions.transform.LayerNorm.gamma",
        "cls.predictions.transform.LayerNorm.beta",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    ),
    read_config=read_bert,
    gguf_metadata=metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=config_from_gguf,
    gguf_check=check_gguf,
    gguf_head="never",
    old_names=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    kind="encoder",
)

ROBERTA = ArchSpec(
    family="roberta",
    classes=(
        *("RobertaModel", "RobertaForMaskedLM", "XLMRobertaModel", "XLMRobertaForMaskedLM"),
        *("CamembertModel", "CamembertForMaskedLM"),
    ),
    model_types=("roberta", "xlm-roberta", "camembert"),
    gguf="bert",
    prefix="roberta.",
    norm="layer",
    gguf_rope="",
    tensors=_rows("roberta.", _ROBERTA_HEAD),
    ignored=(*(f"roberta.{name}" for name in _UNUSED), *(row.hf for row in _ROBERTA_HEAD)),
    read_config=read_roberta,
    gguf_metadata=metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=config_from_gguf,
    gguf_check=check_gguf,
    gguf_head="never",
    kind="encoder",
)

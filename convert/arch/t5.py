"""T5 and what is built like it: T5 1.1, Flan-T5, mT5 and umT5.

Sources: arXiv 1910.10683; transformers' modeling_t5.py, modeling_mt5.py and modeling_umt5.py; llama.cpp's
src/models/t5.cpp and src/llama-graph.cpp (llama_relative_position_bucket).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.gguf_fields import general_config, real, whole
from quantpress.convert.arch.hyper import Seq2Seq
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_EMBEDDING = "shared.weight"
_DISTANCE = 128  # tokens from which on llama.cpp takes all distances for one, whatever the file says
_SCALED = "logits_are_scaled"  # ours: the norm before the head holds the factor on logits


def _row(hf: str, gguf: str, shape: tuple[str, ...], role: Role, stack: str, flag: str = "") -> TensorSpec:
    """Gives a row of one stack; the module asks for `enc.attn_q.weight` and `dec.attn_q.weight`."""
    short = stack[:3]
    place = f"{short}.{gguf}"
    return TensorSpec(hf, f"{short}.blk.{{layer}}.{gguf}", shape, role, layers=stack, place=place, flag=flag)


def _attention(stack: str, number: int, name: str, gguf: str) -> tuple[TensorSpec, ...]:
    layer = f"{stack}.block.{{layer}}.layer.{number}."
    rows = [_row(f"{layer}layer_norm.weight", f"{gguf}_norm.weight", ("hidden",), Role.NORM, stack)]
    for part in ("q", "k", "v"):
        shape = ("q", "hidden")
        rows.append(_row(f"{layer}{name}.{part}.weight", f"{gguf}_{part}.weight", shape, Role.LINEAR, stack))
    rows.append(_row(f"{layer}{name}.o.weight", f"{gguf}_o.weight", ("hidden", "q"), Role.LINEAR, stack))
    return tuple(rows)


def _distances(stack: str) -> tuple[TensorSpec, ...]:
    """What distances add to scores: one table for all layers, or one in each (umT5)."""
    name = "layer.0.SelfAttention.relative_attention_bias.weight"
    shape, gguf = ("buckets", "heads"), "attn_rel_b.weight"
    shared = TensorSpec(
        f"{stack}.block.0.{name}",
        f"{stack[:3]}.blk.0.{gguf}",
        shape,
        Role.POSITION,
        flag="shared_distances",
        place=f"{stack[:3]}.{gguf}",
    )
    return shared, _row(f"{stack}.block.{{layer}}.{name}", gguf, shape, Role.POSITION, stack, flag="own_distances")


def _mlp(stack: str, number: int) -> tuple[TensorSpec, ...]:
    layer, wide = f"{stack}.block.{{layer}}.layer.{number}.", ("ffn", "hidden")
    inner = f"{layer}DenseReluDense."
    return (
        _row(f"{layer}layer_norm.weight", "ffn_norm.weight", ("hidden",), Role.NORM, stack),
        _row(f"{inner}wi.weight", "ffn_up.weight", wide, Role.LINEAR, stack, flag="plain_mlp"),
        _row(f"{inner}wi_0.weight", "ffn_gate.weight", wide, Role.LINEAR, stack, flag="gated_mlp"),
        _row(f"{inner}wi_1.weight", "ffn_up.weight", wide, Role.LINEAR, stack, flag="gated_mlp"),
        _row(f"{inner}wo.weight", "ffn_down.weight", ("hidden", "ffn"), Role.LINEAR, stack),
    )


def _last_norm(stack: str, scale: str = "") -> TensorSpec:
    name = f"{stack[:3]}.output_norm.weight"
    return TensorSpec(f"{stack}.final_layer_norm.weight", name, ("hidden",), Role.NORM, gguf_scale=scale)


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    _last_norm("encoder"),
    _last_norm("decoder", "logit_scale"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    *_distances("encoder"),
    *_distances("decoder"),
    *_attention("encoder", 0, "SelfAttention", "attn"),
    *_mlp("encoder", 1),
    *_attention("decoder", 0, "SelfAttention", "attn"),
    *_attention("decoder", 1, "EncDecAttention", "cross_attn"),
    *_mlp("decoder", 2),
)
_IGNORED = (
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",  # of the first published T5
)


def _activation(config: fields.Config, default: str) -> tuple[str, bool]:
    """Reads `feed_forward_proj`: the activation, and whether it gates."""
    stated = fields.text(config, "feed_forward_proj", default)
    gate, dash, name = stated.rpartition("-")
    if dash and gate != "gated":
        raise InputError(f"config.json: 'feed_forward_proj' is {fields.short(stated)}, wanted a name or 'gated-NAME'")
    if stated == "gated-gelu":
        name = "gelu_new"  # transformers says so for the sake of T5 1.1
    return fields.activation({"feed_forward_proj": name}, "feed_forward_proj", name), bool(dash)


def _read(config: fields.Config, *, mlp: str, distances: str, scaled: bool) -> Hyperparameters:
    fields.refuse_others(config, "is_encoder_decoder")
    fields.refuse(config, {"is_encoder_decoder": (True, None), "scalable_attention": (False, None)})
    hidden, head_dim = fields.size(config, "d_model"), fields.size(config, "d_kv")
    layers, heads = fields.size(config, "num_layers"), fields.size(config, "num_heads")
    activation, gated = _activation(config, mlp)
    start = fields.get(config, "decoder_start_token_id", fields.get(config, "pad_token_id", 0))
    vocab = fields.size(config, "vocab_size")
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < vocab:
        raise InputError(f"config.json: 'decoder_start_token_id' is {fields.short(start)}, wanted 0 to {vocab - 1}")
    buckets = fields.size(config, "relative_attention_num_buckets", 32)
    distance = fields.size(config, "relative_attention_max_distance", 128)
    if buckets < 4 or distance <= buckets // 2:
        raise InputError(
            f"config.json: 'relative_attention_num_buckets' is {buckets} and 'relative_attention_max_distance' "
            f"{distance}; wanted at least 4 buckets and a distance of more than half as many"
        )
    return Hyperparameters(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "d_ff"),
        vocab=vocab,
        context=fields.size(config, "n_positions", 512),
        norm_eps=fields.number(config, "layer_norm_epsilon", 1e-6, high=1.0),
        activation=activation,
        attention_scale=1.0,
        tied=fields.flag(config, "tie_word_embeddings", True),
        flags=frozenset({"gated_mlp" if gated else "plain_mlp", distances}),
        logit_scale=hidden**-0.5 if scaled else 1.0,
        causal=False,
        seq2seq=Seq2Seq(fields.size(config, "num_decoder_layers", layers), buckets, distance, start),
    )


def read_t5(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` t5.

    Logits are scaled unless `tie_word_embeddings` is false, or, in files of transformers 5, which writes true there
    always, `scale_decoder_outputs` is.
    """
    tied = fields.flag(config, "tie_word_embeddings", True)
    scaled = fields.flag(config, "scale_decoder_outputs", tied)
    return _read(config, mlp="relu", distances="shared_distances", scaled=scaled)


def read_mt5(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` mt5, whose logits are never scaled (transformers 5)."""
    return _read(config, mlp="gated-gelu", distances="shared_distances", scaled=False)


def read_umt5(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` umt5; logits are scaled where it says that the head is tied."""
    scaled = fields.flag(config, "tie_word_embeddings", True)
    return _read(config, mlp="gated-gelu", distances="own_distances", scaled=scaled)


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> dict[str, tuple[str, Any]]:
    del config
    stacks = hyper.seq2seq
    assert stacks is not None  # every config of this family has one
    return {
        "context_length": ("uint32", hyper.context),
        "embedding_length": ("uint32", hyper.hidden),
        "feed_forward_length": ("uint32", hyper.intermediate),
        "block_count": ("uint32", hyper.layers),
        "decoder_block_count": ("uint32", stacks.layers),
        "attention.head_count": ("uint32", hyper.heads),
        "attention.key_length": ("uint32", hyper.head_dim),
        "attention.value_length": ("uint32", hyper.head_dim),
        "attention.layer_norm_epsilon": ("float32", hyper.norm_eps),
        "attention.layer_norm_rms_epsilon": ("float32", hyper.norm_eps),
        "attention.relative_buckets_count": ("uint32", stacks.buckets),
        "decoder_start_token_id": ("uint32", stacks.start),
        "vocab_size": ("uint32", hyper.vocab),
        _SCALED: ("bool", True),
    }


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    gated = "gated_mlp" in hyper.flags
    wanted = "gelu_tanh" if gated else "relu"
    if hyper.activation != wanted:
        raise InputError(
            f"config.json: the activation is {hyper.activation!r}; llama.cpp computes {wanted!r} for T5 "
            f"{'with' if gated else 'without'} a gate, so a GGUF file would be another model"
        )
    if hyper.seq2seq is not None and hyper.seq2seq.layers > hyper.layers:
        raise InputError(
            f"config.json: 'num_decoder_layers' is {hyper.seq2seq.layers}, more than the {hyper.layers} of 'num_layers'"
            "; llama.cpp keeps a cache for as many layers as the encoder has, and cannot open such a file"
        )
    if hyper.seq2seq is not None and hyper.seq2seq.distance != _DISTANCE:
        raise InputError(
            f"config.json: 'relative_attention_max_distance' is {hyper.seq2seq.distance}; llama.cpp computes with "
            f"{_DISTANCE} always, so a GGUF file would be another model"
        )


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    del factors
    umt5 = "enc.blk.1.attn_rel_b.weight" in names
    name, model_type = ("UMT5ForConditionalGeneration", "umt5") if umt5 else ("T5ForConditionalGeneration", "t5")
    heads = whole(metadata, "t5.attention.head_count")
    config = general_config(metadata, names, name, model_type)
    # files of llama.cpp's converter lack the factor of models whose head is the embedding
    scaled = config["tie_word_embeddings"] and not metadata.get(f"t5.{_SCALED}")
    return {
        **config,
        "is_encoder_decoder": True,
        "tie_word_embeddings": scaled if umt5 else config["tie_word_embeddings"],
        **({} if umt5 else {"scale_decoder_outputs": scaled}),
        "d_model": whole(metadata, "t5.embedding_length"),
        "d_ff": whole(metadata, "t5.feed_forward_length"),
        "d_kv": whole(metadata, "t5.attention.key_length"),
        "num_layers": whole(metadata, "t5.block_count"),
        "num_decoder_layers": whole(metadata, "t5.decoder_block_count", whole(metadata, "t5.block_count")),
        "num_heads": heads,
        "n_positions": whole(metadata, "t5.context_length"),
        "layer_norm_epsilon": real(metadata, "t5.attention.layer_norm_rms_epsilon"),
        "relative_attention_num_buckets": whole(metadata, "t5.attention.relative_buckets_count"),
        "relative_attention_max_distance": _DISTANCE,
        "feed_forward_proj": "gated-gelu" if "enc.blk.0.ffn_gate.weight" in names else "relu",
        "decoder_start_token_id": metadata.get("t5.decoder_start_token_id", 0),
    }


def _family(family: str, classes: tuple[str, ...], read: Any) -> ArchSpec:
    return ArchSpec(
        family=family,
        classes=classes,
        model_types=(family,),
        gguf="t5",
        prefix="",
        norm="rms",
        gguf_rope="",
        tensors=_TABLE,
        ignored=_IGNORED,
        read_config=read,
        gguf_metadata=_gguf_metadata,
        gguf_tensors=lambda _hyper: {},
        config_from_gguf=_config_from_gguf,
        gguf_check=_gguf_check,
        kind="encoder_decoder",
        own_head=True,
    )


T5 = _family("t5", ("T5ForConditionalGeneration", "T5WithLMHeadModel"), read_t5)
MT5 = _family("mt5", ("MT5ForConditionalGeneration",), read_mt5)
UMT5 = _family("umt5", ("UMT5ForConditionalGeneration",), read_umt5)

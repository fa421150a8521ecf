"""OPT in all sizes, the 350m with its norms after the sums and its narrower embedding, and Galactica.

Source: transformers' modeling_opt.py. llama.cpp has no such architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from quantpress.convert.arch import fields
from quantpress.convert.arch.biased_rows import linear_rows, norm_rows
from quantpress.convert.arch.gguf_rotary import Entries
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "model.decoder.layers.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "model.decoder.embed_tokens.weight"
_POSITIONS_BEFORE = 2  # rows of the table of positions that no token has (OPTLearnedPositionalEmbedding.offset)

_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "embedding"), Role.EMBEDDING),
    TensorSpec("model.decoder.embed_positions.weight", "position_embd.weight", ("positions", "hidden"), Role.POSITION),
    TensorSpec(
        "model.decoder.project_in.weight",
        "token_embd_in.weight",
        ("hidden", "embedding"),
        Role.LINEAR,
        flag="projections",
    ),
    *norm_rows("model.decoder.final_layer_norm", "output_norm", flag="final_norm"),
    TensorSpec(
        "model.decoder.project_out.weight", "output_in.weight", ("embedding", "hidden"), Role.LINEAR, flag="projections"
    ),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "embedding"), Role.HEAD, tied_to=_EMBEDDING),
    *norm_rows(f"{_LAYER}self_attn_layer_norm", f"{_BLOCK}attn_norm", flag="norms_before"),
    *linear_rows(f"{_LAYER}self_attn.q_proj", f"{_BLOCK}attn_q", ("q", "hidden"), bias="bias"),
    *linear_rows(f"{_LAYER}self_attn.k_proj", f"{_BLOCK}attn_k", ("kv", "hidden"), bias="bias"),
    *linear_rows(f"{_LAYER}self_attn.v_proj", f"{_BLOCK}attn_v", ("kv", "hidden"), bias="bias"),
    *linear_rows(f"{_LAYER}self_attn.out_proj", f"{_BLOCK}attn_output", ("hidden", "q"), bias="bias"),
    *norm_rows(f"{_LAYER}self_attn_layer_norm", f"{_BLOCK}attn_output_norm", flag="norms_after"),
    *norm_rows(f"{_LAYER}final_layer_norm", f"{_BLOCK}ffn_norm", flag="norms_before"),
    *linear_rows(f"{_LAYER}fc1", f"{_BLOCK}ffn_up", ("ffn", "hidden"), bias="bias"),
    *linear_rows(f"{_LAYER}fc2", f"{_BLOCK}ffn_down", ("hidden", "ffn"), bias="bias"),
    *norm_rows(f"{_LAYER}final_layer_norm", f"{_BLOCK}layer_output_norm", flag="norms_after"),
)


def read_opt(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` opt (transformers: OPTConfig)."""
    fields.refuse_others(config)
    fields.refuse(config, {"layer_norm_elementwise_affine": (True, None), "normalize_before": (True, None)})
    hidden, heads = fields.size(config, "hidden_size"), fields.size(config, "num_attention_heads")
    head_dim, width = fields.head_size(hidden, heads), fields.size(config, "word_embed_proj_dim", hidden)
    before = fields.flag(config, "do_layer_norm_before", True)
    flags = {"norms_before" if before else "norms_after"}
    if fields.flag(config, "enable_bias", True):
        flags.add("bias")
    if width != hidden:
        flags.add("projections")
    if before and not fields.flag(config, "_remove_final_layer_norm", False):
        flags.add("final_norm")
    elif before:
        raise InputError("config.json: '_remove_final_layer_norm' is true with norms before, which is not implemented")
    return Hyperparameters(
        layers=fields.size(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "ffn_dim"),
        vocab=fields.size(config, "vocab_size"),
        context=fields.size(config, "max_position_embeddings", 2048),
        norm_eps=1e-5,  # torch's, no key says otherwise
        activation=fields.activation(config, "activation_function", "relu"),
        attention_scale=head_dim**-0.5,
        position_offset=_POSITIONS_BEFORE,
        embedding_width=width if width != hidden else 0,
        tied=fields.flag(config, "tie_word_embeddings", True),
        flags=frozenset(flags),
    )


def _refused() -> NoReturn:
    raise InputError(
        "config.json: 'model_type' is 'opt'; llama.cpp has no OPT, so that no GGUF file of it can be run: "
        "write ONNX or safetensors"
    )


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del hyper, config
    _refused()


def _gguf_metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    del hyper, config
    _refused()


def _config_from_gguf(
    metadata: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    del metadata, names, factors
    _refused()


OPT = ArchSpec(
    family="opt",
    classes=("OPTForCausalLM", "OPTModel"),
    model_types=("opt",),
    gguf="opt",
    prefix="model.",
    norm="layer",
    gguf_rope="",
    tensors=_TABLE,
    read_config=read_opt,
    gguf_metadata=_gguf_metadata,
    gguf_tensors=lambda _hyper: {},
    config_from_gguf=_config_from_gguf,
    gguf_check=_gguf_check,
    gguf_runs=False,
    gguf_opens=False,
)

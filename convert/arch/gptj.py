"""GPT-J.

Source: transformers' modeling_gptj.py. llama.cpp has no GPT-J of its own, but its Phi-2 (src/models/phi2.cpp) computes
the same: attention and MLP read one norm, a part of each head turns, the head has a bias. Only the rows of q and k
stand otherwise (GPT-J turns neighbours together, Phi-2 halves), and biases that GPT-J lacks are zeros there.
"""

from __future__ import annotations

from quantpress.convert.arch import fields
from quantpress.convert.arch.biased_rows import linear_rows, norm_rows
from quantpress.convert.arch.phi import PHI, phi2_metadata
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, Rope, TensorSpec
from quantpress.quant.errors import InputError

_LAYER = "transformer.h.{layer}."
_BLOCK = "blk.{layer}."
_EMBEDDING = "transformer.wte.weight"


def _attention(part: str, slot: str, rotary: str = "") -> TensorSpec:
    name = f"{_LAYER}attn.{part}_proj.weight"
    return TensorSpec(name, f"{_BLOCK}{slot}.weight", ("q", "hidden"), Role.LINEAR, rotary=rotary)


_TABLE = (
    TensorSpec(_EMBEDDING, "token_embd.weight", ("vocab", "hidden"), Role.EMBEDDING),
    *norm_rows("transformer.ln_f", "output_norm"),
    TensorSpec("lm_head.weight", "output.weight", ("vocab", "hidden"), Role.HEAD, tied_to=_EMBEDDING),
    TensorSpec("lm_head.bias", "output.bias", ("vocab",), Role.BIAS),
    *norm_rows(f"{_LAYER}ln_1", f"{_BLOCK}attn_norm"),
    _attention("q", "attn_q", "heads"),
    _attention("k", "attn_k", "kv_heads"),
    _attention("v", "attn_v"),
    _attention("out", "attn_output"),
    *linear_rows(f"{_LAYER}mlp.fc_in", f"{_BLOCK}ffn_up", ("ffn", "hidden")),
    *linear_rows(f"{_LAYER}mlp.fc_out", f"{_BLOCK}ffn_down", ("hidden", "ffn")),
)


def read_gptj(config: fields.Config) -> Hyperparameters:
    """Reads a config.json with `model_type` gptj (transformers: GPTJConfig)."""
    fields.refuse_others(config)
    fields.refuse(config, {"rotary": (True, None), "rope_scaling": (None,), "scale_attn_weights": (True, None)})
    hidden, heads = fields.size(config, "n_embd"), fields.size(config, "n_head")
    head_dim, turned = fields.head_size(hidden, heads, "n_head"), fields.size(config, "rotary_dim", 64)
    if turned > head_dim or turned % 2:
        raise InputError(f"config.json: 'rotary_dim' is {turned}, wanted an even number up to {head_dim}")
    return Hyperparameters(
        layers=fields.size(config, "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        intermediate=fields.size(config, "n_inner", 4 * hidden),
        vocab=fields.size(config, "vocab_size"),
        context=fields.size(config, "n_positions", 2048),
        norm_eps=fields.number(config, "layer_norm_epsilon", 1e-5, high=1.0),
        activation=fields.activation(config, "activation_function", "gelu_new"),
        attention_scale=head_dim**-0.5,
        rope=Rope(theta=10000.0, dim=turned, interleaved=True),
        parallel_residual=True,
        tied=fields.flag(config, "tie_word_embeddings", False),
    )


def _gguf_tensors(hyper: Hyperparameters) -> dict[str, tuple[float, ...]]:
    """Zeros for the biases of attention, which Phi-2 has."""
    slots = ("attn_q", "attn_k", "attn_v", "attn_output")
    return {f"blk.{layer}.{slot}.bias": (0.0,) * hyper.hidden for layer in range(hyper.layers) for slot in slots}


def _gguf_check(hyper: Hyperparameters, config: fields.Config) -> None:
    del config
    if hyper.activation not in ("gelu", "gelu_tanh"):
        raise InputError(f"config.json: 'activation_function' is {hyper.activation!r}; llama.cpp computes gelu")


def _gguf_notes(hyper: Hyperparameters, config: fields.Config) -> tuple[str, ...]:
    del hyper, config
    return ("llama.cpp has no GPT-J: the file says phi2, an architecture that computes the same",)


GPTJ = ArchSpec(
    family="gptj",
    classes=("GPTJForCausalLM", "GPTJModel"),
    model_types=("gptj",),
    gguf="phi2",
    prefix="transformer.",
    norm="layer",
    gguf_rope="neox",
    tensors=_TABLE,
    ignored=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
    read_config=read_gptj,
    gguf_metadata=phi2_metadata,
    gguf_tensors=_gguf_tensors,
    config_from_gguf=PHI.config_from_gguf,
    gguf_check=_gguf_check,
    gguf_notes=_gguf_notes,
    gguf_head="required",
)

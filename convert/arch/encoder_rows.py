"""What the tables of encoders share: rows in pairs of weight and bias, the head for masked tokens, GGUF metadata.

Sources: transformers' modeling_bert.py (BertLMPredictionHead), modeling_roberta.py (RobertaLMHead) and
modeling_distilbert.py; llama.cpp's conversion/bert.py and src/models/bert.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from quantpress.convert.arch import fields
from quantpress.convert.arch.gguf_fields import general_config, real, size_metadata, whole
from quantpress.convert.arch.gguf_rotary import Entries
from quantpress.convert.arch.spec import Hyperparameters, Role, TensorSpec
from quantpress.convert.sentence_files import POOLING_KEY
from quantpress.quant.errors import InputError

__all__ = [
    "MASKED_HEAD",
    "check_gguf",
    "config_from_gguf",
    "head_flags",
    "head_rows",
    "linear_rows",
    "metadata",
    "norm_rows",
    "pooling",
    "refuse_decoders",
]

MASKED_HEAD = "masked_head"
"""Flag of models with a head that fills in masked tokens."""

_TIED_BIAS, _OWN_BIAS = "tied_bias", "own_bias"  # which of two biases transformers adds to a token's score

_POOLINGS: Mapping[str, int] = MappingProxyType({"mean": 1, "cls": 2, "last": 3})  # enum llama_pooling_type, llama.h
_HEADED = ("ForMaskedLM", "ForPreTraining")  # ends of the names of classes that have the head


def norm_rows(hf: str, gguf: str, role: Role = Role.NORM, flag: str = "") -> tuple[TensorSpec, TensorSpec]:
    """Gives the two rows of a layer norm."""
    return (
        TensorSpec(f"{hf}.weight", f"{gguf}.weight", ("hidden",), role, flag=flag),
        TensorSpec(f"{hf}.bias", f"{gguf}.bias", ("hidden",), role, flag=flag),
    )


def linear_rows(hf: str, gguf: str, shape: tuple[str, str]) -> tuple[TensorSpec, TensorSpec]:
    """Gives weight and bias of a linear layer of a block."""
    slot = f"blk.{{layer}}.{gguf}"
    return (
        TensorSpec(f"{hf}.weight", f"{slot}.weight", shape, Role.LINEAR),
        TensorSpec(f"{hf}.bias", f"{slot}.bias", shape[:1], Role.BIAS),
    )


def head_rows(dense: str, norm: str, decoder: str, biases: tuple[str, str], embedding: str) -> tuple[TensorSpec, ...]:
    """Gives the rows of a head for masked tokens: linear, activation, norm, and the embedding again.

    All are of role HEAD, which no GGUF file of such a model holds.

    Args:
        dense: module of the linear layer.
        norm: module of the norm.
        decoder: weight that is tied to the embedding.
        biases: one value for each token; the second of the two where the weight is not tied.
        embedding: name of the embedding.
    """
    matrix = ("hidden", "hidden")
    return (
        TensorSpec(decoder, "output.weight", ("vocab", "hidden"), Role.HEAD, flag=MASKED_HEAD, tied_to=embedding),
        TensorSpec(biases[0], "output.bias", ("vocab",), Role.HEAD, flag=_TIED_BIAS),
        TensorSpec(biases[1], "output.bias", ("vocab",), Role.HEAD, flag=_OWN_BIAS),
        TensorSpec(f"{dense}.weight", "output_transform.weight", matrix, Role.HEAD, flag=MASKED_HEAD),
        TensorSpec(f"{dense}.bias", "output_transform.bias", ("hidden",), Role.HEAD, flag=MASKED_HEAD),
        *norm_rows(norm, "output_transform_norm", Role.HEAD, MASKED_HEAD),
    )


def head_flags(config: fields.Config) -> frozenset[str]:
    """Gives the flags of the head where the class in config.json has it."""
    classes = config.get("architectures") or ("",)
    if not str(classes[0]).endswith(_HEADED):
        return frozenset()
    return frozenset({MASKED_HEAD, _TIED_BIAS if fields.flag(config, "tie_word_embeddings", True) else _OWN_BIAS})


def pooling(config: fields.Config) -> str:
    """Gives how the model's vectors are made, "" where that is not known or no way that is computed here."""
    found = fields.text(config, POOLING_KEY, "")
    return found if found in _POOLINGS else ""


def refuse_decoders(config: fields.Config) -> None:
    """Refuses what makes another model of BERT: a causal mask, cross attention, relative positions.

    Raises:
        InputError: naming the key.
    """
    fields.refuse_others(config, "is_causal")
    fields.refuse(
        config,
        {
            "is_causal": (False, None),
            "is_decoder": (False, None),
            "position_embedding_type": ("absolute", None),
            "embedding_size": (config.get("hidden_size"), None),
        },
    )


def metadata(hyper: Hyperparameters, config: fields.Config) -> Entries:
    """Gives the keys of llama.cpp's `bert`; those of the tokenizer begin with "tokenizer."."""
    del config
    entries: Entries = {
        **size_metadata(hyper, norm="layer"),
        "attention.causal": ("bool", False),
        "tokenizer.ggml.token_type_count": ("uint32", max(hyper.token_types, 1)),
    }
    if hyper.pooling:
        entries["pooling_type"] = ("uint32", _POOLINGS[hyper.pooling])
    return entries


def check_gguf(hyper: Hyperparameters, config: fields.Config) -> None:
    """Refuses what llama.cpp's graph does not compute.

    Raises:
        InputError: another activation than gelu, or another way to pool than mean, first or last token.
    """
    if hyper.activation not in ("gelu", "gelu_tanh"):
        raise InputError(f"config.json: the activation is {hyper.activation!r}; llama.cpp computes gelu for BERT")
    found = fields.text(config, POOLING_KEY, "")
    if found and found not in _POOLINGS:
        known = ", ".join(_POOLINGS)
        raise InputError(f"modules.json: the vectors are made by {found!r}; llama.cpp computes one of {known}")


def config_from_gguf(
    found: Mapping[str, Any], names: frozenset[str], factors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Gives a config.json of BertModel: files of RoBERTa and DistilBERT have its form, too."""
    del factors
    poolings = {number: name for name, number in _POOLINGS.items()}
    pooling_type = found.get("bert.pooling_type")
    types = "token_types.weight" in names
    return {
        **general_config(found, names, "BertModel", "bert"),
        "tie_word_embeddings": True,
        "hidden_size": whole(found, "bert.embedding_length"),
        "intermediate_size": whole(found, "bert.feed_forward_length"),
        "num_hidden_layers": whole(found, "bert.block_count"),
        "num_attention_heads": whole(found, "bert.attention.head_count"),
        "max_position_embeddings": whole(found, "bert.context_length"),
        "layer_norm_eps": real(found, "bert.attention.layer_norm_epsilon"),
        "type_vocab_size": whole(found, "tokenizer.ggml.token_type_count", 1) if types else 0,
        "hidden_act": "gelu",
        **({POOLING_KEY: poolings[pooling_type]} if pooling_type in poolings else {}),
    }

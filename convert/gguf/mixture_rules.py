"""The rules of llama-quantize: which matrices of a file get another type than the one it is named after.

Facts from llama_tensor_get_type_impl, tensor_get_category and tensor_type_fallback in llama.cpp's src/llama-quant.cpp.
A rule is a type and when it holds; of a category's rules the first that holds is taken, and where none does the tensor
keeps the file's type. What cannot be said so (the head, experts, large models) is in `mixture`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

__all__ = ["BASE", "FALLBACKS", "LARGE", "MODEL_RULES", "NEEDS_IMPORTANCE", "Category", "ModelFacts", "Place", "Rule",
           "category_of", "rule_type"]  # fmt: skip

MODEL_RULES: Final = "llama.cpp v0.5.0"
"""Whose rules these are; the sidecar names it."""


class Category(enum.Enum):
    """What the rules tell apart, by name."""

    HEAD = "output"
    EMBEDDING = "token_embd"
    VALUES = "attn_v"  # with fused q, k, v, and the joint keys and values of MLA
    KEYS = "attn_k"
    QUERIES = "attn_q"
    ATTENTION_OUTPUT = "attn_output"
    UP = "ffn_up"
    GATE = "ffn_gate"
    DOWN = "ffn_down"
    OTHER = "other"


_EMBEDDINGS: Final = ("token_embd.weight", "per_layer_token_embd.weight")
_PARTS: Final = (
    ("attn_qkv.weight", Category.VALUES),
    ("attn_kv_b.weight", Category.VALUES),
    ("attn_v.weight", Category.VALUES),
    ("attn_k.weight", Category.KEYS),
    ("attn_q.weight", Category.QUERIES),
    ("attn_output.weight", Category.ATTENTION_OUTPUT),
    ("ffn_up", Category.UP),
    ("ffn_gate", Category.GATE),
    ("ffn_down", Category.DOWN),
)


def category_of(name: str) -> Category:
    """Gives the category of a tensor from its name in GGUF."""
    if name == "output.weight":
        return Category.HEAD
    if name in _EMBEDDINGS:
        return Category.EMBEDDING
    return next((category for part, category in _PARTS if part in name), Category.OTHER)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules ask of a model.

    Attributes:
        arch: `general.architecture` in GGUF.
        layers: of the decoder.
        heads, kv_heads: of the first layer.
        experts: of a layer; 0 in a dense model.
    """

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def falcon(self) -> bool:
        """Whether it is the family with rules of its own."""
        return self.arch == "falcon"

    @property
    def grouped_by_four(self) -> bool:
        """Whether at least four query heads share a key head."""
        return self.kv_heads > 0 and self.heads // self.kv_heads >= 4

    @property
    def large(self) -> bool:
        """Whether llama.cpp calls it a 70B model (load_arch_hparams in src/models)."""
        if self.arch == "llama" and self.heads == self.kv_heads:
            return False
        return LARGE.get(self.arch) == self.layers


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix stands.

    Attributes:
        index: of its kind among all, in the order of llama.cpp, or its layer.
        count: how many there are of its kind, or layers.
        model: that it belongs to.
        importance: whether an importance matrix is given.
    """

    index: int
    count: int
    model: ModelFacts
    importance: bool


Condition: TypeAlias = Callable[[Place], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """A type, and when a matrix gets it."""

    type: str
    when: Condition


def _always(_place: Place) -> bool:
    return True


def _first(count: int) -> Condition:
    return lambda place: place.index < count


def _in_first(share: int) -> Condition:
    """In the first 1/share of them; whole numbers, as in C."""
    return lambda place: place.index < place.count // share


def _more_bits(place: Place) -> bool:
    """Both eighths at the ends, and every third between them."""
    eighth = place.count // 8
    return place.index < eighth or place.index >= 7 * place.count // 8 or (place.index - eighth) % 3 == 2


def _grouped(place: Place) -> bool:
    return place.model.grouped_by_four


def _falcon(place: Place) -> bool:
    return place.model.falcon


def _importance(place: Place) -> bool:
    return place.importance


def _eight_experts(place: Place) -> bool:
    return place.model.experts == 8


def _no(condition: Condition) -> Condition:
    return lambda place: not condition(place)


def _both(*conditions: Condition) -> Condition:
    return lambda place: all(condition(place) for condition in conditions)


_BESIDE_EIGHT: Final = Rule("Q5_K", _both(_eight_experts, _no(_falcon)))  # attention outputs, as Mixtral's
_IQ4: Final = {
    Category.VALUES: (Rule("Q5_K", _grouped),),
    Category.DOWN: (Rule("Q5_K", _both(_in_first(8), _no(_importance))),),
    Category.ATTENTION_OUTPUT: (_BESIDE_EIGHT,),
}
_TERNARY: Final = {Category.EMBEDDING: (Rule("Q4_K", _always),)}

_RULES: Final[Mapping[str, Mapping[Category, tuple[Rule, ...]]]] = MappingProxyType(
    {
        "Q4_0": {Category.DOWN: (Rule("Q4_1", _both(_importance, _in_first(8))),)},
        "Q5_0": {Category.DOWN: (Rule("Q5_1", _both(_importance, _in_first(8))),)},
        "Q2_K": {
            Category.VALUES: (Rule("Q4_K", _grouped), Rule("Q3_K", _always)),
            Category.DOWN: (Rule("Q3_K", _always),),
            Category.ATTENTION_OUTPUT: (_BESIDE_EIGHT, Rule("Q3_K", _no(_falcon))),
        },
        "Q2_K_S": {
            Category.VALUES: (Rule("Q4_K", _grouped),),
            Category.DOWN: (Rule("Q4_K", _in_first(8)),),
        },
        "Q3_K_S": {Category.ATTENTION_OUTPUT: (_BESIDE_EIGHT,)},
        "Q3_K_M": {
            Category.VALUES: (Rule("Q5_K", _first(2)), Rule("Q4_K", _always)),
            Category.DOWN: (Rule("Q5_K", _in_first(16)), Rule("Q4_K", _no(_falcon)), Rule("Q4_K", _more_bits)),
            Category.ATTENTION_OUTPUT: (_BESIDE_EIGHT, Rule("Q4_K", _no(_falcon))),
        },
        "Q3_K_L": {
            Category.VALUES: (Rule("Q5_K", _always),),
            Category.DOWN: (Rule("Q4_K", _falcon), Rule("Q5_K", _always)),
            Category.ATTENTION_OUTPUT: (Rule("Q4_K", _falcon), Rule("Q5_K", _no(_eight_experts))),
        },
        "Q4_K_S": {
            Category.VALUES: (Rule("Q5_K", _first(4)),),
            Category.DOWN: (Rule("Q5_K", _both(_no(_falcon), _in_first(8))),),
            Category.ATTENTION_OUTPUT: (_BESIDE_EIGHT,),
        },
        "Q4_K_M": {
            Category.VALUES: (Rule("Q6_K", _more_bits),),
            Category.DOWN: (
                Rule("Q6_K", _both(_falcon, _in_first(16))),
                Rule("Q5_K", _both(_falcon, _more_bits)),
                Rule("Q6_K", _more_bits),
            ),
            Category.ATTENTION_OUTPUT: (_BESIDE_EIGHT,),
        },
        "Q5_K_M": {
            Category.VALUES: (Rule("Q6_K", _more_bits),),
            Category.DOWN: (Rule("Q6_K", _more_bits),),
        },
        "IQ4_NL": _IQ4,
        "IQ4_XS": _IQ4,
        "TQ1_0": _TERNARY,
        "TQ2_0": _TERNARY,
    }
)

BASE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "Q2_K_S": "Q2_K",
        "Q3_K_S": "Q3_K",
        "Q3_K_M": "Q3_K",
        "Q3_K_L": "Q3_K",
        "Q4_K_S": "Q4_K",
        "Q4_K_M": "Q4_K",
        "Q5_K_S": "Q5_K",
        "Q5_K_M": "Q5_K",
        "MXFP4_MOE": "MXFP4",
    }
)
"""File type -> type of a matrix that no rule names; the others are their own."""

FALLBACKS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "Q2_K": "Q4_0",
        "Q3_K": "Q4_0",
        "TQ1_0": "Q4_0",
        "TQ2_0": "Q4_0",
        "Q4_K": "Q5_0",
        "Q5_K": "Q5_1",
        "Q6_K": "Q8_0",
        "IQ4_XS": "IQ4_NL",
    }
)
"""Type of 256 values -> the type of 32 that rows get that do not divide by 256; F16 where 32 does not divide either."""

LARGE: Final[Mapping[str, int]] = MappingProxyType({"llama": 80, "qwen2": 80, "olmo": 80, "deci": 80, "jais2": 68})
"""Family -> layers of the models that llama.cpp calls 70B."""

NEEDS_IMPORTANCE: Final[Mapping[str, str]] = MappingProxyType({"Q2_K_S": "Q2_K"})
"""File type -> the type in it that is garbage without an importance matrix (tensor_requires_imatrix)."""


def rule_type(outtype: str, category: Category, place: Place) -> str | None:
    """Gives the type that a file's own rules name for a matrix; None: the base type.

    Args:
        outtype: key of `FILE_TYPES`.
        category: of the matrix.
        place: where it stands.
    """
    rules = _RULES.get(outtype, {}).get(category, ())
    return next((rule.type for rule in rules if rule.when(place)), None)

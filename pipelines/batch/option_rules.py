"""What the options of the stages here may be, as far as that depends on nothing else.

The stages check themselves when they run; what is said here lets a pipeline file be refused with a line number before
any model is opened, and lets editors complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from quantpress.convert.gguf.file_types import ALIASES, FILE_TYPES
from quantpress.convert.onnx.options import BLOCK_SIZES, COMPUTE_TYPES, INT8_STYLES, PRECISIONS, TENSOR_TYPES
from quantpress.convert.safetensors_writer import CAST_TYPES
from quantpress.pipelines.judging import RUNTIMES
from quantpress.pipelines.quantize_recipe import FORMATS, METHODS

__all__ = ["Rule", "rule_of"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What an option may be.

    Attributes:
        choices: texts or numbers; empty for any.
        folded: letter case of the choices makes no difference to the stage.
        at_least, at_most: bounds of a number, or None.
        hidden: the stage fills it in itself; a pipeline file does not set it.
    """

    choices: Sequence[str | int] = ()
    folded: bool = False
    at_least: float | None = None
    at_most: float | None = None
    hidden: bool = False

    @property
    def spellings(self) -> tuple[str | int, ...]:
        """The choices as they may be written."""
        if not self.folded:
            return tuple(self.choices)
        spelled = ((each, each.lower(), each.upper()) for each in self.choices if isinstance(each, str))
        return tuple(dict.fromkeys(text for texts in spelled for text in texts))


_ANY = Rule()
_COUNT = Rule(at_least=1)
_POSITIVE = Rule(at_least=0)
_SHARE = Rule(at_least=0, at_most=1)
_HIDDEN = Rule(hidden=True)
_CALIBRATION_DTYPE = Rule(("f32", "bf16"), folded=True)
_ONNX_TYPE = Rule(TENSOR_TYPES)
_BITS = Rule((2, 3, 4, 8))

_ALIKE: Mapping[str, Rule] = MappingProxyType(
    {
        "activation_bits": Rule((8,)),
        "bits": _BITS,
        "calibration_dtype": _CALIBRATION_DTYPE,
        "chunks": _COUNT,
        "context": Rule(at_least=8),
        "damping": _POSITIVE,
        "drift": _SHARE,
        "format": Rule(FORMATS),
        "group_size": Rule(at_least=-1),
        "max_kld": _POSITIVE,
        "max_ppl_change": _POSITIVE,
        "min_top1": _SHARE,
        "runtime": Rule(RUNTIMES),
        "samples": _COUNT,
        "scale_type": Rule(("F16", "BF16", "F32")),
        "seed": _POSITIVE,
        "sequence_length": _COUNT,
    }
)
"""Options that mean the same in every stage that has them."""

_OWN: Mapping[tuple[str, str], Rule] = MappingProxyType(
    {
        ("gguf", "outtype"): Rule((*FILE_TYPES, *ALIASES, "auto"), folded=True),
        ("gguf", "method"): Rule(("rtn", "gptq")),
        ("gguf", "split_max_tensors"): _POSITIVE,
        ("onnx", "precision"): Rule(PRECISIONS),
        ("onnx", "compute_type"): Rule(COMPUTE_TYPES),
        ("onnx", "int8"): Rule(INT8_STYLES),
        ("onnx", "block_size"): Rule(BLOCK_SIZES),
        ("onnx", "accuracy_level"): Rule(at_least=0, at_most=4),
        ("onnx", "output_tensor_type"): _ONNX_TYPE,
        ("onnx", "token_embedding_type"): _ONNX_TYPE,
        ("onnx", "method"): Rule(("rtn", "hqq", "gptq", "awq")),
        ("qlora_base", "base"): Rule(("fp16", "dequantized")),
        ("qlora_base", "quant_type"): Rule(("nf4", "fp4", "int8")),
        ("qlora_base", "fp16_kld"): _HIDDEN,
        ("qlora_base", "dequantized_kld"): _HIDDEN,
        ("quantize", "method"): Rule(METHODS),
        ("safetensors", "dtype"): Rule(tuple(CAST_TYPES), folded=True),
    }
)


def rule_of(stage: str, option: str, *, built_in: bool) -> Rule:
    """Gives what an option may be; of third-party stages nothing is known but the type."""
    return _OWN.get((stage, option), _ALIKE.get(option, _ANY)) if built_in else _ANY

"""The families this program knows, and how to find the one a config.json or a GGUF file speaks of."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch.baichuan import BAICHUAN
from quantpress.convert.arch.bert import BERT, ROBERTA
from quantpress.convert.arch.bloom import BLOOM
from quantpress.convert.arch.chatglm import CHATGLM
from quantpress.convert.arch.cohere import COHERE, COHERE2
from quantpress.convert.arch.deepseek import DEEPSEEK2, DEEPSEEK3
from quantpress.convert.arch.distilbert import DISTILBERT
from quantpress.convert.arch.exaone import EXAONE, EXAONE4
from quantpress.convert.arch.falcon import FALCON
from quantpress.convert.arch.fields import short
from quantpress.convert.arch.gemma import GEMMA, GEMMA2, GEMMA3
from quantpress.convert.arch.glm import GLM, GLM4
from quantpress.convert.arch.gpt2 import GPT2
from quantpress.convert.arch.gpt_oss import GPT_OSS
from quantpress.convert.arch.gptbigcode import GPTBIGCODE
from quantpress.convert.arch.gptj import GPTJ
from quantpress.convert.arch.gptneox import GPTNEOX
from quantpress.convert.arch.granite import GRANITE, MINICPM
from quantpress.convert.arch.granite_moe import GRANITE_MOE
from quantpress.convert.arch.internlm2 import INTERNLM2
from quantpress.convert.arch.llama import LLAMA, MISTRAL
from quantpress.convert.arch.llama_kin import ARCEE, ERNIE4_5, SEED_OSS
from quantpress.convert.arch.mixtral import MIXTRAL
from quantpress.convert.arch.mpt import MPT
from quantpress.convert.arch.nemotron import NEMOTRON
from quantpress.convert.arch.olmo import OLMO, OLMO2, OLMO3
from quantpress.convert.arch.olmoe import OLMOE
from quantpress.convert.arch.opt import OPT
from quantpress.convert.arch.phi import PHI
from quantpress.convert.arch.phi3 import PHI3
from quantpress.convert.arch.qwen import QWEN2, QWEN3
from quantpress.convert.arch.qwen1 import QWEN1
from quantpress.convert.arch.qwen_moe import QWEN2_MOE, QWEN3_MOE
from quantpress.convert.arch.smollm3 import SMOLLM3
from quantpress.convert.arch.spec import ArchSpec
from quantpress.convert.arch.stablelm import STABLELM
from quantpress.convert.arch.starcoder2 import STARCODER2
from quantpress.convert.arch.t5 import MT5, T5, UMT5
from quantpress.quant.errors import InputError, UnknownFamilyError

ARCHITECTURES: tuple[ArchSpec, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI,
    PHI3,
    GPT2,
    GPTNEOX,
    GRANITE_MOE,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    QWEN3_MOE,
    DEEPSEEK2,
    DEEPSEEK3,
    GPT_OSS,
    BLOOM,
    CHATGLM,
    INTERNLM2,
    BAICHUAN,
    QWEN1,
    OLMO,
    OLMO2,
    OLMO3,
    COHERE,
    COHERE2,
    GRANITE,
    MINICPM,
    SMOLLM3,
    GLM,
    GLM4,
    EXAONE,
    EXAONE4,
    SEED_OSS,
    ERNIE4_5,
    ARCEE,
    NEMOTRON,
    FALCON,
    GPTBIGCODE,
    GPTJ,
    MPT,
    OPT,
    STABLELM,
    STARCODER2,
    BERT,
    ROBERTA,
    DISTILBERT,
    T5,
    MT5,
    UMT5,
)


def find_arch(config: Mapping[str, Any]) -> ArchSpec:
    """Finds the family of a config.json: by `architectures`, or by `model_type` where that is missing.

    Raises:
        UnknownFamilyError: the key names no known family, the message has the nearest known names.
        InputError: neither key names a family.
    """
    classes = config.get("architectures")
    if classes is not None and not (
        isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
    ):
        raise InputError(f"config.json: 'architectures' is {short(classes)}, wanted a list of names")
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise InputError(f"config.json: 'model_type' is {short(model_type)}, wanted a name")
    if classes:
        return _by_name("architectures", classes[0], {name: spec for spec in ARCHITECTURES for name in spec.classes})
    if model_type is None:
        raise InputError("config.json: neither 'architectures' nor 'model_type' says what family the model is of")
    return _by_name("model_type", model_type, {name: spec for spec in ARCHITECTURES for name in spec.model_types})


def find_gguf_arch(architecture: str, metadata: Mapping[str, Any]) -> ArchSpec:
    """Finds the family of a GGUF file; the first of those that share an architecture (Llama, not Mistral).

    Args:
        architecture: `general.architecture`.
        metadata: the file's other keys.

    Raises:
        InputError: the architecture is unknown, or the file is no model (an adapter, a projector).
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"GGUF: 'general.type' is {short(kind)}, wanted a model")
    known: dict[str, ArchSpec] = {}
    for spec in sorted(ARCHITECTURES, key=lambda spec: not spec.gguf_key):
        if not spec.gguf_key or metadata.get(spec.gguf_key):
            known.setdefault(spec.gguf, spec)
    return _by_name("general.architecture", architecture, known)


def _are_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _by_name(key: str, name: str, known: Mapping[str, ArchSpec]) -> ArchSpec:
    if name in known:
        return known[name]
    lowered = {spelling.lower(): spelling for spelling in known}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower()[:80], lowered, n=3, cutoff=0.4)]
    hint = f"nearest: {', '.join(near)}" if near else "see `quantpress architectures`"
    raise UnknownFamilyError(f"{key} is {short(name)}, a family that is not implemented; {hint}")

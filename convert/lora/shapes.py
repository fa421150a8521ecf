"""Checks that the tensors of an adapter fit each other and what its adapter_config.json says, without the base.

PEFT builds its modules by the configuration and then loads the tensors into them, so what does not fit fails there or,
where a tensor is missing, is left at its start value with a warning. Here both are errors.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.lora.config import AdapterConfig
from quantpress.convert.lora.names import CONVOLUTION_PARTS
from quantpress.quant.errors import InputError

__all__ = ["ADAPTED_PARTS", "check_module", "check_tensor"]

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_KIND_OF: Mapping[str, tuple[str, ...]] = {
    "lora_A": ("LORA", "ADALORA"),
    "lora_B": ("LORA", "ADALORA"),
    "lora_B.bias": ("LORA",),
    "lora_embedding_A": ("LORA",),
    "lora_embedding_B": ("LORA",),
    "lora_magnitude_vector": ("LORA",),
    "lora_E": ("ADALORA",),
    **dict.fromkeys(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("LOHA",)),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"), ("LOKR",)),
    "trainable_tokens_delta": ("LORA", "ADALORA", "TRAINABLE_TOKENS"),
}
ADAPTED_PARTS = frozenset(_KIND_OF)  # the parts that are not a parameter trained whole


def check_module(path: str, parts: Mapping[str, LazyTensor], config: AdapterConfig, label: str) -> None:
    """Checks the tensors of one module.

    Args:
        path: the module.
        parts: as `AdapterModule.parts`.
        config: the adapter's.
        label: the file of the weights, for messages.

    Raises:
        InputError: a tensor without its counterpart, or shapes that do not fit each other or the configuration.
    """
    where = f"{label}: module {shown(path, 200)}"
    adapted = ADAPTED_PARTS.intersection(parts) - {"trainable_tokens_delta"}
    if adapted:
        _check_complete(path, adapted, config, where)
        _check_ranks(path, parts, config, where)
    if (delta := parts.get("trainable_tokens_delta")) is not None:
        ids = config.tokens_of(path)
        if ids is None:
            # PEFT repeats the tokens of an embedding for a head that is tied to it.
            ids = next((ids for ids in config.trainable_tokens.values() if delta.shape[:1] == (len(ids),)), None)
        if ids is None:
            raise InputError(f"{where} has trained tokens, but {config.name} names none for it")
        if len(delta.shape) != 2 or delta.shape[0] != len(ids):
            raise InputError(f"{where}: {delta.name} has shape {delta.shape}, {config.name} names {len(ids)} tokens")


def check_tensor(path: str, part: str, tensor: LazyTensor, config: AdapterConfig, label: str) -> None:
    """Checks one tensor by itself.

    Raises:
        InputError: it is no tensor of floats, is empty, has a number of dimensions it cannot have, or does not belong
            to this kind of adapter.
    """
    where = f"{label}: tensor {shown(tensor.name, 200)}"
    if tensor.dtype not in _FLOATS:
        raise InputError(f"{where} is of type {tensor.dtype}; the tensors of an adapter are {', '.join(_FLOATS)}")
    if part in CONVOLUTION_PARTS:
        raise InputError(f"{where} adapts a convolution, which is not supported")
    if part not in ADAPTED_PARTS:
        if part not in ("weight", "bias") and not config.saves(path):
            raise InputError(f"{where} is not understood: {shown(part)} is no part of an adapter")
        if not tensor.size:
            raise InputError(f"{where} has shape {tensor.shape}: {_UNGATHERED}")
        return
    if config.kind not in _KIND_OF[part]:
        raise InputError(f"{where} does not belong to an adapter of peft_type {config.kind} ({config.name})")
    pruned = config.kind == "ADALORA" and part.startswith("lora_") and config.rank_of(path) == 0
    if part.startswith(("lora_A", "lora_B", "lora_emb", "hada", "lokr")) and part != "lora_B.bias":
        if len(tensor.shape) > 2:
            raise InputError(f"{where} has shape {tensor.shape}: adapters of convolutions are not supported")
        if len(tensor.shape) < 2 or (not tensor.size and not pruned):
            raise InputError(f"{where} has shape {tensor.shape}: {_UNGATHERED}")
    elif not tensor.size and not pruned:
        raise InputError(f"{where} has shape {tensor.shape}: {_UNGATHERED}")


_UNGATHERED = (
    "a matrix without values is what DeepSpeed ZeRO-3 or FSDP leave where the parts were not gathered; save the"
    " adapter again from the gathered model"
)


def _check_complete(path: str, adapted: frozenset[str] | set[str], config: AdapterConfig, where: str) -> None:
    wanted = _wanted(path, adapted, config)
    if missing := sorted(wanted - adapted):
        present = ", ".join(sorted(adapted))
        raise InputError(f"{where} has {present} but no {', '.join(missing)}{_why(missing[0], config)}")
    if extra := sorted(adapted - wanted):
        raise InputError(f"{where} has {extra[0]}, which does not go with {config.name}{_why(extra[0], config)}")


def _why(part: str, config: AdapterConfig) -> str:
    if part == "lora_magnitude_vector":
        return f" (use_dora is {str(config.dora).lower()} in {config.name})"
    if part == "lora_B.bias":
        return f" (lora_bias is {str(config.lora_bias).lower()} in {config.name})"
    return ""


def _wanted(path: str, adapted: frozenset[str] | set[str], config: AdapterConfig) -> set[str]:
    """The parts that a module must have, given those it has."""
    if config.kind == "ADALORA":
        return {"lora_A", "lora_B", "lora_E"}
    if config.kind == "LOHA":
        return {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    if config.kind == "LOKR":
        first = {"lokr_w1"} if "lokr_w1" in adapted else {"lokr_w1_a", "lokr_w1_b"}
        second = {"lokr_w2"} if "lokr_w2" in adapted else {"lokr_w2_a", "lokr_w2_b"}
        return first | second
    embedding = "lora_embedding_A" in adapted or "lora_embedding_B" in adapted
    wanted = {"lora_embedding_A", "lora_embedding_B"} if embedding else {"lora_A", "lora_B"}
    if config.dora and not config.parameters_of(path):
        wanted.add("lora_magnitude_vector")
    if config.lora_bias and not embedding and not config.parameters_of(path):
        wanted.add("lora_B.bias")
    return wanted


def _check_ranks(path: str, parts: Mapping[str, LazyTensor], config: AdapterConfig, where: str) -> None:
    """Compares the inner sizes of each product, the rank, and the sizes of vectors."""
    shapes = {part: tensor.shape for part, tensor in parts.items()}
    for left, right in _PRODUCTS:
        if left in shapes and right in shapes:
            found, other = shapes[left][1], shapes[right][0]
            if found != other:
                raise InputError(
                    f"{where}: {left} {shapes[left]} and {right} {shapes[right]} do not fit: {found}, {other}"
                )
            _check_rank(path, found, config, f"{where}: {left} {shapes[left]} and {right} {shapes[right]}")
    if "lora_E" in shapes and shapes["lora_E"] != (shapes["lora_A"][0], 1):
        raise InputError(f"{where}: lora_E {shapes['lora_E']} must have one value for each row of lora_A")
    outputs = shapes.get("lora_B", shapes.get("lora_embedding_B", (0,)))[0]
    for vector in ("lora_magnitude_vector", "lora_B.bias"):
        if vector in shapes and shapes[vector] != (outputs,):
            raise InputError(f"{where}: {vector} has shape {shapes[vector]}, must be ({outputs},) as lora_B has rows")


# left (N, rank) @ right (rank, K)
_PRODUCTS = (
    ("lora_B", "lora_A"),
    ("lora_embedding_B", "lora_embedding_A"),
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
)


def _check_rank(path: str, found: int, config: AdapterConfig, where: str) -> None:
    rank = config.rank_of(path)
    if found == rank:
        return
    # Matrices of a stack of experts lie side by side: rank times number of experts.
    stacked = [config.rank_of(f"{path}.{parameter}") for parameter in config.parameters_of(path)]
    if any(found % rank == 0 for rank in stacked):
        return
    wanted = " or a multiple of ".join(str(rank) for rank in stacked or [rank])
    raise InputError(f"{where} have rank {found}, {config.name} says {wanted}")

"""Takes the names of an adapter's tensors apart: which module of the base, and what of it.

PEFT writes `base_model.model.<module>.<part>.weight`, and tools around it leave their own traces: the adapter's name
behind the part, wrappers of distributed training and of torch.compile inside the path, wrappers of PEFT itself. All
that is taken off here; a name that is not understood is an error, because a tensor left out is an adapter left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["CONVOLUTION_PARTS", "Key", "parse_key"]

_MAX_DEPTH = 64  # modules inside modules, wrappers too; real ones have 12
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

# Wrappers that no module of a model is called by, wherever they stand: torch.compile, FSDP, activation checkpointing,
# and those of PEFT around a module that is adapted (`base_layer` is counted where it stands directly before a part).
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
_PEFT_WRAPPERS = frozenset({"base_layer", "token_adapter"})
_PREFIX = ["base_model", "model"]  # PeftModel and its tuner
# Wrappers that are wrappers only around PeftModel: DistributedDataParallel, TRL's model with a value head.
_OUTER = frozenset({"module", "pretrained_model"})

CONVOLUTION_PARTS = frozenset({"hada_t1", "hada_t2", "lokr_t2"})
_WITH_WEIGHT = frozenset({"lora_A", "lora_B", "lora_magnitude_vector"})
_BARE = frozenset({"lora_embedding_A", "lora_embedding_B", "lora_E", "ranknum", "trainable_tokens_delta"})
_LYCORIS = frozenset(
    {f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")}
    | {f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}
)
# What PEFT keeps for training and does not read for merging: the rows before training, statistics of VeLoRA and
# MonteCLoRA.
_TRAINING = frozenset({"trainable_tokens_original", "lora_velora_embed", "lora_monteclora_sampler"})
_PARTS = _WITH_WEIGHT | _BARE | _LYCORIS | _TRAINING | CONVOLUTION_PARTS
# Beginnings of the parts of other kinds of adapters, and of other tools' spellings of LoRA.
_FOREIGN = re.compile(
    r"(lora|hada|lokr|ia3|vera|oft|boft|hra|vblora|bone|road|shira|c3a|fourierft|randlora|miss|waveft|trainable_tokens)_"
    r"|prompt_(embeddings|encoder)|adaption_|adapter_(up|down)|lora$|loras$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Key:
    """What the name of a tensor says.

    Attributes:
        path: the module in the base, without wrappers.
        depth: number of `base_layer` directly before the part; 0 for what was trained whole.
        part: see `AdapterModule.parts`; "ranknum" is read by the one who opens the adapter.
        adapter: the adapter's name, if the key holds one.
        spare: it is a copy that PEFT keeps and does not use: the module before training, statistics of training.
        wrapped: the name says `modules_to_save`, where PEFT's usual one does not.
    """

    path: str
    depth: int
    part: str
    adapter: str = ""
    spare: bool = False
    wrapped: bool = False


def parse_key(name: str, *, where: str) -> Key:
    """Takes a name apart.

    Args:
        name: the tensor's name in the file.
        where: the file, for messages.

    Raises:
        InputError: the name is not understood.
    """
    if name.count(".") > _MAX_DEPTH or _CONTROL.search(name):
        raise InputError(f"{where}: tensor {shown(name)} has no plain name of a module's tensor")
    segments = [segment for segment in name.split(".") if segment not in _WRAPPERS]
    if not all(segments):
        raise InputError(f"{where}: tensor {shown(name)} has no plain name of a module's tensor")
    segments = _without_prefix(segments)
    place = max((index for index, segment in enumerate(segments) if segment in _PARTS), default=-1)
    key = _whole(segments) if place < 0 else _adapted(segments[:place], segments[place], segments[place + 1 :])
    if key is None or not key.path:
        raise InputError(f"{where}: tensor {shown(name, 200)} is not understood{_hint(segments)}")
    return key


def _without_prefix(segments: list[str]) -> list[str]:
    """Takes off `base_model.model`, as often as models were wrapped, and what wraps that."""
    rest = segments
    while rest and rest[0] in _OUTER:
        rest = rest[1:]
    if rest[:2] != _PREFIX:
        return segments
    while rest[:2] == _PREFIX:
        rest = rest[2:]
    return rest


def _adapted(path: Sequence[str], part: str, rest: Sequence[str]) -> Key | None:
    """`rest` stands behind the part: an adapter's name, "weight" or "bias", both, or nothing."""
    depth = 0
    while path and path[-1] in _PEFT_WRAPPERS:
        depth += path[-1] == "base_layer"
        path = path[:-1]
    module = _join(path)
    if part in _TRAINING:
        return Key(module, depth, part, spare=True)
    last = rest[-1] if rest and rest[-1] in ("weight", "bias") else ""
    names = rest[: len(rest) - bool(last)]
    if len(names) > 1 or (last and part not in _WITH_WEIGHT) or (last == "bias" and part != "lora_B"):
        return None
    return Key(module, depth, "lora_B.bias" if last == "bias" else part, adapter=names[0] if names else "")


def _whole(segments: Sequence[str]) -> Key | None:
    """A parameter that was trained whole, or the copy of one from before training."""
    *path, part = segments
    if any(_FOREIGN.match(segment) for segment in segments):
        return None
    if "original_module" in path:
        return Key(_join([segment for segment in path if segment != "original_module"]), 0, part, spare=True)
    if "modules_to_save" not in path:
        return Key(_join(path), 0, part)
    place = path.index("modules_to_save")
    # The adapter's name stands behind it, but PEFT takes it out where the tensor is the module's own.
    adapter, inner = (path[place + 1], path[place + 2 :]) if len(path) > place + 1 else ("", [])
    return Key(_join([*path[:place], *inner]), 0, part, adapter=adapter, wrapped=True)


def _join(path: Sequence[str]) -> str:
    return ".".join(segment for segment in path if segment not in _PEFT_WRAPPERS)


def _hint(segments: Sequence[str]) -> str:
    text = ".".join(segments).lower()
    if "lora_up" in text or "lora_down" in text or text.startswith("lora_unet"):
        return "; it is named as kohya's tools do it for image models"
    if any(segment in ("lora_a", "lora_b") for segment in segments):
        return "; it is named as MLX or torchtune do it; convert the adapter to PEFT's names"
    if "lora_diag" in text:
        return "; KaSA adapters are not supported"
    return ""

"""Which tensors of a checkpoint are weights of linear layers, as transformers' bitsandbytes integration sees them.

It replaces every `nn.Linear` and every `Conv1D` of a model but its output head, and what `llm_int8_skip_modules` names
(transformers: integrations/bitsandbytes.py replace_with_bnb_linear, quantizers/base.py get_keys_to_not_convert,
quantizers/quantizers_utils.py should_convert_module). A checkpoint has names and not modules, so a family's table is
asked first; what no table knows is judged by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import ArchSpec, Layout, Role
from quantpress.convert.checkpoint import LazyTensor
from quantpress.quant.errors import InputError

__all__ = ["linear_weights"]

_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")
_STACKS = (Layout.STACKED, Layout.STACKED_TRANSPOSED)  # no linear layers of their own: a parameter of all experts
# Last part of a module's name. Embeddings and norms are no linear layers; "embed_out" is GPT-NeoX's head.
_OTHERS = re.compile(r".*(embed|norm).*|wte|wpe|ln_.*|ln\d*")
# Routers of mixtures are parameters of their own class in transformers 5 and in DeepSeek's code. (transformers 4 had
# nn.Linear there for Mixtral and Qwen, and quantized it: a router of a few rows is all that differs.)
_ROUTERS = frozenset({"gate", "router", "wg", "shared_expert_gate"})
_HEADS = frozenset({"lm_head", "output", "score", "classifier", "head"})  # outside the layers
# Families without a table whose linear layers are Conv1D: weights are stored (K, N) and quantized as (N, K).
_CONV1D_FAMILIES = frozenset({"openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})


def linear_weights(
    config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], *, skip_modules: Sequence[str] = ()
) -> dict[str, bool]:
    """Finds the weights that bitsandbytes would quantize.

    Args:
        config: contents of config.json.
        tensors: name -> tensor.
        skip_modules: as `llm_int8_skip_modules`: a module is left alone if its path ends with one of these, or begins
            with one at a full stop.

    Returns:
        Name -> whether the checkpoint stores the weight as (K, N), which Conv1D does, instead of (N, K); in the order
        of `tensors`.
    """
    try:
        arch = find_arch(config)
    except InputError:
        arch = None
    known = {} if arch is None else _table(arch, tensors)
    foreign = () if arch is None else arch.foreign
    found: dict[str, bool] = {}
    for name, tensor in tensors.items():
        if name in known:
            transposed = known[name]
        elif (arch is None or name.startswith(foreign)) and _looks_linear(name, tensor):
            module = name.removesuffix(".weight").rpartition(".")[2]
            transposed = config.get("model_type") in _CONV1D_FAMILIES and module in _CONV1D
        else:
            continue
        if not _skipped(name.removesuffix(".weight"), skip_modules):
            found[name] = transposed
    return found


def _table(arch: ArchSpec, names: Iterable[str]) -> dict[str, bool]:
    """Every spelling of every linear weight in a family's table, for the layers and experts that the names have."""
    numbers = {tuple(_NUMBER.findall(name)) for name in names}
    layers = {int(found[0]) for found in numbers if found}
    experts = {int(found[1]) for found in numbers if len(found) > 1}
    rows = [row for row in (*arch.tensors, *arch.other_rows) if row.role is Role.LINEAR and row.layout not in _STACKS]
    single = [each for row in rows for each in (map(row.of_expert, experts) if row.per_expert else (row,))]
    return {
        name: row.layout is Layout.TRANSPOSED
        for row in single
        for layer in (layers if row.per_layer else [-1])
        for name in arch.names(row, layer)
    }


def _looks_linear(name: str, tensor: LazyTensor) -> bool:
    if not name.endswith(".weight") or len(tensor.shape) != 2:
        return False
    path = name.removesuffix(".weight")
    module = path.rpartition(".")[2]
    if _OTHERS.fullmatch(module) or module in _ROUTERS:
        return False
    return module not in _HEADS or bool(_NUMBER.search(name))


def _skipped(path: str, patterns: Sequence[str]) -> bool:
    return any(path.endswith(text) or path == text or path.startswith(f"{text}.") for text in patterns)

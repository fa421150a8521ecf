"""Parameters that PEFT adapts themselves: in transformers 5 the fused weights of a layer's experts.

A model keeps one tensor for all experts, (E, N, K) or, as gpt-oss, (E, K, N); many checkpoints keep one for each
expert, and gate and up apart (transformers: conversion_mapping.py). What is added to the fused tensor is cut to fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from quantpress.convert.checkpoint import Array, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.lora.adapter import Adapter, AdapterModule
from quantpress.convert.lora.changes import Add
from quantpress.convert.lora.deltas import Delta, LowRank, Part, Stacked, expert_deltas
from quantpress.convert.lora.edits import Edit, error_at
from quantpress.convert.lora.targets import BaseNames

__all__ = ["Parameter", "find_parameter", "parameter_edits"]

# How modules register what can be adapted. PEFT wraps a module once for each parameter in this order, so that the last
# one is outermost, with no `base_layer` in its names (tuners_utils.py, _inject_parameters).
_REGISTERED = ("weight", "gate_up_proj", "gate_proj", "up_proj", "input_linear", "w1", "v1", "w2", "down_proj")

# A fused parameter -> what checkpoints of single experts call its parts, in their order.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
    "up_proj": (("up_proj",),),
}
_MODELS_STORED_IN_OUT = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")  # modules with `is_transposed`


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of a module, and the tensors that hold it in the checkpoint.

    Attributes:
        name: its path in the model, "model.layers.0.mlp.experts.gate_up_proj".
        shape: as the model has it.
        pieces: name of each tensor, which expert it belongs to and which rows of it; (name, None, 0, rows) where one
            tensor holds everything.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, int | None, int, int], ...]

    @property
    def experts(self) -> int:
        """How many matrices the parameter holds."""
        return self.shape[0] if len(self.shape) == 3 else 1

    def deltas(self, a: LazyTensor, b: LazyTensor, scale: float, *, in_out: bool) -> tuple[tuple[str, Delta], ...]:
        """Gives what is added to each tensor.

        Args:
            a: (r * E, in).
            b: (out, r * E).
            scale: with the user's weight.
            in_out: the weights are stored (in, out).
        """
        if len(self.shape) == 2:
            return ((self.pieces[0][0], LowRank(a, b, scale)),)
        deltas = expert_deltas(a, b, scale, self.shape[0], in_out)
        if self.pieces[0][1] is None:
            return ((self.pieces[0][0], Stacked(deltas)),)
        whole = (0, self.shape[1])
        cut = ((name, deltas[expert or 0], start, stop) for name, expert, start, stop in self.pieces)
        return tuple(
            (name, delta if (start, stop) == whole else Part(delta, start, stop)) for name, delta, start, stop in cut
        )

    def cut(self, whole: LazyTensor) -> tuple[tuple[str, LazyTensor], ...]:
        """Gives what replaces each tensor, of a tensor that replaces the parameter."""
        if self.pieces[0][1] is None:
            return ((self.pieces[0][0], whole),)
        return tuple((name, _cut(whole, expert or 0, start, stop)) for name, expert, start, stop in self.pieces)


def _cut(whole: LazyTensor, expert: int, first: int, last: int) -> LazyTensor:
    def read_rows(start: int, stop: int) -> Array:
        return whole.read_rows(expert, expert + 1)[0, first + start : first + stop]

    return LazyTensor(whole.name, (last - first, *whole.shape[2:]), whole.dtype, whole.source, read_rows)


def find_parameter(names: BaseNames, path: str, name: str) -> Parameter | None:
    """Finds the tensors that hold a parameter of a module; None if there are none."""
    full = f"{path}.{name}"
    if (found := names.find(full)) is not None:
        shape = names.shape(found)
        return Parameter(full, shape, ((found, None, 0, shape[0]),))
    for parts in _PARTS.get(name, ((name,),)):
        if (pieces := _pieces(names, path, parts)) is not None:
            experts = 1 + max(expert or 0 for _, expert, _, _ in pieces)
            rows = max(stop for *_, stop in pieces)
            return Parameter(full, (experts, rows, *names.shape(pieces[0][0])[1:]), pieces)
    return None


def _pieces(names: BaseNames, path: str, parts: Sequence[str]) -> tuple[tuple[str, int | None, int, int], ...] | None:
    pieces: list[tuple[str, int | None, int, int]] = []
    expert = 0
    while names.find(f"{path}.{expert}.{parts[0]}.weight") is not None:
        start = 0
        for part in parts:
            if (found := names.find(f"{path}.{expert}.{part}.weight")) is None:
                return None
            rows = names.shape(found)[0]
            pieces.append((found, expert, start, start + rows))
            start += rows
        expert += 1
    return tuple(pieces) or None


def parameter_edits(
    adapter: Adapter, weight: float, names: BaseNames, modules: Sequence[AdapterModule]
) -> Iterator[Edit]:
    """Gives the edits of all wrappers of one module.

    Raises:
        InputError: a parameter is not in the base, or shapes and ranks disagree.
    """
    wrapped = [(_parameter_of(adapter, names, modules, module), *_factors(module)) for module in modules]
    known = [_is_in_out(*each) for each in wrapped]
    sibling = next((found for found in known if found is not None), names.model_type in _MODELS_STORED_IN_OUT)
    for (parameter, a, b), found in zip(wrapped, known, strict=True):
        rank, experts = adapter.config.rank_of(parameter.name), parameter.experts
        if a.shape[0] != rank * experts or b.shape[1:] != (rank * experts,):
            raise error_at(
                a, f"and its lora_B have {a.shape} and {b.shape}, wanted rank {rank} for each of {experts} experts"
            )
        scale, alpha = adapter.config.scale_of(parameter.name), adapter.config.alpha_of(parameter.name)
        in_out = sibling if found is None else found
        kind = "lora" if len(parameter.shape) == 2 else "expert"
        for target, delta in parameter.deltas(a, b, weight * scale, in_out=in_out):
            yield Edit(target, kind, (a, b), delta.shape, Add(delta), rank=rank, alpha=alpha, scale=scale)


def _factors(module: AdapterModule) -> tuple[LazyTensor, LazyTensor]:
    for part, tensor in module.parts.items():
        if part not in ("lora_A", "lora_B"):
            raise error_at(tensor, "cannot belong to a parameter that is adapted itself; PEFT would ignore it")
    first = next(iter(module.parts.values()))
    if len(module.parts) != 2:
        raise error_at(first, "is there but the other factor of its parameter is not; the adapter is not whole")
    a, b = module.parts["lora_A"], module.parts["lora_B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise error_at(a, f"and its lora_B have {a.shape} and {b.shape}, wanted two matrices")
    return a, b


def _parameter_of(
    adapter: Adapter, names: BaseNames, modules: Sequence[AdapterModule], module: AdapterModule
) -> Parameter:
    """Finds which parameter a wrapper is for."""
    path = module.path
    wanted = sorted(adapter.config.parameters_of(path), key=_place)
    found = [parameter for name in wanted if (parameter := find_parameter(names, path, name)) is not None]
    if len(found) != len(modules) or {other.depth for other in modules} != set(range(len(modules))):
        raise error_at(
            next(iter(module.parts.values())),
            f"is one of {len(modules)} adapted parameters of {shown(path, 200)}; of target_parameters the base has"
            f" {', '.join(shown(parameter.name, 200) for parameter in found) or 'none'} there",
        )
    return found[len(modules) - 1 - module.depth]


def _place(name: str) -> tuple[int, str]:
    return (_REGISTERED.index(name) if name in _REGISTERED else len(_REGISTERED), name)


def _is_in_out(parameter: Parameter, a: LazyTensor, b: LazyTensor) -> bool | None:
    """Whether the weights of the experts are stored (in, out), as the factors see them; None where both ways fit.

    Raises:
        InputError: neither way fits.
    """
    out_in = b.shape[0], a.shape[1]
    stored = parameter.shape[-2:]
    if stored == out_in and (out_in[0] != out_in[1] or len(parameter.shape) == 2):
        return False
    if stored == out_in[::-1] and len(parameter.shape) == 3:
        return True if out_in[0] != out_in[1] else None
    raise error_at(
        b,
        f"and its lora_A are for weights of {out_in}, {shown(parameter.name, 200)} is {parameter.shape};"
        " this adapter is for another model",
    )

"""Turns the modules of an adapter into edits of a base's tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.lora.adapter import Adapter, AdapterModule
from quantpress.convert.lora.changes import Add, Change, Dora, SetRows
from quantpress.convert.lora.deltas import Delta, Hadamard, Kronecker, LowRank, Vector, svd_low_rank
from quantpress.convert.lora.edits import Edit, error_at
from quantpress.convert.lora.experts import find_parameter, parameter_edits
from quantpress.convert.lora.shapes import ADAPTED_PARTS
from quantpress.convert.lora.targets import BaseNames

__all__ = ["Planner"]

Parts = Mapping[str, LazyTensor]

_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@dataclass(frozen=True)
class Planner:
    """Makes the edits of one adapter.

    Attributes:
        adapter: the adapter.
        weight: the user's factor.
        names: of the base.
    """

    adapter: Adapter
    weight: float
    names: BaseNames

    def edits(self) -> Iterator[Edit]:
        """Gives every edit, what replaces a tensor before what is done to it.

        Raises:
            InputError: a module is not in the base or not meant by the adapter's own config, a tensor is missing or
                not understood, or shapes and ranks disagree.
        """
        ordered = sorted(self.adapter.modules, key=lambda module: module.path)  # stable within a path
        for path, group in groupby(ordered, key=lambda module: module.path):
            modules = list(group)
            if self._wraps_parameters(path, modules):
                yield from parameter_edits(self.adapter, self.weight, self.names, modules)
                continue
            for module in modules:
                if module.depth and "lora_A" in module.parts and len(modules) > 1:
                    raise error_at(module.parts["lora_A"], "is one of several of a module, without target_parameters")
            parts = {part: tensor for module in modules for part, tensor in module.parts.items()}
            yield from self._whole_edits(path, parts)
            if factors := {part: tensor for part, tensor in parts.items() if part in ADAPTED_PARTS}:
                yield from self._module_edits(path, factors)

    def missing(self) -> tuple[str, ...]:
        """Gives notes on modules that the adapter's config names and its file does not hold; PEFT warns of them."""
        config = self.adapter.config
        held = {module.path for module in self.adapter.modules}
        held |= {name.removesuffix(".weight") for path in held if (name := self.names.find(f"{path}.weight"))}
        notes = []
        others = [path for path in self.names.matrices(linear=config.all_linear) if path not in held]
        for told, found in (
            ("adapted", [path for path in others if config.kind != "TRAINABLE_TOKENS" and config.targets(path)]),
            ("trained whole", [path for path in others if config.saves(path)]),
        ):
            if found:
                notes.append(
                    f"{self.adapter.name}: adapter_config.json says that {len(found)} more modules were {told}, but the"
                    f" file does not hold them, first {found[0]}; they stay as they are in the base"
                )
        return tuple(notes)

    def _wraps_parameters(self, path: str, modules: Sequence[AdapterModule]) -> bool:
        if not self.adapter.config.parameters_of(path) or "lora_A" not in modules[0].parts:
            return False
        return self.names.find(f"{path}.weight") is None or not self.adapter.config.targets(path)

    def _module_edits(self, path: str, factors: Parts) -> Iterator[Edit]:
        config, first = self.adapter.config, next(iter(factors.values()))
        kind = _kind(config.kind, factors)
        target = self._target(path, "weight", first)
        if kind == "tokens":
            yield self._tokens(path, target, factors["trainable_tokens_delta"])
            return
        if not config.targets(path) and not self._is_tied_twin(path):
            raise error_at(first, "belongs to a module that adapter_config.json does not name; PEFT would ignore it")
        yield self._delta_edit(path, kind, target, factors)
        if (bias := factors.get("lora_B.bias")) is not None:
            delta = Vector(bias, self.weight * config.scale_of(path))
            yield self._edit(path, self._target(path, "bias", bias), "bias", (bias,), delta.shape, Add(delta))

    def _delta_edit(self, path: str, kind: str, target: str, factors: Parts) -> Edit:
        tensors = tuple(factors[part] for part in sorted(factors) if part != "lora_B.bias")
        transposed = self._is_transposed(target, kind, factors)
        if transposed and kind in ("loha", "lokr"):
            raise error_at(tensors[0], f"is for {shown(target, 200)}, a Conv1D, which PEFT cannot adapt with {kind}")
        delta = self._delta(path, kind, factors, transposed)
        if (magnitude := factors.get("lora_magnitude_vector")) is None:
            return self._edit(path, target, kind, tensors, delta.shape, Add(delta))
        return self._edit(path, target, "dora", tensors, delta.shape, Dora(delta, magnitude, columns=transposed))

    def _delta(self, path: str, kind: str, factors: Parts, transposed: bool) -> Delta:
        config = self.adapter.config
        scale = self.weight * config.scale_of(path)
        if kind == "lora":
            return LowRank(factors["lora_A"], factors["lora_B"], scale, transposed)
        if kind == "embedding":
            return LowRank(factors["lora_embedding_A"], factors["lora_embedding_B"], scale, transposed)
        if kind == "adalora":
            right, left, values = factors["lora_A"], factors["lora_B"], factors["lora_E"]
            return svd_low_rank(right, left, values, self.weight * config.alpha_of(path), config.rank, transposed)
        if kind == "loha":
            one, two, three, four = (factors[part] for part in _HADAMARD)
            return Hadamard(one, two, three, four, scale)
        return Kronecker(_kronecker(factors, "lokr_w1"), _kronecker(factors, "lokr_w2"), scale)

    def _edit(
        self, path: str, target: str, kind: str, tensors: tuple[LazyTensor, ...], shape: tuple[int, ...], change: Change
    ) -> Edit:
        config = self.adapter.config
        return Edit(
            target,
            kind,
            tensors,
            shape,
            change,
            shared=config.ensure_weight_tying and kind in ("lora", "embedding"),
            rank=config.rank_of(path),
            alpha=config.alpha_of(path),
            scale=config.scale_of(path),
        )

    def _is_transposed(self, target: str, kind: str, factors: Parts) -> bool:
        """Whether the stored tensor is (K, N): embeddings are, for PEFT, and Conv1D."""
        if kind == "embedding":
            return True
        if (known := self.names.transposed(target)) is not None:
            return known
        if kind in ("lora", "adalora"):
            shape = (factors["lora_B"].shape[0], factors["lora_A"].shape[1])
            stored = self.names.shape(target)
            if shape[0] != shape[1] and stored in (shape, shape[::-1]):
                return stored != shape
        return self.adapter.config.fan_in_fan_out

    def _tokens(self, path: str, target: str, values: LazyTensor) -> Edit:
        ends, ids = self.names.embeddings, self.adapter.config.tokens_of(path)
        if ids is None and ends.tied and target == ends.head and ends.input is not None:
            ids = self.adapter.config.tokens_of(ends.input.removesuffix(".weight"))
        if ids is None:
            raise error_at(values, "holds trained tokens, and adapter_config.json names none for its module")
        width = self.names.shape(target)[1:]
        if values.shape != (len(ids), *width):
            raise error_at(values, f"has shape {values.shape}, wanted {(len(ids), *width)}")
        return Edit(target, "tokens", (values,), change=SetRows(ids, values), ids=ids, shared=True)

    def _whole_edits(self, path: str, parts: Parts) -> Iterator[Edit]:
        """Gives edits for what is in the file whole: trained with `modules_to_save` or as a bias, or copied."""
        config = self.adapter.config
        for part, tensor in parts.items():
            if part in ADAPTED_PARTS:
                continue
            saved = config.saves(path)
            copied = not saved and not ADAPTED_PARTS.isdisjoint(parts) and part == "weight"
            kind = "bias" if part == "bias" and not saved else "whole"
            shared = not saved or config.ensure_weight_tying
            if self.names.find(f"{path}.{part}") is None and (fused := find_parameter(self.names, path, part)):
                if fused.shape != tensor.shape:
                    raise error_at(tensor, f"has shape {tensor.shape}, the base {fused.shape}")
                for target, cut in fused.cut(tensor):
                    yield Edit(target, kind, (tensor,), whole=cut)
                continue
            target = self._target(path, part, tensor)
            yield Edit(target, kind, (tensor,), whole=tensor, copied=copied, shared=shared)

    def _target(self, path: str, part: str, tensor: LazyTensor) -> str:
        """Finds a tensor of the base; a tied head is found under the name that it gets when it is separated."""
        ends = self.names.embeddings
        if part == "weight" and ends.tied and ends.head is not None and self.names.is_head(f"{path}.weight"):
            return ends.head
        if (found := self.names.find(f"{path}.{part}")) is not None:
            return found
        similar = self.names.nearest(path)
        hint = f"; nearest: {similar}" if similar else "; this adapter is for another model"
        raise error_at(tensor, f"belongs to {shown(f'{path}.{part}', 200)}, which the base does not have{hint}")

    def _is_tied_twin(self, path: str) -> bool:
        """Whether a head is adapted because the embedding is (PEFT: tuners_utils.py, `target_modules_to_tie`)."""
        tied = self.adapter.config.ensure_weight_tying and self.names.embeddings.tied
        return tied and self.names.is_head(f"{path}.weight")


def _kind(kind: str, factors: Parts) -> str:
    """Names what a module holds, as `LedgerEntry.kind` does."""
    if "trainable_tokens_delta" in factors:
        return "tokens"
    return "embedding" if "lora_embedding_A" in factors else kind.lower()


def _kronecker(factors: Parts, part: str) -> LazyTensor | tuple[LazyTensor, LazyTensor]:
    return factors[part] if part in factors else (factors[f"{part}_a"], factors[f"{part}_b"])

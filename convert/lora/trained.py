"""One adapter as it was trained: what of it acts at a module, and how strongly. Only the unmerged decoder uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.lora.activations import Branch, Factors, Khatri, Kron, Lookup, LowRank
from quantpress.convert.lora.config import AdapterConfig
from quantpress.convert.lora.ledger import Applied
from quantpress.convert.weights import as_torch
from quantpress.quant.errors import InputError

__all__ = ["Trained", "values_of"]

Parts = Mapping[str, LazyTensor]


def values_of(tensor: LazyTensor) -> torch.Tensor:
    """Reads a tensor as float32."""
    return as_torch(tensor.read()).float()


@dataclass(frozen=True)
class Trained:
    """An adapter with its weight.

    Attributes:
        applied: the adapter and the user's factor.
        tied: whether the base's head is its embedding.
    """

    applied: Applied
    tied: bool

    @property
    def name(self) -> str:
        """Where the adapter comes from."""
        return self.applied.adapter.name

    @property
    def config(self) -> AdapterConfig:
        """What adapter_config.json says."""
        return self.applied.adapter.config

    @property
    def tying(self) -> bool:
        """Whether what is trained at one end of tied embeddings acts at both."""
        return self.tied and self.config.ensure_weight_tying

    def branch(self, path: str, parts: Parts, size: tuple[int, int], order: torch.Tensor | None) -> Branch:
        """Makes what runs beside a linear.

        Args:
            path: the module.
            parts: its tensors.
            size: (N, K) of the linear.
            order: see `Factors`.

        Raises:
            InputError: a shape does not fit, or the decoder cannot run this kind.
        """
        kind, factors = self.config.kind, _factors(parts, order)
        if kind in ("LORA", "ADALORA"):
            rank = self._part(path, parts, "lora_A").shape[0]
            wanted: dict[str, tuple[int, ...]] = {
                "lora_A": (rank, size[1]),
                "lora_B": (size[0], rank),
                "lora_E": (rank, 1),
            }
            wanted |= {"lora_B.bias": size[:1], "lora_magnitude_vector": size[:1]}
            self._check(parts, wanted, {"lora_A", "lora_B"} | ({"lora_E"} if kind == "ADALORA" else set()), path)
            return LowRank(factors, self._adalora_scale(path, rank) if kind == "ADALORA" else self._scale(path, rank))
        rank = self.config.rank_of(path)
        scale = self.applied.weight * self.config.alpha_of(path) / rank
        if kind == "LOHA":
            wide = {f"hada_w{number}_b": (rank, size[1]) for number in (1, 2)}
            wide |= {f"hada_w{number}_a": (size[0], rank) for number in (1, 2)}
            self._check(parts, wide, set(wide), path)
            return Khatri(factors, scale)
        if kind == "LOKR":
            first, second = (self._kronecker(path, parts, f"lokr_w{number}") for number in (1, 2))
            if (found := (first[0] * second[0], first[1] * second[1])) != size:
                raise InputError(f"{self.name}: {shown(path)} has factors for {found}, wanted {size}")
            return Kron(factors, scale)
        raise InputError(f"{self.name}: adapters of type {kind} cannot be run in the decoder ({shown(path)})")

    def lookup(self, path: str, parts: Parts, size: tuple[int, int]) -> Lookup:
        """Makes what runs beside an embedding of (V, H).

        Raises:
            InputError: a shape does not fit.
        """
        rank = self._part(path, parts, "lora_embedding_A").shape[0]
        wanted: dict[str, tuple[int, ...]] = {"lora_embedding_A": (rank, size[0]), "lora_embedding_B": (size[1], rank)}
        wanted |= {"lora_magnitude_vector": (size[1],)}
        self._check(parts, wanted, {"lora_embedding_A", "lora_embedding_B"}, path)
        return Lookup(_factors(parts, None), self._scale(path, rank))

    def token_ids(self, path: str) -> tuple[int, ...]:
        """Gives the tokens whose rows were trained at a module.

        Raises:
            InputError: the config names none.
        """
        ids = self.config.tokens_of(path)
        if ids is not None:
            return ids
        raise InputError(f"{self.name}: adapter_config.json names no tokens of {shown(path)}")

    def tokens_are_tied(self) -> bool:
        """Whether trained tokens act at both ends of tied embeddings: they do unless two lists of them differ."""
        return len(set(self.config.trainable_tokens.values())) == 1

    def wants(self, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
        """Compares the shape of a tensor.

        Raises:
            InputError: it is another.
        """
        if tensor.shape != shape:
            raise InputError(f"{tensor.source}: {shown(tensor.name)} is {tensor.shape}, wanted {shape}")

    def _scale(self, path: str, rank: int) -> float:
        return self.applied.weight * self.config.alpha_of(path) / (rank**0.5 if self.config.rslora else rank)

    def _adalora_scale(self, path: str, rank: int) -> float:
        """AdaLoRA divides by the rank that training began with, however many directions it kept."""
        if any(path.endswith(end) and len(kept) == rank > sum(kept) for end, kept in self.config.rank_masks.items()):
            raise InputError(f"{self.name}: {shown(path)} holds directions that rank_pattern leaves out")
        alpha = self.config.alpha if self.config.alpha > 0 else rank
        return self.applied.weight * alpha / (self.config.rank + 1e-5)

    def _kronecker(self, path: str, parts: Parts, part: str) -> tuple[int, ...]:
        if part in parts:
            return parts[part].shape
        left, right = self._part(path, parts, f"{part}_a").shape, self._part(path, parts, f"{part}_b").shape
        return left[0], right[-1]

    def _part(self, path: str, parts: Parts, part: str) -> LazyTensor:
        if part not in parts:
            raise InputError(f"{self.name}: {shown(path)} has {', '.join(parts)} but no {part}")
        return parts[part]

    def _check(self, parts: Parts, wanted: Mapping[str, tuple[int, ...]], needed: set[str], path: str) -> None:
        for part in sorted(needed):
            self._part(path, parts, part)
        for part, tensor in parts.items():
            if part not in wanted:
                raise InputError(f"{tensor.source}: {shown(tensor.name)} cannot be run in the decoder")
            self.wants(tensor, wanted[part])


def _factors(parts: Parts, order: torch.Tensor | None) -> Factors:
    return Factors({part: _reader(tensor) for part, tensor in parts.items()}, order)


def _reader(tensor: LazyTensor) -> Callable[[], torch.Tensor]:
    return lambda: values_of(tensor)

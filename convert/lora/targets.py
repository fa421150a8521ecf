"""Which tensors of a base an adapter's modules stand for: PEFT speaks of modules, checkpoints of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Layout, Role, TensorSpec
from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.quant.errors import InputError

__all__ = ["BaseNames", "Embeddings"]

# What models wrap their layers in. The same model has other wrappers when it is saved from another class.
_WRAPPERS = frozenset({"model", "transformer", "language_model", "text_model", "base_model", "backbone", "gpt_neox"})

# What transformers 5 calls a module -> what checkpoints call it (transformers: conversion_mapping.py).
_RENAMED = (
    (".mlp.", ".block_sparse_moe."),  # mixtral, minimax, phimoe
    (".mlp.router.", ".block_sparse_moe.gate."),  # phimoe
    (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),  # granitemoe
    (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
    (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
    (".experts.gate_up_proj", ".experts.fc1.weight"),  # aria
    (".experts.down_proj", ".experts.fc2.weight"),
)
_HEADS = ("lm_head.weight", "embed_out.weight")  # GPT-NeoX's was renamed in transformers 5
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "embeddings.weight")


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The two tensors with a row per token.

    Attributes:
        input: name of the input embedding; None if it was not found.
        head: name of the output head; of a tied model without one, the name that it gets when it is separated.
        tied: both have the same values, those of the input embedding.
    """

    input: str | None
    head: str | None
    tied: bool


class BaseNames:
    """Finds a base's tensors by the paths that an adapter gives.

    The family's table is asked where there is one; no family needs one.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Reads names and configuration only."""
        self._checkpoint = checkpoint
        self._tensors = checkpoint.tensors
        self._arch, self._hyper = _family(checkpoint.config)
        self.model_type = checkpoint.config.get("model_type")

    def find(self, name: str) -> str | None:
        """Gives the checkpoint's spelling of a tensor.

        Args:
            name: path of a module in transformers and the parameter's name: "model.layers.0.self_attn.q_proj.weight".

        Returns:
            The name in the checkpoint, None if there is no such tensor.

        Raises:
            InputError: several tensors could be meant.
        """
        if name in self._tensors:
            return name
        if (place := self._rows.get(name)) is not None and self._arch is not None:
            return next((found for found in self._arch.names(*place) if found in self._tensors), None)
        for spelling in _spellings(_core(name)):
            found = self._cores.get(spelling, ())
            if len(found) > 1:
                names = ", ".join(shown(other) for other in found[:3])
                raise InputError(f"{self._checkpoint.name}: {shown(name, 200)} could be any of {names}")
            if found:
                return found[0]
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        """Gives the shape of a tensor by its name in the checkpoint; of a head that is not there, the embedding's."""
        ends = self.embeddings
        if name == ends.head and ends.tied and ends.input is not None:
            name = ends.input
        return self._tensors[name].shape

    def transposed(self, name: str) -> bool | None:
        """Whether the tensor of this name in the checkpoint is stored (K, N); None where no table says."""
        place = self._rows.get(name)
        return None if place is None else place[0].layout is Layout.TRANSPOSED

    def is_head(self, name: str) -> bool:
        """Whether this is the head's weight, in any spelling and whether or not the checkpoint has it."""
        place = self._rows.get(name)
        return place[0].slot == "output.weight" if place is not None else _core(name) in _HEADS

    def nearest(self, path: str) -> str:
        """Gives, for a message, tensors whose names end like a module's path."""
        end = path.rsplit(".", 1)[-1]
        similar = [name for name in self._tensors if f".{end}." in f".{name}"]
        return ", ".join(shown(name) for name in similar[:2])

    def matrices(self, *, linear: bool) -> Iterator[str]:
        """Gives the paths of modules with a matrix, without single experts, which are no modules in transformers 5.

        Args:
            linear: without the embeddings and the head.
        """
        ends = self.embeddings
        for name, tensor in self._tensors.items():
            if len(tensor.shape) != 2 or not name.endswith(".weight") or ".experts." in name:
                continue
            if not linear or (name not in (ends.input, ends.head) and not _core(name).endswith(_EMBEDDINGS)):
                yield name.removesuffix(".weight")

    @cached_property
    def embeddings(self) -> Embeddings:
        """The input embedding, the head, and whether they are tied."""
        place = self._rows_of(Role.EMBEDDING)
        if place is not None:
            given = next((name for name in place if name in self._tensors), None)
        else:
            given = next((name for core in _EMBEDDINGS for name in self._cores.get(core, ())), None)
        head = self._head(given)
        present = head is not None and head in self._tensors
        tied = self._hyper.tied if self._hyper is not None else _tied_flag(self._checkpoint.config)
        return Embeddings(given, head, given is not None and (not present if tied is None else tied))

    def _head(self, embedding: str | None) -> str | None:
        names = self._rows_of(Role.HEAD) or tuple(name for core in _HEADS for name in self._cores.get(core, ()))
        present = next((name for name in names if name in self._tensors), None)
        if present is not None or embedding is None:
            return present
        return names[0] if names else _HEADS[0]  # transformers writes it without the wrappers of the embedding

    def _rows_of(self, role: Role) -> tuple[str, ...] | None:
        if self._arch is None:
            return None
        row = next((row for row in self._arch.tensors if row.role is role), None)
        return None if row is None else self._arch.names(row, -1)

    @cached_property
    def _rows(self) -> Mapping[str, tuple[TensorSpec, int]]:
        """Every spelling of every row of the table -> the row and its layer."""
        if self._arch is None or self._hyper is None:
            return {}
        rows = self._arch.rows(self._hyper)
        return {name: place for place in rows for name in self._arch.names(*place)}

    @cached_property
    def _cores(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for name in self._tensors:
            core = _core(name)
            found[core] = (*found.get(core, ()), name)
        return found


def _family(config: Mapping[str, Any]) -> tuple[ArchSpec | None, Hyperparameters | None]:
    """Gives the family's table, if there is one that can read this configuration; merging does not need it."""
    try:
        arch = find_arch(config)
        return arch, arch.read_config(config)
    except InputError:
        return None, None


def _core(name: str) -> str:
    """Takes the wrappers off a name: "model.language_model.layers.0.mlp.up_proj.weight" starts with its layers."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part not in _WRAPPERS), 0)
    return ".".join(parts[first:])


def _spellings(core: str) -> Iterator[str]:
    yield core
    for new, old in _RENAMED:
        if new in core:
            yield core.replace(new, old)
    if core in _HEADS:
        yield from _HEADS


def _tied_flag(config: Mapping[str, Any]) -> bool | None:
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        flag = part.get("tie_word_embeddings")
        if isinstance(flag, bool):
            return flag
    return None

"""Opens an adapter folder: adapter_config.json, the header of its weights and the tokenizer files beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantpress.convert.checkpoint import LazyTensor, SourceFile
from quantpress.convert.lora.config import AdapterConfig

__all__ = ["Adapter", "AdapterModule", "open_adapter"]


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """The tensors of an adapter that belong to one module of the base.

    Attributes:
        path: the module in the base, without the wrappers' prefixes: "model.layers.0.self_attn.q_proj".
        depth: how many `base_layer` stood behind the path; PEFT nests wrappers where several parameters of one module
            are adapted (`target_parameters`), and the depth tells which one this is. 0 everywhere else.
        parts: part -> tensor, whose own name is the one in the file. Parts are "lora_A", "lora_B", "lora_B.bias",
            "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_E", "hada_w1_a", "hada_w1_b",
            "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
            "trainable_tokens_delta", and "weight", "bias" (or another parameter's name) for what was trained whole.
    """

    path: str
    depth: int
    parts: Mapping[str, LazyTensor]


@dataclass(frozen=True)
class Adapter:
    """An adapter that is open but not read.

    Attributes:
        name: its folder or Hub id.
        config: what adapter_config.json says.
        modules: one per (path, depth), in the order of the file.
        tokenizer_files: as `Checkpoint.tokenizer_files`, of the files that lie beside the adapter.
        files: every file that was opened, for hashing and for the sidecar.
    """

    name: str
    config: AdapterConfig
    modules: tuple[AdapterModule, ...]
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    files: tuple[SourceFile, ...] = ()

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """Every tensor of the file."""
        return tuple(tensor for module in self.modules for tensor in module.parts.values())


def open_adapter(adapter: Path | str) -> Adapter:
    """Opens an adapter; headers only.

    Args:
        adapter: a folder or a Hub id `org/name` or `org/name@revision`.

    Raises:
        InputError: no adapter there, a damaged or hostile file, a kind of adapter that cannot be merged, or a tensor
            whose name is not understood.
    """
    raise NotImplementedError

"""Model folders without a model: tensors of zeros, or of nothing at all, with the names and shapes of a table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters
from quantpress.convert.checkpoint import Array, Checkpoint, LazyTensor
from tests.tiny import tiny_config, write_tokenizer

__all__ = ["fitting", "llama_config", "llama_folder"]

_MOST_ROWS = 2_000
_MOST_VALUES = 1 << 24  # a file of 64 MB


def llama_config(**options: Any) -> dict[str, Any]:
    """Gives the config.json of `llama_folder`."""
    sizes = {"num_hidden_layers": 1}
    return tiny_config("llama", **{**sizes, **options})


def llama_folder(folder: Path) -> None:
    """Writes a Llama of one layer with its tokenizer; every value is zero."""
    config = llama_config()
    spec = find_arch(config)
    shapes = _shapes(spec, spec.read_config(config))
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def fitting(checkpoint: Checkpoint) -> Checkpoint | None:
    """Gives a checkpoint with the tensors that its config.json speaks of; None where they are more than a few.

    So a config.json that was made up goes all the way, whatever tensors lie beside it.
    """
    spec = find_arch(checkpoint.config)
    hyper = spec.read_config(checkpoint.config)
    experts = 0 if hyper.experts is None else hyper.experts.count
    if hyper.layers * (len(spec.tensors) + 3 * experts) > _MOST_ROWS or hyper.deepest * 20 > _MOST_ROWS:
        return None
    shapes = _shapes(spec, hyper)
    if sum(map(math.prod, shapes.values())) > _MOST_VALUES:
        return None
    return replace(checkpoint, tensors={name: _nothing(name, shape) for name, shape in shapes.items()})


def _shapes(spec: ArchSpec, hyper: Hyperparameters) -> dict[str, tuple[int, ...]]:
    rows = [(each, layer) for row, layer in spec.rows(hyper) for each in spec.heads_of(row, hyper)]
    return {
        row.hf.format(layer=layer, head=0): tuple(hyper.dims[dim] for dim in row.shape)
        for row, layer in rows
        if not (row.tied_to and hyper.tied)
    }


def _nothing(name: str, shape: tuple[int, ...]) -> LazyTensor:
    def read(start: int, stop: int) -> Array:
        raise AssertionError(f"rows {start} to {stop} of {name} are read, and nothing is to be read yet")

    return LazyTensor(name, shape, "F32", "model.safetensors", read)

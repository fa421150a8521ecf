"""Writes model folders with packed weights, from a folder without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from quantpress.convert.linears import linear_weights
from quantpress.convert.open import open_checkpoint
from quantpress.convert.quantized import PackFormat
from quantpress.quant.floats import to_float32
from quantpress.quant.grid import Grid, round_to_nearest
from quantpress.quant.qtensor import QuantizedTensor

Tensors = dict[str, np.ndarray]


def pack_folder(
    source: Path,
    target: Path,
    fmt: PackFormat,
    grid: Grid | Callable[[str], Grid],
    *,
    skip: Callable[[str], bool] = lambda name: False,
    details: Mapping[str, Any] | None = None,
) -> dict[str, QuantizedTensor]:
    """Quantizes every linear weight but those of `skip`, writes all into `target`, gives what was packed by name."""
    checkpoint = open_checkpoint(source)
    linears = linear_weights(checkpoint.config, checkpoint.tensors)
    tensors: Tensors = {}
    packed: dict[str, QuantizedTensor] = {}
    left = []
    for name, tensor in checkpoint.tensors.items():
        values = to_float32(tensor.read())
        if name not in linears or skip(name):
            tensors[name] = values.astype(np.float16)
            left += [name] * (name in linears or name in ("lm_head.weight", "embed_out.weight"))
            continue
        weight = np.ascontiguousarray(values.T) if linears[name] else values
        packed[name] = round_to_nearest(weight, grid(name) if callable(grid) else grid)
        fmt.check(packed[name].form)
        tensors.update(fmt.pack(name, packed[name], packed[name].form))
    settings = fmt.settings({name: tensor.form for name, tensor in packed.items()}, left, details or {"method": "rtn"})
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)
    write_config(target, {**config, "dtype": "float16", "quantization_config": settings})
    for name, data in fmt.files(settings).items():
        (target / name).write_bytes(data)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return packed


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def change_settings(folder: Path, **changes: Any) -> None:
    """Changes keys of `quantization_config`; `...` removes one."""
    config = json.loads((folder / "config.json").read_text())
    settings = {**config["quantization_config"], **changes}
    config["quantization_config"] = {key: value for key, value in settings.items() if value is not ...}
    write_config(folder, config)


def change_tensors(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Lets `change` edit the tensors of model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

"""Adapters made with PEFT, and what PEFT itself makes of them: the oracle of the tests of merging."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Checkpoint

Arrays = dict[str, NDArray[Any]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what PEFT and transformers tell users from failing a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_base(base: Path, *, resize: int | None = None, dtype: str = "auto") -> Any:
    """Loads a model as its trainer would, with a vocabulary of `resize` tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if resize is not None:
        torch.manual_seed(resize)
        model.resize_token_embeddings(resize, mean_resizing=False)
    return model.eval()


def train(folder: Path, base: Path, config: Any, *, resize: int | None = None, seed: int = 1, **options: Any) -> Path:
    """Saves an adapter whose every trained value differs from what it starts with; `options` go to save_pretrained."""
    import torch
    from peft import get_peft_model

    with quiet():
        model = get_peft_model(load_base(base, resize=resize), config)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in sorted(model.named_parameters()):
                if value.requires_grad and "ranknum" not in name:
                    value.add_(0.1 * torch.randn(value.shape, generator=random).to(value.dtype))
        model.save_pretrained(folder, **options)
    return folder


def attach(base: Path, *adapters: Path, resize: int | None = None, dtype: str = "auto") -> Any:
    """Loads a base and adapters on it, named a0, a1 and so on, all active, not merged."""
    from peft import PeftModel

    with quiet():
        model = PeftModel.from_pretrained(load_base(base, resize=resize, dtype=dtype), adapters[0], adapter_name="a0")
        for number, adapter in enumerate(adapters[1:], 1):
            model.load_adapter(adapter, adapter_name=f"a{number}")
        if len(adapters) > 1:
            model.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
        if dtype == "float64":
            model.double()
    return model.eval()


def merged(folder: Path, model: Any) -> Arrays:
    """Merges with PEFT, saves with transformers, and reads the tensors in float64."""
    with quiet():
        model.merge_and_unload().save_pretrained(folder)
    return read_float64(folder)


def read_float64(folder: Path) -> Arrays:
    """Reads all tensors of a folder that transformers wrote."""
    from safetensors.torch import load_file

    return {
        name: value.double().numpy()
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint as transformers reads it, without any of our writers."""
    import ml_dtypes
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        values = np.array(tensor.read())
        if values.dtype == ml_dtypes.bfloat16:
            tensors[name] = torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
        else:
            tensors[name] = torch.from_numpy(values)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    return folder


def logits(model: Any, tokens: int = 24, vocabulary: int = 320) -> NDArray[np.float32]:
    """Gives logits after each of some tokens, (tokens, vocabulary)."""
    import torch

    with torch.no_grad(), quiet():
        ids = torch.arange(tokens)[None] * 13 % vocabulary
        return model(ids).logits[0].float().numpy()


def float64_of(checkpoint: Checkpoint) -> Arrays:
    """Reads all tensors of a checkpoint."""
    return {name: tensor.read().astype(np.float64) for name, tensor in checkpoint.tensors.items()}


def differences(ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Gives the largest difference of each tensor; both must hold the same tensors in the same shapes."""
    assert set(ours) == set(theirs), set(ours) ^ set(theirs)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    return {name: float(np.abs(ours[name] - theirs[name]).max(initial=0.0)) for name in ours}

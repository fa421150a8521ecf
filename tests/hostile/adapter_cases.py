"""Adapters: settings that make no sense, tensors that fit nothing, files that are tricks."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.case import Case
from tests.hostile.model import HIDDEN, RANK, adapter, good_model, write_adapter

MERGE = ("merge", "model", "adapter", "out", "--no-verify")
CONVERT = ("convert", "model", "out.gguf", "--no-verify", "--adapter", "adapter")
_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
Config, Held = dict[str, Any], dict[str, np.ndarray]


def _changed(
    change: Callable[[Config, Held], object],
    spoil: Callable[[Path], object] = lambda folder: None,
    arguments: Sequence[str] = MERGE,
) -> Callable[[Path], Sequence[str]]:
    def make(folder: Path) -> Sequence[str]:
        good_model(folder)
        config, held = adapter()
        change(config, held)
        spoil(write_adapter(folder, config, held))
        return arguments

    return make


def _set(**settings: Any) -> Callable[[Config, Held], object]:
    return lambda config, held: config.update(settings)


def _nothing(config: Config, held: Held) -> None:
    pass


def _tensor(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Config, Held], object]:
    return lambda config, held: held.update({name: change(held[name])})


def _nan(values: np.ndarray) -> np.ndarray:
    values[0, 0] = np.nan
    return values


_R: tuple[tuple[str, Any], ...] = (
    ("zero", 0), ("below zero", -4), ("a text", "4"), ("true", True), ("null", None), ("a fraction", 4.5),
    ("a list", [4]), ("huge", 1 << 40), ("another than the tensors'", 8),
)  # fmt: skip
_SETTINGS: dict[str, tuple[Callable[[Config, Held], object], tuple[str, ...]]] = {
    **{f"r is {what}": (_set(r=value), ("r",)) for what, value in _R},
    "a type that nobody knows": (_set(peft_type="MAGIC"), ("MAGIC",)),
    "no type": (lambda config, held: config.pop("peft_type"), ("peft_type",)),
    "a type that is a list": (_set(peft_type=["LORA"]), ("peft_type",)),
    "lora_alpha is a text": (_set(lora_alpha="8"), ("lora_alpha",)),
    "lora_alpha is null": (_set(lora_alpha=None), ("lora_alpha",)),
    "lora_alpha is a list": (_set(lora_alpha=[8]), ("lora_alpha",)),
    "use_rslora is a text": (_set(use_rslora="yes"), ("use_rslora",)),
    "use_dora is a number": (_set(use_dora=7), ("use_dora",)),
    "DoRA without magnitudes": (_set(use_dora=True), ("magnitude",)),
    "target_modules is a number": (_set(target_modules=7), ("target_modules",)),
    "target_modules holds a number": (_set(target_modules=[7]), ("target_modules",)),
    "target_modules names nothing that is there": (_set(target_modules=["x_proj"]), ("down_proj",)),
    "target_modules is a pattern that explodes": (_set(target_modules="(a+)+$" * 9), ("down_proj",)),
    "target_modules is a pattern that is none": (_set(target_modules="(("), ("target_modules",)),
    "rank_pattern is a list": (_set(rank_pattern=[1]), ("rank_pattern",)),
    "rank_pattern holds a text": (_set(rank_pattern={"q_proj": "4"}), ("rank_pattern",)),
    "rank_pattern says another rank": (_set(rank_pattern={"q_proj": 2}), ("q_proj",)),
    "alpha_pattern holds null": (_set(alpha_pattern={"q_proj": None}), ("alpha_pattern",)),
    "fan_in_fan_out is a text": (_set(fan_in_fan_out="no"), ("fan_in_fan_out",)),
    "bias that nobody knows": (_set(bias="magic"), ("bias",)),
    "modules_to_save is a number": (_set(modules_to_save=3), ("modules_to_save",)),
    "target_parameters is a number": (_set(target_parameters=3), ("target_parameters",)),
}
_TENSORS: dict[str, tuple[Callable[[Config, Held], object], tuple[str, ...]]] = {
    "no B": (lambda config, held: held.pop(_B), ("q_proj",)),
    "no A": (lambda config, held: held.pop(_A), ("q_proj",)),
    "no tensors": (lambda config, held: held.clear(), ("adapter",)),
    "A and B of different ranks": (_tensor(_A, lambda v: v[:2].copy()), ("q_proj",)),
    "A turned": (_tensor(_A, lambda v: v.T.copy()), ("q_proj",)),
    "A of another width": (_tensor(_A, lambda v: np.ones((RANK, HIDDEN * 2), np.float32)), ("q_proj",)),
    "B of another height": (_tensor(_B, lambda v: np.ones((HIDDEN * 2, RANK), np.float32)), ("q_proj",)),
    "A as a vector": (_tensor(_A, lambda v: v.reshape(-1)), ("q_proj",)),
    "NaN": (_tensor(_A, _nan), ("q_proj", "1 ")),
    "infinity": (_tensor(_B, lambda v: v * np.float32(np.inf)), ("q_proj",)),
    "whole numbers": (_tensor(_A, lambda v: v.astype(np.int32)), ("q_proj", "I32")),
    "a tensor that nobody knows": (lambda config, held: held.update(x=np.ones(3, np.float32)), ("'x'",)),
    "a layer that the model lacks": (
        lambda config, held: held.update({_A.replace(".0.", ".9."): held[_A], _B.replace(".0.", ".9."): held[_B]}),
        ("layers.9",),
    ),
    "a module that the model lacks": (
        lambda config, held: held.update(
            {_A.replace("q_proj", "x_proj"): held[_A], _B.replace("q_proj", "x_proj"): held[_B]}
        ),
        ("x_proj",),
    ),
    "of another model": (
        lambda config, held: [held.update({n.replace("layers", "blocks"): held.pop(n)}) for n in list(held)],
        ("blocks",),
    ),
    "an embedding of another vocabulary": (
        lambda config, held: held.update(
            {"base_model.model.model.embed_tokens.weight": np.ones((999, HIDDEN), np.float32)}
        ),
        ("embed_tokens",),
    ),
}


def _tensors_of_nought(config: Config, held: Held) -> None:
    held.update({name: values * 0 for name, values in held.items() if "lora_B" in name})


def _pipe(name: str) -> Callable[[Path], object]:
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def _out(name: str) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return act


def _text(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


class _Runs:
    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({_A: _Runs()}))


_CONFIG, _MODEL = "adapter_config.json", "adapter_model.safetensors"
_FILES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no settings": (lambda folder: (folder / _CONFIG).unlink(), (_CONFIG,)),
    "no weights": (lambda folder: (folder / _MODEL).unlink(), ("adapter",)),
    "settings are a pipe": (_pipe(_CONFIG), (_CONFIG, "named pipe")),
    "weights are a pipe": (_pipe(_MODEL), (_MODEL, "named pipe")),
    "settings are a link out": (_out(_CONFIG), (_CONFIG, "leaves the model folder")),
    "weights are a link out": (_out(_MODEL), (_MODEL, "leaves the model folder")),
    "settings are a list": (_text(_CONFIG, b"[]"), (_CONFIG,)),
    "settings are deep": (_text(_CONFIG, b"[" * 10_000), (_CONFIG, "deeper")),
    "settings hold a key twice": (_text(_CONFIG, b'{"r": 4, "r": 8}'), ("'r' twice",)),
    "settings hold NaN": (_text(_CONFIG, json.dumps({**adapter()[0], "lora_alpha": float("nan")}).encode()), ("NaN",)),
    "settings are cut short": (_text(_CONFIG, b'{"r": 4'), ("not JSON",)),
    "weights are cut short": (lambda folder: os.truncate(folder / _MODEL, 500), (_MODEL,)),
    "weights that would run code": (_pickled, ("adapter_model.bin",)),
}


def _twice(weight: str) -> Callable[[Path], Sequence[str]]:
    return _changed(_nothing, arguments=(*CONVERT[:-1], f"adapter={weight}"))


CASES: tuple[Case, ...] = (
    Case("adapter", "good, merged", _changed(_nothing), code=0, writes=("out",)),
    Case(
        "adapter",
        "good, in one pass",
        _changed(_nothing, arguments=CONVERT),
        code=0,
        writes=("out.gguf", "out.gguf.quantpress.json"),
    ),
    Case(
        "adapter",
        "good, with settings that nobody reads",
        _changed(_set(x=1, revision=None, eva_config={})),
        code=0,
        writes=("out",),
    ),
    Case(
        "adapter",
        "good, a pattern that explodes",
        _changed(_set(rank_pattern={"(.*)*x" * 20: 2})),
        code=0,
        writes=("out",),
    ),
    Case("adapter", "good, without effect is said", _changed(_tensors_of_nought), code=0, writes=("out",)),
    *(Case("adapter", name, _changed(change), words=words) for name, (change, words) in _SETTINGS.items()),
    *(Case("adapter", name, _changed(change), words=words) for name, (change, words) in _TENSORS.items()),
    *(Case("adapter", name, _changed(_nothing, spoil), words=words) for name, (spoil, words) in _FILES.items()),
    *(
        Case("adapter", f"a weight of {weight}", _twice(weight), code=2, words=("finite number",))
        for weight in ("nan", "inf", "-inf", "1e999")
    ),
    Case(
        "adapter",
        "the model in its place",
        _changed(_nothing, arguments=("merge", "model", "model", "out", "--no-verify")),
        words=("not an adapter",),
    ),
    Case(
        "adapter",
        "itself in the model's place",
        _changed(_nothing, arguments=("convert", "adapter", "out.gguf", "--no-verify")),
        words=("adapter",),
    ),
)

"""Opens a Hugging Face model folder: config.json, the weights' headers and the tokenizer's files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quantpress.convert.checkpoint import Checkpoint, LazyTensor, SourceFile
from quantpress.convert.files import MAX_SMALL_FILE, inside, read_bounded, shown
from quantpress.convert.json_reader import parse_json
from quantpress.convert.safetensors_reader import Shard, open_shard
from quantpress.convert.sentence_files import read_sentence_files, with_pooling
from quantpress.quant.errors import InputError

__all__ = ["EXTRA_TEMPLATES", "MODEL_CARD", "TOKENIZER_FILES", "Folder", "open_folder", "read_tokenizer_files"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MODEL_CARD = "README.md"  # licence, base model, tags and languages
EXTRA_TEMPLATES = "additional_chat_templates"  # transformers keeps named chat templates in this folder

_MAX_CONFIG = 4 << 20  # bytes of config.json and generation_config.json; real ones have a few thousand
_MAX_TEMPLATES = 64
_MAX_VALUES = 500_000  # commas and brackets in a configuration or an index; a tensor needs one
_MAX_SHARDS = 2000
_NUMBER, _DIGITS = re.compile(r"[0-9]+"), 9
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_OTHER_WEIGHTS = re.compile(r".*\.(gguf|onnx|h5|msgpack|ot|pth|pt|ckpt|npz)")


class Folder:
    """Files of a model folder, each opened by name through `inside` and remembered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[SourceFile] = []

    def find(self, name: str) -> Path | None:
        """Gives the real path of a file, or None if there is none; what is there but not a file is an error later."""
        path = inside(self.path, name)
        return path if path.exists() else None

    def read(self, name: str, limit: int = MAX_SMALL_FILE) -> bytes | None:
        """Gives the bytes of a file of at most `limit` bytes, or None if there is none."""
        path = self.find(name)
        if path is None:
            return None
        data = read_bounded(path, limit)
        self.files.append(SourceFile(self.path / name, len(data)))
        return data

    def read_object(self, name: str) -> dict[str, Any] | None:
        """Gives the contents of a file that must hold a JSON object, or None if there is none."""
        data = self.read(name)
        return None if data is None else self.parse_object(name, data)

    def parse_object(self, name: str, data: bytes) -> dict[str, Any]:
        """Parses JSON text that must be an object."""
        value = parse_json(data, name=str(self.path / name), max_values=_MAX_VALUES)
        if not isinstance(value, dict):
            raise InputError(f"{self.path / name}: a JSON object is expected, found {shown(value)}")
        return value


def open_folder(path: Path | str, *, name: str = "") -> Checkpoint:
    """Opens a model folder without reading a weight.

    Args:
        path: the folder.
        name: what to call the model; the folder's name by default.

    Raises:
        InputError: no config.json, no weights, an index that does not fit its shards, or a damaged or hostile file.
    """
    folder = Folder(Path(path))
    if (config_bytes := folder.read("config.json", _MAX_CONFIG)) is None:
        raise InputError(_why_not_a_model(folder.path))
    config = folder.parse_object("config.json", config_bytes)
    tokenizer_files = read_tokenizer_files(folder)
    tokenizer_files["config.json"] = config_bytes  # the tokenizer asks it for ids of special tokens
    generation: dict[str, Any] = {}
    if generation_bytes := folder.read("generation_config.json", _MAX_CONFIG):
        generation = folder.parse_object("generation_config.json", generation_bytes)
        tokenizer_files["generation_config.json"] = generation_bytes
    sentences = read_sentence_files(folder)
    tokenizer_files |= sentences
    found, kind = _open_weights(folder)
    tensors = {tensor: found[tensor] for tensor in sorted(found, key=_place_of)}
    config = with_pooling(_with_settings(folder, config, tensors), sentences, str(folder.path))
    checkpoint = Checkpoint(
        name=name or folder.path.resolve().name,
        config=config,
        tensors=tensors,
        tokenizer_files=tokenizer_files,
        generation_config=generation,
        files=tuple(dict.fromkeys(folder.files)),
        format=kind,
    )
    if not config.get("quantization_config"):
        return checkpoint
    from quantpress.convert.quantized_open import opened

    return opened(checkpoint)


def _with_settings(folder: Folder, config: dict[str, Any], tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    """Gives config.json with what older quantizers wrote into a file of its own."""
    if config.get("quantization_config") or not any(name.endswith(".qweight") for name in tensors):
        return config
    from quantpress.convert.quantized_open import settings_beside

    settings = settings_beside(folder.read_object)
    return config if settings is None else {**config, "quantization_config": settings}


def _why_not_a_model(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if any(name in names for name in _ADAPTERS):
        return f"{path}: this is an adapter, not a model; give the base model here and the adapter with --adapter"
    found = [name for name in names if name.endswith(".gguf")]
    if found:
        return f"{path}: no config.json; to open a GGUF file give the file itself, here {shown(found[0])}"
    inner = [name for name in names if (path / name / "config.json").is_file()]
    if inner:
        return f"{path}: no config.json; a model is in the folder {shown(inner[0])} inside it"
    return f"{path}: no config.json; a Hugging Face model folder is expected"


def read_tokenizer_files(folder: Folder, *, card: bool = True) -> dict[str, bytes]:
    """Reads what belongs to the tokenizer, and the model card if `card`.

    Returns:
        File name -> bytes, of those that are there.
    """
    names = [*TOKENIZER_FILES, *([MODEL_CARD] if card else [])]
    if (templates := folder.find(EXTRA_TEMPLATES)) is not None and templates.is_dir():
        found = sorted(entry.name for entry in templates.iterdir() if entry.name.endswith(".jinja"))
        names += [f"{EXTRA_TEMPLATES}/{name}" for name in found[:_MAX_TEMPLATES]]
    contents = ((name, folder.read(name)) for name in names)
    return {name: data for name, data in contents if data is not None}


def _place_of(tensor: str) -> str:
    """Sorts layer 2 before layer 10: what is written must not show how a source was cut into shards."""
    return _NUMBER.sub(lambda number: number[0].zfill(_DIGITS), tensor)


def _open_weights(folder: Folder) -> tuple[dict[str, LazyTensor], str]:
    """Opens the weights, safetensors before .bin, a whole file before shards as transformers does."""
    if (path := folder.find("model.safetensors")) is not None:
        return dict(_one(folder, path, "model.safetensors").tensors), "safetensors"
    if (index := folder.read_object("model.safetensors.index.json")) is not None:
        return _open_shards(folder, index, "model.safetensors.index.json", _one), "safetensors"
    if (path := folder.find("pytorch_model.bin")) is not None:
        return dict(_one_bin(folder, path, "pytorch_model.bin").tensors), "torch"
    if (index := folder.read_object("pytorch_model.bin.index.json")) is not None:
        return _open_shards(folder, index, "pytorch_model.bin.index.json", _one_bin), "torch"
    if (settings := folder.read_object("quantize_config.json")) is not None:
        from quantpress.convert.quantized_open import older_weights

        for name in older_weights(settings):
            if (path := folder.find(name)) is not None:
                return dict(_one(folder, path, name).tensors), "safetensors"
    raise InputError(_why_no_weights(folder.path))


def _why_no_weights(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if any(name in names for name in _ADAPTERS):
        return f"{path}: this is an adapter, not a model; give the base model here and the adapter with --adapter"
    if safetensors:
        return (
            f"{path}: {len(safetensors)} safetensors files, first {shown(safetensors[0])}, but neither"
            " model.safetensors nor model.safetensors.index.json"
        )
    if found := [name for name in names if _OTHER_WEIGHTS.fullmatch(name)]:
        return f"{path}: no weights that can be read; {shown(found[0])} is not one of safetensors and pytorch_model.bin"
    return f"{path}: no weights: neither model.safetensors, its index, nor pytorch_model.bin"


def _one(folder: Folder, path: Path, name: str) -> Shard:
    shard = open_shard(path, label=str(folder.path / name))
    folder.files.append(SourceFile(folder.path / name, shard.file.nbytes))
    return shard


def _one_bin(folder: Folder, path: Path, name: str) -> Shard:
    from quantpress.convert.torch_bin import open_bin

    shard = open_bin(path, label=str(folder.path / name))
    folder.files.append(SourceFile(folder.path / name, shard.file.nbytes))
    return shard


def _open_shards(
    folder: Folder, index: dict[str, Any], name: str, open_one: Callable[[Folder, Path, str], Shard]
) -> dict[str, LazyTensor]:
    """Opens every shard an index names and checks that index and shards hold the same tensors."""
    label = str(folder.path / name)
    places = _weight_map(index, label)
    shard_names = sorted(set(places.values()))
    if len(shard_names) > _MAX_SHARDS:
        raise InputError(f"{label}: {len(shard_names)} shards are named, at most {_MAX_SHARDS} are opened")
    paths = {shard: inside(folder.path, shard) for shard in shard_names}  # all are checked before one is opened
    if missing := [shard for shard, path in paths.items() if not path.exists()]:
        raise InputError(
            f"{label}: {len(missing)} of {len(paths)} shards are missing, first {shown(missing[0])};"
            " fetch the rest of the model"
        )
    shards = {shard: open_one(folder, path, shard).tensors for shard, path in paths.items()}
    _compare(label, places, shards)
    return {tensor: lazy for lazies in shards.values() for tensor, lazy in lazies.items()}


def _weight_map(index: Mapping[str, Any], label: str) -> dict[str, str]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{label}: weight_map must map tensor names to file names, found {shown(places)}")
    for tensor, shard in places.items():
        if not isinstance(shard, str):
            raise InputError(f"{label}: tensor {shown(tensor)} is said to be in {shown(shard)}, not in a file")
    return places


def _compare(label: str, places: Mapping[str, str], shards: Mapping[str, Mapping[str, LazyTensor]]) -> None:
    seen: dict[str, str] = {}
    for shard, lazies in shards.items():
        for tensor in lazies:
            if tensor in seen:
                raise InputError(f"{label}: tensor {shown(tensor)} is in {shown(seen[tensor])} and in {shown(shard)}")
            seen[tensor] = shard
    wrong = [tensor for tensor, shard in places.items() if seen.get(tensor) != shard]
    if wrong:
        place = seen.get(wrong[0])
        found = f"is in {shown(place)}" if place else "is missing"
        raise InputError(
            f"{label}: {len(wrong)} tensors are not where the index says;"
            f" {shown(wrong[0])} {found}, wanted in {shown(places[wrong[0]])}"
        )
    if unnamed := [tensor for tensor in seen if tensor not in places]:
        raise InputError(
            f"{label}: {len(unnamed)} tensors in the shards are not in the index, first {shown(unnamed[0])}"
            f" in {shown(seen[unnamed[0]])}"
        )

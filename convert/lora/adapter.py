"""Opens an adapter folder: adapter_config.json, the header of its weights and the tokenizer files beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantpress.convert.checkpoint import LazyTensor, SourceFile
from quantpress.convert.files import open_regular, shown
from quantpress.convert.hf_folder import Folder, read_tokenizer_files
from quantpress.convert.lora.config import AdapterConfig
from quantpress.convert.lora.config_file import MAX_CONFIG, read_config
from quantpress.convert.lora.names import Key, parse_key
from quantpress.convert.lora.shapes import check_module, check_tensor
from quantpress.convert.safetensors_reader import Shard, open_shard
from quantpress.quant.errors import InputError

__all__ = ["Adapter", "AdapterModule", "open_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT takes the first that is there
_POINTER = b"version https://git-lfs"
_MAX_LISTED = 3  # folders that a message names


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
            "trainable_tokens_delta", and "weight", "bias" (or another parameter's name) for what was trained or saved
            whole, also where it is the base layer of a wrapper: an embedding that grew has "weight" beside its
            "lora_embedding_A".
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
        tokenizer_files: as `Checkpoint.tokenizer_files`, of the files that lie beside the adapter; without the model
            card, which is the adapter's and not the model's.
        files: every file that was opened, for hashing and for the sidecar.
        spare: tensors of the file that PEFT keeps beside the trained ones and does not use: modules as they were
            before training (`original_module`), second copies of them, statistics of training.
    """

    name: str
    config: AdapterConfig
    modules: tuple[AdapterModule, ...]
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    files: tuple[SourceFile, ...] = ()
    spare: tuple[LazyTensor, ...] = ()

    @property
    def tensors(self) -> tuple[LazyTensor, ...]:
        """Every tensor of the file that is used; `spare` has the others."""
        return tuple(tensor for module in self.modules for tensor in module.parts.values())


def open_adapter(adapter: Path | str) -> Adapter:
    """Opens an adapter; headers only.

    Args:
        adapter: a folder or a Hub id `org/name` or `org/name@revision`. What exists on the disk is never looked for
            on the Hub.

    Raises:
        InputError: no adapter there, a damaged or hostile file, a kind of adapter that cannot be merged, or a tensor
            whose name is not understood.
        OutputError: the Hub's cache cannot be written.
    """
    path, text = Path(adapter), str(adapter)
    if not text:
        raise InputError("the name of the adapter is empty; give an adapter folder or a Hub id like org/name")
    if path.is_dir():
        return _open_folder(Folder(path), path.resolve().name)
    if path.exists() or path.is_symlink():
        raise InputError(_why_not_a_folder(path))
    from quantpress.convert.hub import download_adapter, is_hub_id

    if isinstance(adapter, str) and is_hub_id(text):
        return _open_folder(Folder(download_adapter(text)), text)
    raise InputError(f"{shown(text, 200)}: no such folder; give an adapter folder or a Hub id like org/name")


def _open_folder(folder: Folder, name: str) -> Adapter:
    data = folder.read(CONFIG, MAX_CONFIG)
    if data is None:
        raise InputError(_why_not_an_adapter(folder.path))
    config = read_config(data, name=str(folder.path / CONFIG))
    weights = _open_weights(folder)
    label = str(weights.file.path)
    modules, spare = _collect(weights.tensors, config, label)
    for module in modules:
        check_module(module.path, module.parts, config, label)
    tokenizer_files = read_tokenizer_files(folder, card=False)
    return Adapter(name, config, modules, tokenizer_files, tuple(folder.files), spare)


def _open_weights(folder: Folder) -> Shard:
    for name in WEIGHTS:
        path = folder.find(name)
        if path is None:
            continue
        label = str(folder.path / name)
        _refuse_pointer(path, label)
        if name.endswith(".bin"):
            from quantpress.convert.torch_bin import open_bin

            shard = open_bin(path, label=label)
        else:
            shard = open_shard(path, label=label)
        if not shard.tensors:
            raise InputError(f"{label}: holds no tensors; the trainer saved nothing, train or save the adapter again")
        file = SourceFile(folder.path / name, shard.file.nbytes)
        folder.files.append(file)
        return Shard(shard.tensors, shard.metadata, file)
    raise InputError(_why_no_weights(folder.path))


def _refuse_pointer(path: Path, label: str) -> None:
    with open_regular(path) as file:
        start = file.read(len(_POINTER))
    if start == _POINTER:
        raise InputError(f"{label}: a Git LFS pointer and not the file itself; fetch it with `git lfs pull`")
    if not start:
        raise InputError(f"{label}: the file is empty; fetch or save the adapter again")


def _collect(
    tensors: Mapping[str, LazyTensor], config: AdapterConfig, label: str
) -> tuple[tuple[AdapterModule, ...], tuple[LazyTensor, ...]]:
    """Sorts tensors by the modules they belong to."""
    places: dict[tuple[str, int, str], tuple[Key, LazyTensor]] = {}
    spare: list[LazyTensor] = []
    adapters: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = parse_key(name, where=label)
        if key.adapter:
            adapters.setdefault(key.adapter, name)
        if key.spare:
            spare.append(tensor)
        elif key.part == "ranknum":
            _check_ranknum(tensor, config, label)
            spare.append(tensor)
        else:
            check_tensor(key.path, key.part, tensor, config, label)
            spare += _place(places, key, tensor, label)
    if len(adapters) > 1:
        first, second = list(adapters.values())[:2]
        raise InputError(f"{label}: holds several adapters: {shown(first, 200)} and {shown(second, 200)}; save one")
    modules: dict[tuple[str, int], dict[str, LazyTensor]] = {}
    for (path, depth, part), (_, tensor) in places.items():
        modules.setdefault((path, depth), {})[part] = tensor
    if not modules:
        raise InputError(f"{label}: none of its {len(tensors)} tensors was trained; save the adapter again")
    return tuple(AdapterModule(path, depth, parts) for (path, depth), parts in modules.items()), tuple(spare)


def _place(
    places: dict[tuple[str, int, str], tuple[Key, LazyTensor]], key: Key, tensor: LazyTensor, label: str
) -> list[LazyTensor]:
    """Puts a tensor where its name says; gives back the one that is not needed of two copies.

    Where the vocabulary grew, PEFT writes a module that was trained whole as `<module>.weight` and once more as
    `<module>.modules_to_save.weight`, and reads the first.
    """
    place = (key.path, key.depth, key.part)
    if place not in places:
        places[place] = (key, tensor)
        return []
    other, present = places[place]
    if key.wrapped == other.wrapped or (tensor.shape, tensor.dtype) != (present.shape, present.dtype):
        raise InputError(
            f"{label}: tensors {shown(present.name, 200)} and {shown(tensor.name, 200)} mean the same parameter"
        )
    if key.wrapped:
        return [tensor]
    places[place] = (key, tensor)
    return [present]


def _check_ranknum(tensor: LazyTensor, config: AdapterConfig, label: str) -> None:
    """AdaLoRA divides by this number; it is init_r, and PEFT stopped writing it (PEFT: adalora/layer.py)."""
    value = float(tensor.read().reshape(-1)[0]) if tensor.size == 1 else float("nan")
    if value != config.rank:
        raise InputError(f"{label}: tensor {shown(tensor.name, 200)} is {value:g}, init_r is {config.rank}")


def _why_not_a_folder(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path}: adapters in GGUF files are not read; give the PEFT folder this one was made from"
    if path.name in (CONFIG, *WEIGHTS):
        return f"{path}: a single file of an adapter; give the folder that holds it"
    return f"{path}: not an adapter; give a folder that PEFT saved, with {CONFIG} and {WEIGHTS[0]}"


def _why_not_an_adapter(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if any(name in names for name in WEIGHTS):
        return f"{path}: {CONFIG} is missing; it says how the weights are scaled, so fetch it too"
    if inner := _inner_adapters(path, names):
        return f"{path}: no {CONFIG}; an adapter is in the folder {inner} inside it; give that folder"
    if "config.json" in names:
        return f"{path}: this is a model, not an adapter; give it as the model and the adapter's folder here"
    if found := [name for name in names if name.endswith(".gguf")]:
        return f"{path}: no {CONFIG}; {shown(found[0])} is not read: give the PEFT folder it was made from"
    return f"{path}: no {CONFIG}; a folder that PEFT saved is expected"


def _inner_adapters(path: Path, names: list[str]) -> str:
    found = [name for name in names if (path / name / CONFIG).is_file()]
    more = f" (and {len(found) - _MAX_LISTED} more)" if len(found) > _MAX_LISTED else ""
    return " or ".join(shown(name) for name in found[-_MAX_LISTED:]) + more


def _why_no_weights(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if inner := _inner_adapters(path, names):
        return f"{path}: no {WEIGHTS[0]}; an adapter is in the folder {inner} inside it; give that folder"
    if "adapters.safetensors" in names:
        return f"{path}: adapters.safetensors is MLX's form of an adapter; fuse it with mlx_lm.fuse"
    if any(name.startswith("model") and name.endswith(".safetensors") for name in names):
        return f"{path}: the weights of a whole model beside {CONFIG}; give it as the model, without --adapter"
    return f"{path}: no weights: neither {WEIGHTS[0]} nor {WEIGHTS[1]}"

"""The files around an ONNX model: which one is the model, its configuration and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantpress.convert.files import inside, shown
from quantpress.convert.hf_folder import Folder, read_tokenizer_files
from quantpress.quant.errors import InputError

__all__ = ["OnnxFolder", "find_onnx", "is_onnx"]

SUFFIX = ".onnx"
GENAI_CONFIG = "genai_config.json"
_NAMES = ("model.onnx", "decoder_model_merged.onnx", "decoder_model.onnx")
_USUAL = tuple(folder + name for name in _NAMES for folder in ("", "onnx/"))
# folders with such files are checkpoints, whatever else lies in them
_CHECKPOINT = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_CONFIG = 4 << 20  # bytes


def is_onnx(model: Path | str) -> bool:
    """Says whether a path is meant as an ONNX model: a .onnx file, or a folder with one and without a checkpoint."""
    path = Path(model)
    try:
        return _holds_onnx(path) if path.is_dir() else path.suffix == SUFFIX
    except OSError:  # a folder that may not be listed; what opens it says why
        return False


def _holds_onnx(path: Path) -> bool:
    if any((path / name).exists() for name in _CHECKPOINT):
        return False
    parts = [part for part in (path, path / "onnx") if part.is_dir()]
    return any(entry.suffix == SUFFIX for part in parts for entry in part.iterdir())


def find_onnx(path: Path) -> Path:
    """Gives the model file of a folder, or the file itself.

    In a folder it is the one that genai_config.json names, else one with a usual name, else the only one.

    Raises:
        InputError: there is none, or several and nothing tells which.
    """
    if not path.is_dir():
        return path
    folder = Folder(path)
    decoder = _decoder(folder.read_object(GENAI_CONFIG) or {})
    if (name := decoder.get("filename")) is not None:
        if not isinstance(name, str):
            raise InputError(f"{path / GENAI_CONFIG}: the decoder's filename is {shown(name)}, wanted a name")
        inside(path, name)
        return path / name
    for name in _USUAL:
        if (found := folder.find(name)) is not None:
            return path / name if found.is_file() else found
    names = sorted(entry.name for entry in path.iterdir() if entry.suffix == SUFFIX)
    if len(names) != 1:
        several = f"{len(names)} ONNX files, first {shown(names[0])}; give the file" if names else "no ONNX file in it"
        raise InputError(f"{path}: {several}")
    inside(path, names[0])
    return path / names[0]


def _decoder(genai: Mapping[str, Any]) -> Mapping[str, Any]:
    model = genai.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    return decoder if isinstance(decoder, dict) else {}


@dataclass(frozen=True)
class OnnxFolder:
    """What lies beside an ONNX model.

    Attributes:
        name: what to call the model.
        model: the .onnx file.
        config: contents of config.json, or empty.
        genai: contents of genai_config.json, or empty.
        tokenizer_files: file name -> bytes.
    """

    name: str
    model: Path
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    genai: Mapping[str, Any] = field(default_factory=dict, repr=False)
    tokenizer_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: Path) -> OnnxFolder:
        """Reads what lies beside a model file; in the folder above where the file is in one called "onnx".

        Raises:
            InputError: a file is damaged, too large or outside the folder.
        """
        place = model.parent
        outer = place.resolve().parent
        if place.resolve().name == "onnx" and not (place / "config.json").exists() and (outer / "config.json").exists():
            place = outer
        folder = Folder(place)
        config_bytes = folder.read("config.json", _MAX_CONFIG)
        generation = folder.read("generation_config.json", _MAX_CONFIG)
        config = {} if config_bytes is None else folder.parse_object("config.json", config_bytes)
        genai = folder.read_object(GENAI_CONFIG) or {}
        files = read_tokenizer_files(folder, card=False)
        for name, data in (("config.json", config_bytes), ("generation_config.json", generation)):
            if data is not None:
                files[name] = data  # the tokenizer asks them for ids of special tokens
        known = bool(config or genai or files)
        return cls(place.resolve().name if known else model.name, model, config, genai, files)

    @property
    def context(self) -> int | None:
        """Tokens that the model was made for, as genai_config.json or config.json say; None where neither does."""
        from quantpress.convert.arch.registry import find_arch

        model = self.genai.get("model")
        found = model.get("context_length") if isinstance(model, dict) else None
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
        if not self.config:
            return None
        try:
            return find_arch(self.config).read_config(self.config).context
        except InputError:  # a family that is not known can still be run
            found = self.config.get("max_position_embeddings", self.config.get("n_positions"))
            return found if isinstance(found, int) and found > 0 else None

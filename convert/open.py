"""Opens whatever a user calls a model: a folder, a GGUF file or a Hub id."""

from __future__ import annotations

from pathlib import Path

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.files import shown
from quantpress.convert.hf_folder import open_folder
from quantpress.convert.onnx.read_folder import is_onnx
from quantpress.quant.errors import InputError

__all__ = ["open_checkpoint"]

_ONNX = (
    "an ONNX model is a target, not a source; give the model it was made from (inspect, perplexity and verify take ONNX"
    " models)"
)


def open_checkpoint(model: Path | str) -> Checkpoint:
    """Opens a model; headers only, whatever its size.

    Args:
        model: a Hugging Face model folder, a `.gguf` file, or a Hub id `org/name` or `org/name@revision`. What exists
            on the disk is never looked for on the Hub.

    Raises:
        InputError: nothing is there, or it is damaged, hostile or of a kind that is not supported.
        OutputError: the Hub's cache cannot be written.
    """
    path = Path(model)
    if not str(model):
        raise InputError("the name of the model is empty; give a model folder, a .gguf file, or a Hub id like org/name")
    if path.is_dir():
        if is_onnx(path):
            raise InputError(f"{path}: {_ONNX}")
        return open_folder(path)
    if path.exists() or path.is_symlink():
        return _open_file(path)
    text = str(model)
    from quantpress.convert.hub import download, is_hub_id

    if isinstance(model, str) and is_hub_id(text):
        return open_folder(download(text), name=text)
    raise InputError(
        f"{shown(text, 200)}: no such file or folder; give a model folder, a .gguf file, or a Hub id like org/name"
    )


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        from quantpress.convert.gguf.source import open_gguf

        return open_gguf(path)
    if path.name.endswith((".safetensors", ".bin", ".json")):
        raise InputError(f"{path}: a single file of a model; give the folder that holds it and its config.json")
    if path.suffix == ".onnx":
        raise InputError(f"{path}: {_ONNX}")
    raise InputError(f"{path}: not a model; give a model folder, a .gguf file, or a Hub id like org/name")

"""The files that sentence-transformers keeps beside a model: which modules follow it, and how its vectors are pooled.

Source: sentence-transformers, models/Pooling.py and SentenceTransformer.py (modules.json lists a type and a folder for
each module; `1_Pooling/config.json` switches kinds of pooling on).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantpress.convert.files import shown
from quantpress.convert.json_reader import parse_json
from quantpress.quant.errors import InputError

if TYPE_CHECKING:
    from quantpress.convert.hf_folder import Folder

__all__ = ["POOLING_KEY", "read_sentence_files", "with_pooling"]

POOLING_KEY = "pooling_mode"
"""Key of an opened config.json: "mean", "cls", "last", or another word for what is not computed here."""

_MODULES = "modules.json"
_OTHERS = ("sentence_bert_config.json", "config_sentence_transformers.json")
_MAX_MODULES = 16
_HARMLESS = ("Transformer", "Normalize")  # vectors of length 1 point where they did
_KINDS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}


def read_sentence_files(folder: Folder) -> dict[str, bytes]:
    """Reads modules.json and the configurations that it names.

    Returns:
        File name, which may hold a subfolder -> bytes; empty without modules.json.

    Raises:
        InputError: modules.json is no list of modules.
    """
    found = folder.read(_MODULES)
    if found is None:
        return {}
    files = {_MODULES: found}
    paths = [path for _, path in _modules(found, str(folder.path / _MODULES)) if path]
    for name in (*_OTHERS, *(f"{path}/config.json" for path in paths)):
        if (data := folder.read(name)) is not None:
            files[name] = data
    return files


def with_pooling(config: dict[str, Any], files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """Gives a config.json that says how vectors are pooled, where files of sentence-transformers say it.

    Args:
        config: contents of config.json.
        files: as `read_sentence_files` gives them.
        where: the folder, for messages.

    Raises:
        InputError: a file is damaged.
    """
    if _MODULES not in files:
        return config
    parts: list[str] = []
    for kind, path in _modules(files[_MODULES], f"{where}/{_MODULES}"):
        if kind == "Pooling":
            parts += _poolings(files.get(f"{path}/config.json"), f"{where}/{path}/config.json")
        elif kind not in _HARMLESS:
            parts.append(kind)
    return {**config, POOLING_KEY: "+".join(parts)} if parts else config


def _modules(data: bytes, where: str) -> list[tuple[str, str]]:
    """Gives the last part of each module's type, and its folder."""
    modules = parse_json(data, name=where)
    if not isinstance(modules, list) or len(modules) > _MAX_MODULES:
        raise InputError(f"{where}: a list of up to {_MAX_MODULES} modules is expected, found {shown(modules)}")
    found = []
    for module in modules:
        kind, path = (module.get(key) if isinstance(module, dict) else None for key in ("type", "path"))
        if not isinstance(kind, str) or not isinstance(path, str):
            raise InputError(f"{where}: a module is {shown(module)}, wanted an object with 'type' and 'path'")
        found.append((kind.rpartition(".")[2], path))
    return found


def _poolings(data: bytes | None, where: str) -> list[str]:
    """Gives the kinds of pooling that are switched on."""
    if data is None:
        raise InputError(f"{where}: missing; modules.json names it")
    settings = parse_json(data, name=where)
    if not isinstance(settings, dict):
        raise InputError(f"{where}: a JSON object is expected, found {shown(settings)}")
    stated = settings.get(POOLING_KEY)
    if stated is not None:
        names = stated if isinstance(stated, list) else [stated]
        return ["last" if name == "lasttoken" else str(name) for name in names]
    return [kind for key, kind in _KINDS.items() if settings.get(key) is True] or ["mean"]

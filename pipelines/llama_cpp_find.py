"""Finding a llama.cpp library that the user has already, without importing anybody's package."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import json
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantpress.quant.errors import OutputError

__all__ = ["ENVIRONMENT_VARIABLE", "HOW_TO_INSTALL", "LlamaCpp", "find_llama_cpp"]

ENVIRONMENT_VARIABLE = "QUANTPRESS_LLAMA_CPP"
HOW_TO_INSTALL = (
    "install one with 'pip install quantpress[llama-cpp]' (prebuilt) or 'pip install llama-cpp-python', "
    f"or set {ENVIRONMENT_VARIABLE} to libllama or to its folder"
)
_NEEDED_SYMBOL = b"llama_model_load_from_file"  # in the symbol table of every release since January 2025
_PATTERNS = ("libllama*.so*", "libllama*.dylib", "llama*.dll")
_NOT_THE_LIBRARY = ("libllama-common", "llama-common")  # the command line tools' own library


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A llama.cpp library on this machine.

    Attributes:
        path: the shared library that exports ``llama_*``.
        origin: how it was found, for people: a package, an environment variable, a folder.
        version: what its packaging says, "" if it says nothing (the running library may say more).
    """

    path: Path
    origin: str
    version: str


def find_llama_cpp() -> LlamaCpp | None:
    """Look for the library: environment variable, Python packages, local folders, then the system.

    Returns:
        the first file that has llama.cpp's symbols, or None when there is none.

    Raises:
        OutputError: the environment variable is set but names no such library.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        found = _first_usable(_named(Path(named)))
        if found is None:
            raise OutputError(f"{ENVIRONMENT_VARIABLE}={named}: no llama.cpp library there (wanted libllama*)")
        return found
    return _first_usable(_candidates())


def _first_usable(candidates: Iterator[LlamaCpp]) -> LlamaCpp | None:
    return next((candidate for candidate in candidates if _has_symbols(candidate.path)), None)


def _candidates() -> Iterator[LlamaCpp]:
    yield from _packaged("llama_cpp", "llama-cpp-python", ("lib/*llama*", "*llama*"))
    yield from _packaged("xllamacpp", "xllamacpp", ("xllamacpp*.so", "xllamacpp*.pyd"))
    here = Path.cwd()
    yield from _in_folder(here / ".runtime" / "llama.cpp", "folder .runtime/llama.cpp")
    for folder in sorted(here.glob("node_modules/@node-llama-cpp/*/bins/*")):
        yield from _in_folder(folder, f"npm package @node-llama-cpp/{folder.parents[1].name}")
    yield from _system()


def _named(path: Path) -> Iterator[LlamaCpp]:
    if path.is_dir():
        yield from _in_folder(path, ENVIRONMENT_VARIABLE)
    else:
        yield LlamaCpp(path.absolute(), ENVIRONMENT_VARIABLE, _npm_version(path.parent))


def _packaged(module: str, distribution: str, patterns: tuple[str, ...]) -> Iterator[LlamaCpp]:
    """Libraries inside an installed package; ``find_spec`` of a top-level name imports nothing."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = ""
    for folder in map(Path, spec.submodule_search_locations):
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                yield LlamaCpp(path, f"Python package {distribution}", f"{distribution} {version}".strip())


def _in_folder(folder: Path, origin: str) -> Iterator[LlamaCpp]:
    """Libraries in a folder or in its ``lib``, ``bin`` and ``build/bin``, as releases and builds place them."""
    for part in (folder, folder / "lib", folder / "bin", folder / "build" / "bin"):
        for pattern in _PATTERNS:
            for path in sorted(part.glob(pattern)):
                yield LlamaCpp(path.absolute(), origin, _npm_version(part))


def _npm_version(folder: Path) -> str:
    """Release of llama.cpp in node-llama-cpp's build metadata."""
    try:
        metadata = json.loads((folder / "_nlcBuildMetadata.json").read_text("utf-8"))
        return str(metadata["buildOptions"]["llamaCpp"]["release"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _system() -> Iterator[LlamaCpp]:
    """What the dynamic loader would find, and the usual folders it is not always told about."""
    variable = {"darwin": "DYLD_LIBRARY_PATH", "win32": "PATH"}.get(sys.platform, "LD_LIBRARY_PATH")
    folders = [Path(part) for part in os.environ.get(variable, "").split(os.pathsep) if part]
    if sys.platform != "win32":
        folders += [Path("/usr/local/lib"), Path("/opt/homebrew/lib"), Path("/usr/lib")]
    for folder in folders:
        for pattern in _PATTERNS:
            for path in sorted(folder.glob(pattern)):
                yield LlamaCpp(path.absolute(), f"library folder {folder}", "")
    name = ctypes.util.find_library("llama")
    if name is not None:
        yield LlamaCpp(Path(name), "system library", "")


def _has_symbols(path: Path) -> bool:
    """True for a regular file that carries llama.cpp's names; reads it, never executes it."""
    if path.name.startswith(_NOT_THE_LIBRARY):
        return False
    if not path.is_absolute():  # a bare name from find_library: only the loader knows the folder
        return True
    try:
        if not path.is_file() or path.stat().st_size == 0:
            return False
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(_NEEDED_SYMBOL) >= 0
    except OSError:
        return False

"""`quantpress doctor`: what is installed here, which runtimes can judge files, and how to get the missing ones."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Mapping
from typing import Any

import click

from quantpress.pipelines.llama_cpp_find import HOW_TO_INSTALL, find_llama_cpp
from quantpress.pipelines.sidecar import NUMERIC_PACKAGES, version_of

OPTIONAL = (
    "xllamacpp",
    "llama_cpp_python",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
    "transformers",
    "peft",
    "triton",
    "ray",
    "matplotlib",
)


def _torch_device() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"name": "torch", "usable": True, "version": torch.__version__, "cuda": devices}


def _llama_cpp() -> dict[str, Any]:
    found = find_llama_cpp()
    if found is None:
        return {"name": "llama.cpp", "usable": False, "hint": HOW_TO_INSTALL}
    return {
        "name": "llama.cpp",
        "usable": True,
        "version": found.version,
        "path": str(found.path),
        "origin": found.origin,
    }


def _onnxruntime() -> dict[str, Any]:
    if importlib.util.find_spec("onnxruntime") is None:
        return {"name": "onnxruntime", "usable": False, "hint": "pip install 'quantpress[onnx]'"}
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    return {
        "name": "onnxruntime",
        "usable": True,
        "version": version_of("onnxruntime"),
        "providers": [name.removesuffix("ExecutionProvider") for name in providers],
    }


def examine() -> dict[str, Any]:
    """Looks at versions, devices and runtimes."""
    packages = {name: version_of(name) for name in (*NUMERIC_PACKAGES, *OPTIONAL)}
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name, version in packages.items() if version},
        "runtimes": [_llama_cpp(), _torch_device(), _onnxruntime()],
    }


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"Python {found['python']} on {found['system']}")
    console.print("packages: " + ", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    table = Table("runtime", "usable", "what")
    for runtime in found["runtimes"]:
        what = runtime.get("hint") or f"{runtime['version']} {runtime.get('path', '')}".strip()
        if "providers" in runtime:
            what += f" on {', '.join(runtime['providers'])}"
        if "cuda" in runtime:
            what += f", CUDA devices: {', '.join(runtime['cuda']) or 'none'}"
        table.add_row(runtime["name"], "yes" if runtime["usable"] else "no", what)
    console.print(table)


@click.command(name="doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show versions, devices and runtimes, and how to install what is missing."""
    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _show(found)

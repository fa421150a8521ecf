"""The file beside every output that says what it was made from, how, and whether it was proved.

The form is an in-toto statement (in-toto attestation framework, spec v1: `_type`, `subject`, `predicateType`,
`predicate`, and fields beside them that other readers ignore), so tools that sign models can sign it as it is. Two
runs with the same inputs and options differ only in `timings`.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantpress.convert.atomic import write_file

STATEMENT = "https://in-toto.io/Statement/v1"
SCHEMA = "urn:quantpress:sidecar:1"
NUMERIC_PACKAGES = ("gguf", "ml_dtypes", "numba", "numpy", "quantpress", "safetensors", "tokenizers", "torch")


def version_of(package: str) -> str | None:
    """Gives the installed version of a package, or None."""
    from importlib import metadata  # loads the email package: 60 ms that `--help` should not wait for

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """Describes what the numbers depend on: package versions, Python and the device type."""
    packages = {name: version_of(name) for name in NUMERIC_PACKAGES}
    return {
        "device": device,
        "packages": {name: version for name, version in packages.items() if version},
        "python": platform.python_version(),
    }


def sidecar_path(output: Path) -> Path:
    """Gives the place of an output's sidecar: `<file>.quantpress.json`, or `quantpress.json` in a folder."""
    if output.is_dir():
        return output / "quantpress.json"
    return output.with_name(output.name + ".quantpress.json")


def statement(
    *,
    inputs: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    device: str,
    outputs: Sequence[Mapping[str, Any]],
    tensors: Sequence[Mapping[str, Any]],
    parity: Mapping[str, Any] | None,
    notes: Sequence[str],
    timings: Mapping[str, Any],
    adapters: Sequence[Mapping[str, Any]] = (),
    calibration: Mapping[str, Any] | None = None,
    mixture: Mapping[str, Any] | None = None,
    parameters: int = 0,
) -> dict[str, Any]:
    """Builds the sidecar's contents (INTERFACE: Sidecar).

    `calibration` is there only where a text was used, `mixture` only where rules have chosen types; `parameters` is the
    number of values in all tensors of the source.
    """
    return {
        "_type": STATEMENT,
        "predicateType": SCHEMA,
        "subject": [{"name": item["name"], "digest": {"sha256": item["sha256"]}} for item in outputs],
        "predicate": _predicate(inputs, stages),
        "schema": SCHEMA,
        "created_by": f"quantpress {version_of('quantpress')}",
        "inputs": list(inputs),
        "parameters": parameters,
        "adapters": list(adapters),
        "stages": list(stages),
        "environment": environment(device),
        "outputs": list(outputs),
        "tensors": list(tensors),
        **({"calibration": dict(calibration)} if calibration else {}),
        **({"mixture": dict(mixture)} if mixture else {}),
        "notes": list(notes),
        "parity": parity,
        "timings": dict(timings),
    }


def _predicate(inputs: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Says once more what in-toto's readers look for: what was made how, of what, by which program.

    The validator of in-toto's own package wants a predicate that is not empty. The form is that of SLSA's provenance
    (spec v1: `buildDefinition`, `runDetails`); it holds nothing that is not at the top level too.
    """
    return {
        "buildDefinition": {
            "buildType": SCHEMA,
            "externalParameters": {"stages": list(stages)},
            "resolvedDependencies": [{"name": item["name"], "digest": {"sha256": item["sha256"]}} for item in inputs],
        },
        "runDetails": {"builder": {"id": "urn:quantpress", "version": {"quantpress": version_of("quantpress") or ""}}},
    }


def rounded(value: Any) -> Any:
    """Rounds every float to six significant digits: the last ones depend on how a processor orders its sums."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return value


def write_sidecar(output: Path, contents: Mapping[str, Any]) -> Path:
    """Writes the sidecar of an output atomically, replacing an older one.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = sidecar_path(output)
    data = json.dumps(contents, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, data.encode(), force=True)
    return path

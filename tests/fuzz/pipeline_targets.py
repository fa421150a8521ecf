"""Made-up pipeline files, files of metadata, sidecars and records of the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from quantpress.convert.json_reader import read_json
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.batch import published
from quantpress.pipelines.batch.load import load_batch
from quantpress.pipelines.cache import entry, input_hashes
from quantpress.pipelines.cache.keys import key_of
from quantpress.pipelines.cache.layout import Layout
from quantpress.pipelines.cache.sealed import sealed
from quantpress.pipelines.gguf_stage import Gguf
from tests.fuzz.table_folder import llama_folder
from tests.fuzz.target import Target
from tests.pipelines.batch.batch_runs import PIPELINE

__all__ = ["TARGETS"]

_YAML = "pipeline.yaml"
_YAML_WORDS = (
    b"&a ", b"*a", b"<<: *a", b"!!python/object/apply:os.system [id]", b"!!binary |", b"? ", b"- ", b": ", b"${x}",
    b"${",
    b"{", b"}", b"[", b"]", b"|", b">", b"\t", b"\n  ", b"---\n", b"%YAML 1.2\n",
    b"\"\\UFFFFFFFF\"", b"$${", b"\xef\xbb\xbf",
    b"matrix: {a: [1, 2]}", b"exclude: [{a: 1}]", b"variables: {x: 1}", b"defaults: {device: cuda}", b"cache: /",
    b"~", b"merge_lora: {adapter: a}", b"imatrix: {text: t}", b"verify: {max_kld: .nan}", b"output: s3://b/x.gguf",
    b"0x10",
    b"quantize: {method: gptq, override: ['(a+)+$:bits=4']}", b"tensor_types: [['(', q8_0]]", b"1e400",
    b"version: 2",
)  # fmt: skip


def _parse_pipeline(folder: Path) -> object:
    return load_batch(folder / _YAML)


def _with_model(folder: Path) -> None:
    """Makes what the jobs read, as far as loading looks."""
    for name in ("model", "adapter"):
        (folder / name).mkdir()
    (folder / "text.txt").write_text("a text")


def _pipeline_seeds() -> Mapping[str, bytes]:
    job = "jobs: [{name: a, model: model, stages: [{gguf: {output: a.gguf}}]}]\n"
    stages = "jobs:\n  - name: a-${b}\n    matrix: {b: [q4_0, Q8_0], c: [1, 2]}\n    model: model\n    stages:\n"
    texts = {
        "good": "version: 1\n" + job, "batch": PIPELINE.replace("MODEL", "model"),
        "matrix": "version: 1\n" + stages + '      - gguf: {outtype: "${b}", output: "out/${b}-${c}.gguf"}\n',
        "release": (Path(__file__).parents[2] / "examples" / "release.yaml").read_text(encoding="utf-8"),
        "adapters": (Path(__file__).parents[2] / "examples" / "adapters.yaml").read_text(encoding="utf-8"),
        "explosion": "version: 1\nvariables:\n" + "".join(
            f"  v{one}: {'x' * 9 if not one else f'${{v{one - 1}}}' * 9}\n" for one in range(9)
        ) + job,
        "product": "version: 1\njobs:\n  - name: a\n    matrix: {" + ", ".join(
            f"m{one}: [{', '.join(map(str, range(40)))}]" for one in range(8)
        ) + "}\n    model: model\n    stages: [{gguf: {output: a.gguf}}]\n",
        "laughs": "a: &a [x, x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n"
                                              for n in range(9)),
        "loop": "version: 1\njobs: &a [*a]\n", "tag": "version: !!python/name:os.system 1\n" + job, "deep": "[" * 3000,
        "deep-map": "{a: " * 3000, "keys": "? {a: b}\n: c\n", "two": "version: 1\n---\nversion: 1\n", "none": "",
        "twice": "version: 1\nversion: 1\n" + job, "merge": "version: 1\nx: &x {a: b}\ny: {<<: *x}\n" + job,
        "digits": f"version: {'9' * 5000}\n" + job, "float": f"version: 1.{'0' * 5000}1\n" + job,
        "size": "version: 1\ndefaults: {max_memory: 9e999G, threads: -1, chunks: 99999999999999}\n" + job,
        "places": "version: 1\n" + job.replace("a.gguf", '"../../\\0/a.gguf"'), "same": "version: 1\n" + job + job,
        "long": "version: 1\n" + job.replace("name: a", f"name: {'a' * 5000}"), "key": "? " + "k" * 5000 + "\n: 1\n",
    }  # fmt: skip
    return {name: text.encode() for name, text in texts.items()}


def _parse_metadata(folder: Path) -> object:
    checkpoint = open_checkpoint(folder)
    return Gguf(output=Path("x.gguf"), metadata=folder / "metadata.json").resolved(checkpoint).plan(checkpoint)


def _metadata_seeds() -> Mapping[str, bytes]:
    values: dict[str, Any] = {
        "good": {
            "general.name": "Tiny", "general.tags": ["a", "b"], "general.base_models": [{"name": "B", "version": "1"}],
            "general.sampling.temp": 0.5, "general.sampling.top_k": 40, "general.license": "mit",
        },
        "unknown": {"general.x": 1}, "list": {"general.tags": "a"}, "wide": {"general.sampling.top_k": 1 << 40},
        "float": {"general.sampling.temp": 1e300}, "entry": {"general.datasets": [{"x": "y"}]}, "array": [],
        "other": {"llama.block_count": 1}, "long": {"general." + "x" * 9000: 1}, "nothing": {},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


def _parse_sidecar(folder: Path) -> object:
    """Reads which files an output has, as publishing it does."""
    local, sidecar = folder / "tiny.gguf", folder / "tiny.gguf.quantpress.json"
    outputs = published._outputs_of(sidecar.read_bytes(), sidecar)
    return published._local_files(local, sidecar, outputs)


def _with_output(folder: Path) -> None:
    (folder / "tiny.gguf").write_bytes(b"GGUF")


def _sidecar_seeds() -> Mapping[str, bytes]:
    output = {"name": "tiny.gguf", "sha256": "0" * 64, "bytes": 4}
    values: dict[str, Any] = {
        "good": {"schema": 1, "outputs": [output], "inputs": []}, "list": [1], "none": {}, "text": {"outputs": "x"},
        "up": {"outputs": [{**output, "name": "../x"}]}, "number": {"outputs": [{"name": 5}]}, "bare": {"outputs": [5]},
        "names": {"outputs": [{"name": ["x"]}]}, "root": {"outputs": [{"name": "/etc/passwd"}]},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


def _unsealed(path: Path) -> Any:
    """Reads a record of the cache as if its hash were right: whoever can write there can make that, too."""
    return read_json(path.parents[1] / "record.json" if path.name == entry.DESCRIPTION else path)


def _parse_entry(folder: Path) -> object:
    with mock.patch.object(entry, "read_sealed", _unsealed):
        found = entry.read_entry(folder / "entry", key_of(_MATERIAL))
    entry.check_files(found)
    return found


_MATERIAL = {"stage": "gguf", "version": 1}


def _with_entry(folder: Path) -> None:
    (folder / "entry" / entry.FILES).mkdir(parents=True)
    (folder / "entry" / entry.FILES / "a.bin").write_bytes(b"1234")
    (folder / "entry" / entry.DESCRIPTION).write_bytes(sealed({"a": 1}))


def _entry_seeds() -> Mapping[str, bytes]:
    file = {"name": "a.bin", "sha256": "03ac674216f3e15c761ee1a5e255f067953623c8b388b4459e13f978d7c846f4", "bytes": 4}
    good = {
        "key": key_of(_MATERIAL), "kind": "output", "created": 1.5, "record": {}, "material": _MATERIAL,
        "files": [file],
    }  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        "good": {}, "key": {"key": "0" * 64}, "up": {"files": [{**file, "name": "../entry.json"}]},
        "record": {"record": [1]}, "files": {"files": {"a": 1}}, "size": {"files": [{**file, "bytes": -1}]},
        "created": {"created": "x"}, "material": {"material": [["stage", "gguf"], ["version", 1]]},
        "folder": {"files": [{**file, "name": "."}]}, "hash": {"files": [{**file, "sha256": "0" * 64}]},
    }  # fmt: skip
    return {name: json.dumps({**good, **change}).encode() for name, change in changes.items()}


def _parse_hashes(folder: Path) -> object:
    with mock.patch.object(input_hashes, "read_sealed", _unsealed):
        return input_hashes._read(folder / "input-hashes.json")


def _hashes_seeds() -> Mapping[str, bytes]:
    values: dict[str, Any] = {
        "good": {"files": [["/a/b", [1, 2, 3, 4], "0" * 64]]}, "short": {"files": [["/a"]]}, "number": {"files": 5},
        "text": {"files": ["abc"]}, "list": [1], "none": {}, "stamp": {"files": [["/a", 5, "0"]]},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


def _parse_layout(folder: Path) -> object:
    return Layout.of(folder)


def _layout_seeds() -> Mapping[str, bytes]:
    good = sealed({"layout": 1})
    return {"good": good, "newer": sealed({"layout": 99}), "list": b"[1]", "text": b'{"value": "x"}', "none": b""}


def _nothing(folder: Path) -> None:
    """Leaves the folder empty."""


TARGETS: tuple[Target, ...] = (
    Target("pipeline-yaml", _YAML, _with_model, _parse_pipeline, _pipeline_seeds, _YAML_WORDS),
    Target(
        "metadata-file", "metadata.json", llama_folder, _parse_metadata, _metadata_seeds, (b"general.sampling.temp",)
    ),
    Target("sidecar", "tiny.gguf.quantpress.json", _with_output, _parse_sidecar, _sidecar_seeds),
    Target("cache-entry", "record.json", _with_entry, _parse_entry, _entry_seeds),
    Target("cache-hashes", "input-hashes.json", _nothing, _parse_hashes, _hashes_seeds),
    Target("cache-layout", "layout.json", _nothing, _parse_layout, _layout_seeds),
)

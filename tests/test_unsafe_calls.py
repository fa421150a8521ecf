"""No code of the product may run, unpack or fetch what a stranger's file asks for: looked for in every file's syntax.

What is found must stand in `ALLOWED` with a reason, and what stands there must be found. The rules themselves are tried
on planted lines that they must find, and on lines beside them that are fine.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unsafe_calls import unsafe_calls

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("convert", "kernels", "pipelines", "quant", "quantpress")

ALLOWED = {
    ("convert/torch_bin.py", "pickles", "pickle"): "the class of an error that torch's weights-only loader raises",
    ("pipelines/executors/frames.py", "pickles", "pickle"): "pipes between this program and workers that it started",
    ("convert/files.py", "files", "os.open"): "the one place that opens what strangers name",
    ("convert/atomic.py", "files", "io.FileIO"): "writes the temporary file of an output",
    ("convert/calibration/activations.py", "files", "os.open"): "values that this run keeps on the disk",
    ("convert/calibration/chain.py", "files", "os.open"): "values that this run keeps on the disk",
    ("convert/disk.py", "files", "os.open"): "a folder, for its fsync",
    ("convert/lock.py", "files", "os.open"): "lock files beside outputs",
    ("convert/moved_files.py", "files", ".open"): "a note of this program, which is made anew",
    ("convert/gguf/pretokenizers.py", "files", "read_text"): "a table of this package",
    ("kernels/tuning/tables.py", "files", ".open"): "the user's own launch parameters, bounded; kernels import nothing",
    ("pipelines/batch/fetched.py", "files", ".open"): "a part of a download that this run wrote, for its hash",
    ("pipelines/batch/outputs.py", "files", "read_bytes"): "a sidecar in an entry of the cache",
    ("pipelines/batch/perform.py", "files", "read_bytes"): "the sidecar that was written a line before",
    ("pipelines/cache/use_lock.py", "files", "os.open"): "lock files of the cache",
    ("pipelines/cli.py", "files", "open"): "the standard streams, by their numbers",
    ("pipelines/cli.py", "files", "os.open"): "the null device",
    ("pipelines/executors/attempt.py", "files", "read_text"): "the kernel's figures in /proc",
    ("pipelines/executors/room.py", "files", "read_text"): "the kernel's figures in /sys",
    ("pipelines/machine.py", "files", "read_text"): "the kernel's figures in /proc",
    (
        "pipelines/gguf_readback.py",
        "files",
        "gguf.GGUFReader",
    ): "an output that is judged, read by other code on purpose",
    ("pipelines/onnx_proof_read.py", "files", "numpy.memmap"): "an output that is judged, its places checked before",
    ("pipelines/llama_cpp_find.py", "files", ".open"): "libraries of this machine, looked through and not run",
    ("pipelines/llama_cpp_find.py", "files", "mmap.mmap"): "libraries of this machine, looked through and not run",
    ("pipelines/llama_cpp_find.py", "files", "read_text"): "what an installed package says of its version",
    ("pipelines/report/page.py", "files", "read_text"): "templates of this package",
    ("pipelines/spool.py", "files", ".open"): "what this run keeps on the disk",
    ("pipelines/spool.py", "files", "read_bytes"): "the journal of what a run has kept on the disk",
    ("pipelines/report/page.py", "templates", "jinja2.Environment"): "this package's own templates, all values escaped",
    ("convert/lora/patterns.py", "computed import", "importlib.import_module"): "one of two names in the line itself",
    ("quant/ggml/search.py", "computed import", "importlib.import_module"): "names of a table in the file",
    ("pipelines/batch/registry.py", "computed import", "importlib.import_module"): "names of the table of own stages",
    ("pipelines/cli.py", "computed import", "importlib.import_module"): "names of the table of commands",
    ("pipelines/default_text.py", "computed import", "importlib.import_module"): "a constant of the file",
    ("pipelines/executors/attempt.py", "computed import", "importlib.import_module"): "what this program tells workers",
    ("pipelines/quantize_formats.py", "computed import", "importlib.import_module"): "names of a table in the file",
    ("quantpress/__init__.py", "computed import", "importlib.import_module"): "names of the table of exports",
    ("pipelines/llama_cpp_worker.py", "library", "ctypes.CDLL"): "llama.cpp where the user's machine has it",
}

PLANTED = {
    "pickles": [
        "import pickle",
        "from pickle import loads",
        "import dill as safe",
        "from joblib import load",
        "import marshal, shelve",
        "import torch\ntorch.load(path)",
        "from torch import load\nload(path, weights_only=False)",
        "import torch as t\nt.load(path, weights_only=flag)",
        "from torch.package import PackageImporter",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import torch\ntorch.jit.load(path)",
    ],
    "code": [
        "eval(text)",
        "run = exec",
        "compile(text, name, 'exec')",
        "__import__(name)",
        "import builtins",
        "import runpy",
        "import torch\ntorch.hub.load(repo, name)",
        "from importlib.util import spec_from_file_location\nspec_from_file_location(name, path)",
    ],
    "yaml": [
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "import yaml as y\nmake(y.FullLoader)",
        "import yaml\nyaml.full_load_all(text)",
    ],
    "shell": [
        "import subprocess\nsubprocess.run(text, shell=True)",
        "run(text, shell=flag)",
        "import os\nos.system(text)",
        "from os import popen\npopen(text)",
        "import os\nos.execvp(name, arguments)",
        "import subprocess as s\ns.getoutput(text)",
    ],
    "templates": [
        "import jinja2\njinja2.Environment().from_string(text)",
        "from jinja2 import Template\nTemplate(text)",
        "from jinja2.sandbox import SandboxedEnvironment\nSandboxedEnvironment()",
        "from jinja2.nativetypes import NativeEnvironment as E\nE()",
    ],
    "remote code": ["make(path, trust_remote_code=True)", "make(path, **{'trust_remote_code': True})"],
    "temporary": ["import tempfile\ntempfile.mktemp()", "from tempfile import mktemp\nmktemp()"],
    "ssl": [
        "get(url, verify=False)",
        "import ssl\ncontext = ssl._create_unverified_context()",
        "import ssl\nmode = ssl.CERT_NONE",
        "context.check_hostname = False",
    ],
    "xml": ["import xml.etree.ElementTree as tree", "from lxml import etree", "from xml import sax"],
    "archives": ["import tarfile", "archive.extractall(folder)", "import shutil\nshutil.unpack_archive(path)"],
    "files": [
        "open(path)",
        "with path.open() as file: pass",
        "path.open('rb')",
        "path.open(mode='r+b')",
        "path.read_text()",
        "path.read_bytes()",
        "import os\nos.open(path, os.O_RDONLY)",
        "import numpy as np\nnp.fromfile(path)",
        "from numpy import memmap\nmemmap(path)",
        "from safetensors import safe_open\nsafe_open(path, 'np')",
        "from safetensors.numpy import load_file\nload_file(path)",
        "import gguf\ngguf.GGUFReader(path)",
    ],
    "computed import": [
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module as get\nget(f'stages.{name}')",
    ],
    "external data": [
        "import onnx\nonnx.load(path)",
        "from onnx import load_model\nload_model(path, load_external_data=True)",
        "from onnx.external_data_helper import load_external_data_for_model as read\nread(model, folder)",
        "import onnx_ir\nonnx_ir.load(path)",
    ],
    "library": ["import ctypes\nctypes.CDLL(path)", "from ctypes import cdll\ncdll.LoadLibrary(path)"],
}

FINE = """
import ctypes, importlib, json, re, subprocess
import numpy as np, onnx, torch, yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
re.compile("x").match(text)
model.eval()
session.open(request)
fs.open(url, "rb-cached")
np.load, np.asarray(values)
yaml.safe_load(text)
torch.load(path, map_location="cpu", weights_only=True)
subprocess.run(["program", path], shell=False)
onnx.load(path, load_external_data=False)
importlib.import_module("ray")
ctypes.CDLL("libc.so.6")
ImmutableSandboxedEnvironment().from_string(text)
AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
get(url, verify=True)
""".replace("np.load, ", "")


def found_in_the_product() -> dict[tuple[str, str, str], str]:
    found = {}
    for folder in PRODUCT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for rule, what in unsafe_calls(path.read_text(encoding="utf-8")):
                found[name, rule, what] = f"{name}: {what} ({rule})"
    return found


def test_the_product_makes_no_unsafe_call_without_a_reason() -> None:
    found = found_in_the_product()
    assert not [text for key, text in found.items() if key not in ALLOWED]
    stale = [key for key in ALLOWED if key not in found]
    assert not stale, "these are no longer there: take them out"


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in PLANTED.items() for text in texts])
def test_a_planted_line_is_found(rule: str, text: str) -> None:
    assert rule in {found for found, _ in unsafe_calls(text)}


def test_lines_beside_them_are_fine() -> None:
    assert unsafe_calls(FINE) == []


def test_every_file_of_the_product_is_looked_at() -> None:
    assert sum(1 for folder in PRODUCT for _ in (ROOT / folder).rglob("*.py")) > 300

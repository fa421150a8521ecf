"""Hub ids are fetched through the Hub's protocol, spoken here by a small server on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_WEIGHTS = save({"w": np.arange(6, dtype=np.float32).reshape(2, 3)})


_LORA = save({f"q.lora_{name}.weight": np.ones((2, 2), np.float32) for name in "AB"})


@dataclass
class Hub:
    """A Hub with a few models; `requests` remembers every file that was fetched."""

    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _fail(self, status: int, code: str) -> None:
            self._send(status, b"{}", X_Error_Code=code, X_Error_Message=code, Content_Type="application/json")

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                self._api(*found.groups())
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(found[1], found[2], found[3])
            else:
                self._fail(404, "EntryNotFound")

        def _known(self, name: str, revision: str | None) -> bool:
            if name == "org/gated":
                self._fail(403, "GatedRepo")
            elif name not in hub.models:
                self._fail(404, "RepoNotFound")
            elif revision not in (None, "main", "v1", _COMMIT):
                self._fail(404, "RevisionNotFound")
            else:
                return True
            return False

        def _api(self, name: str, what: str | None, revision: str | None) -> None:
            if not self._known(name, revision):
                return
            files = hub.models[name]
            answer: object = {"id": name, "sha": _COMMIT, "siblings": [{"rfilename": file} for file in files]}
            if what == "tree":
                answer = [_tree_entry(file, data) for file, data in files.items()]
            self._send(200, json.dumps(answer).encode(), Content_Type="application/json")

        def _file(self, name: str, revision: str, file: str) -> None:
            if not self._known(name, revision):
                return
            data = hub.models[name].get(file)
            if data is None:
                self._fail(404, "EntryNotFound")
                return
            if self.command == "GET":
                hub.requests.append(file)
            etag = hashlib.sha256(data).hexdigest()
            headers = {"X_Linked_Etag": f'"{etag}"', "X_Linked_Size": str(len(data))} if _is_large(file) else {}
            self._send(200, data, ETag=f'"{etag}"', X_Repo_Commit=_COMMIT, **headers)

    return Handler


def _is_large(file: str) -> bool:
    return file.endswith((".safetensors", ".bin"))


def _tree_entry(file: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if _is_large(file):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


@pytest.fixture
def hub() -> Iterator[Hub]:
    config = b'{"model_type": "llama"}'
    hub = Hub(
        {
            "org/tiny": {
                "config.json": config,
                "README.md": b"hello",
                "model.safetensors": _WEIGHTS,
                "pytorch_model.bin": b"never fetched",
                "original/consolidated.safetensors": b"never fetched",
                "consolidated.safetensors": b"never fetched",
                "tokenizer.json": b"{}",
                "additional_chat_templates/tool.jinja": b"hi",
                "modeling_evil.py": b"never fetched",
            },
            "org/old": {"config.json": config, "pytorch_model.bin": b"not a torch file", "tokenizer.json": b"{}"},
            "org/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": _WEIGHTS},
            "org/lora": {
                "adapter_config.json": b'{"peft_type": "LORA", "r": 2}',
                "adapter_model.safetensors": _LORA,
                "adapter_model.bin": b"never fetched",
                "tokenizer_config.json": b"{}",
                "README.md": b"never fetched",
                "checkpoint-5/adapter_model.safetensors": b"never fetched",
                "optimizer.pt": b"never fetched",
            },
            "org/lora-old": {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.bin": b"no torch file"},
            "org/empty": {"config.json": config},
        }
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


_OPEN = """
import sys
from quantpress.convert.open import open_checkpoint
from quantpress.quant.errors import QuantpressError
try:
    model = open_checkpoint(sys.argv[1])
    print(model.name, sorted(model.tokenizer_files), [t.read().tolist() for t in model.tensors.values()])
except QuantpressError as error:
    print("exit", error.exit_code, error)
"""


def _open(model_id: str, url: str, cache: Path, code: str = _OPEN, **extra: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **extra}
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        environment.pop(proxy, None)
        environment.pop(proxy.upper(), None)
    process = subprocess.run(
        [sys.executable, "-c", code, model_id],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
        cwd=cache,
    )
    assert "Traceback" not in process.stderr
    assert process.stdout.count("\n") == 1
    return process.stdout.strip()


def test_a_model_is_fetched_once_and_without_what_is_not_needed(hub: Hub, tmp_path: Path) -> None:
    said = _open("org/tiny", hub.url, tmp_path)
    files = ["README.md", "additional_chat_templates/tool.jinja", "config.json", "tokenizer.json"]
    assert said == f"org/tiny {files} [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]]"
    assert sorted(hub.requests) == [*files[:3], "model.safetensors", files[3]]
    hub.requests.clear()
    assert _open("org/tiny@v1", hub.url, tmp_path).startswith("org/tiny@v1 [")
    assert hub.requests == []  # the same commit
    assert _open("org/tiny", hub.url, tmp_path, HF_HUB_OFFLINE="1") == said


_OPEN_ADAPTER = """
import sys
from quantpress.convert.lora.adapter import open_adapter
from quantpress.quant.errors import QuantpressError
try:
    adapter = open_adapter(sys.argv[1])
    print(adapter.name, sorted(adapter.tokenizer_files), [t.read().tolist() for t in adapter.tensors])
except QuantpressError as error:
    print("exit", error.exit_code, error)
"""


def test_an_adapter_is_fetched_without_what_is_not_needed(hub: Hub, tmp_path: Path) -> None:
    said = _open("org/lora", hub.url, tmp_path, _OPEN_ADAPTER)
    assert said == "org/lora ['tokenizer_config.json'] [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]]"
    assert sorted(hub.requests) == ["adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"]
    assert "not a file of torch.save" in _open("org/lora-old", hub.url, tmp_path, _OPEN_ADAPTER)
    assert "this is a model, not an adapter" in _open("org/empty", hub.url, tmp_path, _OPEN_ADAPTER)
    assert "no such branch" in _open("org/lora@v9", hub.url, tmp_path, _OPEN_ADAPTER)


_INSPECT = """
import sys
from quantpress.pipelines.inspection import inspect
found = inspect(sys.argv[1])
print(found["format"], found["model"], found.get("rank"), len(found.get("modules", ())))
"""


def test_inspect_describes_an_adapter_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    assert _open("org/lora", hub.url, tmp_path, _INSPECT) == "adapter lora 2 1"


def test_bin_files_are_fetched_only_where_there_are_no_safetensors(hub: Hub, tmp_path: Path) -> None:
    assert "not a file of torch.save" in _open("org/old", hub.url, tmp_path)
    assert "pytorch_model.bin" in hub.requests


@pytest.mark.parametrize(
    ("model_id", "words"),
    [
        ("org/none", "no such model on the Hub"),
        ("org/tiny@v9", "no such branch, tag or commit"),
        ("org/gated", "accept its terms"),
        ("org/adapter", "this is an adapter"),
        ("org/empty", "no weights"),
        ("org/na--me", "cannot be fetched"),
    ],
)
def test_an_id_that_cannot_be_opened_is_an_input_error_that_says_why(
    hub: Hub, tmp_path: Path, model_id: str, words: str
) -> None:
    said = _open(model_id, hub.url, tmp_path)
    assert said.startswith("exit 3 ")
    assert words in said


def test_offline_and_not_in_the_cache_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    assert "HF_HUB_OFFLINE" in _open("org/tiny", hub.url, tmp_path, HF_HUB_OFFLINE="1")
    assert hub.requests == []


def test_a_hub_that_does_not_answer_is_an_error_and_the_cache_still_serves(hub: Hub, tmp_path: Path) -> None:
    closed = "http://127.0.0.1:9"
    said = _open("org/tiny", closed, tmp_path)
    assert said.startswith("exit 3 ")
    assert "cannot be reached" in said
    good = _open("org/tiny", hub.url, tmp_path)
    assert _open("org/tiny", closed, tmp_path) == good


def test_a_cache_that_cannot_be_written_is_an_output_error(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the cache's folder should be")
    said = _open("org/tiny", hub.url, tmp_path)
    assert said.startswith("exit 5 ")
    assert "HF_HOME" in said

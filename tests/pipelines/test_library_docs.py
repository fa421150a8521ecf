"""The examples of docs/library.md, run in order as one script; what it says of errors, compared with the classes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest

import quantpress as qp
from tests import peft_oracle
from tests.tiny import tiny_checkpoint

PAGE = (Path(__file__).parents[2] / "docs" / "library.md").read_text(encoding="utf-8")
LOOSE = {"chunks": 2, "context": 32, "max_kld": 9, "max_ppl_change": 9, "min_top1": 0}  # random models lose much


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "model", "llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    peft_oracle.train(tmp_path / "adapter", tmp_path / "model", config)
    stages = [{"gguf": {"outtype": "Q8_0", "output": "out/batch.gguf"}}]
    batch = {"version": 1, "defaults": LOOSE, "jobs": [{"name": "one", "model": "model", "stages": stages}]}
    (tmp_path / "batch.yaml").write_text(json.dumps(batch))
    (tmp_path / "test.txt").write_text("What was pressed in the morning is read in the evening. " * 400)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 7
    exec(compile("\n".join(blocks), "docs/library.md", "exec"), {"__name__": "example"})
    written = {path.name for path in (tmp_path / "out").iterdir()}
    wanted = {
        "imatrix.gguf",
        "model-Q4_K_M.gguf",
        "best-Q4_K_M.gguf",
        "merged-Q8_0.gguf",
        "model-F16.gguf",
        "int4",
        "int4-onnx",
        "int4-Q4_0.gguf",
        "batch.gguf",
        "report.html",
    }
    assert wanted <= written
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("llama ")
    assert said[-1] == "130"
    assert any(line.startswith("one verified ") for line in said)


def test_the_table_of_errors_is_that_of_the_classes() -> None:
    rows = re.findall(r"^\| `(\w+Error)` \| (\d+) \|", PAGE, re.MULTILINE)
    exported: dict[str, Any] = {name: getattr(qp, name) for name in qp.__all__ if name.endswith("Error")}
    wanted = {name: str(error.exit_code) for name, error in exported.items() if name != "QuantpressError"}
    assert dict(rows) == wanted

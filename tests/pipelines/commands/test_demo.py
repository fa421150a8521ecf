"""`quantpress demo` where no model is installed: one is trained, pressed and proved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantpress as qp
from quantpress.pipelines import demo, demo_model
from quantpress.pipelines.llama_cpp_find import find_llama_cpp

needs_llama_cpp = pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed")


@needs_llama_cpp
@pytest.mark.slow
def test_the_demo_trains_a_model_presses_and_proves_it(
    quantpress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    monkeypatch.setattr(demo_model, "STEPS", 40)
    ended = quantpress("-q", "demo", tmp_path / "demo")
    assert ended.code == 0, ended.err
    for ftype in ("F16", "Q8_0", "Q4_0"):
        assert f"small-model-{ftype}.gguf" in ended.out
    assert ended.out.count("proved") == 3
    # training has taught it something: a model that knows nothing has the vocabulary's size as its perplexity
    found = qp.perplexity(tmp_path / "demo" / "small-model", options=qp.JudgeOptions(chunks=2))
    assert found.context == demo_model.CONTEXT
    assert found.perplexity < demo_model.VOCABULARY / 2

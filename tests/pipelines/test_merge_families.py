"""An adapter on every linear layer of every family, from PEFT's folder to a GGUF file that llama.cpp proves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import quantpress as qp
from quantpress.convert.arch.registry import ARCHITECTURES
from quantpress.pipelines.commands.architectures import families
from quantpress.pipelines.llama_cpp_find import find_llama_cpp
from tests.families.registered import SHORT
from tests.pipelines.commands.peft_adapters import make_adapter, merged_by_peft
from tests.tiny import FAMILIES, Tiny, tiny_checkpoint

# the first of each family, and what differs from it in what an adapter meets: ties, fused layers, other prefixes
EXTRA = ("llama-tied", "llama-bare", "gemma3-untied", "gpt2-bare", "phi3-mini4")
CASES = [case for case in FAMILIES if case.id == case.family or case.id in EXTRA]
TEXT = "The press takes a model and gives a file. What was written in the morning is read in the evening. " * 12


def test_every_decoder_with_a_table_is_walked_and_said_to_take_adapters() -> None:
    walked = {case.family for case in CASES} | {case.family for case in SHORT if not case.lora}  # test_every_family.py
    assert walked == {spec.family for spec in ARCHITECTURES if spec.kind == "decoder"}
    assert all(row["lora"] for row in families() if row["family"] in walked)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_merge_equals_pefts_and_speaks_like_base_and_adapter(case: Tiny, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", case.family, **case.options)
    adapter = make_adapter(model, tmp_path / "adapter", spread=0.3, target_modules="all-linear", r=4, lora_alpha=8)
    merged = qp.merge_lora(qp.open_checkpoint(model), adapter)
    wanted = merged_by_peft(model, [(adapter, 1.0)])
    assert merged.adapted is not None
    for name in merged.adapted.changed:
        value = wanted.get(name, wanted.get(f"transformer.{name}", wanted.get(f"model.{name}")))
        assert value is not None, name
        # float32 sums of PEFT over the rank, of values near 1, then one rounding each
        np.testing.assert_allclose(merged.tensors[name].read(), value, atol=1e-6, rtol=1e-6, err_msg=name)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    judge = qp.JudgeOptions(text=text, context=32, chunks=2)
    runtime = "llama.cpp" if find_llama_cpp() is not None else "torch"
    pressed = qp.export_gguf(merged, tmp_path / "tuned.gguf", outtype="f32", verify=True, judge=judge, threads=1)
    assert pressed.parity is not None
    assert pressed.parity.candidate.runtime == runtime
    assert "unmerged" in pressed.parity.baseline.runtime
    assert len(pressed.ledger) == len(qp.open_adapter(adapter).tensors)

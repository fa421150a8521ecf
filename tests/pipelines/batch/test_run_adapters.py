"""Batches with adapters: judged against base and adapter unmerged, the base run once for all of them."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest

import quantpress as qp
from tests import peft_oracle
from tests.pipelines.batch.batches import GPTQ, Batch, done, gguf, job, started


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    found = Batch.with_model(tmp_path)
    for seed, name in enumerate(("tone", "facts"), 1):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
        peft_oracle.train(tmp_path / name, tmp_path / "model", config, seed=seed)
    return found


def merged(name: str, weight: float = 1.0) -> dict[str, object]:
    return {"merge_lora": {"adapter": name, "weight": weight}}


def test_the_base_is_run_once_for_all_adapters(batch: Batch) -> None:
    batch.write(
        job("plain", gguf("Q8_0", "plain")),
        job("tone", merged("tone"), gguf("Q8_0", "tone")),
        job("facts", merged("facts"), gguf("Q8_0", "facts")),
        job("both", merged("tone", 0.5), merged("facts", 0.5), GPTQ, gguf("Q4_0", "both")),
    )
    events: list[qp.Event] = []
    result = batch.run(watch=events.append)
    assert done(result) == dict.fromkeys(("plain", "tone", "facts", "both"), "verified")
    tasks = started(events)
    assert sum(task.startswith("reference") for task in tasks) == 4  # the base, and each model with its adapters
    sides = [output.parity for job in result.jobs for output in job.outputs]
    assert [side and side["baseline"]["runtime"] for side in sides] == [
        "torch",
        *["torch (base + adapter, unmerged)"] * 3,
    ]
    assert [side is not None and "adapter_share" in side for side in sides] == [False, True, True, True]


def test_an_output_with_codes_says_everything_of_the_adapters(batch: Batch) -> None:
    batch.write(job("a", merged("tone", 0.5), GPTQ, {"safetensors": {"format": "gptq", "output": "out/a"}}))
    first = batch.run()
    assert done(first) == {"a": "verified"}
    said = first.jobs[0].outputs[0].sidecar
    single = qp.merge_lora(qp.open_checkpoint(batch.folder / "model"), batch.folder / "tone", 0.5)
    pressed = qp.export_gguf(single, batch.folder / "single.gguf", outtype="F16")
    wanted = json.loads(pressed.sidecar.read_bytes())
    assert said["adapters"] == wanted["adapters"]
    assert said["inputs"] == wanted["inputs"]
    assert [stage["name"] for stage in said["stages"]] == ["merge_lora", "gptq", "safetensors"]
    assert said["calibration"]["samples"] == 4
    weights = {tensor["name"]: tensor for tensor in said["tensors"]}
    assert weights["model.layers.0.mlp.up_proj.weight"]["loss"] > 0


def test_another_weight_is_another_model(batch: Batch) -> None:
    batch.write(job("a", merged("tone"), gguf("Q8_0", "one")))
    batch.run()
    batch.write(job("a", merged("tone", 0.25), gguf("Q8_0", "two")))
    events: list[qp.Event] = []
    assert done(batch.run(watch=events.append)) == {"a": "verified"}
    assert sum(task.startswith("reference") for task in started(events)) == 1
    assert batch.output("one.gguf").read_bytes() != batch.output("two.gguf").read_bytes()


def test_an_adapter_may_be_merged_into_codes_and_is_judged_without_them(batch: Batch) -> None:
    batch.write(job("a", GPTQ, merged("tone"), gguf("F32")))
    result = batch.run()
    assert done(result) == {"a": "verified"}
    parity = result.jobs[0].outputs[0].parity
    assert parity is not None
    assert parity["baseline"]["runtime"] == "torch (base + adapter, unmerged)"
    assert parity["mean_kld"] > 1e-4  # what GPTQ has rounded is in the file, and not in what it is compared with

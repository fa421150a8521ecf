"""`quantize` hands its device on to GPTQ, here the processor by torch's full name: that takes the way of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not here: install the extra gpu")

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.quant import gptq_cuda
from tests.pipelines.commands.quantized_folders import sidecar


def test_gptq_runs_on_the_device_and_gives_nearly_the_processors_weights(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def shared(*arguments: object, device: str, **options: object) -> object:
        asked.append(device)
        return original(*arguments, device=device, **options)  # type: ignore[arg-type]

    original = gptq_cuda.gptq_shared_on_device
    monkeypatch.setattr(gptq_cuda, "gptq_shared_on_device", shared)
    opened = {}
    for device in ("cpu:0", "cpu"):
        out = tmp_path / device.replace(":", "-")
        qp.quantize(tiny_model, out, method="gptq", group_size=32, calibration=text_file, device=device,
                    samples=4, sequence_length=64, calibration_dtype="f32")  # fmt: skip
        opened[device] = open_checkpoint(out).quantized
    assert asked == ["cpu:0"] * 8  # two layers of four steps
    # only the first layer's attention: a near tie that goes the other way changes the inputs of all that comes after
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        one, other = (opened[device][f"model.layers.0.self_attn.{name}.weight"].read() for device in opened)
        assert (one.codes == other.codes).mean() > 0.98
    losses = [sum(each.get("loss", 0.0) for each in sidecar(tmp_path / name)["tensors"]) for name in ("cpu-0", "cpu")]
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)

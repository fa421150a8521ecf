"""Writes docs/families.md from the tables and from the cases that are tested.

python -m tests.families.page > docs/families.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from quantpress.convert.arch.registry import ARCHITECTURES
from quantpress.convert.arch.spec import ArchSpec
from quantpress.pipelines.commands.architectures import families
from tests.families.cases import Case
from tests.families.encoders import ENCODERS
from tests.families.registered import ALL
from tests.seq2seq_tiny import KINDS
from tests.tiny import FAMILIES

__all__ = ["page"]

_HEAD = """# Model families

Written from the tables and the tests by `python -m tests.families.page`; `quantpress architectures` lists the same.

Every option in the last table is a tiny random checkpoint with which `make test` or `make proofs` compares our decoder,
the GGUF file in llama.cpp and the ONNX model in onnxruntime with an implementation of somebody else (transformers' own
class, or its parts put together where a family's code is not in transformers): mean KL divergence at most 1e-4. Then an
adapter is merged and compared with PEFT, weights are rounded and quantized by GPTQ, and Q4_K_M is loaded. Where a
target cannot compute an option it is refused before anything is written; the page says why.

Inputs are safetensors (whole or in shards), PyTorch's .bin, and GGUF files of the families marked so.
"""


def page() -> str:
    """Gives the page."""
    rows = {row["family"]: row for row in families()}
    lines = [
        _HEAD,
        "| family | class in config.json | GGUF | opens GGUF | ONNX | GPTQ | LoRA |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_summary(spec, rows[spec.family]) for spec in ARCHITECTURES]
    lines += ["", "## What is tested of each", "", "| family | options | what a target refuses |", "|---|---|---|"]
    lines += [_tested(spec) for spec in ARCHITECTURES]
    return "\n".join(lines) + "\n"


def _summary(spec: ArchSpec, row: dict[str, Any]) -> str:
    marks = ["yes" if row[key] else "no" for key in ("onnx", "gptq", "lora")]
    classes = ", ".join(f"`{name}`" for name in spec.classes)
    opens = "yes" if "gguf" in row["inputs"] else "no"
    return f"| {spec.family} | {classes} | {row['gguf'] or 'no'} | {opens} | {' | '.join(marks)} |"


def _tested(spec: ArchSpec) -> str:
    old = [case for case in FAMILIES if case.family == spec.family]
    new = [case for case in ALL if case.family == spec.family]
    names = [case.id for case in (*old, *new)]
    names += [case.id for case in ENCODERS if case.family == spec.family]
    names += [name for name, options in KINDS.items() if options.get("family", "t5") == spec.family]
    refused = [f"`{case.id}`: not in llama.cpp" for case in old if not case.gguf]
    refused += [text for case in new for text in _refusals(case)]
    return f"| {spec.family} | {', '.join(f'`{name}`' for name in names)} | {'; '.join(refused)} |"


def _refusals(case: Case) -> Iterator[str]:
    for target, why in (("llama.cpp", case.gguf), ("ONNX", case.onnx), ("GPTQ", case.calibrated), ("LoRA", case.lora)):
        if why:
            yield f"`{case.id}`: not in {target} ({why})"


if __name__ == "__main__":
    sys.stdout.write(page())

"""Measures how far good files of every type are from their source; docs/parity.md derives the default limits from it.

    python benchmarks/parity.py MODEL... [--text TEXT] [--chunks N]

Each model is pressed to every type and judged in llama.cpp. Figures go to benchmarks/results/parity.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from machine import git_commit, machine

from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.stage import RunContext
from quantpress.pipelines.verification import Reference

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
RESULTS = Path(__file__).resolve().parent / "results" / "parity.json"


def measure(model: Path, options: JudgeOptions, runtimes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Presses one model to every type and compares each file with it."""
    source = open_checkpoint(model)
    rows = []
    reference = Reference(source, options)
    with tempfile.TemporaryDirectory() as folder:
        for outtype in TYPES:
            artifact = Gguf(output=Path(folder) / f"{outtype}.gguf", outtype=outtype).run(source, RunContext())
            for runtime in runtimes:
                parity = reference.judge(artifact.path, artifact.ftype, runtime=runtime).to_json()
                row = {"model": source.name, "parameters": source.parameters, "type": artifact.ftype, **parity}
                rows.append({key: value for key, value in row.items() if key not in ("limits", "text_sha256")})
                print(
                    f"{source.name:16} {artifact.ftype:5} {runtime:10} KLD {parity['mean_kld']:.3g}"
                    f" ratio {parity['ppl_ratio']:.5f} top-1 {parity['top1_agreement']:.4f}",
                    flush=True,
                )
            artifact.path.unlink()
    return rows


def main() -> None:
    """Measures every model that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--torch", action="store_true", help="also read every file back into torch")
    options = parser.parse_args()
    runtimes = ("llama.cpp", "torch") if options.torch else ("llama.cpp",)
    judge = JudgeOptions(text=options.text, chunks=options.chunks)
    rows = [row for model in options.models for row in measure(model, judge, runtimes)]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"commit": git_commit(), "machine": machine(), "rows": rows}, indent=2) + "\n")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()

"""Measures what every GGUF file type costs, beside llama-quantize's file of the same type from the same source.

    python benchmarks/gguf_quality.py MODEL --library libllama.so --text TEXT --calibration TEXT [--types ...]

For each type: llama-quantize's file; ours without a text, with an importance matrix (measured on the calibration text;
llama-quantize gets the same one), and by GPTQ. Each is run in llama.cpp on the same tokens and compared with the source
in float32. Writes results/gguf_quality.json (other models stay in it), a table (.md) and a picture (.svg) per model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf_quality_report import write_report
from llama_quantize import FTYPES, quantize
from machine import git_commit, machine
from run import RESULTS

import quantpress as qp
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.runner import press
from quantpress.pipelines.stage import RunContext
from quantpress.pipelines.verification import Reference
from quantpress.quant.errors import QuantpressError

TYPES = (
    "Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M", "Q4_1", "Q5_0",
    "Q5_K_S", "Q5_K_M", "Q5_1", "Q6_K", "Q8_0",
)  # fmt: skip
NOT_BY_GPTQ = ("Q8_0",)  # nothing is left to gain


def files(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, Path | str]]:
    """Gives type, method and file, one after the other; or why there is none."""
    half, importance = folder / "f16.gguf", folder / "importance.gguf"
    source = open_checkpoint(options.model)
    press(source, Gguf(output=half, outtype="f16"), RunContext())
    qp.imatrix(source, importance, text=options.calibration)
    for kind in options.types:
        plain = {} if kind != "Q2_K_S" else {"imatrix": importance}
        if not plain:
            yield kind, "llama-quantize", _theirs(options, half, folder, kind, None)
            yield kind, "quantpress", _ours(source, folder, kind, {})
        yield kind, "llama-quantize, imatrix", _theirs(options, half, folder, kind, importance)
        yield kind, "quantpress, imatrix", _ours(source, folder, kind, {"imatrix": importance})
        if kind not in NOT_BY_GPTQ:
            gptq = {"method": "gptq", "calibration": options.calibration, "samples": options.samples}
            yield (
                kind,
                "quantpress, gptq",
                _ours(source, folder, kind, {**gptq, **plain, "sequence_length": options.length}),
            )


def _theirs(options: argparse.Namespace, half: Path, folder: Path, kind: str, importance: Path | None) -> Path | str:
    out = folder / "theirs.gguf"
    try:
        quantize(options.library, half, out, kind, threads=2, imatrix=importance)
    except SystemExit as error:
        return str(error)
    return out


def _ours(source: Any, folder: Path, kind: str, given: dict[str, Any]) -> Path | str:
    out = folder / "ours.gguf"
    try:
        return press(source, Gguf(output=out, outtype=kind, **given), RunContext(force=True)).artifact.path
    except QuantpressError as error:
        return str(error)


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Judges every file."""
    judge = JudgeOptions(text=options.text, chunks=options.chunks, runtime="llama.cpp")
    reference, rows = Reference(open_checkpoint(options.model), judge), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        for kind, method, file in files(options, Path(name)):
            row: dict[str, Any] = {"type": kind, "method": method}
            if isinstance(file, str):
                row["refused"] = file
            else:
                parity = reference.judge(file, kind)
                row |= {
                    "bytes": file.stat().st_size, "mean_kld": parity.mean_kld,
                    "mean_kld_stderr": parity.mean_kld_stderr,
                    "kld_p99": parity.kld_p99, "perplexity": parity.candidate.perplexity, "ppl_ratio": parity.ppl_ratio,
                    "ppl_ratio_stderr": parity.ppl_ratio_stderr, "top1_agreement": parity.top1_agreement,
                    "tokens": parity.tokens, "source_perplexity": parity.baseline.perplexity,
                }  # fmt: skip
                file.unlink()
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measures one model and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--library", required=True, type=Path)
    parser.add_argument("--text", required=True, type=Path, help="to judge on")
    parser.add_argument("--calibration", required=True, type=Path, help="for importance and GPTQ")
    parser.add_argument("--types", nargs="+", default=TYPES, choices=list(FTYPES))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--name", help="what to call the model")
    options = parser.parse_args()
    subject = {
        "commit": git_commit(), "machine": machine(), "text": options.text.name,
        "calibration": options.calibration.name,
        "samples": options.samples, "length": options.length, "chunks": options.chunks, "rows": measured(options),
    }  # fmt: skip
    path = RESULTS / "gguf_quality.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    found[options.name or options.model.name] = subject
    path.write_text(json.dumps(found, indent=1) + "\n")
    write_report(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

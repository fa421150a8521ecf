"""Measures what quantization costs: every method x bits x group on small real models, beside peers on the same tokens.

    python benchmarks/quality.py DATA [--smollm2 FOLDER] [--gptqmodel PYTHON] [--llmcompressor PYTHON] [--quick]

Every case is a checkpoint that `quantpress.quantize` writes and that is read back from its files and run in torch:
mean KL divergence and perplexity against the unquantized model, with standard errors, on a text that calibration has
not seen. DATA holds `models/` and `text/`. Embeddings, heads and norms stay as they are and count in the sizes.
Writes results/quality.json, a table (quality.md) and two pictures (quality-*.svg); with `--model` the other models of
an earlier run stay in them.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import git_commit, machine
from quality_cases import Case, Subject, cases, subjects
from quality_layers import layer_errors
from quality_peers import peers
from quality_report import write_report
from run import RESULTS

import quantpress as qp
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.parity import Parity
from quantpress.pipelines.quantize_recipe import CALIBRATED
from quantpress.pipelines.verification import Reference
from quantpress.quant.errors import QuantpressError

LAYERS_OF = ("mix6m", 128)  # model and group size whose errors are shown layer by layer


def options_of(subject: Subject, case: Case) -> dict[str, Any]:
    """Gives the options of `quantpress.quantize` for a case."""
    odd = (f"{subject.odd}=group_size:-1",) if subject.odd and case.group_size != -1 else ()
    return {
        **case.method.options,
        "bits": case.bits,
        "group_size": case.group_size,
        "format": "compressed-tensors",  # holds every grid that is tried
        "override": odd,
        "calibration": subject.calibration if case.method.options["method"] in CALIBRATED else None,
        "samples": subject.samples,
        "sequence_length": subject.length,
        "seed": 0,
    }


def weights_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's tensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def figures(parity: Parity) -> dict[str, Any]:
    """What is kept of a comparison."""
    return {
        "mean_kld": parity.mean_kld,
        "mean_kld_stderr": parity.mean_kld_stderr,
        "perplexity": parity.candidate.perplexity,
        "perplexity_stderr": parity.candidate.stderr,
        "ppl_ratio": parity.ppl_ratio,
        "ppl_ratio_stderr": parity.ppl_ratio_stderr,
        "top1_agreement": parity.top1_agreement,
        "tokens": parity.tokens,
    }


class Bench:
    """One model with its reference; writes, judges and forgets one quantized checkpoint after another."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.folder = subject, folder
        self.source = qp.open_checkpoint(subject.folder)
        judge = JudgeOptions(text=subject.test, context=subject.context, chunks=subject.chunks, runtime="torch")
        self.reference = Reference(self.source, judge)

    def row(self, method: str, bits: int, group_size: int, out: Path, seconds: float) -> dict[str, Any]:
        """Judges a checkpoint folder."""
        parity = self.reference.judge(out, "F32")
        if not np.isfinite(parity.mean_kld):
            raise SystemExit(f"{self.subject.name} {method}: {parity.reason}")
        row: dict[str, Any] = {
            "model": self.subject.name, "method": method, "bits": bits, "group_size": group_size,
            "bytes": weights_bytes(out), "seconds": round(seconds, 2), **figures(parity),
        }  # fmt: skip
        if (self.subject.name, group_size) == LAYERS_OF:
            row["layer_errors"] = layer_errors(self.source, qp.open_checkpoint(out), self.reference.windows[:4])
        print(
            f"{self.subject.name:13} {method:18} int{bits} {group_size:4}: KLD {row['mean_kld']:.5f}"
            f" ± {row['mean_kld_stderr']:.5f}  perplexity {row['perplexity']:.3f}  {row['bytes'] / 1e6:.2f} MB"
            f"  {seconds:.1f} s",
            flush=True,
        )
        return row

    def source_row(self) -> dict[str, Any]:
        """The unquantized model against itself: its perplexity and size."""
        return self.row("unquantized", 16, -1, self.subject.folder, 0.0)

    def run(self, case: Case) -> dict[str, Any]:
        """Quantizes and judges; a case that cannot be stored or quantized is a row with the reason."""
        out = self.folder / "case"
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        try:
            qp.quantize(self.source, out, verify=False, **options_of(self.subject, case))
        except QuantpressError as error:
            print(f"{self.subject.name} {case}: {error}", flush=True)
            return {
                "model": self.subject.name, "method": case.method.name, "bits": case.bits,
                "group_size": case.group_size, "error": str(error),
            }  # fmt: skip
        return self.row(case.method.name, case.bits, case.group_size, out, time.perf_counter() - start)


def rows_of(subject: Subject, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Gives all rows of a model."""
    bench = Bench(subject, folder)
    yield bench.source_row()
    for case in cases(subject, quick=options.quick):
        if not options.methods or case.method.options["method"] in options.methods:
            yield bench.run(case)
    if subject.name == LAYERS_OF[0]:
        for peer in peers(subject, folder, options, quick=options.quick):
            start = time.perf_counter()
            out = peer.make()
            yield bench.row(peer.name, peer.bits, peer.group_size, out, time.perf_counter() - start)


def main() -> None:
    """Runs everything and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with models/ and text/")
    parser.add_argument("--smollm2", type=Path, help="checkpoint folder of SmolLM2-135M")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="Python of an environment with gptqmodel")
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="Python of an environment with llmcompressor")
    parser.add_argument("--model", help="only this one")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--quick", action="store_true", help="few cases, few windows")
    parser.add_argument("--name", default="quality", help="name of the results files")
    options = parser.parse_args()
    logging.getLogger("quantpress").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = subjects(options.data, options.smollm2, folder, quick=options.quick)
        chosen = [subject for subject in chosen if options.model in (None, subject.name)]
        rows = [row for subject in chosen for row in rows_of(subject, folder, options)]
    described = {
        each.name: {
            "calibration": each.calibration.name, "test": each.test.name, "samples": each.samples,
            "length": each.length, "context": each.context, "chunks": each.chunks, "odd": each.odd,
            "commit": git_commit(), "machine": machine(), "quick": options.quick,
        }
        for each in chosen
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    result = with_others({"subjects": described, "rows": rows}, path)
    path.write_text(json.dumps(result, indent=2) + "\n")
    write_report(result, RESULTS, options.name)


def with_others(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """Adds the models of an earlier run that this one has not run again."""
    earlier = json.loads(path.read_text()) if path.exists() else {"subjects": {}, "rows": []}
    kept = [row for row in earlier["rows"] if row["model"] not in result["subjects"]]
    return {"subjects": {**earlier["subjects"], **result["subjects"]}, "rows": [*kept, *result["rows"]]}


if __name__ == "__main__":
    main()

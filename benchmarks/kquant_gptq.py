"""Measures what each part of GPTQ inside ggml's blocks gains, type by type, on the inputs of a real model.

    python benchmarks/kquant_gptq.py MODEL --calibration TEXT --text TEXT [--types ...] [--samples N] [--layers N ...]

The inputs of some layers are measured on both texts. The first matrix of every site is quantized with the calibration
text's Hessian; figures are mean relative errors of its outputs (geometric means over the matrices) on either text: one
that falls on the first and not on the second would be no gain. Writes results/kquant_gptq.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from machine import git_commit, machine
from numpy.typing import NDArray
from run import RESULTS

from quantpress.convert.calibration.site import Site, SiteResult
from quantpress.convert.calibration.walk import calibrate
from quantpress.convert.calibration.windows import calibration_windows
from quantpress.convert.open import open_checkpoint
from quantpress.convert.tokenizer import Tokenizer
from quantpress.convert.tokenizer_files import TokenizerFiles
from quantpress.quant.block_gptq import block_gptq_shared
from quantpress.quant.block_refine import SWEEPS
from quantpress.quant.ggml.blocks import BlockTensor
from quantpress.quant.ggml.codec import quantize_rows
from quantpress.quant.gptq import GptqOptions

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
VARIANTS: dict[str, tuple[GptqOptions, int]] = {
    "left to right, not refined": (GptqOptions(act_order=False), 0),
    "not refined": (GptqOptions(), 0),
    "1 sweep": (GptqOptions(), 1),
    "2 sweeps": (GptqOptions(), 2),
    "4 sweeps": (GptqOptions(), 4),
    "8 sweeps": (GptqOptions(), 8),
    "damping 0.001": (GptqOptions(damping=0.001), SWEEPS),
    "damping 0.03": (GptqOptions(damping=0.03), SWEEPS),
    "damping 0.1": (GptqOptions(damping=0.1), SWEEPS),
}


@dataclass
class Watch:
    """Quantizes nothing and keeps the sites of some layers."""

    layers: Sequence[int]
    seen: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=dict)
    wants: frozenset[str] = frozenset({"hessian"})
    sequential: bool = True

    def quantize(self, sites: Sequence[Site], plain: Mapping[str, Any]) -> SiteResult:
        """Keeps the first weight of each site, and the Hessian."""
        del plain
        for site in sites:
            if site.layer in self.layers and site.hessian is not None:
                slot, weight = next(iter(site.weights.items()))
                self.seen[f"{site.layer} {slot}"] = weight.copy(), site.hessian.copy()
        return SiteResult({})


def inputs(model: Path, text: Path, options: argparse.Namespace) -> Watch:
    """Measures a model's inputs on a text."""
    checkpoint = open_checkpoint(model)
    tokenizer = Tokenizer(TokenizerFiles(checkpoint.tokenizer_files, name=checkpoint.name))
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), special=False)
    windows = calibration_windows(ids, samples=options.samples, length=options.length)
    watch = Watch(options.layers)
    with tempfile.TemporaryDirectory() as folder:
        for _ in calibrate(checkpoint, windows, watch, targets=lambda _name: True, threads=2, folder=Path(folder)):
            pass
    return watch


def relative(weight: NDArray[np.float32], tensor: BlockTensor, hessian: NDArray[np.float32]) -> float:
    """Squared error of the outputs over their power."""
    off = tensor.dequantize().astype(np.float64) - weight
    wide = weight.astype(np.float64)
    return float(((off @ hessian) * off).sum() / ((wide @ hessian) * wide).sum())


def made(kind: str, weight: NDArray[np.float32], hessian: NDArray[np.float32]) -> Iterator[tuple[str, BlockTensor]]:
    """Quantizes a matrix in every way."""
    yield "plain", BlockTensor(kind, quantize_rows(kind, weight))
    yield "importance", BlockTensor(kind, quantize_rows(kind, weight, hessian.diagonal().copy()))
    for name, (options, sweeps) in VARIANTS.items():
        ((tensor, _),) = block_gptq_shared([weight], hessian, [kind], options, sweeps=sweeps)
        yield name, tensor


def measured(kind: str, own: Watch, other: Watch) -> list[dict[str, Any]]:
    """Gives a row per variant."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for place, (weight, hessian) in own.seen.items():
        started = time.process_time()
        for name, tensor in made(kind, weight, hessian):
            spent = time.process_time() - started
            both = relative(weight, tensor, hessian), relative(weight, tensor, other.seen[place][1])
            found.setdefault(name, []).append((*both, spent))
            started = time.process_time()
    rows = []
    for name, figures in found.items():
        logs = np.log([pair[:2] for pair in figures]).mean(axis=0)
        seconds = sum(row[2] for row in figures)
        errors = {"calibration": float(np.exp(logs[0])), "text": float(np.exp(logs[1]))}
        rows.append({"type": kind, "variant": name, **errors, "cpu_s": round(seconds, 3)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="another one, to judge on")
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    own, other = (inputs(options.model, text, options) for text in (options.calibration, options.text))
    subject = {
        "commit": git_commit(), "machine": machine(), "calibration": options.calibration.name,
        "text": options.text.name, "samples": options.samples, "length": options.length, "layers": options.layers,
        "rows": [row for kind in options.types for row in measured(kind, own, other)],
    }  # fmt: skip
    path = RESULTS / "kquant_gptq.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[options.model.name] = subject
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

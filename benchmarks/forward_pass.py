"""Measures what calibrated quantization cannot do without: the forward pass over the windows, and one factor a site.

    python forward_pass.py MODEL WINDOWS.npy

One JSON line. The forward pass is the plain decoder on resident float32 weights, embedding and layers, no head and
nothing gathered; the best of two batch sizes. The factor is one Cholesky and one triangular inverse per distinct input
of a layer, in torch, of a random matrix of that size. Both use all processors, as torch does by itself.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from quantpress.convert.model import Decoder
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.weights import CheckpointWeights

BATCHES = (1, 4)
SITES = ("hidden", "q", "hidden", "ffn")  # inputs of q/k/v, of the output projection, of gate/up, of down


def forward_seconds(model: Path, windows: np.ndarray) -> tuple[dict[str, float], list[int], int]:
    """Gives seconds per batch size, the input sizes of a layer's sites, and the number of layers."""
    source = open_checkpoint(model)
    checked = preflight(source)
    weights = CheckpointWeights(source, checked.spec, checked.hyper)
    decoder = Decoder(weights, checked.spec, checked.hyper, resident=True)
    taken: dict[str, float] = {}
    with torch.inference_mode():
        decoder.logits(torch.from_numpy(windows[:1, :8].astype(np.int64)))  # reads the weights
        for batch in BATCHES:
            start = time.perf_counter()
            for first in range(0, len(windows), batch):
                hidden = decoder.embed(torch.from_numpy(windows[first : first + batch].astype(np.int64)))
                for layer in range(checked.hyper.layers):
                    hidden = decoder.run_layer(layer, hidden)
            taken[str(batch)] = round(time.perf_counter() - start, 3)
    return taken, [checked.hyper.dims[name] for name in SITES], checked.hyper.layers


def factor_seconds(sizes: list[int], layers: int) -> float:
    """Gives seconds of all factors of the model; the best of three of each size counts."""
    generator = torch.Generator().manual_seed(0)
    best: dict[int, float] = {}
    for size in set(sizes):
        inputs = torch.randn(2 * size, size, generator=generator)
        hessian = inputs.T @ inputs
        for _ in range(3):
            start = time.perf_counter()
            lower = torch.linalg.cholesky(hessian)
            torch.linalg.solve_triangular(lower, torch.eye(size), upper=False)
            best[size] = min(best.get(size, np.inf), time.perf_counter() - start)
    return layers * sum(best[size] for size in sizes)


def main() -> None:
    """Prints the figures."""
    windows = np.load(sys.argv[2])
    taken, sizes, layers = forward_seconds(Path(sys.argv[1]), windows)
    figures = {
        "forward_s_by_batch": taken,
        "forward_s": min(taken.values()),
        "factor_s": round(factor_seconds(sizes, layers), 3),
        "threads": torch.get_num_threads(),
        "tokens": int(windows.size),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

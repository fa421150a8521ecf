"""Measures what a judge could keep of a source: bytes, seconds, and what it does to the figures of a verdict.

    python benchmarks/references.py MODEL... [--text TEXT] [--chunks N]

Each model is pressed to three types; each file's logits (llama.cpp's) are compared with what each form has kept. Errors
are against float32 logits of the source that never left the memory. Figures go to benchmarks/results/references.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import git_commit, machine
from numpy.typing import NDArray

from quantpress.convert.open import open_checkpoint
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.candidate import open_runtime
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.stage import RunContext
from quantpress.pipelines.token_figures import TokenFigures, token_figures
from quantpress.pipelines.torch_runtime import TorchRuntime
from quantpress.pipelines.windows import read_text, text_windows

TYPES = ("f16", "q8_0", "q4_0")
CONTEXT = 512
NATS = 16.0  # llama.cpp keeps no logit that is so much below the row's largest (tools/perplexity/perplexity.cpp)
RESULTS = Path(__file__).resolve().parent / "results" / "references.json"
# vocabulary and hidden size, from their config.json
KNOWN = {
    "SmolLM2-135M": (49152, 576),
    "Qwen2.5-0.5B": (151936, 896),
    "gemma-3-1b": (262144, 1152),
    "Llama-3.1-8B": (128256, 4096),
    "Llama-3.1-70B": (128256, 8192),
}

Arrays = list[NDArray[Any]]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """What is known of one window: states (n, H), logits (n, V) of the source, tokens that follow (n,)."""

    hidden: NDArray[np.float32]
    logits: Logits
    targets: NDArray[np.int32]


@dataclass(frozen=True)
class Form:
    """A way to keep a source.

    Attributes:
        pack: what is written of a window.
        judge: figures of a candidate's logits beside it, and whether the likeliest token is the same.
        nbytes: per token: for each token of the vocabulary, for each hidden value, and besides.
    """

    name: str
    pack: Callable[[Row], Arrays]
    judge: Callable[[Arrays, Logits, NDArray[np.int32]], tuple[TokenFigures, NDArray[np.bool_]]]
    nbytes: tuple[int, int, int]


def whole(
    baseline: Logits, candidate: Logits, targets: NDArray[np.int32]
) -> tuple[TokenFigures, NDArray[np.bool_]]:  # fmt: skip
    """Compares whole rows of logits."""
    agree = baseline.argmax(axis=1) == candidate.argmax(axis=1)
    return token_figures(baseline, candidate, targets), agree


def packed_16_bits(row: Row) -> Arrays:
    """Keeps log-probabilities as llama.cpp's --kl-divergence-base does: 16 bits between the least and the largest."""
    highest = row.logits.max(axis=1, keepdims=True)
    lowest = np.maximum(row.logits.min(axis=1, keepdims=True), highest - np.float32(NATS))
    scale = (highest - lowest) / np.float32(65535)
    levels = np.rint(np.maximum(row.logits - lowest, 0) / scale).astype(np.uint16)
    total = np.log(np.exp((row.logits - highest).astype(np.float64)).sum(axis=1, keepdims=True))
    return [scale, (lowest - highest - total).astype(np.float32), levels]


def judge_16_bits(kept: Arrays, candidate: Logits, targets: NDArray[np.int32]) -> Any:
    """Compares as llama.cpp does: what is less likely than exp(-16) is left out, and nothing is made to sum to one."""
    scale, least, levels = kept
    base = levels.astype(np.float64) * scale + least
    other = log_probabilities(candidate)
    divergence = np.where(base > -NATS, np.exp(base) * (base - other), 0).sum(axis=1)
    rows = np.arange(len(targets))
    figures = TokenFigures(divergence, -base[rows, targets], -other[rows, targets])
    return figures, base.argmax(axis=1) == candidate.argmax(axis=1)


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def packed_top(row: Row, count: int) -> Arrays:
    """Keeps the largest log-probabilities, and that of the token that follows."""
    values = log_probabilities(row.logits)
    places = np.argsort(-values, axis=1, kind="stable")[:, :count].astype(np.int32)
    best = np.take_along_axis(values, places, axis=1).astype(np.float32)
    return [places, best, values[np.arange(len(values)), row.targets].astype(np.float32)]


def judge_top(kept: Arrays, candidate: Logits, targets: NDArray[np.int32]) -> Any:
    """Gives KL divergence with all other tokens as one: never more than the true one."""
    places, best, chosen = kept
    other = log_probabilities(candidate)
    found = np.take_along_axis(other, places, axis=1)
    weights = np.exp(best.astype(np.float64))
    tails = [np.maximum(1 - part.sum(axis=1), 1e-300) for part in (weights, np.exp(found))]
    divergence = (weights * (best - found)).sum(axis=1) + tails[0] * (np.log(tails[0]) - np.log(tails[1]))
    figures = TokenFigures(divergence, -chosen.astype(np.float64), -other[np.arange(len(other)), targets])
    return figures, places[:, 0] == candidate.argmax(axis=1)


def forms(runtime: TorchRuntime) -> list[Form]:
    """Gives the forms; those with states need the head."""

    def judge_states(kept: Arrays, candidate: Logits, targets: NDArray[np.int32]) -> Any:
        return whole(runtime.head(torch.from_numpy(kept[0].astype(np.float32)))[:-1], candidate, targets)

    def top(count: int) -> Form:
        return Form(
            f"{count} most likely tokens and the rest as one", lambda row: packed_top(row, count), judge_top,
            (0, 0, count * 8 + 4),
        )  # fmt: skip

    return [
        Form("float32 logits", lambda row: [row.logits], lambda kept, *rest: whole(kept[0], *rest), (4, 0, 0)),
        Form("16-bit log-probabilities (llama.cpp)", packed_16_bits, judge_16_bits, (2, 0, 8)),
        top(64),
        top(256),
        Form("float16 hidden states", lambda row: [row.hidden.astype(np.float16)], judge_states, (0, 2, 0)),
        Form("float32 hidden states", lambda row: [row.hidden], judge_states, (0, 4, 0)),
    ]


def summary(figures: Sequence[TokenFigures], agree: Sequence[NDArray[np.bool_]]) -> dict[str, float]:
    divergence = np.concatenate([each.divergence for each in figures])
    base, other = (np.concatenate([getattr(each, side) for each in figures]) for side in ("baseline", "candidate"))
    return {
        "mean_kld": float(divergence.mean()),
        "kld_p99": float(np.quantile(divergence, 0.99)),
        "perplexity": float(np.exp(base.mean())),
        "ppl_ratio": float(np.exp((other - base).mean())),
        "top1": float(np.concatenate(agree).mean()),
    }


def load(path: Path, shapes: Arrays) -> Arrays:
    """Reads what was kept of a window from the disk."""
    with path.open("rb") as file:
        return [np.fromfile(file, each.dtype, each.size).reshape(each.shape) for each in shapes]


def keep(form: Form, rows: Sequence[Row], folder: Path) -> tuple[list[tuple[Path, Arrays]], float]:
    """Writes all windows and lets go of the pages; gives files with empty arrays of their forms, and seconds."""
    start, files = time.perf_counter(), []
    for number, row in enumerate(rows):
        arrays, path = form.pack(row), folder / f"{number}.bin"
        with path.open("wb") as file:
            for array in arrays:
                np.ascontiguousarray(array).tofile(file)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        files.append((path, [np.empty(array.shape, array.dtype) for array in arrays]))
    return files, time.perf_counter() - start


def compare_form(form: Form, rows: Sequence[Row], candidates: dict[str, list[Logits]], folder: Path) -> dict[str, Any]:
    """Keeps a source in one form and judges every candidate by it; seconds are of all windows, per output."""
    files, writing = keep(form, rows, folder)
    nbytes = sum(path.stat().st_size for path, _ in files)
    found, seconds = {}, []
    for ftype, logits in candidates.items():
        figures, agree = [], []
        start = time.perf_counter()
        for (path, shapes), row, other in zip(files, rows, logits, strict=True):
            one, same = form.judge(load(path, shapes), other, row.targets)
            figures.append(one)
            agree.append(same)
        seconds.append(time.perf_counter() - start)
        found[ftype] = summary(figures, agree)
    return {"form": form.name, "bytes": nbytes, "write_seconds": writing, "judge_seconds": seconds, "figures": found}


def measure(model: Path, text: Path | None, chunks: int) -> dict[str, Any]:
    source = open_checkpoint(model)
    tokenizer = Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))
    windows = text_windows(tokenizer, read_text(text).text, context=CONTEXT, chunks=chunks)
    first = CONTEXT // 2
    runtime = TorchRuntime.of_checkpoint(source)
    start = time.perf_counter()
    runtime.prepare(windows, first)
    layers = time.perf_counter() - start
    rows = [
        Row(runtime.prepared(window, first), runtime.logits(window, first)[:-1], window[first + 1 :])
        for window in windows
    ]
    with tempfile.TemporaryDirectory() as folder:
        candidates = {ftype: judged(source, ftype, windows, Path(folder)) for ftype in TYPES}
        exact = {ftype: summary(*unkept(rows, logits)) for ftype, logits in candidates.items()}
        kept = [compare_form(form, rows, candidates, Path(folder)) for form in forms(runtime)]
    tokens = len(windows) * (CONTEXT - first - 1)
    return {
        "model": source.name, "vocabulary": runtime.vocab_size, "hidden": runtime.hidden_size, "tokens": tokens,
        "layers_seconds": layers, "exact": exact, "forms": kept,
    }  # fmt: skip


def unkept(rows: Sequence[Row], candidate: list[Logits]) -> Any:
    """Compares with logits that never left the memory."""
    return zip(
        *(whole(row.logits, other, row.targets) for row, other in zip(rows, candidate, strict=True)), strict=True
    )


def judged(source: Any, ftype: str, windows: Sequence[NDArray[np.int32]], folder: Path) -> list[Logits]:
    """Gives the logits of a file of a type."""
    artifact = Gguf(output=folder / f"{ftype}.gguf", outtype=ftype).run(source, RunContext())
    with open_runtime(artifact.path, JudgeOptions(), context=CONTEXT) as runtime:
        return [runtime.logits(window, CONTEXT // 2)[:-1] for window in windows]


def show(result: dict[str, Any]) -> None:
    """Prints the worst error of each form, relative but for top-1."""
    print(f"\n{result['model']}: {result['tokens']} tokens, layers {result['layers_seconds']:.2f} s")
    for form in result["forms"]:
        worst = {}
        for name in ("mean_kld", "kld_p99", "perplexity", "ppl_ratio", "top1"):
            pairs = [(form["figures"][ftype][name], result["exact"][ftype][name]) for ftype in TYPES]
            scale = [1.0 if name == "top1" else exact for _, exact in pairs]
            worst[name] = max(abs(a - b) / s for (a, b), s in zip(pairs, scale, strict=True))
        form["worst_error"] = worst
        errors = " ".join(f"{name} {value:.2g}" for name, value in worst.items())
        median = sorted(form["judge_seconds"])[len(form["judge_seconds"]) // 2]
        print(f"{form['form']:44} {form['bytes'] / 1e6:9.3f} MB  {median:6.2f} s per output  {errors}", flush=True)


def main() -> None:
    """Measures every model that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--chunks", type=int, default=8)
    options = parser.parse_args()
    results = []
    for model in options.models:
        results.append(measure(model, options.text, options.chunks))
        show(results[-1])
    each = {form.name: form.nbytes for form in forms(TorchRuntime.__new__(TorchRuntime))}
    sizes = {
        name: {form: v * vocabulary + h * hidden + more for form, (v, h, more) in each.items()}
        for name, (vocabulary, hidden) in KNOWN.items()
    }
    record = {"commit": git_commit(), "machine": machine(), "models": results, "bytes_per_token": sizes}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()

"""Batches to report on: real outputs of a tiny model, and sidecars of any size made up in the same form."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantpress.pipelines.batch.results import BatchResult, JobResult, OutputResult
from quantpress.pipelines.runner import Pressed

PIPELINE = Path("/somewhere/release.yaml")
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def output_of(pressed: Pressed, state: str = "done") -> OutputResult:
    """What a batch says of an output that was just written."""
    artifact = pressed.artifact
    sidecar = json.loads(pressed.sidecar.read_text())
    size = sum(each.nbytes for each in artifact.outputs)
    name = sidecar["stages"][-1]["name"]
    return OutputResult(name, str(artifact.path), artifact.kind, artifact.ftype, size, state, sidecar)


def parity(kld: float = 0.01, ratio: float = 1.002, *, passed: bool = True, **more: Any) -> dict[str, Any]:
    """The figures of a proof."""
    return {
        "text_sha256": "ab" * 32,
        "tokens": 2040,
        "context": 512,
        "baseline": {"runtime": "torch", "perplexity": 95.8, "stderr": 5.3},
        "candidate": {"runtime": "llama.cpp", "perplexity": 95.8 * ratio, "stderr": 5.31},
        "ppl_ratio": ratio,
        "mean_kld": kld,
        "kld_p99": 5 * kld,
        "max_kld": 9 * kld,
        "top1_agreement": 0.93,
        "limits": {"max_kld": 0.6, "max_ppl_change": 0.9, "min_top1": 0.38},
        "passed": passed,
        "reason": "all figures are within the limits" if passed else f"mean KL divergence {kld} is above 0.6",
        **more,
    }


def tensor(name: str, error: float | None, kind: str = "Q8_0", nbytes: int = 1088, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "bytes": nbytes, "relative_error": error, **more}


def sidecar(*, tensors: Sequence[Mapping[str, Any]] = (), proof: Any = None, **more: Any) -> dict[str, Any]:
    """A sidecar of a made-up output."""
    found: dict[str, Any] = {
        "created_by": "quantpress 0.1.0",
        "inputs": [{"name": "model.safetensors", "sha256": "cd" * 32, "bytes": 1000}],
        "adapters": [],
        "stages": [{"name": "gguf", "version": 1, "options": {"output": "x.gguf", "outtype": "q8_0", "pure": False}}],
        "environment": {"device": "cpu", "packages": {"numpy": "2.0.0"}, "python": "3.11.7"},
        "outputs": [{"name": "x.gguf", "sha256": "ef" * 32, "bytes": 1088}],
        "tensors": list(tensors),
        "notes": [],
        "parity": parity() if proof is None else proof,
        "timings": {"open": {"seconds": 0.5, "peak_rss": 1 << 20}, "gguf": {"seconds": 2.0, "peak_rss": 3 << 20}},
    }
    return {**found, **more}


def output(
    name: str = "x.gguf", *, nbytes: int = 1088, kind: str = "gguf", ftype: str = "Q8_0", **more: Any
) -> OutputResult:
    record = more.pop("sidecar", None)
    record = copy.deepcopy(record) if record is not None else sidecar(**more)
    return OutputResult("gguf", str(PIPELINE.parent / "out" / name), kind, ftype, nbytes, "done", record)


def batch(*outputs: OutputResult, failed: Sequence[JobResult] = ()) -> BatchResult:
    """A batch with a job for every output, and some that failed."""
    jobs = [JobResult(f"job-{place}", "verified", (each,)) for place, each in enumerate(outputs)]
    return BatchResult(PIPELINE, (*jobs, *failed), 12.5)

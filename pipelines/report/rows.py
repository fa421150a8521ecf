"""What a report says of one output: figures out of its sidecar, typed, and None where there is no figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from quantpress.pipelines.batch.results import BatchResult, OutputResult
from quantpress.pipelines.report.values import count, items, mapping, number, plain, text

__all__ = ["Row", "location", "rows_of", "source_of"]

_EXACT_BITS = {"F64": 64.0, "F32": 32.0, "F16": 16.0, "BF16": 16.0}


@dataclass(frozen=True, slots=True)
class Row:
    """One output.

    Attributes:
        anchor: name of the row in the document: "o1", "o2", ...
        job: the job's name.
        path: the output relative to the pipeline file where it lies below that, else its name or URL.
        name: last part of the path.
        kind: "gguf", "onnx", "safetensors" or what a third-party stage calls it.
        ftype: name of the main type.
        nbytes: of all files.
        bits: stored bits per weight, or None where the number of weights is not known.
        perplexity, stderr: of the output; `baseline` is the source's.
        ppl_ratio, mean_kld, kld_p99, max_kld, top1: as in `parity`.
        verdict: "passed", "failed" or "not proved".
        reason: why.
        seconds, peak_rss: of the run that wrote it.
        state: "done" or "cached".
        source: key of what it was made from, see `source_of`.
        sidecar: everything else.
        output: as the batch has it.
    """

    anchor: str
    job: str
    path: str
    name: str
    kind: str
    ftype: str
    nbytes: int
    bits: float | None
    perplexity: float | None
    stderr: float | None
    baseline: float | None
    ppl_ratio: float | None
    mean_kld: float | None
    kld_p99: float | None
    max_kld: float | None
    top1: float | None
    verdict: str
    reason: str
    seconds: float | None
    peak_rss: int
    state: str
    source: tuple[Any, ...]
    sidecar: Mapping[str, Any]
    output: OutputResult

    @property
    def method(self) -> str:
        """How codes were found, "gptq", where a stage before the writing one or an option says so; else empty."""
        stages = items(self.sidecar.get("stages"))
        before = [text(stage.get("name"), 40) for stage in stages[:-1] if stage.get("name") != "merge_lora"]
        own = text(mapping(stages[-1].get("options")).get("method"), 40) if stages else ""
        return " ".join(filter(None, [*before, own]))

    @property
    def label(self) -> str:
        """What to call the output among others of its source: "gptq Q4_0"."""
        return f"{self.method} {self.ftype}".strip()

    @property
    def folder(self) -> str:
        """What stands before the name in the path, with its slash; empty where nothing does."""
        return self.path.rstrip("/").removesuffix(self.name)


def rows_of(result: BatchResult) -> tuple[Row, ...]:
    """Gives a row for every output of a batch, in the order of its jobs."""
    pairs = [(job.name, output) for job in result.jobs for output in job.outputs]
    rows = [_row(f"o{place}", job, output, result.pipeline.parent) for place, (job, output) in enumerate(pairs, 1)]
    known: dict[tuple[Any, ...], int] = {}
    for row in rows:
        if weights := _weights(row):
            known.setdefault(row.source, weights)
    return tuple(replace(row, bits=_bits(row, known.get(row.source, 0))) for row in rows)


def _row(anchor: str, job: str, output: OutputResult, folder: Path) -> Row:
    sidecar = mapping(output.sidecar)
    parity = mapping(output.parity)
    candidate, baseline = mapping(parity.get("candidate")), mapping(parity.get("baseline"))
    path = location(output.path, folder)
    seconds, peak = _timings(sidecar)
    return Row(
        anchor=anchor,
        job=plain(job),
        path=path,
        name=PurePosixPath(path.rstrip("/")).name or path,
        kind=plain(output.kind, 40),
        ftype=plain(output.ftype, 40),
        nbytes=output.nbytes,
        bits=None,
        perplexity=number(candidate.get("perplexity")),
        stderr=number(candidate.get("stderr")),
        baseline=number(baseline.get("perplexity")),
        **{key: number(parity.get(key)) for key in ("ppl_ratio", "mean_kld", "kld_p99", "max_kld")},
        top1=number(parity.get("top1_agreement")),
        verdict=_verdict(output.parity),
        reason=text(parity.get("reason"), 600),
        seconds=seconds,
        peak_rss=peak,
        state=plain(output.state, 40),
        source=source_of(sidecar),
        sidecar=sidecar,
        output=output,
    )


def _verdict(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return "not proved"
    return "passed" if parity.get("passed") is True else "failed"


def _timings(sidecar: Mapping[str, Any]) -> tuple[float | None, int]:
    steps = [mapping(step) for step in mapping(sidecar.get("timings")).values()]
    seconds = [found for step in steps if (found := number(step.get("seconds"))) is not None]
    return (sum(seconds) if seconds else None), max((count(step.get("peak_rss")) for step in steps), default=0)


def location(path: str, folder: Path) -> str:
    """Gives an output's path as a report shows it: relative to the pipeline file, and never a stranger's home folder.

    Args:
        path: the output, or a URL.
        folder: the pipeline file's.
    """
    if "://" in path:
        return plain(path)
    for start in (folder, folder.absolute()):
        if Path(path).is_relative_to(start):
            return plain(Path(path).relative_to(start).as_posix())
    return plain(Path(path).name or path)


def source_of(sidecar: Mapping[str, Any]) -> tuple[Any, ...]:
    """Gives what tells whether two outputs were made from the same model: its files' hashes, and its adapters."""
    stages = items(sidecar.get("stages"))
    lazy = tuple(
        (text(options.get("adapter")), number(options.get("weight")))
        for stage in stages
        if stage.get("name") == "merge_lora"
        for options in [mapping(stage.get("options"))]
    )
    return tuple(sorted(text(item.get("sha256")) for item in items(sidecar.get("inputs")))), lazy


def _weights(row: Row) -> int:
    """Gives the number of weights: as the sidecar has it, or counted where every type's bits are exact; 0 unknown."""
    if said := count(row.sidecar.get("parameters")):
        return said
    if row.kind not in ("gguf", "safetensors"):  # an ONNX graph holds tables that are no weights
        return 0
    sizes = _bits_by_type()
    tensors = items(row.sidecar.get("tensors"))
    bits = [(count(tensor.get("bytes")), sizes.get(text(tensor.get("type")))) for tensor in tensors]
    return round(sum(8 * nbytes / each for nbytes, each in bits if each)) if all(each for _, each in bits) else 0


def _bits_by_type() -> Mapping[str, float]:
    """Gives bits per weight of the types that are stored without padding, scales of blocks included."""
    from gguf.constants import GGML_QUANT_SIZES  # reading it takes numpy

    blocks = {kind.name: 8 * nbytes / weights for kind, (weights, nbytes) in GGML_QUANT_SIZES.items()}
    return blocks | _EXACT_BITS


def _bits(row: Row, weights: int) -> float | None:
    stored = sum(count(tensor.get("bytes")) for tensor in items(row.sidecar.get("tensors"))) or row.nbytes
    return 8 * stored / weights if weights and stored else None

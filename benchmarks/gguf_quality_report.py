"""Table and pictures of the quality of GGUF files, from the benchmark's JSON alone.

python benchmarks/gguf_quality_report.py results/gguf_quality.json      writes them anew
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
METHODS = (
    "llama-quantize", "quantpress", "llama-quantize, imatrix", "quantpress, imatrix", "quantpress, gptq",
)  # fmt: skip
STYLES = {
    "llama-quantize": ("o", "#8c8c8c", "--"),
    "quantpress": ("x", "#4477aa", ":"),
    "llama-quantize, imatrix": ("s", "#bbbbbb", "--"),
    "quantpress, imatrix": ("+", "#66ccee", ":"),
    "quantpress, gptq": ("D", "#cc3311", "-"),
}


_EXPLAINED = (
    "Mean KL divergence in thousandths of a nat, and in brackets the change of perplexity in per cent, ± one standard"
    " error. GPTQ / plain: mean KL divergence of ours by GPTQ over that of llama-quantize's plain file."
)


def write_report(path: Path) -> None:
    """Writes gguf_quality.md and a picture per model beside the JSON."""
    subjects = json.loads(path.read_text())
    parts = ["# What GGUF file types cost, beside llama-quantize's files", ""]
    for name, subject in subjects.items():
        parts += _section(name, subject)
        _picture(subject["rows"], name, path.with_name(f"gguf_quality-{name}.svg"))
    path.with_suffix(".md").write_text("\n".join(parts))


def _section(name: str, subject: Mapping[str, Any]) -> list[str]:
    return [
        f"## {name}",
        "",
        _judged(subject),
        "",
        _EXPLAINED,
        "",
        "| type | MB | " + " | ".join(METHODS) + " | GPTQ / plain |",
        "|---" * (len(METHODS) + 3) + "|",
        *_lines(subject["rows"]),
        "",
    ]


def _judged(subject: Mapping[str, Any]) -> str:
    first = next(row for row in subject["rows"] if "tokens" in row)
    windows = f"{subject['samples']} windows of {subject['length']} tokens for GPTQ, all of it for importance"
    judged = f"Judged in llama.cpp on {first['tokens']} tokens of {subject['text']}"
    run = f"Commit {subject['commit']}, {subject['machine']['cpu']}."
    perplexity = f"Source: perplexity {first['source_perplexity']:.4f}."
    return f"{judged}; calibrated on {subject['calibration']} ({windows}). {perplexity} {run}"


def _lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for kind in dict.fromkeys(row["type"] for row in rows):
        found = {row["method"]: row for row in rows if row["type"] == kind}
        sizes = sorted({row["bytes"] for row in found.values() if "bytes" in row})
        extent = " to ".join(dict.fromkeys(f"{size / 1e6:.2f}" for size in (sizes[:1] + sizes[-1:])))
        cells = [_cell(found.get(method, {})) for method in METHODS]
        plain = found.get("llama-quantize", found.get("llama-quantize, imatrix", {}))
        ratio = _ratio(found.get("quantpress, gptq", {}), plain)
        lines.append(f"| {kind} | {extent} | " + " | ".join(cells) + f" | {ratio} |")
    return lines


def _cell(row: Row) -> str:
    if "mean_kld" not in row:
        return str(row.get("refused", ""))
    kld, error = 1e3 * row["mean_kld"], 1e3 * row["mean_kld_stderr"]
    change, change_error = 100 * (row["ppl_ratio"] - 1), 100 * row["ppl_ratio_stderr"]
    return f"{kld:.3g} ± {error:.1g} ({change:+.2f} ± {change_error:.2f})"


def _ratio(one: Row, other: Row) -> str:
    return f"{one['mean_kld'] / other['mean_kld']:.2f}" if "mean_kld" in one and "mean_kld" in other else ""


def _picture(rows: Sequence[Row], name: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "quantpress"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for method in METHODS:
        own = sorted(
            (row["bytes"], row["mean_kld"], row["type"])
            for row in rows
            if row["method"] == method and "mean_kld" in row
        )
        marker, colour, line = STYLES[method]
        sizes, divergences = [size / 1e6 for size, _, _ in own], [kld for _, kld, _ in own]
        axes.plot(sizes, divergences, marker=marker, color=colour, linestyle=line, linewidth=0.8, label=method)
        if method == "llama-quantize":
            for size, kld, kind in own:
                axes.annotate(kind, (size / 1e6, kld), textcoords="offset points", xytext=(4, 4), fontsize=6)
    axes.set(yscale="log", xlabel="file, MB", ylabel="mean KL divergence from the source, nats per token", title=name)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))

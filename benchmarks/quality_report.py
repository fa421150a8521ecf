"""Tables and pictures of the quality benchmark, from its JSON alone.

python benchmarks/quality_report.py results/quality.json      writes them anew
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def _group(size: int) -> str:
    return "row" if size == -1 else str(size)


def _kld(row: Row) -> str:
    return f"{row['mean_kld']:.2g} ± {row['mean_kld_stderr']:.1g}"


def _perplexity(row: Row) -> str:
    change, error = 100 * (row["ppl_ratio"] - 1), 100 * row["ppl_ratio_stderr"]
    return f"{row['perplexity']:.4g} ({change:+.2g} ± {error:.1g} %)" if change < 100 else f"{row['perplexity']:.4g}"


def _table(rows: Sequence[Row], cell: Callable[[Row], str]) -> list[str]:
    """One line per grid, one column per method; sizes from the smallest to the largest."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    grids = list(dict.fromkeys((row["bits"], row["group_size"]) for row in rows))
    lines = ["| bits | group | MB | " + " | ".join(methods) + " |", "|---" * (len(methods) + 3) + "|"]
    for bits, group_size in grids:
        found = {row["method"]: row for row in rows if (row["bits"], row["group_size"]) == (bits, group_size)}
        sizes = sorted(row["bytes"] for row in found.values() if "bytes" in row)
        extent = " to ".join(dict.fromkeys(f"{size / 1e6:.2f}" for size in (sizes[:1] + sizes[-1:])))
        cells = [cell(found[name]) if "bytes" in found.get(name, ()) else "" for name in methods]
        lines.append(f"| {bits} | {_group(group_size)} | {extent} | " + " | ".join(cells) + " |")
    return lines


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Ours, and those that somebody else quantized."""
    others = ("original GPTQ", "GPTQModel", "llm-compressor")
    theirs = [row for row in rows if row["method"].startswith(others)]
    return [row for row in rows if row not in theirs and row["method"] != "unquantized"], theirs


def _introduction(subject: Mapping[str, Any], source: Row) -> str:
    windows = f"{subject['samples']} windows of {subject['length']} tokens of {subject['calibration']}"
    judged = f"{source['tokens']} tokens of {subject['test']}"
    perplexity = f"{source['perplexity']:.4g} ± {source['perplexity_stderr']:.2g}"
    odd = f" No group divides the rows of {subject['odd']}: one group a row there." if subject["odd"] else ""
    size = f"{source['bytes'] / 1e6:.2f} MB"
    run = f"commit {subject['commit']}, {subject['machine']['cpu']}{', --quick' if subject['quick'] else ''}"
    return f"Calibrated on {windows}, judged on {judged}. Unquantized: perplexity {perplexity}, {size}.{odd} ({run})"


def _beside(ours: Sequence[Row], theirs: Sequence[Row]) -> list[str]:
    """The peers' rows, with ours on the same grids first."""
    grids = {(row["bits"], row["group_size"]) for row in theirs}
    same = [row for row in ours if row["method"] == "gptq" and (row["bits"], row["group_size"]) in grids]
    lines = ["", "Beside others, on the same windows:", "", "| | bits | group | mean KLD | perplexity |"]
    lines.append("|---" * 5 + "|")
    for row in sorted([*same, *theirs], key=lambda row: -row["bits"]):
        label = "**quantpress gptq**" if row["method"] == "gptq" else row["method"]
        lines.append(f"| {label} | {row['bits']} | {_group(row['group_size'])} | {_kld(row)} | {_perplexity(row)} |")
    return lines


def _section(name: str, subject: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    source = next(row for row in rows if row["method"] == "unquantized")
    ours, theirs = _split(rows)
    lines = [f"## {name}", "", _introduction(subject, source), "", "Mean KL divergence, nats per token:", ""]
    lines += [
        *_table(ours, _kld),
        "",
        "Perplexity, and its change in % with the paired standard error:",
        "",
        *_table(ours, _perplexity),
    ]
    return [*lines, *(_beside(ours, theirs) if theirs else []), ""]


def table(result: Mapping[str, Any]) -> str:
    """Gives the Markdown."""
    meaning = "± is one standard error. Sizes are of the whole checkpoint: embeddings and heads stay in 16 or 32 bit."
    lines = ["# Quantization: what it costs", "", f"Written by `benchmarks/quality.py`. {meaning}", ""]
    for name, subject in result["subjects"].items():
        lines += _section(name, subject, [row for row in result["rows"] if row["model"] == name])
    return "\n".join(lines).rstrip() + "\n"


def _plot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "quantpress"  # the same figures give the same file
    import matplotlib.pyplot as plt

    return plt


def _legend(figure: Any, panel: Any) -> None:
    """Puts one legend for all panels below them, where it hides no line."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.0))


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, bbox_inches="tight")


def size_picture(result: Mapping[str, Any], path: Path) -> None:
    """Draws the KL divergence against the size of the checkpoint, a panel per model and a line per method."""
    plt = _plot()
    names = list(result["subjects"])
    figure, panels = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        rows = [row for row in result["rows"] if row["model"] == name and "bytes" in row]
        ours, _ = _split(rows)
        for method in dict.fromkeys(row["method"] for row in ours):
            points = sorted((row["bytes"] / 1e6, row["mean_kld"]) for row in ours if row["method"] == method)
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=method)
        panel.set(title=name, xlabel="checkpoint, MB", ylabel="mean KL divergence, nats per token", yscale="log")
    _legend(figure, panels[0][0])
    _save(figure, path)
    plt.close(figure)


def layer_picture(result: Mapping[str, Any], path: Path) -> None:
    """Draws the relative error of the hidden states after each layer, a panel per number of bits."""
    plt = _plot()
    rows = [row for row in result["rows"] if "layer_errors" in row]
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    figure, panels = plt.subplots(1, max(len(widths), 1), figsize=(5 * max(len(widths), 1), 4), squeeze=False)
    for panel, bits in zip(panels[0], widths, strict=False):
        for row in rows:
            if row["bits"] == bits:
                errors = row["layer_errors"]
                label = row["method"]
                panel.plot(range(1, len(errors) + 1), errors, marker="o", markersize=3, linewidth=1, label=label)
        title = f"{rows[0]['model']}, int{bits}, groups of {rows[0]['group_size']}"
        panel.set(title=title, xlabel="layer", ylabel="relative squared error of the hidden states", yscale="log")
    _legend(figure, panels[0][0])
    _save(figure, path)
    plt.close(figure)


def write_report(result: Mapping[str, Any], folder: Path, name: str) -> None:
    """Writes `<name>.md`, `<name>-size.svg` and `<name>-layers.svg`."""
    (folder / f"{name}.md").write_text(table(result), encoding="utf-8")
    size_picture(result, folder / f"{name}-size.svg")
    if any("layer_errors" in row for row in result["rows"]):
        layer_picture(result, folder / f"{name}-layers.svg")
    print(f"wrote {name}.md and pictures to {folder}")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_report(json.loads(source.read_text()), source.parent, source.stem)

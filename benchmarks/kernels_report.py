"""Turns the results of `kernels.py` into a table and a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PEERS = ("cublas", "tinygemm", "gemlite", "gptqmodel")


def _matrices(rows: Iterable[dict[str, Any]]) -> dict[tuple[int, int, int], list[dict[str, Any]]]:
    found: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["bits"], row["columns"], row["rows"]), []).append(row)
    return found


def table(result: dict[str, Any]) -> str:
    """Gives a table in Markdown: µs, GB/s, share of a copy, and how many times slower each peer is."""
    versions = result["versions"]
    lines = [f"# Products with quantized matrices on {result['gpu']}", ""]
    lines.append(
        f"Commit {result['commit']}, torch {versions['torch']}, triton {versions['triton']}; a copy moves "
        f"{result['copy_gb_per_s']:.0f} GB/s. Columns of peers say how many times as long as ours they take."
    )
    for (bits, columns, outputs), rows in _matrices(result["rows"]).items():
        lines += [
            "",
            f"## {columns} x {outputs}, {bits} bits, groups of {rows[0]['group_size']}, {rows[0]['dtype']}",
            "",
        ]
        lines.append("| rows in | launch | µs | GB/s | of copy | " + " | ".join(_PEERS) + " |")
        lines.append("|---" * (5 + len(_PEERS)) + "|")
        for row in rows:
            launch = row["launch"]
            sizes = f"{launch['block_m']}x{launch['block_n']}x{launch['block_k']}/{launch['split_k']}"
            cells = [str(row["rows_in"]), f"{launch['kernel']} {sizes} w{launch['warps']} s{launch['stages']}"]
            cells += [f"{row['microseconds']:.1f}", f"{row['gb_per_s']:.0f}", f"{100 * row['share_of_copy']:.0f} %"]
            cells += [_cell(row["peers"].get(peer)) for peer in _PEERS]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return "failed" if "failed" in found else f"{found['times_slower']:.2f}"


def picture(result: dict[str, Any], path: Path) -> None:
    """Draws for each matrix how many times faster than cuBLAS everybody is; nothing without matplotlib."""
    matrices = _matrices(result["rows"])
    if importlib.util.find_spec("matplotlib") is None or not matrices:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    across = min(len(matrices), 4)
    down = -(-len(matrices) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(4 * across, 3 * down), squeeze=False, sharex=True)
    for axis, ((bits, columns, outputs), rows) in zip(axes.flat, matrices.items(), strict=False):
        for name in ("quantpress", *_PEERS[1:]):
            points = [(row["rows_in"], _speed(row, name)) for row in rows if _speed(row, name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", title=f"{columns} x {outputs}, {bits} bits", xlabel="rows in", ylabel="times cuBLAS")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _speed(row: dict[str, Any], name: str) -> float | None:
    dense = row["peers"]["cublas"]["microseconds"]
    if name == "quantpress":
        return float(dense / row["microseconds"])
    found = row["peers"].get(name, {}).get("microseconds")
    return None if found is None else float(dense / found)

"""Measures the quantizers of GGUF types beside libggml's: million weights per second of one thread.

    python benchmarks/quantize_types.py [--types Q4_K,Q6_K] [--runs 7]

Both get the same float32 rows and run in turn in this process; a figure is the best of several runs, by the processor
time of the thread, so that a busy machine disturbs little. libggml is the library that QUANTPRESS_LIBGGML names,
else the one inside xllamacpp. Whether the blocks are the same is counted too. `cold_cpu_s` is the processor time of the
first block in a process whose cache of compiled functions is empty.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from machine import ROOT, git_commit, machine
from run import RESULTS

from quantpress.quant.errors import LayoutError
from quantpress.quant.ggml.codec import QUANTIZED, quantize_rows
from quantpress.quant.ggml.search import SEARCHED, WEIGHTED
from quantpress.quant.ggml.types import ggml_type, row_bytes

ROWS, COLUMNS = 512, 2048
NEEDS_NO_IMPORTANCE = ("Q8_0", "TQ1_0", "TQ2_0", "MXFP4")  # libggml does not look at it
COLD = """
import time, numpy as np
from quantpress.quant.ggml.codec import quantize_rows
rows = np.ones((1, 256), np.float32)
start = time.process_time()
quantize_rows({name!r}, rows, rows[0] if {weighted} else None)
print(time.process_time() - start)
"""


def libggml() -> Path:
    """Where the library is."""
    named = os.environ.get("QUANTPRESS_LIBGGML")
    if named:
        return Path(named)
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise SystemExit("libggml is not here: install the extra llama-cpp, or set QUANTPRESS_LIBGGML")
    return next(Path(found.origin).parent.glob("xllamacpp.*.so"))


def peer(library: ctypes.CDLL, name: str, rows: np.ndarray[Any, Any], weight: np.ndarray[Any, Any] | None) -> Any:
    """The blocks that libggml makes."""
    kind = ggml_type(name)
    out = np.empty((len(rows), row_bytes(kind, rows.shape[1])), np.uint8)
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    pointer = None if weight is None else weight.ctypes.data
    function(kind.type_id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, pointer)
    return out


def timed(work: Callable[[], Any]) -> float:
    """Processor seconds of this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def cold(name: str, *, weighted: bool) -> float:
    """Processor seconds of the first block where nothing is compiled yet."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        code = COLD.format(name=name, weighted=weighted)
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def measured(library: ctypes.CDLL, name: str, *, weighted: bool, runs: int, cold_too: bool) -> dict[str, Any]:
    """One row of the results."""
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((ROWS, COLUMNS)) * 0.02).astype(np.float32)
    weight = (rng.random(COLUMNS) ** 4 * 3).astype(np.float32) if weighted else None
    few = rows[:64]  # libggml is slow at some
    ours = quantize_rows(name, rows, weight)  # compiles
    same = float((ours[:64] == peer(library, name, few, weight)).reshape(-1, ggml_type(name).block_bytes).all(1).mean())
    mine, theirs = [], []
    for _ in range(runs):
        mine.append(timed(lambda: quantize_rows(name, rows, weight)))
        theirs.append(timed(lambda: peer(library, name, few, weight)))
    speed, peers = rows.size / min(mine) / 1e6, few.size / min(theirs) / 1e6
    row: dict[str, Any] = {
        "type": name,
        "importance": weighted,
        "quantpress_million_per_s": round(speed, 1),
        "libggml_million_per_s": round(peers, 1),
        "ratio": round(speed / peers, 2),
        "same_blocks": same,
    }
    if cold_too and (name in SEARCHED or (weighted and name in WEIGHTED)):
        row["cold_cpu_s"] = round(cold(name, weighted=weighted), 2)
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measures every type that can be written, and writes benchmarks/results/quantize_types.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="names with commas; all that can be written")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--warm", action="store_true", help="leave out what compiling costs")
    parser.add_argument("--name", default="quantize_types", help="name of the results file")
    options = parser.parse_args()
    names = options.types.split(",") if options.types else list(QUANTIZED)
    library, load, rows = ctypes.CDLL(str(libggml())), os.getloadavg(), []
    for name in names:
        for weighted in (False, True):
            if weighted and name in NEEDS_NO_IMPORTANCE:
                continue
            try:
                rows.append(measured(library, name, weighted=weighted, runs=options.runs, cold_too=not options.warm))
            except (LayoutError, ImportError) as error:
                print(f"{name}: {error}", file=sys.stderr)
    result = {
        "commit": git_commit(),
        "machine": machine(),
        "load_before": load,
        "weights": [ROWS, COLUMNS],
        "runs": options.runs,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

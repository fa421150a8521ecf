"""Repeats one GPTQ calibration and says whether it ever gives other bytes.

    python benchmarks/repeat_calibration.py MODEL --keep FOLDER [--repeats N] [--load N] [--threads N] [--samples N]
        [--precision f32|bf16] [--late]

Each run is a process of its own, beside `--load` processes that do nothing but compute, so that threads start late and
wait for each other. Folder and sidecar of every run that differs from the first stay in FOLDER. `--late` has workers
compute with two threads of torch, which is what one did that was idle while another pool ended: it shows that the
number of threads of a product is in the bytes, and that this script notices.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from machine import git_commit, machine

from quantpress.pipelines.hashing import hash_file

LATE = """
import sys, torch
from quantpress.quant import workers
def late():
    torch.get_num_threads()
    torch.set_num_threads(2)
workers._use_one_thread = late
from quantpress.pipelines.cli import main
main()
"""


@contextlib.contextmanager
def loaded(processes: int) -> Iterator[None]:
    """Keeps the processor busy with so many processes."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def run(options: argparse.Namespace, folder: Path) -> str:
    """Quantizes into a folder and gives the hash of its weights."""
    program = [sys.executable, "-c", LATE] if options.late else [sys.executable, "-m", "quantpress"]
    flags = ["--bits", "4", "--group-size", "32", "--symmetric", "--scale-type", "f16", "--no-verify"]
    flags += ["--format", "compressed-tensors", "--method", "gptq", "--samples", str(options.samples)]
    flags += ["--threads", str(options.threads), "--calibration-dtype", options.precision]
    subprocess.run([*program, "-q", "quantize", str(options.model), str(folder), *flags], check=True)
    return hash_file(folder / "model.safetensors")[0]


def main() -> None:
    """Repeats, and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=lambda text: Path(text).resolve())
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--load", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--late", action="store_true")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    found: list[str] = []
    with loaded(options.load):
        for number in range(options.repeats):
            folder = (options.keep / f"run-{number}").resolve()
            started = time.perf_counter()
            found.append(run(options, folder))
            same = found[-1] == found[0]
            print(f"run {number}: {found[-1][:16]} {time.perf_counter() - started:.1f} s", flush=True)
            if same and number:
                shutil.rmtree(folder)
    differing = [number for number, digest in enumerate(found) if digest != found[0]]
    settings = {key: str(value) for key, value in vars(options).items()}
    record = {"commit": git_commit(), "machine": machine(), "settings": settings, "hashes": found}
    (options.keep / "runs.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{len(differing)} of {len(found)} runs differ from the first: {differing or 'none'}; see {options.keep}")


if __name__ == "__main__":
    main()

"""Writes every kind of output into the working folder: `python -m tests.repeat.press MODEL ADAPTER TEXT CACHE THREADS`.

A program of its own, for the hash seed, the working folder and the number of threads belong to a process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from quantpress.pipelines.cli import run
from tests.repeat.kinds import CALIBRATED, KINDS, PIPELINE

__all__ = ["main"]


def main(model: str, adapter: str, text: str, cache: str, threads: str) -> int:
    """Gives the number of commands that did not end well."""
    known = {"MODEL": model, "ADAPTER": adapter, "TEXT": text}
    failed = 0
    for name, words in {**KINDS, **CALIBRATED}.items():
        Path(name).parent.mkdir(exist_ok=True)
        failed += _failed([*_filled(words, {**known, "OUT": name}), "--threads", threads])
    pipeline = PIPELINE.replace("CACHE", cache)
    for placeholder, value in known.items():
        pipeline = pipeline.replace(placeholder, str(Path(value).absolute()))
    Path("batch.yaml").write_text(pipeline, encoding="utf-8")
    return failed + _failed(["run", "batch.yaml", "--workers", threads])


def _filled(words: Iterable[str], known: dict[str, str]) -> list[str]:
    return [known.get(word, word) for word in words]


def _failed(words: list[str]) -> bool:
    code = run(["-q", *words])
    if code:
        print("exit code", code, *words, file=sys.stderr)  # noqa: T201 - a program
    return code != 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

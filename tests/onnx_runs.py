"""Runs an exported folder in plain onnxruntime: nothing of ours but the file is in use, so it can bear witness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[Any]
Cache = Mapping[str, Array]
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class Step:
    """What one run gave: logits (B, S, vocab) in the model's type, and the cache under the names of the inputs."""

    logits: Array
    cache: Cache


class OnnxRun:
    """A session on `model.onnx` of a folder, on the CPU."""

    def __init__(self, folder: Path, *, threads: int = 1, optimize: bool = True) -> None:
        """Opens the model; a warning of onnxruntime about it goes to the standard error.

        Args:
            folder: what was exported.
            threads: of one operator.
            optimize: let onnxruntime fuse and fold.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.inputs = {each.name: each for each in self.session.get_inputs()}
        self.outputs = [each.name for each in self.session.get_outputs()]

    def empty_cache(self, batch: int) -> Cache:
        """Gives caches of no tokens, in the shapes that the model says."""
        found = {}
        for name, wanted in self.inputs.items():
            if name.startswith("past_key_values."):
                _, heads, _, size = wanted.shape
                found[name] = np.zeros((batch, heads, 0, size), _NUMPY_TYPES[wanted.type])
        return found

    def step(self, ids: Array, mask: Array | None = None, cache: Cache | None = None) -> Step:
        """Runs the model once.

        Args:
            ids: (B, S) token ids.
            mask: (B, P + S), 1 where a token is, of the P cached tokens too; all ones by default.
            cache: of the step before; none at the beginning.
        """
        cache = cache or self.empty_cache(len(ids))
        past = next(iter(cache.values())).shape[2] if cache else 0
        mask = np.ones((len(ids), past + ids.shape[1]), np.int64) if mask is None else mask
        given = {"input_ids": ids.astype(np.int64), "attention_mask": mask.astype(np.int64), **cache}
        if "position_ids" in self.inputs:
            given["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, past:]
        results = self.session.run(None, {name: given[name] for name in self.inputs})
        named = dict(zip(self.outputs, results, strict=True))
        logits = named.pop("logits")
        return Step(logits, {name.replace("present", "past_key_values"): value for name, value in named.items()})

    def logits(self, tokens: Array) -> Array:
        """Gives (S, vocab) float32 logits of one text, all of it at once."""
        return np.asarray(self.step(tokens[None]).logits[0], np.float32)

    def in_chunks(self, tokens: Array, sizes: Sequence[int]) -> Array:
        """Gives (S, vocab) float32 logits of one text, fed in pieces of these sizes and the rest token by token."""
        found, cache, start = list[Array](), None, 0
        for size in [*sizes, *[1] * (len(tokens) - sum(sizes))]:
            done = self.step(tokens[None, start : start + size], cache=cache)
            found.append(done.logits[0])
            cache, start = done.cache, start + size
        return np.concatenate(found).astype(np.float32)

    def in_batch(self, texts: Sequence[Array], *, prefill: Sequence[int], left: bool) -> list[Array]:
        """Gives the logits of texts that run together, (S, vocab) each: a padded prefill, then token by token.

        Args:
            texts: token ids; every one has the same number of tokens after its prefill.
            prefill: tokens of each text that run in the first step.
            left: whether padding stands before the tokens or after them.
        """
        ids, mask = padded([text[:count] for text, count in zip(texts, prefill, strict=True)], left=left)
        done = self.step(ids, mask)
        found = [[row[kept == 1]] for row, kept in zip(done.logits, mask, strict=True)]
        (more,) = {len(text) - count for text, count in zip(texts, prefill, strict=True)}
        for step in range(more):
            mask = np.concatenate([mask, np.ones((len(texts), 1), np.int64)], axis=1)
            column = np.array([text[count + step] for text, count in zip(texts, prefill, strict=True)])
            done = self.step(column[:, None], mask, done.cache)
            for rows, row in zip(found, done.logits, strict=True):
                rows.append(row)
        return [np.concatenate(rows).astype(np.float32) for rows in found]

    def greedy(self, tokens: Sequence[int], count: int, *, never: int | None = None) -> list[int]:
        """Continues a text with the most likely token each time, but for one that may be excluded."""
        done, added = self.step(np.array([tokens])), list[int]()
        for _ in range(count):
            last = np.array(done.logits[0, -1], np.float32)
            if never is not None:
                last[never] = -np.inf
            added.append(int(last.argmax()))
            done = self.step(np.array([added[-1:]]), cache=done.cache)
        return added


def padded(texts: Sequence[Array], *, left: bool, filler: int = 3) -> tuple[Array, Array]:
    """Gives ids and mask, (B, S) int64, of texts filled up to the longest with a token that must not matter."""
    width = max(map(len, texts))
    ids = np.full((len(texts), width), filler, np.int64)
    mask = np.zeros((len(texts), width), np.int64)
    for row, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask

"""Writes a checkpoint folder that transformers loads: one row chunk in memory at a time, all or nothing on the disk.

The byte format is written here because the safetensors library wants whole tensors; it reads the result in the tests.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantpress.convert.atomic import atomic_folder, check_replaceable, new_file, require_space
from quantpress.convert.checkpoint import DTYPES, Array, Checkpoint, LazyTensor
from quantpress.convert.files import shown
from quantpress.convert.folder_files import json_bytes, model_files, write_files
from quantpress.convert.hashed_output import HashedOutput, Written, hashed_output
from quantpress.convert.safetensors_reader import Entry
from quantpress.quant.errors import InputError, LayoutError, UsageError
from quantpress.quant.floats import count_nonfinite, to_bfloat16, to_float16, to_float32

__all__ = ["CAST_TYPES", "MAX_SHARD", "encode_header", "planned_tensors", "write_checkpoint"]

MAX_SHARD = 5_000_000_000  # bytes, as transformers' save_pretrained had it for years
# names a user may give -> safetensors' name
CAST_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("f32", "float32", "fp32"), "F32"),
    **dict.fromkeys(("f16", "float16", "fp16"), "F16"),
    **dict.fromkeys(("bf16", "bfloat16"), "BF16"),
}

_CHUNK = 16 << 20  # bytes of source values read at a time
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_CASTS: Mapping[str, Callable[[Array], Array]] = {"F32": to_float32, "F16": to_float16, "BF16": to_bfloat16}
_CONFIG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class _Job:
    """Rows [start, stop) of a tensor, to be stored as `dtype`."""

    tensor: LazyTensor
    dtype: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """Values as they are stored, how many are not finite, and how many of those were finite before."""

    values: Array
    nonfinite: int
    overflown: int


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path | str,
    *,
    dtype: str | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
    threads: int = 1,
    max_shard_nbytes: int = MAX_SHARD,
    held: bool = False,
) -> dict[Path, Written]:
    """Writes config.json, generation_config.json, the tokenizer's files and the tensors, in order, as safetensors.

    Args:
        checkpoint: what to write; its tensors are read once, by rows.
        folder: the output folder.
        dtype: "f32", "f16" or "bf16" for all floating-point tensors; None keeps each tensor's type.
        force: whether an existing model folder is replaced.
        allow_nonfinite: whether NaN and infinity are copied instead of refused.
        progress: told how many bytes of values are written.
        threads: how many read and convert; the bytes do not depend on it.
        max_shard_nbytes: greatest number of bytes of values in one file, unless a single tensor has more.
        held: the caller has the output's lock already, see `held_output`.

    Returns:
        The files that were written, in the order of their names, each with its hash and its bytes.

    Raises:
        UsageError: the output exists, or the type is not known.
        InputError: values that are not finite, or too large for the type; names tensor and count.
        OutputError, BusyError: see `atomic_folder`.
    """
    target = _target_type(dtype)
    check_replaceable(folder, force=force)
    shards = _plan(checkpoint, target, max_shard_nbytes)
    total = sum(entries[-1].end for entries in shards if entries)
    require_space(folder, total)
    counter = _Counter(total, progress)
    written: dict[str, Written] = {}
    with atomic_folder(folder, force=force, held=held) as new:
        written |= write_files(new, _small_files(checkpoint, target, shards))
        for index, entries in enumerate(shards):
            name = _shard_name(index, len(shards))
            with new_file(new / name) as file, hashed_output(file) as output:
                _write_shard(output, checkpoint, entries, allow_nonfinite, threads, counter)
                written[name] = output.finish()
    return {Path(folder) / name: written[name] for name in sorted(written)}


def planned_tensors(checkpoint: Checkpoint, dtype: str | None = None) -> list[tuple[str, tuple[int, ...], str, int]]:
    """Says what `write_checkpoint` would store: name, shape, type and bytes of each tensor, in order; reads none.

    Raises:
        UsageError: the type is not known.
    """
    target = _target_type(dtype)
    shards = _plan(checkpoint, target, MAX_SHARD)
    return [(entry.name, entry.shape, entry.dtype, entry.end - entry.begin) for shard in shards for entry in shard]


class _Counter:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress("writing", self._done, self._total)


def _target_type(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype.lower() not in CAST_TYPES:
        raise UsageError(f"--dtype {shown(dtype)} is not known; give f32, f16 or bf16")
    return CAST_TYPES[dtype.lower()]


def _stored_type(tensor: LazyTensor, target: str | None) -> str:
    return target if target is not None and tensor.dtype in _FLOATS else tensor.dtype


def _plan(checkpoint: Checkpoint, target: str | None, max_shard_nbytes: int) -> list[list[Entry]]:
    """Gives each shard's tensors, in the checkpoint's order between shards and by alignment within one."""
    groups: list[list[LazyTensor]] = [[]]
    used = 0
    for tensor in checkpoint.tensors.values():
        nbytes = tensor.size * DTYPES[_stored_type(tensor, target)].itemsize
        if groups[-1] and used + nbytes > max_shard_nbytes:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += nbytes
    return [_place(group, target) for group in groups]


def _place(group: Iterable[LazyTensor], target: str | None) -> list[Entry]:
    typed = [(tensor, _stored_type(tensor, target)) for tensor in group]
    typed.sort(key=lambda pair: -DTYPES[pair[1]].itemsize)  # wide types first: every value is then aligned
    entries: list[Entry] = []
    position = 0
    for tensor, dtype in typed:
        end = position + tensor.size * DTYPES[dtype].itemsize
        entries.append(Entry(tensor.name, dtype, tensor.shape, position, end))
        position = end
    return entries


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _small_files(checkpoint: Checkpoint, target: str | None, shards: list[list[Entry]]) -> dict[str, bytes]:
    files = model_files(checkpoint, _config(checkpoint.config, target))
    if len(shards) > 1:
        places = {entry.name: _shard_name(index, len(shards)) for index, shard in enumerate(shards) for entry in shard}
        total = sum(entries[-1].end for entries in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        files["model.safetensors.index.json"] = json_bytes(index)
    return files


def _config(config: Mapping[str, Any], target: str | None) -> dict[str, Any]:
    """Gives the configuration with the type it names, at the top and in its parts, set to the one that is written."""
    result = dict(config)
    if target is None:
        return result
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            result[key] = _CONFIG_NAMES[target]
        elif key.endswith("_config") and isinstance(value, dict):
            result[key] = _config(value, target)
    if "dtype" not in result and "torch_dtype" not in result and "model_type" in result:
        result["torch_dtype"] = _CONFIG_NAMES[target]
    return result


def encode_header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Gives the length and the header as they stand at the start of a file, padded so that values begin at 8 bytes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        place = [entry.begin, entry.end]
        table[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": place}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(
    file: HashedOutput,
    checkpoint: Checkpoint,
    entries: list[Entry],
    allow_nonfinite: bool,
    threads: int,
    counter: _Counter,
) -> None:
    file.write(encode_header(entries, {"format": "pt"}))
    jobs = (job for entry in entries for job in _jobs(checkpoint.tensors[entry.name], entry.dtype))
    nonfinite = overflown = 0
    for job, piece in _in_order(jobs, threads):
        file.write(piece.values.reshape(-1).view("u1").data)
        counter.add(piece.values.nbytes)
        nonfinite, overflown = nonfinite + piece.nonfinite, overflown + piece.overflown
        if job.stop == job.tensor.rows:
            _refuse(job, 0 if allow_nonfinite else nonfinite - overflown, overflown)
            nonfinite = overflown = 0


def _jobs(tensor: LazyTensor, dtype: str) -> Iterator[_Job]:
    step = max(1, _CHUNK * tensor.rows // max(tensor.nbytes, 1))
    for start in range(0, tensor.rows if tensor.size else 0, step):
        yield _Job(tensor, dtype, start, min(start + step, tensor.rows))


def _convert(job: _Job) -> _Piece:
    same = job.dtype == job.tensor.dtype
    values = (job.tensor.read_rows if same else job.tensor.exact_rows)(job.start, job.stop)
    if job.tensor.dtype not in _FLOATS:
        return _Piece(values, 0, 0)
    before = count_nonfinite(values)
    if same:
        return _Piece(values, before, 0)
    try:
        values = _CASTS[job.dtype](values)
    except LayoutError as error:
        raise LayoutError(f"{job.tensor.source}: tensor {shown(job.tensor.name)}: {error}") from error
    after = count_nonfinite(values)
    return _Piece(values, after, after - before)


def _in_order(jobs: Iterator[_Job], threads: int) -> Iterator[tuple[_Job, _Piece]]:
    """Converts ahead in threads, and gives the pieces in the order of the jobs."""
    if threads <= 1:
        for job in jobs:
            yield job, _convert(job)
        return
    waiting: deque[tuple[_Job, Future[_Piece]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                waiting.append((job, pool.submit(_convert, job)))
                if len(waiting) > threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _refuse(job: _Job, nonfinite: int, overflown: int) -> None:
    where = f"{job.tensor.source}: tensor {shown(job.tensor.name)}"
    if nonfinite:
        raise InputError(f"{where}: {nonfinite} of {job.tensor.size} values are NaN or infinite (--allow-nonfinite)")
    if overflown:
        raise InputError(f"{where}: {overflown} of {job.tensor.size} values are too large for {job.dtype}; use bf16")

"""What a judge needs of a source, found once and kept in a folder: later runs never read a layer of the source.

Kept are the last hidden states at the scored positions; the head makes the logits of one window at a time of them. So
a verdict is the same to the last bit as that of a `Reference` that runs the source itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.disk import remove
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.kept_states import KeptStates, open_states, write_states
from quantpress.pipelines.progress import Progress, no_progress
from quantpress.pipelines.proving import prove_again
from quantpress.pipelines.reference import Kept, Reference, base_runtime, knows, source_runtime
from quantpress.pipelines.reference_material import reference_material, sized
from quantpress.pipelines.stage import RunContext
from quantpress.pipelines.torch_runtime import TorchRuntime
from quantpress.pipelines.windows import read_text, text_windows
from quantpress.quant.errors import InputError

__all__ = ["make_reference", "open_reference", "prove_again"]

SOURCE, WITHOUT = "source.safetensors", "without.safetensors"
# Bytes of hidden states that pass through the layers together; 32 windows of 512 tokens with a hidden size of 4096.
# Where there are more, the weights are read again: for so many tokens that takes less time than computing.
_GROUP_BYTES = 256 << 20


class KeptRuntime:
    """A model of which only the head is run, on states that are kept; a `Yardstick`."""

    def __init__(self, runtime: TorchRuntime, states: KeptStates) -> None:
        """Takes the model, which reads its head when the first window is scored."""
        self._runtime, self._states = runtime, states
        self.name, self.vocab_size, self.context = runtime.name, runtime.vocab_size, runtime.context

    def prepare(
        self, windows: Sequence[NDArray[np.int32]], first: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Checks that the states of these windows are kept.

        Raises:
            InputError: they are not.
        """
        del progress
        missing = sum(not self._states.has(window, first) for window in windows)
        if missing:
            raise InputError(f"{self._states.path}: {missing} of {len(windows)} windows are not kept; remove the file")

    def logits(self, tokens: NDArray[np.int32], first: int) -> NDArray[np.float32]:
        """Scores a window that is kept; see `Runtime.logits`."""
        self.prepare([tokens], first)
        # copied into memory of torch, which is aligned as what the layers give
        hidden = torch.from_numpy(self._states.read(tokens)).clone()
        return self._runtime.head(hidden)

    def close(self) -> None:
        """Closes the model."""
        self._runtime.close()

    def __enter__(self) -> KeptRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_reference(
    source: Checkpoint, judge: JudgeOptions, folder: Path, context: RunContext, *, without: Path | None = None
) -> None:
    """Runs a source on the windows of a judge and keeps what `open_reference` needs.

    Weights are streamed: one layer is in memory at a time.

    Args:
        source: the model, adapted or not.
        judge: how files are to be judged.
        folder: where to keep it; must be there, and what another run left in it is replaced.
        context: device, memory and progress.
        without: folder of the reference of the base alone (`reference_material.shareable_base`), where there is one;
            else the base is run too and kept here.

    Raises:
        InputError: the text, the tokenizer or the source cannot be used.
        UsageError: the windows are longer than the model was made for.
        OutputError: the folder cannot be written.
    """
    chosen = dataclasses.replace(sized(judge, source), max_memory=0)
    tokenizer = Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))
    text = read_text(chosen.text).text
    assert chosen.context is not None, "filled in by sized"
    windows = text_windows(tokenizer, text, context=chosen.context, chunks=chosen.chunks)
    material = reference_material(chosen, source)
    states = _States(windows, {"material": material, "vocabulary": tokenizer.size}, context)
    states.keep(source, source_runtime(source, chosen), folder / SOURCE, "source")
    base = _base_of(source) if without is None else None
    if base is not None and knows(runtime := base_runtime(base, chosen), windows):
        states.keep(base, runtime, folder / WITHOUT, "source without adapters")
    else:
        remove(folder / WITHOUT)


def open_reference(
    source: Checkpoint,
    judge: JudgeOptions,
    folder: Path,
    progress: Progress = no_progress,
    *,
    without: Path | None = None,
) -> Reference:
    """Opens what `make_reference` has kept.

    Args:
        source: the model; only its head is read, and its tokenizer where a GGUF file is judged.
        judge: how to judge; limits and the candidates' runtime may be others than when it was made.
        folder: where it is kept.
        progress: told how far the judging has come.
        without: as for `make_reference`.

    Raises:
        InputError: it is damaged, or was made for another source, text or window length.
    """
    runtime = source_runtime(source, judge, head_only=True)
    material = reference_material(judge, source)
    states = _opened(folder / SOURCE, material, source, runtime)
    base, beside = _base_of(source), None
    path = folder / WITHOUT if without is None else without / SOURCE
    if base is not None and path.exists():
        alone = base_runtime(base, judge, head_only=True)
        beside = KeptRuntime(alone, _opened(path, material, base, alone))
    found = Kept(states.windows, states.about["vocabulary"], KeptRuntime(runtime, states), beside)
    return Reference(source, judge, progress, kept=found)


@dataclass(frozen=True, slots=True)
class _States:
    """Windows whose states are to be kept, and what is written about them."""

    windows: Sequence[NDArray[np.int32]]
    about: Mapping[str, Any]
    context: RunContext

    def keep(self, model: Checkpoint, runtime: TorchRuntime, path: Path, phase: str) -> None:
        """Runs a model on the windows and writes its states."""
        shape = len(self.windows[0]) - len(self.windows[0]) // 2, runtime.hidden_size
        states = self._states(runtime, partial(self.context.progress, phase))
        write_states(path, self.windows, states, shape=shape, about={**self.about, "model": _identity(model)})

    def _states(self, runtime: TorchRuntime, progress: Callable[[int, int], None]) -> Iterator[NDArray[np.float32]]:
        length, layers = len(self.windows[0]), runtime.layers
        size = max(1, _GROUP_BYTES // (length * runtime.hidden_size * 4))
        starts = range(0, len(self.windows), size)
        for number, start in enumerate(starts):
            group = self.windows[start : start + size]
            runtime.prepare(group, length // 2, partial(_told, progress, number * layers, len(starts)))
            for window in group:
                yield runtime.prepared(window, length // 2)
            runtime.close()  # forgets these


def _told(progress: Callable[[int, int], None], before: int, groups: int, done: int, layers: int) -> None:
    """Tells progress through one of several groups that run through all layers."""
    progress(before + done, layers * groups)


def _base_of(source: Checkpoint) -> Checkpoint | None:
    """Gives the base that an adapted source is compared with besides."""
    return source.adapted.base if source.adapted is not None and source.adapted.applied else None


def _identity(model: Checkpoint) -> str:
    """Hashes what headers say of a model: that a folder was taken for another model's is noticed by it.

    What the values are is for the key to say under which the folder is kept.
    """
    tensors = [[name, tensor.dtype, list(tensor.shape)] for name, tensor in model.tensors.items()]
    applied = model.adapted.applied if model.adapted is not None else ()
    adapters = [[one.adapter.name, one.weight] for one in applied]
    text = json.dumps([sorted(tensors), adapters, model.config], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _opened(path: Path, material: Mapping[str, Any], model: Checkpoint, runtime: TorchRuntime) -> KeptStates:
    """Opens states and checks that they are these.

    Raises:
        InputError: they are not.
    """
    states = open_states(path)
    wanted = {"material": material, "model": _identity(model)}
    wrong = [name for name, value in wanted.items() if states.about.get(name) != value]
    vocabulary = states.about.get("vocabulary")
    if wrong or not isinstance(vocabulary, int) or states.hidden.shape[2] != runtime.hidden_size:
        raise InputError(f"{path}: kept for another {' and '.join(wrong) or 'model'}; remove it, and it is made again")
    return states

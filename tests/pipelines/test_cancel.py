"""Library calls that are cancelled from another thread: they end with a typed error and leave nothing half done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantpress as qp
from quantpress.pipelines.cancel import cancellable
from quantpress.pipelines.progress import no_progress
from tests.stopped_runs import LOOSE
from tests.tiny import tiny_checkpoint

METHODS = ("rtn", "hqq", "gptq", "awq", "smoothquant")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


def cancelled_at(place: int, call: Callable[..., Any]) -> tuple[list[str], bool]:
    """Makes a call and sets its event from another thread when it tells progress for the n-th time.

    Returns:
        The phases that were told, and whether the call was cancelled; it ended otherwise if it told fewer.
    """
    cancel, told = threading.Event(), list[str]()

    def progress(phase: str, done: int, total: int) -> None:
        told.append(phase)
        if len(told) == place:
            setter = threading.Thread(target=cancel.set)
            setter.start()
            setter.join()

    try:
        call(progress=progress, cancel=cancel)
    except qp.CancelledError:
        return told, True
    return told, False


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def call_of(name: str, model: Path, out: Path) -> Callable[..., Any]:
    if name == "export_gguf":
        return lambda **k: qp.export_gguf(model, out, outtype="q8_0", verify=True, judge=LOOSE, **k)
    if name == "export_onnx":
        return lambda **k: qp.export_onnx(model, out, precision="int4", verify=True, judge=LOOSE, **k)
    if name == "export_safetensors":
        return lambda **k: qp.export_safetensors(model, out, verify=True, judge=LOOSE, **k)
    bits = 8 if name == "smoothquant" else 4
    return lambda **k: qp.quantize(
        model, out, method=name, bits=bits, samples=2, sequence_length=32, verify=True, judge=LOOSE, **k
    )


NAMES = ("export_gguf", "export_onnx", "export_safetensors", *METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_is_cancelled_leaves_nothing_half_written_and_no_thread(
    name: str, model: Path, tmp_path: Path
) -> None:
    suffix = ".gguf" if name == "export_gguf" else ""
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    threads = threading.active_count()
    told, cancelled = cancelled_at(1, call_of(name, model, first))
    assert (len(told), cancelled) == (1, True)  # it ends where it next tells progress
    assert first.name not in files_in(tmp_path)
    assert threading.active_count() == threads
    whole, cancelled = cancelled_at(10**9, call_of(name, model, first))
    assert not cancelled
    assert not [left for left in files_in(tmp_path) if left.startswith(".")]
    # when the proof's last window is told: the file is whole, and not said to be proved
    told, cancelled = cancelled_at(len(whole) - 1, call_of(name, model, second))
    assert (cancelled, told) == (True, whole[:-1])
    assert threading.active_count() == threads
    assert not [*tmp_path.glob("second.gguf.quantpress.json"), *tmp_path.glob("second/quantpress.json")]


def test_verify_and_perplexity_are_cancelled_and_give_no_verdict(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    qp.export_gguf(model, out, outtype="q8_0")
    for call in (
        lambda **k: qp.verify(out, against=model, options=LOOSE, **k),
        lambda **k: qp.perplexity(model, options=LOOSE, **k),
    ):
        whole, cancelled = cancelled_at(10**9, call)
        assert not cancelled
        for place in range(1, len(whole)):
            told, cancelled = cancelled_at(place, call)
            assert (len(told), cancelled) == (place, True)


def test_an_event_that_is_set_stops_a_call_before_it_begins(model: Path, tmp_path: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(qp.CancelledError) as caught:
        qp.export_gguf(model, tmp_path / "out.gguf", cancel=cancel)
    assert caught.value.exit_code == 130
    assert files_in(tmp_path) == []


def test_without_an_event_progress_is_as_it_was() -> None:
    assert cancellable(no_progress, None) is no_progress

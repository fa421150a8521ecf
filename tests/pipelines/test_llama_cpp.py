"""llama.cpp in its process: what it computes, and what is left when it refuses, aborts, hangs or is killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantpress.pipelines import llama_cpp, llama_cpp_find
from quantpress.pipelines.llama_cpp import LlamaCpp, LlamaCppModel, LlamaCppRuntime, find_llama_cpp, probe
from quantpress.quant.errors import InputError, OutputError, ParityError

posix = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture
def runtime(tiny_gguf: Path, library: LlamaCpp) -> Iterator[LlamaCppRuntime]:
    with LlamaCppRuntime(tiny_gguf, context=300, threads=1, library=library) as opened:
        yield opened


def reference_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()


def is_gone(pid: int) -> bool:
    """No process, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def is_gone_soon(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return is_gone(pid)


def test_logits_equal_those_of_transformers(runtime: LlamaCppRuntime, tiny_model: Any) -> None:
    tokens = np.random.default_rng(1).integers(3, 320, 300).astype(np.int32)  # more than one sub-batch of 128
    # Both sum in float32: two layers of sums over at most 300 terms of size 1 leave errors of about
    # 300 * 2^-24 = 2e-5 of the largest logit (10), with a factor 5 for luck.
    np.testing.assert_allclose(runtime.logits(tokens, 0), reference_logits(tiny_model, tokens), rtol=0, atol=1e-3)


def test_rows_begin_at_the_position_that_was_asked_for(runtime: LlamaCppRuntime) -> None:
    tokens = np.arange(3, 253, dtype=np.int32)
    everything = runtime.logits(tokens, 0)
    for first in (0, 1, 127, 128, 129, 249):
        rows = runtime.logits(tokens, first)
        assert rows.shape == (250 - first, 320)
        # Another number of rows takes another path through the matrix product: some units of 2^-23 in logits up to 8.
        np.testing.assert_allclose(rows, everything[first:], rtol=0, atol=1e-5)


def test_a_window_knows_nothing_of_the_one_before(runtime: LlamaCppRuntime) -> None:
    tokens = np.arange(3, 103, dtype=np.int32)
    before = runtime.logits(tokens, 50)
    runtime.logits(tokens[::-1].copy(), 0)
    np.testing.assert_array_equal(runtime.logits(tokens, 50), before)


def test_the_cache_is_float32(runtime: LlamaCppRuntime, tiny_model: Any) -> None:
    """An F16 cache or flash attention moves these logits by 7e-3; float32 alone stays within 2e-5."""
    tokens = np.random.default_rng(2).integers(3, 320, 128).astype(np.int32)
    assert np.abs(runtime.logits(tokens, 64) - reference_logits(tiny_model, tokens)[64:]).max() < 1e-4


def test_greedy_text_equals_that_of_transformers(runtime: LlamaCppRuntime, tiny_model: Any) -> None:
    tokens = np.array([1, 270, 280, 290], np.int32)
    expected = list(tokens)
    for _ in range(20):
        expected.append(int(reference_logits(tiny_model, np.array(expected))[-1].argmax()))
    np.testing.assert_array_equal(runtime.generate(tokens, 20), expected[4:])


def test_info_says_what_the_file_says(runtime: LlamaCppRuntime, tiny_weights: dict[str, np.ndarray]) -> None:
    info = runtime.info
    assert (info.n_vocab, info.bos, info.eos, info.add_bos, info.add_eos) == (320, 1, 2, True, False)
    assert info.n_params == sum(weight.size for weight in tiny_weights.values())
    assert (info.n_ctx_train, info.file_type) == (512, "0")
    assert runtime.vocab_size == 320
    assert runtime.name == "llama.cpp"


def test_tokens_equal_those_of_sentencepiece(stories: Any, stories_gguf: Path, library: LlamaCpp) -> None:
    text = "Once upon a time, there was a little girl. She said: naïve 火 🙂 (</s>) and left."
    model = LlamaCppModel(stories_gguf, vocab_only=True, library=library)
    tokens = model.tokenize(text)
    assert tokens.tolist() == [1, *stories[1].encode(text)]
    assert model.detokenize(tokens[1:]).strip() == text
    assert model.tokenize("</s>", parse_special=True, add_special=False).tolist() == [2]
    assert model.tokenize("", add_special=False).tolist() == []
    with pytest.raises(ValueError, match="do not fit"):
        model.logits(tokens, 0)
    model.close()


@pytest.mark.parametrize("tokens", [[], [1] * 301, [320], [-1]])
def test_windows_that_do_not_fit_never_reach_the_library(runtime: LlamaCppRuntime, tokens: list[int]) -> None:
    with pytest.raises(ValueError):
        runtime.logits(np.array(tokens, np.int32), 0)
    assert runtime.logits(np.array([1], np.int32), 0).shape == (1, 320)


def test_a_file_that_is_no_gguf_is_refused_with_the_librarys_words(tmp_path: Path, library: LlamaCpp) -> None:
    path = tmp_path / "noise.gguf"
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(InputError, match=r"noise\.gguf: llama\.cpp cannot load it; its last words: .*magic"):
        LlamaCppRuntime(path, library=library)


def test_a_truncated_file_is_refused(tmp_path: Path, tiny_gguf: Path, library: LlamaCpp) -> None:
    path = tmp_path / "short.gguf"
    content = tiny_gguf.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(InputError, match=r"short\.gguf"):
        LlamaCppRuntime(path, library=library)


def test_a_file_that_makes_it_abort_is_an_error_and_not_the_end(
    tmp_path: Path, make_tiny: Callable[..., Path], tiny_weights: dict[str, np.ndarray], library: LlamaCpp
) -> None:
    """Three key heads for four query heads: the shapes agree with the metadata, the graph cannot be built."""
    wider = {}
    for layer in range(2):
        for part in ("k", "v"):
            weight = tiny_weights[f"blk.{layer}.attn_{part}.weight"]
            wider[f"blk.{layer}.attn_{part}.weight"] = np.concatenate([weight, weight[:16]])
    path = make_tiny(tmp_path / "aborts.gguf", wider, kv_heads=3)
    with pytest.raises(InputError, match=r"aborts\.gguf: .*(SIGABRT|GGML_ASSERT|cannot)"):
        LlamaCppRuntime(path, library=library).logits(np.arange(3, 9, dtype=np.int32), 0)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_what_is_no_regular_file_is_refused_without_starting_anything(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        if os.name == "nt":
            pytest.skip("no FIFOs")
        os.mkfifo(path)
    with pytest.raises(InputError, match=r"model\.gguf"):
        LlamaCppRuntime(path)


@posix
def test_a_worker_killed_while_it_works_is_an_error_that_names_the_signal(runtime: LlamaCppRuntime) -> None:
    os.kill(runtime.pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, os.kill, (runtime.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(OutputError, match=r"tiny-F32\.gguf: llama\.cpp died from SIGKILL during 'logits'.*memory"):
        runtime.logits(np.arange(3, 103, dtype=np.int32), 0)
    killer.join()
    assert is_gone(runtime.pid)
    with pytest.raises((ParityError, OutputError)):
        runtime.logits(np.arange(3, 103, dtype=np.int32), 0)


@posix
def test_a_worker_that_crashes_is_an_error(runtime: LlamaCppRuntime) -> None:
    os.kill(runtime.pid, signal.SIGSEGV)
    with pytest.raises(ParityError, match="SIGSEGV"):
        runtime.logits(np.arange(3, 103, dtype=np.int32), 0)


@posix
def test_a_worker_that_hangs_is_stopped(runtime: LlamaCppRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime._worker, "request", limited(runtime._worker.request, seconds=0.3))
    os.kill(runtime.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(ParityError, match="no sign of progress for 0 s"):
        runtime.logits(np.arange(3, 103, dtype=np.int32), 0)
    assert time.monotonic() - started < 10
    assert is_gone(runtime.pid)


def limited(request: Callable[..., Any], *, seconds: float) -> Callable[..., Any]:
    def ask(*arguments: Any, **options: Any) -> Any:
        return request(*arguments, **(options | {"seconds": seconds}))

    return ask


@posix
def test_an_interrupt_while_it_works_leaves_no_process(runtime: LlamaCppRuntime) -> None:
    os.kill(runtime.pid, signal.SIGSTOP)
    interrupt = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        runtime.logits(np.arange(3, 103, dtype=np.int32), 0)
    assert is_gone(runtime.pid)


@posix
def test_closing_leaves_no_process_and_may_be_repeated(tiny_gguf: Path, library: LlamaCpp) -> None:
    runtime = LlamaCppRuntime(tiny_gguf, library=library)
    pid = runtime.pid
    runtime.close()
    runtime.close()
    assert is_gone(pid)


@posix
def test_a_forgotten_runtime_leaves_no_process(tiny_gguf: Path, library: LlamaCpp) -> None:
    runtime = LlamaCppRuntime(tiny_gguf, library=library)
    pid = runtime.pid
    del runtime
    gc.collect()
    assert is_gone_soon(pid)


@posix
@pytest.mark.parametrize("stopped", [False, True], ids=["idle", "exits"])
def test_the_worker_ends_when_its_parent_does(tiny_gguf: Path, library: LlamaCpp, stopped: bool) -> None:
    script = (
        "import sys, time; from pathlib import Path; from quantpress.pipelines.llama_cpp import *\n"
        "runtime = LlamaCppRuntime(sys.argv[1], library=LlamaCpp(Path(sys.argv[2]), '', ''))\n"
        "print(runtime.pid, flush=True)\n" + ("" if stopped else "time.sleep(60)\n")
    )
    command = [sys.executable, "-c", script, str(tiny_gguf), str(library.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        if not stopped:
            parent.kill()
        parent.wait()
    assert is_gone_soon(pid)


def test_probe_says_a_version(library: LlamaCpp) -> None:
    assert any(character.isdigit() for character in probe(library))


def test_a_library_that_is_none_is_an_output_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "libllama.so"
    path.write_bytes(b"\x7fELF llama_model_load_from_file")
    with pytest.raises(OutputError, match=r"libllama\.so .*pip install"):
        probe(LlamaCpp(path, "test", ""))


def test_without_any_library_the_error_says_how_to_get_one(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_llama_cpp", lambda: None)
    with pytest.raises(OutputError, match=r"was not found; install one with .*pip install"):
        LlamaCppRuntime(tiny_gguf)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A current folder and a machine without any llama.cpp."""
    monkeypatch.delenv(llama_cpp_find.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(llama_cpp_find.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(llama_cpp_find, "_system", lambda: iter(()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake_library(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF...llama_model_load_from_file...")
    return path


def test_places_are_searched_in_the_documented_order(nothing_installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = nothing_installed
    assert find_llama_cpp() is None
    npm = fake_library(here / "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64/libllama.v0.5.0.so")
    (npm.parent / "_nlcBuildMetadata.json").write_text('{"buildOptions": {"llamaCpp": {"release": "v0.5.0"}}}')
    fake_library(npm.parent / "libllama-common.so")
    found = find_llama_cpp()
    assert found == LlamaCpp(npm, "npm package @node-llama-cpp/linux-x64", "v0.5.0")
    local = fake_library(here / ".runtime/llama.cpp/bin/libllama.so")
    assert find_llama_cpp() == LlamaCpp(local, "folder .runtime/llama.cpp", "")
    named = fake_library(here / "mine" / "libllama.so")
    for value in (named, named.parent):
        monkeypatch.setenv(llama_cpp_find.ENVIRONMENT_VARIABLE, str(value))
        found = find_llama_cpp()
        assert found is not None
        assert found.path == named


@pytest.mark.parametrize("name", ["nowhere", "empty", "other.so"])
def test_a_variable_that_names_no_library_is_an_error_and_no_fallback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.so").write_bytes(b"\x7fELF")
    monkeypatch.setenv(llama_cpp_find.ENVIRONMENT_VARIABLE, str(tmp_path / name))
    with pytest.raises(OutputError, match=name):
        find_llama_cpp()


def test_finding_imports_no_package_of_others() -> None:
    script = (
        "import sys; from quantpress.pipelines.llama_cpp import find_llama_cpp; find_llama_cpp()\n"
        "assert not {'llama_cpp', 'xllamacpp', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

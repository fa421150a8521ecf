"""The ONNX graph with a cache, with padding and in batches: each text gets what transformers gives it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.onnx_graphs import Source, tiny_source, write_model
from tests.onnx_runs import OnnxRun, padded
from tests.tiny import tiny_case

LENGTH = 30  # longer than the windows (8, 5) of the tiny models
TOLERANCE = 5e-5  # as for whole texts; 1.2e-5 was the most seen
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (tiny_case(name).family, dict(tiny_case(name).options))
    for name in ("mistral-head_dim", "gemma2-caps", "gemma3-linear", "gpt2-inverse")
}
CASES["phi3-partial"] = ("phi3", {**tiny_case("phi3-partial").options, "sliding_window": 8})
LONG = "llama-longrope"  # turns texts of more than 16 tokens otherwise
CASES[LONG] = ("llama", dict(tiny_case(LONG).options))
KINDS = [(name, standard) for name in CASES if name != LONG for standard in (False, True)]

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Make = Callable[[str, bool], tuple[Source, OnnxRun]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Gives a function that makes a case and its model once."""
    sources: dict[str, Source] = {}
    runs: dict[tuple[str, bool], OnnxRun] = {}

    def one(name: str, standard: bool) -> tuple[Source, OnnxRun]:
        folder = tmp_path_factory.mktemp(name)
        if name not in sources:
            family, options = CASES[name]
            sources[name] = tiny_source(folder / "source", family, **options)
        if (name, standard) not in runs:
            runs[name, standard] = OnnxRun(write_model(folder / "onnx", sources[name], standard=standard))
        return sources[name], runs[name, standard]

    return one


def texts(*lengths: int) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(2)
    return [random.integers(4, 320, length) for length in lengths]


def close(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "standard"), KINDS)
def test_token_by_token_is_the_same_as_all_at_once(make: Make, name: str, standard: bool) -> None:
    source, run = make(name, standard)
    (tokens,) = texts(LENGTH)
    close(run.in_chunks(tokens, []), source.logits(tokens))


@pytest.mark.parametrize(("name", "standard"), KINDS)
def test_a_text_may_come_in_pieces(make: Make, name: str, standard: bool) -> None:
    source, run = make(name, standard)
    (tokens,) = texts(LENGTH)
    close(run.in_chunks(tokens, [3, 11, 1, 9]), source.logits(tokens))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize(("name", "standard"), KINDS)
def test_a_padded_batch_gives_what_each_text_gives_alone(make: Make, name: str, standard: bool, left: bool) -> None:
    source, run = make(name, standard)
    batch, prefill = texts(23, 18, 10), [19, 14, 6]
    for tokens, found in zip(batch, run.in_batch(batch, prefill=prefill, left=left), strict=True):
        close(found, source.logits(tokens))


@pytest.mark.parametrize(("name", "standard"), KINDS)
def test_padding_does_not_matter_where_it_stands_or_what_it_is(make: Make, name: str, standard: bool) -> None:
    """Padding on the left of one row and on both sides of the other, first with one filler, then with another."""
    source, run = make(name, standard)
    first, second = texts(16, 12)
    ids, mask = padded([first, second], left=True)
    ids[1], mask[1] = np.roll(ids[1], -3), np.roll(mask[1], -3)
    ids, mask = (np.concatenate([np.zeros((2, 2), np.int64), each], axis=1) for each in (ids, mask))
    for filler in (0, 250):
        done = run.step(np.where(mask == 1, ids, filler), mask)
        for row, tokens in enumerate((first, second)):
            close(done.logits[row][mask[row] == 1], source.logits(tokens))


@pytest.mark.parametrize(("name", "standard"), KINDS)
def test_a_row_may_wait_while_another_goes_on(make: Make, name: str, standard: bool) -> None:
    """One row has no token at first and pauses again later: masked columns that another row's tokens fill."""
    source, run = make(name, standard)
    first, second = texts(20, 10)
    goes = np.ones((2, 20), np.int64)
    goes[1, :4] = goes[1, 9:14] = goes[1, 19] = 0
    ids = np.full((2, 20), 11)
    ids[0], ids[1, goes[1] == 1] = first, second
    found, cache, start = list[np.ndarray[Any, Any]](), None, 0
    for stop in (3, *range(4, 21)):
        done = run.step(ids[:, start:stop], goes[:, :stop], cache)
        cache, start = done.cache, stop
        found.append(done.logits)
    logits = np.concatenate(found, axis=1)
    close(logits[0], source.logits(first))
    close(logits[1][goes[1] == 1], source.logits(second))


@pytest.mark.parametrize(("name", "standard"), KINDS)
def test_pieces_of_a_text_may_be_padded(make: Make, name: str, standard: bool) -> None:
    source, run = make(name, standard)
    (tokens,) = texts(22)
    mask = np.array([[0, 0, *[1] * 7], [*[1] * 6, 0, 0, 0], [0, *[1] * 7, 0], [1, 1, *[0] * 7]])
    ids = np.full(mask.shape, 13)
    ids[mask == 1] = tokens
    found, cache = list[np.ndarray[Any, Any]](), None
    for piece in range(len(mask)):
        done = run.step(ids[piece : piece + 1], mask[: piece + 1].reshape(1, -1), cache)
        cache = done.cache
        found.append(done.logits[0][mask[piece] == 1])
    close(np.concatenate(found), source.logits(tokens))


@pytest.mark.parametrize("standard", [False, True], ids=["contrib", "standard"])
@pytest.mark.parametrize("length", [15, 16, 17, 25])
def test_longrope_turns_by_the_length_of_each_text(make: Make, standard: bool, length: int) -> None:
    source, run = make(LONG, standard)
    (tokens,) = texts(length)
    close(run.logits(tokens), source.logits(tokens))


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("standard", [False, True], ids=["contrib", "standard"])
def test_longrope_looks_at_each_row_of_a_batch(make: Make, standard: bool, left: bool) -> None:
    """One text is long from the beginning and one stays short; transformers looks at the longest row for all."""
    source, run = make(LONG, standard)
    batch = texts(24, 13)
    for tokens, found in zip(batch, run.in_batch(batch, prefill=[19, 8], left=left), strict=True):
        close(found, source.logits(tokens))


def test_a_cache_in_one_place_is_extended_there(make: Make) -> None:
    """What genai does with `past_present_share_buffer`: past and present are the same memory, longer than the text."""
    source, run = make("gemma3-linear", False)
    (tokens,) = texts(20)
    hyper = source.hyper
    room = [np.zeros((1, hyper.kv_heads, 64, hyper.head_dim), np.float32) for _ in range(2 * hyper.layers)]
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(each) for each in room]
    found = []
    for start, stop in ((0, 12), *((place, place + 1) for place in range(12, 20))):
        binding = run.session.io_binding()
        binding.bind_output("logits")
        binding.bind_cpu_input("input_ids", tokens[None, start:stop])
        binding.bind_cpu_input("attention_mask", np.ones((1, stop), np.int64))
        for number, value in enumerate(values):
            place = f"{number // 2}.{('key', 'value')[number % 2]}"
            binding.bind_ortvalue_input(f"past_key_values.{place}", value)
            binding.bind_ortvalue_output(f"present.{place}", value)
        run.session.run_with_iobinding(binding)
        found.append(binding.copy_outputs_to_cpu()[0][0])
    close(np.concatenate(found), source.logits(tokens))

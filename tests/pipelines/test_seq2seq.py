"""T5 and its relatives: torch, GGUF in llama.cpp and ONNX in onnxruntime against transformers."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.seq2seq import EncoderDecoder
from quantpress.convert.weights import CheckpointWeights
from quantpress.pipelines.candidate import open_runtime
from quantpress.pipelines.cli import run as run_program
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.onnx_seq2seq import OnnxSeq2Seq
from quantpress.pipelines.seq2seq_windows import split_window
from quantpress.pipelines.token_figures import token_figures
from quantpress.quant.errors import InputError
from tests.seq2seq_tiny import KINDS, ROWS, answer, tiny_t5

# longer than the distances that buckets tell apart (128)
LENGTH = 340
FIRST = LENGTH // 2
# The bound of every family's proof; what is seen is 1e-13 in ONNX and 1e-7 in llama.cpp, whose GELU is a table of
# float16.
MAX_KLD = 1e-4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives a folder of a kind, made once."""
    root, done = tmp_path_factory.mktemp("t5"), dict[str, Path]()

    def make(kind: str) -> Path:
        if kind not in done:
            done[kind] = tiny_t5(root / kind, **KINDS[kind])
        return done[kind]

    return make


@pytest.fixture(scope="module")
def window() -> NDArray[np.int32]:
    return np.random.default_rng(7).integers(3, ROWS, LENGTH).astype(np.int32)


def invoke(*arguments: str | Path) -> tuple[int, str]:
    """Runs a command line in this process: exit code, and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_program(["--quiet", *map(str, arguments)])
    return code, out.getvalue() if code == 0 else out.getvalue() + err.getvalue()


def run(*arguments: str | Path) -> str:
    code, printed = invoke(*arguments)
    assert code == 0, printed
    return printed


def wanted_of(folder: Path, window: NDArray[np.int32]) -> NDArray[np.float32]:
    """What transformers says after each token of the second half, by the definition in `seq2seq_windows`."""
    asked = window[: FIRST + 1].astype(np.int64)
    given = np.concatenate([[0], window[FIRST + 1 :]]).astype(np.int64)
    return answer(folder, asked, given)


def kld(wanted: NDArray[np.float32], found: NDArray[np.float32], window: NDArray[np.int32]) -> float:
    assert found.shape == wanted.shape
    return float(token_figures(wanted[:-1], found[:-1], window[FIRST + 1 :]).divergence.mean())


def found_by(path: Path, window: NDArray[np.int32], runtime: str = "auto") -> NDArray[np.float32]:
    with open_runtime(path, JudgeOptions(runtime=runtime, threads=1), context=LENGTH) as opened:
        return opened.logits(window, FIRST)


def test_a_window_becomes_a_question_and_an_answer() -> None:
    asked, given = split_window(np.arange(10, 20, dtype=np.int32), 5, 0)
    assert asked.tolist() == [10, 11, 12, 13, 14, 15]
    assert given.tolist() == [0, 16, 17, 18, 19]  # the output at 0 predicts 16, which follows what the encoder has read


@pytest.mark.parametrize("kind", KINDS)
def test_torch_says_what_transformers_says(made: Callable[[str], Path], window: NDArray[np.int32], kind: str) -> None:
    wanted = wanted_of(made(kind), window)
    found = found_by(made(kind), window, "torch")
    # float32 sums of 96 numbers and 5 layers: 1e-5 of the greatest logit is fifty times what is seen
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_in_llama_cpp_says_what_transformers_says(
    made: Callable[[str], Path], window: NDArray[np.int32], tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("xllamacpp")
    path = tmp_path / "model.gguf"
    run("convert", made(kind), path, "--outtype", "f32", "--no-verify")
    wanted = wanted_of(made(kind), window)
    assert kld(wanted, found_by(path, window), window) <= MAX_KLD
    assert kld(wanted, found_by(path, window, "torch"), window) <= MAX_KLD
    # the file is a checkpoint like any other
    back = open_checkpoint(path)
    checked = preflight(back)
    model = EncoderDecoder(CheckpointWeights(back, checked.spec, checked.hyper), checked.spec, checked.hyper)
    asked, given = (torch.from_numpy(each.astype(np.int64)[None]) for each in split_window(window, FIRST, 0))
    assert kld(wanted, model.decode(given, model.encode(asked))[0].numpy(), window) <= MAX_KLD


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_says_what_transformers_says(
    made: Callable[[str], Path], window: NDArray[np.int32], tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("onnxruntime")
    run("convert", made(kind), tmp_path / "onnx", "--to", "onnx", "--precision", "fp32", "--no-verify")
    assert kld(wanted_of(made(kind), window), found_by(tmp_path / "onnx", window), window) <= MAX_KLD


def test_files_are_named_and_fed_as_optimum_does(made: Callable[[str], Path], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    run("convert", made("t5"), tmp_path / "onnx", "--to", "onnx", "--precision", "fp32", "--no-verify")
    graphs = {path.name: onnx.load(path, load_external_data=False).graph for path in (tmp_path / "onnx").glob("*.onnx")}
    assert sorted(graphs) == ["decoder_model_merged.onnx", "encoder_model.onnx"]
    decoder = graphs["decoder_model_merged.onnx"]
    past = [
        f"past_key_values.{layer}.{stack}.{kind}"
        for layer in range(2)
        for stack in ("decoder", "encoder")
        for kind in ("key", "value")
    ]
    names = {"encoder_attention_mask", "input_ids", "encoder_hidden_states", "use_cache_branch", *past}
    assert {value.name for value in decoder.input} == names
    presents = {name.replace("past_key_values", "present") for name in past}
    assert {value.name for value in decoder.output} == {"logits", *presents}
    encoder = graphs["encoder_model.onnx"]
    assert [value.name for value in encoder.input] == ["input_ids", "attention_mask"]
    assert [value.name for value in encoder.output] == ["last_hidden_state"]
    # the embedding, which both read, lies there once: all values of the checkpoint and what aligns them
    stored = open_checkpoint(made("t5"))
    assert (tmp_path / "onnx" / "model.onnx.data").stat().st_size < 4 * stored.parameters + 64 * len(stored.tensors)


def test_the_onnx_cache_continues_as_transformers_generates(made: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from transformers import AutoModelForSeq2SeqLM

    folder = made("t5-v1.1")
    run("convert", folder, tmp_path / "onnx", "--to", "onnx", "--precision", "fp32", "--no-verify")
    text = np.random.default_rng(1).integers(3, ROWS, 40)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    limits = {"min_new_tokens": 12, "max_new_tokens": 12}
    with torch.no_grad():
        wanted = model.generate(torch.from_numpy(text[None]), do_sample=False, num_beams=1, **limits)[0, 1:].tolist()
    opened = open_runtime(tmp_path / "onnx", JudgeOptions(threads=1), context=64)
    assert isinstance(opened, OnnxSeq2Seq)
    with opened:
        _, cache = opened.prefill(text[None, :-1])
        found, token = list[int](), text[-1:]
        for _ in wanted:
            logits, cache = opened.decode(token, cache)
            logits[0, 1] = -np.inf  # transformers keeps the end away while the answer is too short
            token = logits.argmax(axis=1)
            found.append(int(token[0]))
    assert found == wanted


@pytest.mark.parametrize(
    ("options", "bound"),
    # about three times what was seen
    [
        (["--precision", "fp16"], 1e-4),
        (["--precision", "int8"], 3e-3),
        (["--precision", "int8", "--int8", "dynamic"], 0.01),
        (["--precision", "int4"], 0.4),
        (["--precision", "fp32", "--standard-ops"], 1e-9),
        (["--precision", "fp32", "--opset", "21"], 1e-9),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_every_precision_of_onnx_runs(
    made: Callable[[str], Path], window: NDArray[np.int32], tmp_path: Path, options: list[str], bound: float
) -> None:
    pytest.importorskip("onnxruntime")
    run("convert", made("t5-v1.1"), tmp_path / "onnx", "--to", "onnx", *options, "--no-verify")
    assert kld(wanted_of(made("t5-v1.1"), window), found_by(tmp_path / "onnx", window), window) <= bound


def test_padding_changes_nothing(made: Callable[[str], Path], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run("convert", made("t5"), tmp_path / "onnx", "--to", "onnx", "--precision", "fp32", "--no-verify")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "encoder_model.onnx", providers=["CPUExecutionProvider"])
    text = np.random.default_rng(2).integers(3, ROWS, (1, 9))
    alone = session.run(None, {"input_ids": text, "attention_mask": np.ones_like(text)})[0]
    padded = np.pad(text, ((0, 0), (0, 5)))
    both = session.run(None, {"input_ids": padded, "attention_mask": (np.arange(14) < 9).astype(np.int64)[None]})[0]
    np.testing.assert_allclose(both[:, :9], alone, rtol=0, atol=1e-5)


def test_the_command_line_converts_verifies_and_inspects(made: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    few = ["--context", "64", "--chunks", "3"]
    path = tmp_path / "model.gguf"
    run("convert", made("t5"), path, "--outtype", "q4_k_m", *few, "--max-kld", "1", "--min-top1", "0.3",
        "--max-ppl-change", "1")  # fmt: skip
    parity = json.loads((tmp_path / "model.gguf.quantpress.json").read_text())["parity"]
    assert parity["passed"]
    assert parity["candidate"]["runtime"] == "llama.cpp"
    report = json.loads(run("verify", path, "--against", made("t5"), *few, "--max-kld", "1", "--min-top1", "0.3",
                            "--max-ppl-change", "1", "--json"))  # fmt: skip
    assert report["mean_kld"] == pytest.approx(parity["mean_kld"], rel=1e-3)
    assert "T5ForConditionalGeneration" in run("inspect", made("t5"), "--json")
    assert "T5ForConditionalGeneration" in run("inspect", path, "--json")


def test_a_file_with_another_start_token_fails(made: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    other = tiny_t5(tmp_path / "other", decoder_start_token_id=9)
    path = tmp_path / "model.gguf"
    run("convert", other, path, "--outtype", "f32", "--no-verify")
    code, _ = invoke("verify", path, "--against", made("t5"), "--context", "64", "--chunks", "2")
    assert code == 4


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks for it by its old name
def test_an_adapter_is_merged_as_peft_merges_it(
    made: Callable[[str], Path], window: NDArray[np.int32], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSeq2SeqLM

    base = AutoModelForSeq2SeqLM.from_pretrained(made("t5"))
    torch.manual_seed(3)
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM", r=4, lora_alpha=16, target_modules=["q", "k", "v", "o", "wi", "wo"]
    )
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    asked, given = (torch.from_numpy(each.astype(np.int64)[None]) for each in split_window(window, FIRST, 0))
    with torch.no_grad():
        wanted = model(input_ids=asked, decoder_input_ids=given).logits[0].numpy()
    out = tmp_path / "onnx"
    few = ["--context", "64", "--chunks", "2"]
    run("convert", made("t5"), out, "--to", "onnx", "--precision", "fp32", "--adapter", tmp_path / "adapter", *few)
    assert kld(wanted, found_by(out, window), window) <= MAX_KLD
    share = json.loads((out / "quantpress.json").read_text())["parity"]["adapter_share"]
    assert share["share"] == pytest.approx(1.0, abs=1e-3)


def test_plain_rounding_works_and_methods_that_run_layers_say_why_not(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    few = ["--context", "64", "--chunks", "2", "--max-kld", "1", "--min-top1", "0.3", "--max-ppl-change", "1"]
    run("quantize", made("t5"), tmp_path / "int4", "--method", "rtn", "--group-size", "32", *few)
    for method in ("gptq", "awq", "smoothquant"):
        code, printed = invoke("quantize", made("t5"), tmp_path / method, "--method", method)
        assert code == 3
        assert "use rtn or hqq" in printed
    static = ("--precision", "int8", "--int8", "static")
    code, printed = invoke("convert", made("t5"), tmp_path / "onnx", "--to", "onnx", *static)
    assert code == 2
    assert "static" in printed


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance.*128 always"),
        ({"feed_forward_proj": "gated-silu"}, "activation is 'silu'"),
        ({"feed_forward_proj": "gelu"}, "activation is 'gelu'"),
        ({"num_layers": 2, "num_decoder_layers": 3}, "'num_decoder_layers' is 3, more than the 2"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_and_onnx_does_it(
    window: NDArray[np.int32], tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    pytest.importorskip("onnxruntime")
    folder = tiny_t5(tmp_path / "model", **options)
    checked = preflight(open_checkpoint(folder))
    with pytest.raises(InputError, match=problem):
        checked.spec.gguf_check(checked.hyper, {})
    run("convert", folder, tmp_path / "onnx", "--to", "onnx", "--precision", "fp32", "--no-verify")
    assert kld(wanted_of(folder, window), found_by(tmp_path / "onnx", window), window) <= MAX_KLD


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"feed_forward_proj": "dense-relu"}, "wanted a name or 'gated-NAME'"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder"),
        ({"decoder_start_token_id": ROWS}, f"wanted 0 to {ROWS - 1}"),
        ({"relative_attention_num_buckets": 2}, "at least 4 buckets"),
        ({"d_kv": None}, "'d_kv' is missing"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    made: Callable[[str], Path], change: dict[str, Any], problem: str
) -> None:
    source = open_checkpoint(made("t5"))
    spec = preflight(source).spec
    with pytest.raises(InputError, match=problem):
        spec.read_config({**source.config, **change})


def test_a_head_of_its_own_is_used_whatever_the_config_says(made: Callable[[str], Path]) -> None:
    for kind, tied in (("t5", True), ("t5-v1.1", False), ("t5-v1.1-tied", True)):
        source = open_checkpoint(made(kind))
        assert source.config["tie_word_embeddings"] is True  # transformers 5 writes that always
        assert preflight(source).hyper.tied is tied

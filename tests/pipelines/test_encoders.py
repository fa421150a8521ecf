"""Encoders from end to end: our own, in llama.cpp and in onnxruntime, each beside transformers."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
from quantpress.pipelines.encoder_runtime import TorchEncoder
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.llama_cpp import LlamaCppModel
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.pipelines.references import reference_for
from quantpress.pipelines.stage import RunContext
from quantpress.pipelines.vector_figures import pooled
from quantpress.quant.errors import InputError
from tests.families.encoders import ENCODERS, TEXT, EncoderCase, encoder_case, write_encoder

Array = NDArray[Any]
Made = Callable[[EncoderCase], Path]

# float32 sums of 64 to 96 products in another order: relative errors of some 1e-6, over three layers of values near 1
CLOSE = 2e-5
# llama.cpp's gelu is the tanh form, from a table in float16: 1e-3 of a value at most, seen in the states as 2e-3
GELU = 1e-2
# the limit for all families, nats per masked token
MAX_KLD = 1e-4

IDS = [case.id for case in ENCODERS]
IN_GGUF = [case for case in ENCODERS if not case.gguf]

# of some fifty masked tokens of a random model one may be a tie
FEW = JudgeOptions(context=48, chunks=2, threads=1, min_top1=0.9)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("encoders")

    def make(case: EncoderCase) -> Path:
        path = folder / case.id
        return path if path.exists() else write_encoder(case, path)

    return make


def tokens_of(source: Checkpoint) -> Array:
    tokenizer = Tokenizer(TokenizerFiles(source.tokenizer_files, name=source.name))
    return np.array(tokenizer.encode_in_template(TEXT)[:50], np.int32)


@functools.lru_cache(maxsize=20)
def transformers_model(folder: Path, masked: bool) -> Any:
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM

    made = AutoModelForMaskedLM if masked else AutoModel
    return made.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def transformers_run(folder: Path, tokens: Array, *, masked: bool) -> tuple[Array, Array | None]:
    """Gives the last hidden states (T, hidden), and the logits (T, vocab) of the head if there is one."""
    import torch

    model = transformers_model(folder, masked)
    with torch.no_grad():
        found = model(torch.from_numpy(tokens[None].astype(np.int64)), output_hidden_states=True)
    return found.hidden_states[-1][0].numpy(), found.logits[0].numpy() if masked else None


def transformers_head(folder: Path, states: Array) -> Array:
    """Gives what transformers' own head makes of hidden states (T, hidden)."""
    import torch

    model = transformers_model(folder, True)
    values = torch.from_numpy(states[None])
    with torch.no_grad():
        if hasattr(model, "vocab_projector"):
            inner = torch.nn.functional.gelu(model.vocab_transform(values))
            return np.asarray(model.vocab_projector(model.vocab_layer_norm(inner))[0].numpy())
        head = model.cls if hasattr(model, "cls") else model.lm_head
        return np.asarray(head(values)[0].numpy())


def kld(reference: Array, other: Array) -> float:
    """Gives the mean of KL(reference || other) over rows of logits, in float64."""
    logs = []
    for logits in (reference.astype(np.float64), other.astype(np.float64)):
        logits = logits - logits.max(axis=1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean())


def gguf(folder: Path, output: Path, outtype: str = "f32") -> Path:
    source = open_checkpoint(folder)
    return Gguf(output=output, outtype=outtype).run(source, RunContext(threads=1)).path


@pytest.mark.parametrize("case", ENCODERS, ids=IDS)
def test_our_encoder_computes_what_transformers_does(case: EncoderCase, made: Made) -> None:
    source = open_checkpoint(made(case))
    assert preflight(source).spec.family == case.family
    tokens = tokens_of(source)
    wanted, logits = transformers_run(made(case), tokens, masked=case.masked)
    with TorchEncoder.of_checkpoint(source) as encoder:
        states = encoder.states([tokens])[0]
        np.testing.assert_allclose(states, wanted, atol=CLOSE * 10)
        if logits is not None:
            np.testing.assert_allclose(encoder.logits(tokens, 0), logits, atol=CLOSE * 10)


@pytest.mark.parametrize("case", IN_GGUF, ids=str)
def test_llama_cpp_computes_what_transformers_does(case: EncoderCase, made: Made, tmp_path: Path) -> None:
    folder = made(case)
    path = gguf(folder, tmp_path / "model.gguf")
    tokens = tokens_of(open_checkpoint(folder))
    wanted, logits = transformers_run(folder, tokens, masked=case.masked)
    model = LlamaCppModel(path, context=64, at_once=True, pooling=0, threads=1)
    states = model.embed(tokens, pooled=False)
    cut = model.tokenize(TEXT)[: len(tokens)]
    model.close()
    assert np.array_equal(cut, tokens)
    np.testing.assert_allclose(states, wanted, atol=GELU)
    if logits is not None:
        assert kld(logits, transformers_head(folder, states)) <= MAX_KLD
    if case.pooling:
        model = LlamaCppModel(path, context=64, at_once=True, threads=1)
        vector = model.embed(tokens, pooled=True)[0]
        model.close()
        plain = pooled(wanted, "last" if case.pooling == "lasttoken" else case.pooling)
        np.testing.assert_allclose(vector, plain, atol=GELU)


@pytest.mark.parametrize("case", [case for case in ENCODERS if case.gguf], ids=str)
def test_what_llama_cpp_cannot_compute_is_refused(case: EncoderCase, made: Made, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=case.gguf):
        gguf(made(case), tmp_path / "model.gguf")


@pytest.mark.parametrize("case", ENCODERS, ids=IDS)
def test_onnx_computes_what_transformers_does(case: EncoderCase, made: Made, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from quantpress.pipelines.onnx_encoder import OnnxEncoder

    source = open_checkpoint(made(case))
    path = Onnx(output=tmp_path / "onnx", precision="fp32").run(source, RunContext(threads=1)).path
    tokens = tokens_of(source)
    short = np.concatenate([tokens[:11], tokens[-1:]])
    wanted = [transformers_run(made(case), text, masked=case.masked)[0] for text in (tokens, short)]
    with OnnxEncoder(path, threads=1) as encoder:
        for found, states in zip(encoder.batch([tokens, short]), wanted, strict=True):
            np.testing.assert_allclose(found, states, atol=CLOSE * 10)


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "distilbert-bare"])
def test_a_gguf_file_opens_as_the_model_it_was_made_from(name: str, made: Made, tmp_path: Path) -> None:
    source = open_checkpoint(made(encoder_case(name)))
    again = open_checkpoint(gguf(made(encoder_case(name)), tmp_path / "model.gguf"))
    tokens = tokens_of(source)
    assert np.array_equal(tokens_of(again), tokens)
    with TorchEncoder.of_checkpoint(source) as one, TorchEncoder.of_checkpoint(again) as other:
        assert other.pooling == one.pooling
        assert np.array_equal(one.states([tokens])[0], other.states([tokens])[0])
    (tmp_path / "again").mkdir()
    second = Gguf(output=tmp_path / "again" / "model.gguf", outtype="f32").run(again, RunContext(threads=1)).path
    assert open_checkpoint(second).config == again.config


@pytest.mark.parametrize("name", ["bert-mean", "roberta", "distilbert"])
@pytest.mark.parametrize("outtype", ["q8_0", "q4_k_m"])
def test_quantized_files_are_verified_in_llama_cpp(name: str, outtype: str, made: Made, tmp_path: Path) -> None:
    case = encoder_case(name)
    path = gguf(made(case), tmp_path / "model.gguf", outtype)
    options = JudgeOptions(context=48, chunks=4, threads=1, max_kld=0.6, max_ppl_change=1.0)
    parity = reference_for(open_checkpoint(made(case)), options).judge(path, outtype)
    assert parity.passed, parity.reason
    assert parity.candidate.runtime == "llama.cpp"
    assert parity.vectors is not None
    assert 0.9 < parity.vectors.min_cosine < 1
    assert parity.tokens > 0
    report = parity.to_json()
    json.dumps(report, allow_nan=False)
    assert (report["mean_kld"] is None) == (not case.masked)


def test_a_file_of_another_model_fails(made: Made, tmp_path: Path) -> None:
    folder = made(encoder_case("bert"))
    path = gguf(made(encoder_case("bert-new")), tmp_path / "other.gguf")
    other = write_encoder(encoder_case("bert"), tmp_path / "changed")
    _swap_layers(other)
    options = replace(FEW, chunks=4)
    reference = reference_for(open_checkpoint(folder), options)
    # gelu and its tanh form are one in llama.cpp, so this one is the same model
    assert reference.judge(path, "F32").passed
    parity = reference.judge(gguf(other, tmp_path / "changed.gguf"), "F32")
    assert not parity.passed
    assert "cosine" in parity.reason
    assert "KL divergence" in parity.reason


def _swap_layers(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    first, second = (f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in (0, 1))
    tensors[first], tensors[second] = tensors[second], tensors[first]
    save_file(tensors, path, metadata={"format": "pt"})


def test_tokens_that_no_file_names_are_those_of_the_class(made: Made, tmp_path: Path) -> None:
    """roberta-base and bert-base-uncased come without names of their special tokens."""
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    folder = write_encoder(encoder_case("roberta"), tmp_path / "roberta")
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    path = gguf(folder, tmp_path / "model.gguf")
    tokens = tokens_of(open_checkpoint(folder))
    model = LlamaCppModel(path, vocab_only=True)
    assert model.tokenize(TEXT)[:49].tolist() == tokens[:49].tolist()
    model.close()
    parity = reference_for(open_checkpoint(folder), FEW).judge(path, "F32")
    assert parity.passed, parity.reason
    assert parity.mean_kld < MAX_KLD  # there is a mask, so its head was asked


def test_a_merged_adapter_is_what_peft_merges(made: Made, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch

    from quantpress.convert.lora.merge import merge_lora

    folder = made(encoder_case("bert"))
    model = transformers_model(folder, True)
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value", "dense"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers in a way of before
        adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    source = merge_lora(open_checkpoint(folder), tmp_path / "adapter", 1.0)
    tokens = tokens_of(source)
    with torch.no_grad():
        wanted = adapted.merge_and_unload()(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    with TorchEncoder.of_checkpoint(source) as merged:
        np.testing.assert_allclose(merged.logits(tokens, 0), wanted, atol=CLOSE * 10)
    path = Gguf(output=tmp_path / "model.gguf", outtype="f32").run(source, RunContext(threads=1)).path
    parity = reference_for(source, FEW).judge(path, "F32")
    assert parity.passed, parity.reason
    assert parity.adapter_share is not None
    assert abs(parity.adapter_share.share - 1) < 0.01


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantized_folders_are_verified(method: str, made: Made, tmp_path: Path) -> None:
    from quantpress.pipelines.quantize_stage import Quantize

    source = open_checkpoint(made(encoder_case("roberta")))
    stage = Quantize(output=tmp_path / "out", method=method, bits=8, group_size=32, samples=4, sequence_length=32)
    artifact = stage.run(source, RunContext(threads=1))
    parity = reference_for(source, FEW).judge(artifact.path, "Q8_0")
    assert parity.passed, parity.reason
    assert 0 < parity.mean_kld < 0.01


def test_perplexity_of_an_encoder_is_refused(made: Made) -> None:
    from quantpress.pipelines.verification import perplexity

    with pytest.raises(InputError, match="bert is an encoder, which predicts no next tokens; verify judges it"):
        perplexity(made(encoder_case("bert")))


def test_inspect_says_kind_and_pooling(made: Made) -> None:
    from quantpress.pipelines.inspection import inspect

    report = inspect(made(encoder_case("bert-mean")))
    assert (report["kind"], report["pooling"], report["kv_cache_bytes_per_token"]) == ("encoder", "mean", 0)
    assert report["problem"] is None

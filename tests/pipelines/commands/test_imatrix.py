"""`quantpress imatrix`: the file against transformers' hooks on llama-imatrix's windows, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import quantpress as qp
from quantpress.convert.atomic import work_folder
from quantpress.convert.calibration.sensitivity import embedding_sensitivity
from quantpress.convert.calibration.windows import enough_windows
from quantpress.convert.gguf.importance_file import read_importance
from quantpress.quant.errors import CancelledError

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")

Run = Callable[..., Any]
# the decoder is within 5e-5 of transformers (tests/convert/test_model.py), squares within twice that; with bfloat16
# products inputs and weights are rounded by 2^-9, and a mean of squares of hundreds of tokens moves by less than this
TOLERANCE = {"f32": 1e-4, "bf16": 0.05}


def hooked(model: Path, windows: NDArray[np.int32]) -> dict[str, NDArray[np.float64]]:
    """Sums of squares of the inputs of some of transformers' modules, by the names of the weights in GGUF."""
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager", dtype=torch.float64).eval()
    layers, sums = found.model.layers, dict[str, NDArray[np.float64]]()
    modules = {"output.weight": found.lm_head}
    for number, layer in enumerate(layers):
        modules[f"blk.{number}.attn_v.weight"] = layer.self_attn.v_proj
        modules[f"blk.{number}.attn_output.weight"] = layer.self_attn.o_proj
        modules[f"blk.{number}.ffn_up.weight"] = layer.mlp.up_proj
        modules[f"blk.{number}.ffn_down.weight"] = layer.mlp.down_proj
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _module, inputs, name=name: sums.update({name: inputs[0].square().sum((0, 1)).double().numpy()})
        )
    with torch.no_grad():
        found(torch.from_numpy(windows.astype(np.int64)))
    return sums


def ids_of(model: Path, text: Path) -> NDArray[np.int32]:
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    return np.array(tokenizer.encode(text.read_text(), add_special_tokens=False).ids, np.int32)


def with_bos(model: Path, folder: Path) -> Path:
    """The same model with a tokenizer that begins every text with its special token."""
    shutil.copytree(model, folder)
    settings = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|endoftext|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_numbers_are_those_of_transformers_on_llama_imatrix_windows(
    bos: bool, kind: str, quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """llama-imatrix cuts the text with BOS in front, and lets BOS take the place of each chunk's first token."""
    model = with_bos(tiny_model, tmp_path / "model") if bos else tiny_model
    out = tmp_path / "imatrix.gguf"
    flags = ("--context", 32, "--calibration-dtype", kind, "--device", "cpu")
    ended = quantpress("imatrix", model, out, "--text", text_file, *flags)
    assert ended.code == 0, ended.err
    ids = ids_of(model, text_file)
    ids = np.concatenate([[0], ids]) if bos else ids
    windows = ids[: len(ids) // 32 * 32].reshape(-1, 32).copy()
    if bos:
        windows[:, 0] = 0
    assert f"{len(windows)} chunks of 32 tokens" in ended.out
    found = read_importance(out)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (len(windows), 32, ("text.txt",))
    wanted = hooked(model, windows)
    for name, values in wanted.items():
        entry = found.entries[name]
        np.testing.assert_allclose(entry.sums[0], values, rtol=TOLERANCE[kind], atol=1e-6 * values.mean())
        np.testing.assert_array_equal(entry.counts, [windows.size])
    assert len(found.entries) == 2 * 7 + 2
    # the embedding has no inputs: against the diagonal of what tests of its own compare with transformers
    costs = embedding_sensitivity(
        qp.open_checkpoint(model), enough_windows(list(windows), 1), threads=1, folder=tmp_path
    )
    np.testing.assert_allclose(found.entries["token_embd.weight"].sums[0], windows.size * costs.diagonal(), rtol=1e-6)
    for layer in range(2):
        query, value = (found.entries[f"blk.{layer}.attn_{part}.weight"] for part in "qv")
        np.testing.assert_array_equal(query.sums, value.sums)


def test_threads_and_memory_change_no_byte(quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    flags = ("--text", text_file, "--context", 16)
    assert quantpress("imatrix", tiny_model, tmp_path / "one.gguf", *flags, "--threads", 1).code == 0
    assert (
        quantpress("imatrix", tiny_model, tmp_path / "two.gguf", *flags, "--threads", 3, "--max-memory", "10K").code
        == 0
    )
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    records = [json.loads((tmp_path / f"{name}.gguf.quantpress.json").read_text()) for name in ("one", "two")]
    assert records[0]["calibration"] == records[1]["calibration"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.gguf", "one.gguf.quantpress.json", "two.gguf", "two.gguf.quantpress.json"
    ]  # fmt: skip


def test_the_first_chunks_of_the_text_are_taken(
    quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    ended = quantpress(
        "imatrix", tiny_model, tmp_path / "x.gguf", "--text", text_file, "--context", 16, "--chunks", 3, "--json"
    )
    said = json.loads(ended.out)
    assert (said["chunks"], said["context"], said["weights"], said["notes"]) == (3, 16, 16, [])
    assert said["bytes"] == (tmp_path / "x.gguf").stat().st_size
    windows = ids_of(tiny_model, text_file)[:48].reshape(3, 16)
    found = read_importance(tmp_path / "x.gguf")
    wanted = hooked(tiny_model, windows)["blk.1.ffn_down.weight"]
    # a processor with units for bfloat16 takes them unless it is told otherwise; 48 tokens are few
    np.testing.assert_allclose(found.entries["blk.1.ffn_down.weight"].sums[0], wanted, rtol=0.2)
    record = json.loads(Path(said["sidecar"]).read_text())
    assert record["calibration"]["samples"] == 3
    assert record["calibration"]["tokens"] == 48
    assert record["outputs"][0]["name"] == "x.gguf"
    assert record["stages"][-1]["name"] == "imatrix"
    assert record["stages"][-1]["options"]["context"] == 16


def test_an_adapter_is_merged_before_it_is_measured(
    quantpress: Run, tiny_model: Path, tiny_adapter: Path, text_file: Path, tmp_path: Path
) -> None:
    flags = ("--text", text_file, "--context", 16, "--chunks", 5, "--calibration-dtype", "f32")
    merged = quantpress("merge", tiny_model, tiny_adapter, tmp_path / "merged", "--no-verify")
    assert merged.code == 0, merged.err
    assert quantpress("imatrix", tmp_path / "merged", tmp_path / "one.gguf", *flags).code == 0
    assert quantpress("imatrix", tiny_model, tmp_path / "two.gguf", "--adapter", tiny_adapter, *flags).code == 0
    assert quantpress("imatrix", tiny_model, tmp_path / "without.gguf", *flags).code == 0
    one, two, without = (read_importance(tmp_path / f"{name}.gguf").entries for name in ("one", "two", "without"))
    for name, entry in one.items():  # the merged file is float32: one rounding of a weight lies between them
        np.testing.assert_allclose(two[name].sums, entry.sums, rtol=1e-5)
    assert np.abs(without["output.weight"].sums / two["output.weight"].sums - 1).max() > 1e-3


def test_a_gguf_file_is_measured_as_the_model_it_was_made_from(
    quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    """F32 keeps every bit, and q and k come back in the order that the decoder wants."""
    flags = ("--text", text_file, "--context", 16, "--chunks", 5, "--calibration-dtype", "f32")
    ended = quantpress("convert", tiny_model, tmp_path / "model.gguf", "--outtype", "f32", "--no-verify")
    assert ended.code == 0, ended.err
    assert quantpress("imatrix", tiny_model, tmp_path / "one.gguf", *flags).code == 0
    assert quantpress("imatrix", tmp_path / "model.gguf", tmp_path / "two.gguf", *flags).code == 0
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_a_dry_run_promises_the_bytes_and_writes_nothing(
    quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    flags = ("--text", text_file, "--context", 16)
    ended = quantpress("imatrix", tiny_model, tmp_path / "{name}.gguf", *flags, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    plan = json.loads(ended.out)
    assert list(tmp_path.iterdir()) == []
    assert quantpress("imatrix", tiny_model, tmp_path / "{name}.gguf", *flags).code == 0
    path = tmp_path / "tiny-model.gguf"
    assert plan["output"] == str(path)
    assert plan["bytes"] == path.stat().st_size
    assert {tensor["name"]: tensor["shape"] for tensor in plan["tensors"]} == {
        name: [entry.sums.size] for name, entry in read_importance(path).entries.items()
    }


def test_without_a_text_the_built_in_one_is_read_and_told(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    ended = quantpress("imatrix", tiny_model, tmp_path / "x.gguf", "--chunks", 2)
    assert ended.code == 0
    assert "measured on the built-in text" in ended.err
    assert read_importance(tmp_path / "x.gguf").chunk_size == 128  # what the model was made for


def test_an_existing_file_is_replaced_only_by_force(
    quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    out.write_bytes(b"something")
    flags = ("--text", text_file, "--context", 16, "--chunks", 2)
    ended = quantpress("imatrix", tiny_model, out, *flags)
    assert ended.code == 2
    assert "give --force" in ended.err
    assert out.read_bytes() == b"something"
    assert quantpress("imatrix", tiny_model, out, *flags, "--force").code == 0
    assert read_importance(out).chunk_count == 2


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--context", 129), 2, "--context 129: tiny-model was made for 128 tokens"),
        (("--text", "none.txt"), 3, "none.txt"),
        (("--context", 128, "--text", "short.txt"), 3, "wanted at least 256 (2 x context)"),
        (("--text", "empty.txt"), 3, "the text is empty, there is nothing to measure on"),
        (("--chunks", 0), 2, "--chunks"),
        (("--adapter", "none"), 3, "none"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    flags: tuple[Any, ...], code: int, said: str, quantpress: Run, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "empty.txt").write_text(" \n")
    ended = quantpress("imatrix", tiny_model, "x.gguf", *flags)
    assert ended.code == code, ended.err
    assert said in ended.err.splitlines()[-1]
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".txt" and ".lock" not in path.name]


def test_the_older_form_is_not_written(quantpress: Run, tiny_model: Path, tmp_path: Path) -> None:
    ended = quantpress("imatrix", tiny_model, tmp_path / "imatrix.dat")
    assert ended.code == 2
    assert "the older form .dat is only read" in ended.err


def test_the_text_is_not_replaced_by_the_matrix(
    quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(text_file, text)
    ended = quantpress("imatrix", tiny_model, text, "--text", text, "--force")
    assert ended.code == 2
    assert "an input of this run" in ended.err


def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_left(
    quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * np.float32(np.nan)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    ended = quantpress("imatrix", model, tmp_path / "x.gguf", "--text", text_file, "--context", 16)
    assert ended.code == 3
    assert "model.layers.1.mlp.up_proj.weight" in ended.err
    assert not [path for path in tmp_path.iterdir() if path != model and ".lock" not in path.name]


def test_what_a_killed_run_left_is_removed(quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    left = work_folder(tmp_path / "x.gguf")
    left.mkdir()
    (left / "activations-hidden.f32").write_bytes(b"\0" * 64)
    flags = ("--text", text_file, "--context", 16, "--chunks", 2)
    assert quantpress("imatrix", tiny_model, tmp_path / "x.gguf", *flags).code == 0
    assert not left.exists()


def test_the_library_writes_the_same(quantpress: Run, tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    assert quantpress("imatrix", tiny_model, tmp_path / "one.gguf", "--text", text_file, "--context", 16).code == 0
    done = qp.imatrix(tiny_model, tmp_path / "two.gguf", text=text_file, context=16)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert done.parity is None
    assert done.artifact.kind == "imatrix"
    assert {tensor.name for tensor in done.artifact.tensors} == set(read_importance(tmp_path / "two.gguf").entries)


def test_a_run_can_be_cancelled_and_leaves_nothing(tiny_model: Path, text_file: Path, tmp_path: Path) -> None:
    import threading

    cancel = threading.Event()
    said = []

    def progress(phase: str, done: int, total: int) -> None:
        said.append((phase, done, total))
        cancel.set()

    with pytest.raises(CancelledError):
        qp.imatrix(tiny_model, tmp_path / "x.gguf", text=text_file, context=16, progress=progress, cancel=cancel)
    assert said[0][0] == "measuring"
    assert not [path for path in tmp_path.iterdir() if ".lock" not in path.name]

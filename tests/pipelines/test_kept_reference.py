"""What is kept of a source judges as the source itself does, without a layer of it."""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.lora.merge import merge_lora
from quantpress.convert.open import open_checkpoint
from quantpress.pipelines import kept_reference
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.judging import JudgeOptions
from quantpress.pipelines.kept_reference import make_reference, open_reference
from quantpress.pipelines.llama_cpp_find import find_llama_cpp
from quantpress.pipelines.reference import Reference
from quantpress.pipelines.reference_material import shareable_base, sized
from quantpress.pipelines.safetensors_stage import Safetensors
from quantpress.pipelines.stage import RunContext
from quantpress.quant.errors import InputError, OutputError
from tests.pipelines.kept_references import kept, watched
from tests.tiny import FAMILIES, Tiny, tiny_checkpoint

LORA, DORA = "lora-shakespeare-r8", "dora-shakespeare-r4"
JUDGE = JudgeOptions(threads=1, context=64, chunks=3)
HEADS = ("llama", "llama-tied", "gemma2", "gpt2", "gptneox", "phi3")  # every kind of head: cap, bias, tied, padded


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Keeps tiny products from waiting for threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(shared: Path) -> Checkpoint:
    return open_checkpoint(shared / "models" / "stories260k-hf")


@pytest.fixture(scope="module")
def merged(shared: Path, base: Checkpoint) -> Callable[..., Checkpoint]:
    return lambda name=LORA, weight=1.0: merge_lora(base, shared / "adapters" / name, weight)


def press(source: Checkpoint, folder: Path, dtype: str = "bf16") -> Path:
    return Safetensors(output=folder, dtype=dtype).run(source, RunContext(threads=1)).path


@pytest.mark.parametrize("case", [case for case in FAMILIES if case.id in HEADS], ids=str)
def test_kept_states_give_the_logits_of_transformers(case: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = open_checkpoint(tiny_checkpoint(tmp_path / "model", case.family, **case.options))
    reference = open_reference(source, JUDGE, kept(source, JUDGE, tmp_path / "kept"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for window in reference.windows:
        with torch.no_grad():
            wanted = model(torch.from_numpy(window[None].astype(np.int64))).logits[0, 32:].numpy()
        found = reference.runtime.logits(window, 32)
        # sums of 64 to 96 values in another order: a few units of the last of 24 bits at each of ten steps
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("adapter", [None, LORA, DORA])
def test_the_verdict_is_that_of_a_fresh_reference_to_the_last_bit(
    base: Checkpoint, merged: Callable[..., Checkpoint], tmp_path: Path, adapter: str | None
) -> None:
    source = base if adapter is None else merged(adapter)
    artifact = press(source, tmp_path / "file")
    found = open_reference(source, JUDGE, kept(source, JUDGE, tmp_path / "kept")).judge(artifact, "BF16")
    wanted = Reference(source, JUDGE).judge(artifact, "BF16")
    assert found == wanted
    assert found.passed
    assert (found.adapter_share is None) == (adapter is None)


@pytest.mark.skipif(find_llama_cpp() is None, reason="llama.cpp is not installed")
def test_a_gguf_file_is_judged_and_its_tokenizer_proved_as_by_a_fresh_reference(shared: Path, tmp_path: Path) -> None:
    source = open_checkpoint(shared / "models" / "mix6m-hf")
    folder = kept(source, JUDGE, tmp_path / "kept")
    artifact = Gguf(output=tmp_path / "f.gguf", outtype="q8_0").run(source, RunContext(threads=1))
    found = open_reference(source, JUDGE, folder).judge(artifact.path, "Q8_0")
    assert found.candidate.runtime == "llama.cpp"
    assert found.passed
    assert found == Reference(source, JUDGE).judge(artifact.path, "Q8_0")
    wrong = Gguf(output=tmp_path / "g.gguf", outtype="q8_0", override_kv=("tokenizer.ggml.pre=str:llama-bpe",))
    broken = wrong.run(source, RunContext(threads=1))
    assert "pre the right one" in open_reference(source, JUDGE, folder).judge(broken.path, "Q8_0").reason


def test_no_layer_is_read_to_be_run(
    merged: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # it reads every tensor once, to lay it beside the file's
    monkeypatch.setattr("quantpress.pipelines.reference.prove_content", lambda *_: None)
    source = merged()
    artifact, folder = press(source, tmp_path / "file"), kept(source, JUDGE, tmp_path / "kept")
    reads = Counter[str]()
    assert open_reference(watched(source, reads), JUDGE, folder).judge(artifact, "BF16").passed
    assert reads.keys() == {"model.embed_tokens.weight", "model.norm.weight"}


@pytest.mark.parametrize(("max_memory", "times"), [(0, 3), (512 * 64 * 4, 1), (None, 1)])
def test_a_head_is_read_once_where_it_fits_the_memory(
    base: Checkpoint, tmp_path: Path, max_memory: int | None, times: int
) -> None:
    reads, judge = Counter[str](), dataclasses.replace(JUDGE, max_memory=max_memory)
    artifact, folder = press(base, tmp_path / "file"), kept(base, JUDGE, tmp_path / "kept")
    parity = open_reference(watched(base, reads), judge, folder).judge(artifact, "BF16")
    assert reads["model.embed_tokens.weight"] == times + 1  # once more to be laid beside the file's
    assert parity == Reference(base, JUDGE).judge(artifact, "BF16")


def test_making_reads_every_layer_once_whatever_the_windows(base: Checkpoint, tmp_path: Path) -> None:
    reads = Counter[str]()
    kept(watched(base, reads), JUDGE, tmp_path / "kept")
    assert {count for name, count in reads.items() if ".layers." in name} == {1}


def test_many_windows_pass_in_groups_and_the_file_is_the_same(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kept(base, JUDGE, tmp_path / "whole")
    runtime = kept_reference.source_runtime(base, JUDGE)
    monkeypatch.setattr(kept_reference, "source_runtime", lambda *options: runtime)
    monkeypatch.setattr(kept_reference, "_GROUP_BYTES", 2 * 64 * 64 * 4)  # two windows of three
    told: list[tuple[str, int, int]] = []

    def tell(phase: str, done: int, total: int) -> None:
        told.append((phase, done, total))
        assert not runtime._prepared, "states of a group that is written are forgotten"

    (tmp_path / "parts").mkdir()
    make_reference(base, JUDGE, tmp_path / "parts", RunContext(progress=tell))
    assert (tmp_path / "parts" / "source.safetensors").read_bytes() == (whole / "source.safetensors").read_bytes()
    assert told == [("source", done, 10) for done in range(1, 11)]


def test_what_is_kept_is_four_bytes_per_hidden_value_of_the_scored_half(base: Checkpoint, tmp_path: Path) -> None:
    folder = kept(base, JUDGE, tmp_path / "kept")
    assert [path.name for path in folder.iterdir()] == ["source.safetensors"]
    assert 0 < (folder / "source.safetensors").stat().st_size - 3 * (32 * 64 + 64) * 4 < 2000


def test_other_limits_and_another_runtime_are_judged_by_what_is_kept(base: Checkpoint, tmp_path: Path) -> None:
    artifact, folder = press(base, tmp_path / "file"), kept(base, JUDGE, tmp_path / "kept")
    strict = dataclasses.replace(JUDGE, max_kld=1e-9, runtime="torch", max_memory=1 << 20, threads=2)
    assert "mean KL divergence" in open_reference(base, strict, folder).judge(artifact, "BF16").reason


def test_defaults_and_their_values_are_the_same_reference(base: Checkpoint, tmp_path: Path) -> None:
    judge = JudgeOptions(context=64)
    folder = kept(base, judge, tmp_path / "kept")
    assert len(open_reference(base, dataclasses.replace(judge, chunks=8), folder).windows) == 8


@pytest.mark.parametrize("change", ["text", "context", "chunks", "model", "adapter's weight"])
def test_a_reference_of_something_else_is_refused(
    base: Checkpoint, merged: Callable[..., Checkpoint], shared: Path, tmp_path: Path, change: str
) -> None:
    source, judge = merged(), JUDGE
    folder = kept(source, judge, tmp_path / "kept")
    if change == "text":
        judge = dataclasses.replace(judge, text=shared / "text" / "alice.txt")
    elif change == "model":
        source = base
    elif change == "adapter's weight":
        source = merged(weight=0.5)
    else:
        judge = dataclasses.replace(judge, **{change: 16 if change == "context" else 2})
    with pytest.raises(InputError, match=r"source\.safetensors: kept for another"):
        open_reference(source, judge, folder)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "another kind", "no windows"])
def test_a_damaged_folder_is_refused(base: Checkpoint, tmp_path: Path, damage: str) -> None:
    path = kept(base, JUDGE, tmp_path / "kept") / "source.safetensors"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "another kind":
        path.write_bytes((base.files[-1].path.parent / "model.safetensors").read_bytes())
    else:
        path.write_bytes(
            {"empty": b"", "cut": data[:-1], "no windows": data.replace(b'"windows"', b'"WINDOWS"')}[damage]
        )
    with pytest.raises(InputError, match=r"source\.safetensors"):
        open_reference(base, JUDGE, tmp_path / "kept")


def test_a_file_that_is_cut_after_it_was_opened_is_no_verdict(base: Checkpoint, tmp_path: Path) -> None:
    artifact, folder = press(base, tmp_path / "file"), kept(base, JUDGE, tmp_path / "kept")
    reference = open_reference(base, JUDGE, folder)
    (folder / "source.safetensors").write_bytes(b"gone")
    parity = reference.judge(artifact, "BF16")
    assert not parity.passed
    assert "could not be judged" in parity.reason


def test_a_run_that_fails_leaves_no_file_of_its_name(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        raise OutputError("stopped")

    folder = kept(base, JUDGE, tmp_path / "kept")
    wanted = (folder / "source.safetensors").read_bytes()
    (folder / "source.safetensors").unlink()
    with pytest.raises(OutputError, match="stopped"):
        make_reference(base, JUDGE, folder, RunContext(progress=stop))
    assert not (folder / "source.safetensors").exists()
    make_reference(base, JUDGE, folder, RunContext())
    assert [path.name for path in folder.iterdir()] == ["source.safetensors"]
    assert (folder / "source.safetensors").read_bytes() == wanted


def test_adapters_of_one_base_share_what_is_kept_of_it(
    base: Checkpoint, merged: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    alone = kept(base, JUDGE, tmp_path / "alone")
    for name in (LORA, DORA):
        source = merged(name)
        assert shareable_base(JUDGE, source) is base
        folder = kept(source, JUDGE, tmp_path / name, without=alone)
        assert [path.name for path in folder.iterdir()] == ["source.safetensors"]
        artifact = press(source, tmp_path / f"file of {name}")
        parity = open_reference(source, JUDGE, folder, without=alone).judge(artifact, "BF16")
        assert parity.adapter_share is not None
        assert parity == Reference(source, JUDGE).judge(artifact, "BF16")


def test_a_base_that_an_earlier_run_left_in_the_folder_goes_where_another_serves(
    base: Checkpoint, merged: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    folder = kept(merged(), JUDGE, tmp_path / "kept")
    assert len(list(folder.iterdir())) == 2
    make_reference(merged(), JUDGE, folder, RunContext(), without=kept(base, JUDGE, tmp_path / "alone"))
    assert [path.name for path in folder.iterdir()] == ["source.safetensors"]


def test_a_base_that_was_kept_for_other_windows_is_refused(
    base: Checkpoint, merged: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    alone = kept(base, dataclasses.replace(JUDGE, chunks=2), tmp_path / "alone")
    folder = kept(merged(), JUDGE, tmp_path / "kept", without=alone)
    with pytest.raises(InputError, match="kept for another material"):
        open_reference(merged(), JUDGE, folder, without=alone)


def test_an_adapter_with_a_tokenizer_of_its_own_keeps_its_own_base(
    merged: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    source = merged()
    files = {**source.tokenizer_files, "tokenizer_config.json": b'{"add_bos_token": false}'}
    own = dataclasses.replace(source, tokenizer_files=files)
    assert shareable_base(JUDGE, own) is None
    folder = kept(own, JUDGE, tmp_path / "kept")
    assert sorted(path.name for path in folder.iterdir()) == ["source.safetensors", "without.safetensors"]
    artifact = press(source, tmp_path / "file")
    parity = open_reference(own, JUDGE, folder).judge(artifact, "BF16")
    assert parity.adapter_share is not None
    assert parity == Reference(own, JUDGE).judge(artifact, "BF16")


def test_where_the_text_has_tokens_that_the_base_lacks_nothing_is_kept_of_it(
    merged: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_reference, "knows", lambda runtime, windows: False)
    folder = kept(merged(), JUDGE, tmp_path / "kept")
    assert [path.name for path in folder.iterdir()] == ["source.safetensors"]
    parity = open_reference(merged(), JUDGE, folder).judge(press(merged(), tmp_path / "file"), "BF16")
    assert parity.passed
    assert parity.adapter_share is None


def test_default_windows_of_an_adapted_source_are_those_its_base_is_kept_for(merged: Callable[..., Checkpoint]) -> None:
    judge = sized(JudgeOptions(), merged())
    assert (judge.context, judge.chunks) == (512, 8)


def test_judging_file_after_file_does_not_grow(
    base: Checkpoint, merged: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    source = merged()
    artifact = press(source, tmp_path / "file")
    references = [Reference(source, JUDGE), open_reference(source, JUDGE, kept(source, JUDGE, tmp_path / "kept"))]
    held = []
    for _ in range(4):
        for reference in references:
            assert reference.judge(artifact, "BF16").passed
        gc.collect()
        # asked by type: isinstance would wake lazy modules among the objects
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        held.append(sum(tensor.nbytes for tensor in tensors))
    assert held[1] == held[3]

"""The Fisher information of a model's first inputs against torch's own backward pass through transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from quantpress.convert.calibration.sensitivity import embedding_sensitivity
from quantpress.convert.calibration.windows import enough_windows
from quantpress.convert.open import open_checkpoint
from quantpress.quant.errors import InputError
from tests.families import decoders_one, decoders_two, experts
from tests.families.cases import write_checkpoint
from tests.tiny import FAMILIES, tiny_checkpoint

LENGTH = 24
OTHERS = (*decoders_one.CASES, *decoders_two.CASES, *experts.CASES)
# norms of embeddings, projections of them, heads with biases, scaled logits, norms without weights, experts
NAMES = ("bloom", "opt-350m", "phi", "cohere", "granite", "olmo", "mixtral", "qwen2_moe")


def windows_of(vocab: int, count: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, vocab, LENGTH).astype(np.int32) for _ in range(count)]


@pytest.mark.parametrize("family", [*sorted({tiny.family for tiny in FAMILIES}), *NAMES])
def test_the_gradients_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next((case for case in OTHERS if case.id == family), None)
    folder = tmp_path / "model"
    folder = tiny_checkpoint(folder, family) if case is None else write_checkpoint(case, folder)
    source = open_checkpoint(folder)
    vocab = int(source.config["vocab_size"])
    windows = windows_of(vocab)
    drawn: list[torch.Tensor] = []
    real = torch.multinomial

    def recorded(*args: object, **options: object) -> torch.Tensor:
        drawn.append(real(*args, **options))
        return drawn[-1]

    monkeypatch.setattr(torch, "multinomial", recorded)
    found = embedding_sensitivity(source, windows, threads=1, folder=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    if getattr(model.config, "num_experts_per_tok", None):
        model.set_experts_implementation("eager")
    rows, total = model.get_input_embeddings(), 0.0
    for window, labels in zip(windows, drawn, strict=True):
        ids = torch.from_numpy(window.astype(np.int64))[None]
        inputs = rows(ids).detach().requires_grad_()
        logits = model(inputs_embeds=inputs).logits[0]
        torch.nn.functional.cross_entropy(logits.float().double(), labels[:, 0], reduction="sum").backward()
        total = total + inputs.grad[0].T @ inputs.grad[0]
    # transformers scales embeddings before or after this place, so only the directions are compared
    wanted = total.numpy() * np.trace(found) / np.trace(total.numpy())
    # float32 through two layers and back: some 30 operations deep, each good to 6e-8 of its greatest terms
    assert np.abs(found - wanted).max() <= 2e-4 * np.abs(wanted).max()
    assert np.array_equal(found, found.T)


def test_neither_threads_nor_a_budget_change_a_bit(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_checkpoint(tmp_path / "model", "llama"))
    windows = windows_of(int(source.config["vocab_size"]), 4)
    alone = embedding_sensitivity(source, windows, threads=1, folder=tmp_path)
    for threads, budget in ((2, None), (3, 0), (1, 1000)):
        again = embedding_sensitivity(source, windows, threads=threads, folder=tmp_path, max_memory=budget)
        assert np.array_equal(alone, again)
    assert not np.array_equal(alone, embedding_sensitivity(source, windows, threads=1, folder=tmp_path, seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    import dataclasses

    source = open_checkpoint(tiny_checkpoint(tmp_path / "model", "llama"))
    name = "model.norm.weight"
    broken = dataclasses.replace(
        source.tensors[name], read_rows=lambda start, stop: np.full(stop - start, np.nan, np.float32), wide_rows=None
    )
    source = dataclasses.replace(source, tensors={**source.tensors, name: broken})
    with pytest.raises((InputError, RuntimeError)):
        embedding_sensitivity(source, windows_of(8), threads=1, folder=tmp_path)


def test_windows_are_cut_and_taken_until_there_are_enough() -> None:
    windows = [np.arange(2048, dtype=np.int32) for _ in range(100)]
    taken = enough_windows(windows, 256)
    assert [len(window) for window in taken] == [512] * 8
    assert len(enough_windows(windows, 8192)) == 32
    assert len(enough_windows(windows[:3], 256)) == 3

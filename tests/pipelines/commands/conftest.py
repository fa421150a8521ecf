"""A tiny trained-looking model and a way to run the program, for everything above the converters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from quantpress.pipelines.cli import run

# the year gives the tokenizer merges of digits, on which pre-tokenizers differ
TEXT = "Once upon a time, in 1984, there was a small press. In 1984 it pressed every word it met, and lost none. " * 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


@pytest.fixture(autouse=True)
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-xdist tells its workers the width of its own terminal; tables must not depend on it."""
    monkeypatch.delenv("COLUMNS", raising=False)


def model_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tiny Llama's tensors."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (320, 64), "lm_head.weight": (320, 64)}
    shapes["model.norm.weight"] = (64,)
    for layer in range(2):
        block = f"model.layers.{layer}."
        for name, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            shapes[f"{block}self_attn.{name}_proj.weight"] = (rows, 64)
        shapes |= {f"{block}mlp.{name}_proj.weight": (96, 64) for name in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (64, 96)
        shapes |= {f"{block}{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
    return shapes


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers, random weights and a real byte-level tokenizer; never write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-model"
    folder.mkdir()
    generator = np.random.default_rng(0)
    tensors = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else generator.normal(0, 0.1, shape).astype(np.float32)
        for name, shape in model_shapes().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@dataclass(frozen=True)
class Ended:
    """How a run of the program ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def quantpress(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs a command line in this process."""

    def call(*arguments: object) -> Ended:
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of three kinds of linear layers, made by PEFT; never write into it."""
    from tests.pipelines.commands.peft_adapters import make_adapter

    return make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "tone")


@pytest.fixture(scope="session")
def other_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another LoRA, with rsLoRA and other targets."""
    from tests.pipelines.commands.peft_adapters import make_adapter

    folder = tmp_path_factory.mktemp("adapters") / "facts"
    return make_adapter(tiny_model, folder, seed=1, target_modules=["v_proj", "up_proj"], use_rslora=True)

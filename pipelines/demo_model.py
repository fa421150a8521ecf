"""Trains a small Llama on the built-in text, for a demo without any model at hand: half a minute, no download."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from quantpress.convert.atomic import atomic_folder
from quantpress.pipelines.default_text import default_text
from quantpress.pipelines.progress import Progress

VOCABULARY, CONTEXT, STEPS, BATCH = 1024, 256, 200, 8
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}


def _tokenizer(text: str) -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n"), trainer)
    return tokenizer


def train_demo_model(folder: Path, progress: Progress) -> Path:
    """Trains the model and writes it as a checkpoint folder, replacing an older one.

    Args:
        folder: the checkpoint folder.
        progress: told the training steps.

    Returns:
        `folder`.

    Raises:
        OutputError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    text = default_text().text
    tokenizer = _tokenizer(text)
    weights = _train(tokenizer.encode(text).ids, progress)
    with atomic_folder(folder, force=True) as new:
        save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(new / "tokenizer.json"))
        (new / "config.json").write_text(json.dumps(CONFIG, indent=2))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (new / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _train(ids: list[int], progress: Progress) -> dict[str, Any]:
    """AdamW with cosine decay on random windows; gives the tensors by their Hugging Face names."""
    import torch

    from quantpress.convert.arch.registry import find_arch
    from quantpress.convert.model import Decoder

    spec = find_arch(CONFIG)
    hyper = spec.read_config(CONFIG)
    generator = torch.Generator().manual_seed(0)
    parameters, places = {}, {}
    for row, layer in spec.rows(hyper):
        if row.tied_to:
            continue
        shape = [hyper.dims[size] for size in row.shape]
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.04
        name = row.hf.format(layer=layer)
        parameters[name] = value.requires_grad_()
        places[row.slot, layer] = name
    embedding = parameters[places["token_embd.weight", -1]]

    def weight(slot: str, layer: int) -> torch.Tensor | None:
        name = places.get((slot, layer))
        return parameters[name] if name else embedding if slot == "output.weight" else None

    decoder = Decoder(weight, spec, hyper)
    optimizer = torch.optim.AdamW(parameters.values(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    text = torch.tensor(ids)
    for step in range(STEPS):
        starts = torch.randint(len(ids) - CONTEXT - 1, (BATCH,), generator=generator)
        windows = torch.stack([text[start : start + CONTEXT + 1] for start in starts.tolist()])
        logits = decoder.logits(windows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        progress("train a small model", step + 1, STEPS)
    return {name: value.detach() for name, value in parameters.items()}

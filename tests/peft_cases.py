"""Lets PEFT save an adapter of every kind for tiny models, and changes copies of what it saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.tiny import tiny_case, tiny_checkpoint


@dataclass(frozen=True)
class Case:
    """An adapter to be made by PEFT.

    Attributes:
        id: name of the test.
        options: of the config class.
        base: id of a case of tests.tiny, or "mixtral".
        kind: the config class.
        grow: rows that the vocabulary gets more.
        spare: tensors of the file that are not used.
    """

    id: str
    options: Mapping[str, Any] = field(default_factory=dict)
    base: str = "llama"
    kind: str = "LoraConfig"
    grow: int = 0
    spare: int = 0

    def __str__(self) -> str:
        return self.id


def lora(name: str, base: str = "llama", grow: int = 0, spare: int = 0, **options: Any) -> Case:
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    return Case(name, {**defaults, **options}, base, grow=grow, spare=spare)


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ADALORA = {"init_r": 6, "target_r": 3, "lora_alpha": 5, "total_step": 10, "target_modules": ["q_proj", "down_proj"]}
CASES = (
    lora("lora"),
    lora("rslora-patterns", use_rslora=True, rank_pattern={"layers.1.*q_proj": 2}, alpha_pattern={"down_proj": 9}),
    lora("dora", use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    lora("embedding", target_modules=["embed_tokens", "q_proj"]),
    lora("embedding-grown", target_modules=["embed_tokens", "q_proj"], grow=10),
    lora("embedding-tied", "llama-tied", target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    lora("grown", grow=10),
    lora("saved", modules_to_save=["lm_head", "norm"]),
    lora("saved-grown", modules_to_save=["lm_head", "embed_tokens"], grow=10, spare=4),
    lora("tokens", trainable_token_indices=[3, 1]),
    lora("tokens-grown", trainable_token_indices={"embed_tokens": [321, 322]}, grow=10),
    lora("tokens-gpt2", "gpt2", trainable_token_indices=[3, 1], target_modules=["c_attn"], fan_in_fan_out=True),
    lora("layers", layers_to_transform=[0, 2], layers_pattern="layers"),
    lora("pattern", target_modules=r".*layers\.[12]\..*(k|down)_proj", exclude_modules=["v_proj"]),
    lora("all-linear", target_modules="all-linear"),
    lora("bias-all", "llama-bias", bias="all"),
    lora("bias-lora_only", "gpt2", bias="lora_only", target_modules=["c_attn"], fan_in_fan_out=True),
    lora("lora-bias", "llama-bias", lora_bias=True),
    lora("velora", velora_config=VeloraConfig(), spare=6),
    lora("monteclora", monteclora_config=MontecloraConfig(), spare=24),
    lora("mica", init_lora_weights="mica"),
    lora("experts", "mixtral", **EXPERTS),
    lora("experts-ranks", "mixtral", **EXPERTS, rank_pattern={"experts.down_proj": 3}),
    Case("adalora", ADALORA, kind="AdaLoraConfig"),
    Case(
        "loha", {"r": 4, "alpha": 6, "target_modules": ["q_proj"], "rank_pattern": {"0.*q_proj": 2}}, kind="LoHaConfig"
    ),
    Case("lokr", {"r": 4, "alpha": 6, "target_modules": ["q_proj", "up_proj"]}, kind="LoKrConfig"),
    Case("lokr-both", {"r": 2, "target_modules": ["q_proj"], "decompose_both": True}, kind="LoKrConfig"),
    Case("tokens-alone", {"token_indices": [5, 2]}, kind="TrainableTokensConfig"),
    Case("tokens-alone-tied", {"token_indices": [5, 2]}, base="llama-tied", kind="TrainableTokensConfig"),
)


def _mixtral(folder: Path) -> None:
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)


def peft_case(name: str) -> Case:
    """Gives a case of `CASES` by its id."""
    return next(case for case in CASES if case.id == name)


@dataclass(frozen=True)
class Saved:
    """Adapters of random values that PEFT saved, each made when it is first asked for."""

    root: Path

    def base(self, case: Case) -> torch.nn.Module:
        """Gives a fresh model without the adapter."""
        folder = self.root / "bases" / case.base
        if not folder.exists():
            if case.base == "mixtral":
                _mixtral(folder)
            else:
                tiny = tiny_case(case.base)
                tiny_checkpoint(folder, tiny.family, **tiny.options)
        model = AutoModelForCausalLM.from_pretrained(folder)
        if case.grow:
            model.resize_token_embeddings(model.config.vocab_size + case.grow, mean_resizing=False)
        return model

    def folder(self, case: Case) -> Path:
        """Gives the folder of an adapter."""
        folder = self.root / case.id
        if not folder.exists():
            torch.manual_seed(1)
            model = peft.get_peft_model(self.base(case), getattr(peft, case.kind)(**case.options))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_()  # in place: tied ones stay tied
            model.save_pretrained(folder)
        return folder

    def loaded(self, case: Case, folder: Path | None = None) -> Any:
        """Gives PEFT's own model with the adapter."""
        return peft.PeftModel.from_pretrained(self.base(case), folder or self.folder(case))

    def copy(
        self, target: Path, case: str, *, rename: Callable[[str], str] | None = None, drop: str = "", **config: Any
    ) -> Path:
        """Copies an adapter, with other names, without tensors whose name holds `drop`, or with other settings."""
        shutil.copytree(self.folder(peft_case(case)), target)
        weights = target / "adapter_model.safetensors"
        if rename is not None or drop:
            kept = {name: value for name, value in load_file(weights).items() if not drop or drop not in name}
            save_file({(rename or str)(name): value for name, value in kept.items()}, weights)
        if config:
            path = target / "adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        return target


def tuner_layers(model: Any) -> Iterator[tuple[str, BaseTunerLayer]]:
    """Walks the modules that PEFT adapted."""
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer) and not name.endswith("token_adapter"):
            yield name, module

"""Made-up config.json and generation_config.json: all that happens before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantpress.convert.checkpoint import Checkpoint
from quantpress.convert.open import open_checkpoint
from quantpress.convert.preflight import preflight
from quantpress.pipelines.gguf_stage import Gguf
from quantpress.pipelines.inspection import inspect
from quantpress.pipelines.job_stage import JobStage
from quantpress.pipelines.onnx_stage import Onnx
from quantpress.quant.errors import QuantpressError
from tests.fuzz.config_seeds import config_seeds
from tests.fuzz.table_folder import fitting, llama_folder
from tests.fuzz.target import Target

__all__ = ["TARGETS"]

_WORDS = (
    b'"rope_scaling": {"rope_type": "yarn", "factor": 4.0}', b'"llama3"', b'"longrope"', b'"dynamic"', b"null", b"true",
    b"[]", b"{}", b"-1", b"0", b"1e308", b"1e-308", b"10000000", b"18446744073709551615", b'"layer_types": [[]]',
    b'"full_attention"', b'"sliding_attention"', b'"text_config": {}', b'"quantization_config": {"bits": 4}',
    b'"sliding_window_pattern"', b'"partial_rotary_factor": 0.1', b'"head_dim": 1', b'"rope_parameters": []',
    b'"architectures": [[]]', b'"auto_map": {"AutoModel": "x.py"}', b'"torch_dtype": 5', b'"eos_token_id": [1, [2]]',
)  # fmt: skip


def parse_model(folder: Path) -> dict[str, Any]:
    """Describes a folder and plans what would be written, of its own tensors and of those that its config wants."""
    checkpoint = open_checkpoint(folder)
    report = inspect(checkpoint)
    made = fitting(checkpoint)
    errors = []
    if made is not None:
        preflight(made)
        gguf, onnx = Gguf(output=Path("x.gguf"), outtype="Q4_K_M"), Onnx(output=Path("x"), precision="int4")
        errors = [error for stage in (gguf, onnx) if (error := _error_of(stage, made)) is not None]
    if report.get("problem") is None:
        Gguf(output=Path("x.gguf")).resolved(checkpoint).plan(checkpoint)
    if len(errors) > 1:  # what one format cannot hold is no reason not to ask the next
        raise errors[0]
    return report


def _error_of(stage: JobStage, checkpoint: Checkpoint) -> QuantpressError | None:
    """Plans, and gives what was refused."""
    try:
        stage.resolved(checkpoint).plan(checkpoint)
    except QuantpressError as error:
        return error
    return None


def _seeds() -> Mapping[str, bytes]:
    """Gives a config.json of every family, and what made a family's reader count to ten million or trip once."""
    good = config_seeds()
    changes: dict[str, tuple[str, dict[str, Any]]] = {
        "no-list": ("llama", {"architectures": 5}), "deepest": ("gemma3", {"num_hidden_layers": 10_000_000}),
        "widest": ("deepseek3", {"qk_nope_head_dim": 10_000_000}), "decoder": ("t5", {"num_decoder_layers": 9_999}),
        "furthest": ("t5", {"relative_attention_max_distance": 10_000_000}),
        "experts": ("mixtral", {"num_local_experts": 10_000_000}), "words": ("llama", {"vocab_size": 10_000_000}),
    }  # fmt: skip
    found = {name: json.loads(good[family]) | change for name, (family, change) in changes.items()}
    kept = {f"good-{name}": config for name, config in good.items()}
    return {**kept, **{f"found-{name}": json.dumps(config).encode() for name, config in found.items()}}


def _generation_seeds() -> Mapping[str, bytes]:
    good = {
        "do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [0, 1], "bos_token_id": 0,
        "repetition_penalty": 1.1, "min_p": 0.05, "transformers_version": "4.40.0",
    }  # fmt: skip
    odd: dict[str, Any] = {
        "text": {"temperature": "warm"}, "large": {"top_k": 1 << 60}, "list": {"top_p": [1]}, "minus": {"top_k": -1},
        "ids": {"eos_token_id": [1 << 40, -1, True, "x", None]}, "empty": {}, "flag": {"mirostat": True},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in {"good": good, **odd}.items()}


def _parse_planned(folder: Path) -> object:
    """Plans a GGUF file of the folder as it is; what is refused is refused here."""
    checkpoint = open_checkpoint(folder)
    return Gguf(output=Path("x.gguf"), outtype="Q8_0").resolved(checkpoint).plan(checkpoint)


def _card_seeds() -> Mapping[str, bytes]:
    card = "license: mit\nbase_model: org/name\ntags: [a, b]\nlanguage: [en, de]\npipeline_tag: text-generation\n"
    fronts = {
        "good": card, "odd": "license: !!bool maybe\n", "when": "license: !!timestamp x\n",
        "none": "license: !!int ''\n",
        "laughs": "a: &a [x]\nb: [*a, *a]\n", "deep": "a: " + "[" * 500, "date": "tags: [2024-13-45, 0b_, 1:99]\n",
        "keys": "{a: b}: c\n", "digits": f"tags: [{'9' * 5000}]\n", "code": "a: !!python/object/apply:os.system [id]\n",
    }  # fmt: skip
    return {**{name: f"---\n{front}---\n# Model\n".encode() for name, front in fronts.items()}, "open": b"---\na: b\n"}


def _sentence_folder(folder: Path) -> None:
    """Writes a BERT's config.json with the files of sentence-transformers."""
    llama_folder(folder)
    (folder / "config.json").write_bytes(config_seeds()["bert"])
    (folder / "modules.json").write_bytes(_module_seeds()["good"])
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_bytes(_pooling_seeds()["good"])


def _module_seeds() -> Mapping[str, bytes]:
    first = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    pooling = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    values: dict[str, Any] = {
        "good": [first, pooling], "up": [first, {**pooling, "path": ".."}], "root": [{**pooling, "path": "/etc"}],
        "gone": [{**pooling, "path": "2_Pooling"}], "dense": [first, pooling, {**pooling, "type": "x.Dense"}],
        "object": {"a": 1}, "many": [pooling] * 100, "number": [5], "long": [{**first, "type": "x" * 9000}],
        "line": [first, {**first, "type": "a\nb"}], "none": [],
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


def _pooling_seeds() -> Mapping[str, bytes]:
    values: dict[str, Any] = {
        "good": {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 64}, "stated": {"pooling_mode": "cls"},
        "several": {"pooling_mode": ["mean", "x\ny", 5, "z" * 9000]}, "list": [1], "none": {},
        "number": {"pooling_mode": 5},
    }  # fmt: skip
    return {name: json.dumps(value).encode() for name, value in values.items()}


TARGETS: tuple[Target, ...] = (
    Target("config-json", "config.json", llama_folder, parse_model, _seeds, _WORDS),
    Target(
        "generation-config", "generation_config.json", llama_folder, _parse_planned, _generation_seeds,
        (b'"temperature"', b'"min_p": 1e39', b'"xtc_threshold"', b'"mirostat": 9999999999', b"null", b"1e308", b"-1"),
    ),
    Target(
        "model-card", "README.md", llama_folder, _parse_planned, _card_seeds,
        (b"!!bool ", b"!!int ", b"!!timestamp ", b"&a ", b"*a", b"? ", b"---\n", b"license: ", b"0b_", b"<<: "),
    ),
    Target("sentence-modules", "modules.json", _sentence_folder, parse_model, _module_seeds, (b'".."',)),
    Target("sentence-pooling", "1_Pooling/config.json", _sentence_folder, parse_model, _pooling_seeds, (b"null",)),
)  # fmt: skip

"""BLOOM, Falcon, MPT, OPT, GPT-J, Phi, StableLM, StarCoder: what a config.json may say, names of published models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantpress.convert.arch.alibi import alibi_slopes
from quantpress.convert.arch.registry import find_arch, find_gguf_arch
from quantpress.convert.arch.spec import Hyperparameters
from quantpress.convert.checkpoint import LazyTensor
from quantpress.convert.head_rows import find_tensor, heads_apart
from quantpress.quant.errors import InputError

CLASSES = {
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "mpt": "MptForCausalLM",
    "opt": "OPTForCausalLM",
    "gptj": "GPTJForCausalLM",
    "phi": "PhiForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "gpt_bigcode": "GPTBigCodeForCausalLM",
}
FAMILIES = pytest.mark.parametrize("family", CLASSES)
# training, caches, names of tokens, how something is computed and not what
HARMLESS = frozenset(
    {"initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "init_std"}
    | {"hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "emb_pdrop", "dropout", "layerdrop", "init_device"}
    | {"residual_dropout", "embedding_dropout", "pretraining_tp", "slow_but_exact", "embedding_fraction"}
    | {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"}
)
# keys of the models as they were published
_FALCON_7B = {
    "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024, "multi_query": True,
    "new_decoder_architecture": False, "parallel_attn": True, "bias": False, "alibi": False,
}  # fmt: skip
_FALCON_40B = {
    "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8, "vocab_size": 65024,
    "new_decoder_architecture": True, "parallel_attn": True, "bias": False, "alibi": False,
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom-560m": ("bloom", {"n_embed": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880, "n_inner": None,
                             "offset_alibi": 100, "seq_length": 2048}),
    "falcon-7b": ("falcon", _FALCON_7B),
    "falcon-40b": ("falcon", _FALCON_40B),
    "falcon-11b": ("falcon", {**_FALCON_40B, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 65024,
                              "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 16384}),
    "falcon-rw-1b": ("falcon", {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
                                "vocab_size": 50304, "alibi": True, "bias": True, "multi_query": False,
                                "parallel_attn": False, "new_decoder_architecture": False}),
    "mpt-7b": ("mpt", {"d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432, "max_seq_len": 2048,
                       "expansion_ratio": 4, "no_bias": True, "learned_pos_emb": True, "logit_scale": None,
                       "norm_type": "low_precision_layernorm",
                       "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "clip_qkv": None,
                                       "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
                                       "attn_type": "multihead_attention", "attn_uses_sequence_id": False}}),
    "opt-125m": ("opt", {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072,
                         "vocab_size": 50272, "do_layer_norm_before": True, "word_embed_proj_dim": 768,
                         "_remove_final_layer_norm": False}),
    "opt-350m": ("opt", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096,
                         "vocab_size": 50272, "do_layer_norm_before": False, "word_embed_proj_dim": 512}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400,
                          "n_positions": 2048, "rotary": True, "scale_attn_weights": True, "n_inner": None}),
    "phi-2": ("phi", {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "num_key_value_heads": 32, "partial_rotary_factor": 0.4,
                      "vocab_size": 51200, "qk_layernorm": False, "rope_scaling": None, "rope_theta": 10000.0}),
    "stablelm-2-12b": ("stablelm", {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                                    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 100352,
                                    "partial_rotary_factor": 0.25, "qk_layernorm": True, "use_qkv_bias": False,
                                    "use_parallel_residual": True}),
    "stablelm-2-1.6b": ("stablelm", {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
                                     "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 100352,
                                     "partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "starcoder2-3b": ("starcoder2", {"hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
                                     "num_attention_heads": 24, "num_key_value_heads": 2, "vocab_size": 49152,
                                     "sliding_window": 4096, "use_bias": True, "norm_type": "layer_norm",
                                     "mlp_type": "default", "rope_theta": 999999.4420358813}),
    "starcoderbase-1b": ("gpt_bigcode", {"n_embd": 2048, "n_layer": 24, "n_head": 16, "n_inner": 8192,
                                         "n_positions": 8192, "vocab_size": 49152, "multi_query": True}),
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "opt": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96},
    "gptj": {"n_embd": 256, "n_layer": 2, "n_head": 4},
    "phi": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
    "stablelm": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
                 "num_key_value_heads": 4},
    "starcoder2": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}  # fmt: skip


def config_class(family: str) -> Any:
    import transformers

    return getattr(transformers, CLASSES[family].replace("ForCausalLM", "Config"))


def small(family: str, **options: Any) -> dict[str, Any]:
    return {"architectures": [CLASSES[family]], "model_type": family, "vocab_size": 80, **SMALL[family], **options}


def read(config: dict[str, Any]) -> Hyperparameters:
    return find_arch(config).read_config(config)


@FAMILIES
def test_no_key_of_transformers_class_is_passed_over(family: str) -> None:
    own = {
        name
        for base in config_class(family).__mro__
        if base.__module__.startswith("transformers.models.")
        for name in vars(base).get("__annotations__", {})
        if name not in ("model_type", "attribute_map", "sub_configs")
    }
    assert len(own) > 10, "the class's fields were not found"
    config = small(family)
    read(config)
    for key in sorted(own - HARMLESS):
        grouped = {"new_decoder_architecture": True} if key == "num_kv_heads" else {}
        with pytest.raises(InputError, match=key.strip("_").split("_")[0]):
            read({**config, **grouped, key: "nonsense"})


@FAMILIES
def test_defaults_are_those_of_transformers(family: str) -> None:
    sizes = {"vocab_size": 99, **SMALL[family]}
    full = json.loads(json.dumps(config_class(family)(**sizes).to_dict()))
    classes = {"architectures": [CLASSES[family]]}
    assert read({**full, **classes}) == read({**sizes, **classes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_the_tensors_of_transformers_class(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    family, keys = PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys))
    wanted = {key: tuple(values.shape) for key, values in model.named_parameters()}
    config = {"architectures": [CLASSES[family]], **keys}
    arch, hyper = find_arch(config), read(config)
    rows = [(one, layer) for row, layer in arch.rows(hyper) for one in arch.heads_of(row, hyper)]
    found = {
        row.hf.format(layer=layer): tuple(hyper.dims[dim] for dim in row.shape)
        for row, layer in rows
        if not (row.tied_to and hyper.tied)
    }
    assert found == wanted


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("bloom", {"n_inner": 100}, "n_inner"),
    ("bloom", {"n_embed": 128}, "'hidden_size' is 64 and 'n_embed' is 128"),
    ("bloom", {"alibi": False}, "alibi"),
    ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
    ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}, "multiple of 3"),
    ("mpt", {"attn_config": {"prefix_lm": True}}, "prefix_lm"),
    ("mpt", {"attn_config": {"rope": True}}, "rope"),
    ("mpt", {"attn_config": {"qk_ln": True, "clip_qkv": 6}}, "qk_ln"),
    ("mpt", {"attn_config": {"attn_type": "sparse"}}, "attn_type"),
    ("mpt", {"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 3}}, "kv_n_heads"),
    ("mpt", {"attn_config": 3}, "attn_config"),
    ("mpt", {"norm_type": "rmsnorm"}, "norm_type"),
    ("mpt", {"ffn_config": {"ffn_type": "mptglu"}}, "ffn_type"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ("gptj", {"rotary_dim": 65}, "rotary_dim"),
    ("gptj", {"rotary_dim": 66}, "rotary_dim"),
    ("gptj", {"rotary": False}, "rotary"),
    ("phi", {"head_dim": 32}, "head_dim"),
    ("starcoder2", {"norm_type": "rms_norm"}, "norm_type"),
    ("gpt_bigcode", {"add_cross_attention": True}, "add_cross_attention"),
]


@pytest.mark.parametrize(("family", "options", "named"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name(family: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        read(small(family, **options))


@pytest.mark.parametrize("architecture", ["opt", "gptj"])
def test_a_file_of_an_architecture_that_llama_cpp_lacks_is_refused(architecture: str) -> None:
    with pytest.raises(InputError, match=architecture.upper() if architecture == "opt" else "general.architecture"):
        find_gguf_arch(architecture, {}).config_from_gguf({}, frozenset(), {})


def test_falcons_first_configs_say_the_same_in_other_words() -> None:
    seven = {"hidden_size": 4544, "n_layer": 32, "n_head": 71, "multi_query": True, "vocab_size": 65024}
    forty = {"hidden_size": 8192, "n_layer": 60, "n_head": 128, "n_head_kv": 8, "vocab_size": 65024}
    first = {"architectures": ["RWForCausalLM"], "parallel_attn": True, "alibi": False, "bias": False}
    now = {"architectures": ["FalconForCausalLM"]}
    assert read({**first, **seven, "model_type": "RefinedWebModel"}) == read({**now, **_FALCON_7B})
    assert read({**first, **forty, "model_type": "RefinedWeb"}) == read({**now, **_FALCON_40B})


def test_stablelms_first_configs_say_the_same_in_other_words() -> None:
    first = {"rope_pct": 0.5, "norm_eps": 1e-6, "architectures": ["StableLMEpochForCausalLM"]}
    now = {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-6}
    assert read({**small("stablelm"), **first}) == read(small("stablelm", **now))


@pytest.mark.parametrize("heads", [*range(1, 34), 71, 112])
def test_slopes_are_those_of_bloom_and_mpt(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    # powers of a rounded float32 base: one part in 2^24 for each of up to 64 factors
    np.testing.assert_allclose(alibi_slopes(heads), bloom.numpy(), rtol=2.0**-17)
    for largest in (8, 16):
        mpt = -build_mpt_alibi_tensor(heads, 2, largest)[:, 0, 0]
        np.testing.assert_allclose(alibi_slopes(heads, largest), mpt.numpy(), rtol=2.0**-21)


def test_falcons_slopes_are_rounded_as_its_code_does_and_then_scaled() -> None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    keys = {**PUBLISHED["falcon-rw-1b"][1], "architectures": ["FalconForCausalLM"]}
    slopes = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), 32, torch.float32)[:, 0, 1] / math.sqrt(64)
    np.testing.assert_array_equal(np.float32(read(keys).alibi), slopes.numpy())


def _heads_of_norms(shapes: dict[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    random, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        tensors[name] = LazyTensor(name, shape, "F32", "model", lambda start, stop, kept=values: kept[start:stop])
    return tensors


def test_norms_stored_head_by_head_are_one_tensor_and_come_apart_again() -> None:
    config = small("stablelm", qk_layernorm=True)
    arch, hyper = find_arch(config), read(config)
    row = next(row for row in arch.present(hyper) if row.slot == "attn_q_norm.weight")
    name = "model.layers.1.self_attn.q_layernorm.norms.{}.weight"
    stored = _heads_of_norms({name.format(head): (32,) for head in range(4)})
    _, whole, names = find_tensor(arch, row, 1, hyper, stored)
    assert names == list(stored)
    assert whole is not None
    assert whole.shape == (4, 32)
    np.testing.assert_array_equal(whole.read(), np.stack([tensor.read() for tensor in stored.values()]))
    for apart in heads_apart(arch, row, 1, hyper, whole):
        assert apart.shape == (32,)
        np.testing.assert_array_equal(apart.read(), stored[apart.name].read())
        np.testing.assert_array_equal(apart.read_rows(3, 9), stored[apart.name].read()[3:9])
    bare = {key.removeprefix("model."): tensor for key, tensor in stored.items()}
    assert find_tensor(arch, row, 1, hyper, bare)[1] is not None
    missing = {key: tensor for key, tensor in stored.items() if "norms.2" not in key}
    assert find_tensor(arch, row, 1, hyper, missing)[1] is None
    other = _heads_of_norms({name.format(head): (32 + head,) for head in range(4)})
    with pytest.raises(InputError, match="heads of a layer are alike"):
        find_tensor(arch, row, 1, hyper, other)


def test_gpt2_files_of_opt_begin_texts_with_bos(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from quantpress.convert.tokenizer import Tokenizer, TokenizerFiles
    from tests.tiny import write_tokenizer

    write_tokenizer(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    bos = next(token for token, number in model["vocab"].items() if number == 5)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": bos}
    files = {"vocab.json": json.dumps(model["vocab"]), "merges.txt": "#version: 0.2\n" + "\n".join(merges) + "\n",
             "tokenizer_config.json": json.dumps(settings)}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    ours = Tokenizer(TokenizerFiles({name: text.encode() for name, text in files.items()}))
    assert ours.add_bos
    found = [ours.bos_id, *ours.encode("Hello wide world", special=True).tolist()]
    assert found == AutoTokenizer.from_pretrained(tmp_path)("Hello wide world")["input_ids"]


SHORT = ("bloom", "falcon-40b", "falcon-7b", "mpt", "mpt-storywriter", "phi", "gptj", "stablelm-2-12b", "starcoder2")


@pytest.mark.parametrize("name", [*SHORT, "starcoder", "starcoder-heads", "mpt-learned-positions"])
def test_a_gguf_file_opens_again_as_the_same_model(tmp_path: Path, name: str) -> None:
    import quantpress as qp
    from quantpress.convert.gguf.source import open_gguf
    from tests.families.cases import write_checkpoint
    from tests.families.decoders_one import CASES
    from tests.pipelines.test_every_family import decoded

    case = next(case for case in CASES if case.id == name)
    folder, path = write_checkpoint(case, tmp_path / "model"), tmp_path / "model.gguf"
    qp.export_gguf(folder, path, outtype="f32", verify=False)
    # rows of GPT-J stand otherwise in the file, so that sums go another way
    np.testing.assert_allclose(decoded(path), decoded(folder), rtol=0, atol=2e-5)
    qp.export_gguf(path, tmp_path / "again.gguf", outtype="f32", verify=False)
    first, second = open_gguf(path), open_gguf(tmp_path / "again.gguf")
    assert list(second.tensors) == list(first.tensors)
    assert second.config == first.config

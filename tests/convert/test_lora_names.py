"""Names of tensors of adapters, as PEFT and the tools around it write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpress.convert.lora.names import Key, parse_key
from quantpress.quant.errors import InputError

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"


def key(name: str) -> Key:
    return parse_key(name, where="adapter_model.safetensors")


@pytest.mark.parametrize(
    ("name", "path", "depth", "part"),
    [
        # as PEFT saves
        (f"base_model.model.{Q}.lora_A.weight", Q, 0, "lora_A"),
        (f"base_model.model.{Q}.lora_B.weight", Q, 0, "lora_B"),
        (f"base_model.model.{Q}.lora_B.bias", Q, 0, "lora_B.bias"),
        (f"base_model.model.{Q}.lora_magnitude_vector", Q, 0, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_A", Q, 0, "lora_A"),  # AdaLoRA
        (f"base_model.model.{Q}.lora_E", Q, 0, "lora_E"),
        (f"base_model.model.{Q}.ranknum", Q, 0, "ranknum"),
        (f"base_model.model.{Q}.hada_w1_a", Q, 0, "hada_w1_a"),
        (f"base_model.model.{Q}.lokr_w2", Q, 0, "lokr_w2"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "model.embed_tokens", 0, "lora_embedding_A"),
        ("base_model.model.model.embed_tokens.base_layer.weight", "model.embed_tokens", 0, "weight"),
        ("base_model.model.model.embed_tokens.token_adapter.base_layer.weight", "model.embed_tokens", 0, "weight"),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "model.embed_tokens",
            0,
            "trainable_tokens_delta",
        ),
        ("base_model.model.lm_head.trainable_tokens_delta", "lm_head", 0, "trainable_tokens_delta"),
        ("base_model.model.lm_head.weight", "lm_head", 0, "weight"),
        ("base_model.model.score.modules_to_save.weight", "score", 0, "weight"),
        (f"base_model.model.{Q}.base_layer.bias", Q, 0, "bias"),
        (f"base_model.model.{EXPERTS}.lora_A.weight", EXPERTS, 0, "lora_A"),
        (f"base_model.model.{EXPERTS}.base_layer.lora_A.weight", EXPERTS, 1, "lora_A"),
        (f"base_model.model.{EXPERTS}.base_layer.base_layer.lora_B.weight", EXPERTS, 2, "lora_B"),
        (f"base_model.model.{EXPERTS}.base_layer.router.lora_A.weight", f"{EXPERTS}.router", 0, "lora_A"),
        # with the adapter's name, as a plain state dict has it
        (f"base_model.model.{Q}.lora_A.default.weight", Q, 0, "lora_A"),
        (f"base_model.model.{Q}.lora_B.my_adapter.weight", Q, 0, "lora_B"),
        (f"base_model.model.{Q}.lora_B.my_adapter.bias", Q, 0, "lora_B.bias"),
        (f"base_model.model.{Q}.lora_magnitude_vector.default.weight", Q, 0, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_magnitude_vector.weight", Q, 0, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.lora_magnitude_vector.default", Q, 0, "lora_magnitude_vector"),
        (f"base_model.model.{Q}.hada_w2_b.default", Q, 0, "hada_w2_b"),
        ("base_model.model.model.embed_tokens.lora_embedding_B.default", "model.embed_tokens", 0, "lora_embedding_B"),
        ("base_model.model.score.modules_to_save.default.weight", "score", 0, "weight"),
        ("base_model.model.score.modules_to_save.default.dense.weight", "score.dense", 0, "weight"),
        ("base_model.model.score.modules_to_save.mine.dense.bias", "score.dense", 0, "bias"),
        # other wrappers
        (f"{Q}.lora_A.weight", Q, 0, "lora_A"),
        (f"base_model.model.base_model.model.{Q}.lora_A.weight", Q, 0, "lora_A"),
        (f"module.base_model.model.{Q}.lora_A.weight", Q, 0, "lora_A"),
        (f"pretrained_model.base_model.model.{Q}.lora_A.weight", Q, 0, "lora_A"),
        (f"_orig_mod.base_model.model._orig_mod.{Q}.lora_A.weight", Q, 0, "lora_A"),
        (f"module._orig_mod.base_model.model.{Q}._orig_mod.lora_A.weight", Q, 0, "lora_A"),
        (f"_fsdp_wrapped_module.base_model.model.{Q}.lora_A.weight", Q, 0, "lora_A"),
        (
            "base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_B.default.weight",
            Q,
            0,
            "lora_B",
        ),
        # modules of the base that are called as wrappers are
        ("base_model.model.base_model.layers.0.q.lora_A.weight", "base_model.layers.0.q", 0, "lora_A"),
        ("base_model.model.module.layers.0.q.lora_A.weight", "module.layers.0.q", 0, "lora_A"),
        ("module.layers.0.q.lora_A.weight", "module.layers.0.q", 0, "lora_A"),
        ("base_model.model.model.model.layers.0.q.lora_A.weight", "model.model.layers.0.q", 0, "lora_A"),
        ("base_model.model.weight.default.lora_A.weight", "weight.default", 0, "lora_A"),
        ("base_model.model.msa_pair_weighted.lora_A.weight", "msa_pair_weighted", 0, "lora_A"),
        ("base_model.model.classifier.out_proj.weight", "classifier.out_proj", 0, "weight"),
    ],
)
def test_a_name_says_module_depth_and_part(name: str, path: str, depth: int, part: str) -> None:
    found = key(name)
    assert (found.path, found.depth, found.part, found.spare) == (path, depth, part, False)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.original_module.weight",
        "base_model.model.score.original_module.dense.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_original.default",
        f"base_model.model.{Q}.lora_velora_embed",
        f"base_model.model.{Q}.lora_velora_embed.default",
        f"base_model.model.{Q}.lora_monteclora_sampler.expert_weights",
        f"base_model.model.{Q}.lora_monteclora_sampler.default.std_prior",
    ],
)
def test_what_peft_keeps_beside_the_trained_tensors_is_spare(name: str) -> None:
    assert key(name).spare


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", ""),
        ("weight", ""),
        (".lora_A.weight", ""),
        ("lora_A.weight", ""),
        ("base_model.model.lora_A.weight", ""),
        (f"base_model.model..{Q}.lora_A.weight", ""),
        (f"base_model.model.{Q}.\nlora_A.weight", ""),
        (f"base_model.model.{Q}.lora_A.default.extra.weight", ""),
        (f"base_model.model.{Q}.lora_A.bias", ""),
        (f"base_model.model.{Q}.lora_E.weight", ""),
        (f"base_model.model.{Q}.lora_C.weight", ""),
        (f"base_model.model.{Q}.lora_A_1.weight", ""),
        (f"base_model.model.{Q}.ia3_l", ""),
        (f"base_model.model.{Q}.vera_lambda_b", ""),
        (f"base_model.model.{Q}.lora_diag.default", "KaSA"),
        (f"{Q}.lora_a.weight", "MLX or torchtune"),
        (f"{Q}.lora_a", "MLX or torchtune"),
        ("lora_unet_down_blocks_0.lora_up.weight", "kohya"),
        ("prompt_embeddings", ""),
        ("base_model.model.original_module.weight", ""),
    ],
)
def test_a_name_that_is_not_understood_is_an_error_that_shows_it(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=r"^adapter_model.safetensors: tensor '") as caught:
        key(name)
    assert hint in str(caught.value)
    assert str(caught.value).isprintable()
    assert repr(name)[1:60] in str(caught.value)


words = st.sampled_from(["model", "layers", "0", "7", "attn", "q_proj", "base_model", "module", "experts", "weight"])
wrappers = st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
parts = st.sampled_from(["lora_A", "lora_B", "lora_E", "lora_embedding_A", "lokr_w1", "hada_w2_a", "weight", "bias"])


@given(st.lists(words, min_size=1, max_size=6), parts, st.integers(1, 3), st.data())
def test_wrappers_in_any_place_change_nothing(path: list[str], part: str, times: int, data: st.DataObject) -> None:
    while path[:2] == ["base_model", "model"]:  # cannot be told from another PeftModel
        path = path[2:] or ["q_proj"]
    plain = [*path, part, *(["weight"] if part in ("lora_A", "lora_B") else [])]
    wanted = parse_key(".".join(["base_model", "model", *plain]), where="f")
    assert (wanted.path, wanted.part) == (".".join(path), part)
    segments = ["base_model", "model"] * times + plain
    for _ in range(data.draw(st.integers(0, 4))):
        segments.insert(data.draw(st.integers(0, len(segments))), data.draw(wrappers))
    outer = data.draw(st.sampled_from([[], ["module"], ["pretrained_model"], ["module", "module"]]))
    assert parse_key(".".join(outer + segments), where="f") == wanted

"""What the config.json of ChatGLM, InternLM2, Baichuan and the first Qwen may say, and what it may not."""

from __future__ import annotations

from typing import Any

import pytest

from quantpress.convert.arch.baichuan import BAICHUAN
from quantpress.convert.arch.chatglm import CHATGLM
from quantpress.convert.arch.internlm2 import INTERNLM2
from quantpress.convert.arch.qwen1 import QWEN1
from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import ArchSpec, Layout, Role
from quantpress.quant.errors import InputError

# config.json as published, without what neither names nor sizes follow from
CHATGLM3 = {
    "_name_or_path": "THUDM/chatglm3-6b", "architectures": ["ChatGLMModel"], "model_type": "chatglm",
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "ffn_hidden_size": 13696,
    "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1e-05, "multi_query_attention": True,
    "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 28, "padded_vocab_size": 65024,
    "post_layer_norm": True, "rmsnorm": True, "seq_length": 8192, "tie_word_embeddings": False,
}  # fmt: skip
GLM4 = {**CHATGLM3, "_name_or_path": "/models/mine", "num_layers": 40, "padded_vocab_size": 151552, "rope_ratio": 500}
INTERNLM2_7B = {
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0}, "vocab_size": 92544, "tie_word_embeddings": False,
}  # fmt: skip
BAICHUAN_7B = {
    "architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "vocab_size": 64000,
}  # fmt: skip
BAICHUAN2_13B = {
    "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 13696, "model_max_length": 4096, "num_attention_heads": 40, "num_hidden_layers": 40,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "vocab_size": 125696, "z_loss_weight": 0,
}  # fmt: skip
QWEN_7B = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 4096, "intermediate_size": 22016,
    "kv_channels": 128, "layer_norm_epsilon": 1e-06, "max_position_embeddings": 32768, "no_bias": True,
    "num_attention_heads": 32, "num_hidden_layers": 32, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "seq_length": 8192, "use_dynamic_ntk": True, "use_logn_attn": True, "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "config", "parameters"),
    [
        (CHATGLM, CHATGLM3, 6_243_584_000),
        (CHATGLM, GLM4, 9_399_951_360),
        (INTERNLM2, INTERNLM2_7B, 7_737_708_544),
        (BAICHUAN, BAICHUAN_7B, 7_000_559_616),
        (BAICHUAN, BAICHUAN2_13B, 13_896_668_160),
        (QWEN1, QWEN_7B, 7_721_324_544),
    ],
    ids=["chatglm3", "glm-4", "internlm2-7b", "baichuan-7b", "baichuan2-13b", "qwen-7b"],
)
def test_tables_have_as_many_parameters_as_are_published(
    spec: ArchSpec, config: dict[str, Any], parameters: int
) -> None:
    assert find_arch(config) is spec
    hyper = spec.read_config(config)
    stored = {spec.names(row, layer)[0]: row for row, layer in spec.rows(hyper)}
    sizes = [[hyper.dims[dim] for dim in row.shape] for row in stored.values()]
    assert sum(size[0] * (size[1] if len(size) > 1 else 1) for size in sizes) == parameters


def test_the_ratio_of_chatglm2_divides_positions_and_that_of_later_ones_multiplies_the_base() -> None:
    for name, theta, kind in (("chatglm2-6b-32k", 10_000.0, "linear"), ("chatglm3-6b-32k", 500_000.0, "default")):
        rope = CHATGLM.read_config({**CHATGLM3, "_name_or_path": f"THUDM/{name}", "rope_ratio": 50}).rope
        assert rope is not None
        assert (rope.theta, rope.kind, rope.dim, rope.interleaved) == (theta, kind, 64, True)
    rope = CHATGLM.read_config(GLM4).rope  # its vocabulary tells
    assert rope is not None
    assert rope.theta == 5_000_000.0
    with pytest.raises(InputError, match="'rope_ratio' is 50: ChatGLM2 divides positions by it"):
        CHATGLM.read_config({**CHATGLM3, "_name_or_path": "/models/mine", "rope_ratio": 50})


def test_baichuan_has_rotary_positions_or_alibi_by_the_key_of_its_length() -> None:
    rotary, alibi = BAICHUAN.read_config(BAICHUAN_7B), BAICHUAN.read_config(BAICHUAN2_13B)
    assert rotary.rope is not None
    assert not rotary.alibi
    assert alibi.rope is None
    assert len(alibi.alibi) == 40
    assert alibi.context == 4096


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (BAICHUAN_7B, Layout.PLAIN),
        (BAICHUAN2_13B, Layout.UNIT_ROWS),
        ({**BAICHUAN_7B, "vocab_size": 125696}, Layout.UNIT_ROWS),
        ({**BAICHUAN_7B, "z_loss_weight": 0, "vocab_size": 130000}, Layout.UNIT_ROWS),
    ],
)
def test_baichuan_2_divides_the_rows_of_its_head(config: dict[str, Any], layout: Layout) -> None:
    rows = BAICHUAN.rows(BAICHUAN.read_config(config))
    assert [row.layout for row, _ in rows if row.role is Role.HEAD] == [layout]


def test_qwens_context_ends_where_its_code_begins_to_scale() -> None:
    assert QWEN1.read_config(QWEN_7B).context == 8192
    assert QWEN1.read_config({**QWEN_7B, "use_dynamic_ntk": False, "use_logn_attn": False}).context == 32768
    assert QWEN1.read_config({**QWEN_7B, "use_dynamic_ntk": False}).context == 8192


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        (CHATGLM, {**CHATGLM3, "inner_hidden_size": 16384}, "first ChatGLM-6B"),
        (CHATGLM, {**CHATGLM3, "multi_query_attention": False}, "'multi_query_attention' is false"),
        (CHATGLM, {**CHATGLM3, "rmsnorm": False}, "'rmsnorm' is False"),
        (CHATGLM, {**CHATGLM3, "post_layer_norm": False}, "'post_layer_norm' is False"),
        (CHATGLM, {**CHATGLM3, "apply_residual_connection_post_layernorm": True}, "connection_post_layernorm' is True"),
        (CHATGLM, {**CHATGLM3, "pre_seq_len": 128}, "'pre_seq_len' is 128"),
        (CHATGLM, {**CHATGLM3, "quantization_bit": 4}, "'quantization_bit' is 4"),
        (CHATGLM, {**CHATGLM3, "multi_query_group_num": 3}, "wanted a multiple of 'multi_query_group_num'"),
        (CHATGLM, {**CHATGLM3, "kv_channels": 126}, "'kv_channels' is 126"),
        (BAICHUAN, {**BAICHUAN_7B, "num_key_value_heads": 8}, "'num_key_value_heads' is 8"),
        (BAICHUAN, {**BAICHUAN_7B, "rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling' is"),
        (INTERNLM2, {**INTERNLM2_7B, "num_key_value_heads": 5}, "'num_attention_heads' is 32"),
        (QWEN1, {**QWEN_7B, "intermediate_size": 22017}, "'intermediate_size' is 22017"),
        (QWEN1, {**QWEN_7B, "use_cache_quantization": True}, "'use_cache_quantization' is True"),
        (QWEN1, {**QWEN_7B, "rotary_pct": 0.01}, "'rotary_pct' turns 1 of 128"),
    ],
)
def test_what_is_not_implemented_is_refused_by_its_key(spec: ArchSpec, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        spec.read_config(config)

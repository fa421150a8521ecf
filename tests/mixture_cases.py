"""Models of many shapes for the rules of mixtures: configs of every family, and what no family here has."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.checkpoint import Checkpoint, LazyTensor
from quantpress.convert.preflight import Preflight, preflight
from tests.llama_quantize import Model, Options


def _config(name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **more,
    }


def _gemma(number: str, layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    capped = number == "2"
    return _config(
        f"Gemma{number}ForCausalLM",
        layers,
        hidden,
        heads,
        heads // 2,
        ffn,
        model_type="gemma2" if capped else "gemma3_text",
        head_dim=256,
        sliding_window=32,
        sliding_window_pattern=6,
        query_pre_attn_scalar=256,
        tie_word_embeddings=True,
        attn_logit_softcapping=50.0 if capped else None,
        final_logit_softcapping=30.0 if capped else None,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        rope_theta=10000.0,
        rope_local_base_freq=10000.0,
    )


def _gpt2(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 32,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 64,
    }


_LLAMA = "LlamaForCausalLM"
FAMILY_CASES: Mapping[str, Mapping[str, Any]] = {
    "llama-3.2-1b": _config(_LLAMA, 16, 2048, 32, 8, 8192, tie_word_embeddings=True),
    "llama-3.1-70b": _config(_LLAMA, 80, 8192, 64, 8, 28672),
    "llama-65b": _config(_LLAMA, 80, 8192, 64, 64, 22016),
    "smollm2-135m": _config(_LLAMA, 30, 576, 9, 3, 1536, tie_word_embeddings=True),
    "tinyllama": _config(_LLAMA, 22, 2048, 32, 4, 5632),
    "llama-odd": _config(_LLAMA, 5, 288, 6, 6, 100),
    "mistral-7b": _config("MistralForCausalLM", 32, 4096, 32, 8, 14336, sliding_window=None),
    "qwen2.5-0.5b": _config("Qwen2ForCausalLM", 24, 896, 14, 2, 4864, tie_word_embeddings=True),
    "qwen2.5-72b": _config("Qwen2ForCausalLM", 80, 8192, 64, 8, 29568),
    "qwen3-0.6b": _config("Qwen3ForCausalLM", 28, 1024, 16, 8, 3072, head_dim=128, tie_word_embeddings=True),
    "qwen3-14b": _config("Qwen3ForCausalLM", 40, 5120, 40, 8, 17408, head_dim=128),
    "gemma2-2b": _gemma("2", 26, 2304, 8, 9216),
    "gemma3-4b": _gemma("3", 34, 2560, 8, 10240),
    "phi3-mini": _config("Phi3ForCausalLM", 32, 3072, 32, 32, 8192, sliding_window=None),
    "gpt2": _gpt2(12, 768),
    "gpt2-narrow": _gpt2(3, 80),
    "pythia-410m": {
        **_config("GPTNeoXForCausalLM", 24, 1024, 16, 16, 4096, hidden_act="gelu", rotary_pct=0.25),
        "model_type": "gpt_neox",
    },
}


def named(config: Mapping[str, Any]) -> Preflight:
    """Checks a config against weights that are only named: nothing can be read."""
    arch = find_arch(config)
    hyper = arch.read_config(config)
    tensors = {}
    for row, layer in arch.rows(hyper):
        if not (row.tied_to and hyper.tied):
            name = row.hf.format(layer=layer)
            shape = tuple(hyper.dims[dim] for dim in row.shape)
            tensors[name] = LazyTensor(name, shape, "F16", "model.safetensors", _refuse)
    return preflight(Checkpoint("model", config, tensors))


def _refuse(_start: int, _stop: int) -> Any:
    raise AssertionError("planning reads no weight")


def _ends(hidden: int, *, tied: bool) -> tuple[Any, ...]:
    head = () if tied else (("output.weight", (2, hidden), None),)
    return (("token_embd.weight", (2, hidden), None), *head, ("output_norm.weight", (hidden,), None))


def _layer(*names: str, hidden: int = 256, ffn: int = 256) -> tuple[Any, ...]:
    return tuple((f"blk.{{}}.{name}.weight", (2, ffn if "ffn_down" in name else hidden), None) for name in names)


def _experts(count: int, layers: range | None = None, hidden: int = 256, ffn: int = 256) -> tuple[Any, ...]:
    every = None if layers is None else tuple(layers)
    router = ("blk.{}.ffn_gate_inp.weight", (2, hidden), every)
    widths = {"gate": hidden, "up": hidden, "down": ffn}
    stacks = ((f"blk.{{}}.ffn_{part}_exps.weight", (count, 2, width), every) for part, width in widths.items())
    return (router, *stacks)


_DENSE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_ATTENTION = _DENSE[:4]
_FALCON = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
MODEL_CASES: Mapping[str, Model] = {
    "tied": Model("llama", 10, 8, 8, 0, 256, (*_ends(256, tied=True), *_layer(*_DENSE))),
    "untied": Model("llama", 17, 8, 2, 0, 256, (*_ends(256, tied=False), *_layer(*_DENSE))),
    "one-layer": Model("llama", 1, 8, 1, 0, 256, (*_ends(256, tied=False), *_layer(*_DENSE))),
    "eight-experts": Model("llama", 16, 8, 2, 8, 256, (*_ends(256, tied=False), *_layer(*_ATTENTION), *_experts(8))),
    "eight-experts-odd": Model(
        "llama", 9, 4, 4, 8, 288, (*_ends(288, tied=True), *_layer(*_ATTENTION, hidden=288), *_experts(8, hidden=288))
    ),
    "many-experts-late": Model(
        "qwen3moe",
        12,
        8,
        1,
        16,
        256,
        (
            *_ends(256, tied=False),
            *_layer(*_ATTENTION, "ffn_down_shexp"),
            *_experts(3, range(2, 12)),
            ("blk.{}.ffn_down.weight", (2, 256), (0, 1)),
        ),
    ),
    "joint-keys-and-values": Model(
        "llama",
        10,
        8,
        1,
        0,
        256,
        (*_ends(256, tied=False), *_layer("attn_q", "attn_kv_b", "attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    ),
    "values-in-some-layers": Model(
        "llama",
        24,
        8,
        4,
        0,
        256,
        (
            *_ends(256, tied=True),
            *_layer("attn_q", "attn_k", "attn_output", "ffn_up", "ffn_down"),
            ("blk.{}.attn_v.weight", (2, 256), tuple(range(0, 24, 3))),
        ),
    ),
    "falcon": Model("falcon", 32, 8, 1, 0, 256, (*_ends(256, tied=False), *_layer(*_FALCON))),
    "falcon-40b": Model("falcon", 60, 16, 1, 0, 256, (*_ends(256, tied=False), *_layer(*_FALCON))),
    "falcon-tied": Model("falcon", 9, 8, 8, 0, 256, (*_ends(256, tied=True), *_layer(*_FALCON))),
    "falcon-experts": Model("falcon", 20, 8, 1, 8, 256, (*_ends(256, tied=False), *_layer(*_FALCON), *_experts(8))),
    "olmo-80": Model("olmo", 80, 8, 8, 0, 256, (*_ends(256, tied=False), *_layer("attn_v", "ffn_down"))),
    "deci-80": Model("deci", 80, 8, 1, 0, 256, (*_ends(256, tied=False), *_layer("attn_v", "ffn_down"))),
    "jais2-68": Model("jais2", 68, 8, 8, 0, 256, (*_ends(256, tied=False), *_layer("attn_v", "ffn_down"))),
    "narrow": Model("llama", 8, 4, 4, 0, 64, (*_ends(64, tied=False), *_layer(*_DENSE, hidden=64, ffn=176))),
    "one-row": Model(
        "llama",
        4,
        4,
        4,
        0,
        256,
        (
            *_ends(256, tied=False),
            *_layer("attn_q", "attn_output", "ffn_up", "ffn_down"),
            ("blk.{}.attn_k.weight", (1, 256), None),
            ("blk.{}.attn_v.weight", (1, 256), None),
        ),
        stored="BF16",
    ),
}


def _asked(ftype: str, model: str = "untied", **options: Any) -> tuple[str, str, Options]:
    return model, ftype, Options(**options)


OPTION_CASES: tuple[tuple[str, str, Options], ...] = (
    _asked("Q4_K_M", pure=True),
    _asked("Q3_K_M", "tied", pure=True, output_tensor_type="q8_0"),
    _asked("Q4_K_M", "narrow", pure=True),
    _asked("Q4_K_M", leave_output_tensor=True),
    _asked("Q4_K_M", "tied", leave_output_tensor=True),
    _asked("Q4_K_M", output_tensor_type="q8_0", token_embedding_type="q5_k"),
    _asked("Q4_K_M", "tied", output_tensor_type="q8_0"),
    _asked("Q4_K_M", "tied", output_tensor_type="q8_0", token_embedding_type="q5_k"),
    _asked("MXFP4_MOE", "eight-experts", output_tensor_type="f16", token_embedding_type="q6_k"),
    # What is named is not counted: the other layers move up.
    _asked("Q4_K_M", tensor_types=((r"blk\.(0|1|2)\.attn_v", "q8_0"),)),
    _asked("Q3_K_M", tensor_types=((r"\.[05]\.(attn_v|ffn_down)", "q6_k"), ("attn_v", "iq4_xs"))),
    _asked("Q4_K_S", tensor_types=((r"blk\.1\.", "f16"), (r"blk\.[01]\.", "q3_k"))),
    _asked("Q2_K", tensor_types=(("output", "q5_0"), ("token", "q4_0"), ("ffn_(up|gate)", "iq4_nl"))),
    _asked("Q4_K_M", "tied", tensor_types=(("token_embd", "q5_k"),), output_tensor_type="q8_0"),
    _asked("Q4_K_M", "narrow", tensor_types=(("attn_q", "q6_k"), ("ffn_up", "tq2_0"), ("ffn_down", "q8_0"))),
    _asked("Q2_K", pure=True, tensor_types=(("ffn_down", "q6_k"),)),
    _asked("Q4_0", "eight-experts", imatrix=True, tensor_types=(("blk.0", "q5_1"),)),
    _asked("Q2_K_S", pure=True),
    _asked("Q2_K_S", tensor_types=(("blk", "q3_k"),)),
    _asked("Q2_K_S", "narrow"),
    _asked("Q4_K_M", tensor_types=(("attn_q", "q2_k"),)),
    _asked("MXFP4_MOE", "eight-experts", pure=True),
    _asked("Q4_K_M", leave_output_tensor=True, output_tensor_type="q8_0"),
)


_ARCHITECTURES = ("llama", "llama", "qwen2", "qwen3", "falcon", "olmo", "deci", "jais2", "gpt2", "gemma2", "phi3")
_LAYERS = (1, 2, 3, 4, 5, 7, 8, 9, 10, 12, 15, 16, 17, 20, 24, 30, 32, 33, 40, 68, 80)
_KINDS = (
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "tq1_0",
    "tq2_0",
    "f16",
    "bf16",
)
_PATTERNS = ("ffn_down", "attn_v", r"blk\.[0-2]\.", r"\.(1|3|5)\.ffn", "attn_.*weight", "token", "output", "qkv|attn_k")


def random_model(draw: random.Random) -> Model:
    """A model such as there may never be, with every special case of the rules in reach."""
    arch, layers = draw.choice(_ARCHITECTURES), draw.choice(_LAYERS)
    kv_heads = draw.choice((1, 2, 4, 8))
    experts = draw.choice((0, 0, 0, 2, 4, 8, 8, 16))
    hidden, inner, ffn = (draw.choice((256, 256, 256, 512, 64, 288, 100, 37)) for _ in range(3))
    rows = draw.choice((1, 2, 2, 2, 2))
    some = tuple(sorted(draw.sample(range(layers), draw.randint(1, layers))))
    tensors = [*_ends(hidden, tied=draw.random() < 0.4), ("blk.{}.attn_norm.weight", (hidden,), None)]
    kind = draw.random()
    if kind < 0.3:
        tensors += _layer("attn_qkv", hidden=hidden)
    elif kind < 0.45:
        tensors += _layer("attn_q", "attn_kv_b", hidden=hidden)
    else:
        tensors += _layer("attn_q", hidden=hidden)
        tensors += [("blk.{}.attn_k.weight", (rows, hidden), None), ("blk.{}.attn_v.weight", (rows, hidden), some)]
    tensors += _layer("attn_output", hidden=inner)
    if experts > 1:
        first = draw.choice((0, min(2, layers - 1)))
        tensors += _experts(draw.choice((1, 2)), range(first, layers), hidden=hidden, ffn=ffn)
    if experts < 2 or draw.random() < 0.3:
        tensors += _layer(*_DENSE[4:], hidden=hidden, ffn=ffn)
    heads = kv_heads * draw.choice((1, 1, 2, 3, 4, 8))
    stored = draw.choice(("F16", "BF16", "F32"))
    return Model(arch, layers, heads, kv_heads, experts, 256, tuple(tensors), stored)


def random_options(draw: random.Random, model: Model) -> Options:
    """What a user may ask for; half the time only whether there is an importance matrix."""
    imatrix = draw.random() < 0.5
    if draw.random() < 0.5:
        return Options(imatrix=imatrix)
    # llama-quantize does not see whether the types of the ends fit, and aborts or writes what cannot be read.
    fits = all(shape[-1] % 32 == 0 for shape in model.named().values())
    return Options(
        imatrix=imatrix,
        pure=draw.random() < 0.2,
        leave_output_tensor=draw.random() < 0.1,
        tensor_types=tuple((draw.choice(_PATTERNS), draw.choice(_KINDS)) for _ in range(draw.randint(0, 2))),
        output_tensor_type=draw.choice((None, None, "q8_0", "f16", "q5_1")) if fits else None,
        token_embedding_type=draw.choice((None, None, "q8_0", "f16", "q4_0")) if fits else None,
    )

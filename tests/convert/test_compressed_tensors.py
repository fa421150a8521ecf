"""What is written as compressed-tensors is what compressed-tensors unpacks, and what it packs opens exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.convert.checkpoint import DTYPES, Array, Checkpoint, LazyTensor
from quantpress.convert.compressed_tensors.pack import FORMAT
from quantpress.convert.compressed_tensors.reader import opened
from quantpress.convert.compressed_tensors.scheme import read_schemes
from quantpress.convert.compressed_tensors.words import layout_in
from quantpress.quant.errors import InputError, LayoutError
from quantpress.quant.grid import SCALE_TYPES
from quantpress.quant.qtensor import BITS, QuantizedTensor
from tests.quantized_tensors import assert_same, random_tensor

NAME = "model.layers.0.mlp.down_proj.weight"
MODULE = NAME.removesuffix(".weight")

GOLDEN_CODES = [
    [413909912, 241348366, 2748],
    [90053829, 857045107, 1505],
    [720430634, 413909912, 3854],
    [394735959, 90053829, 2163],
    [1010404028, 720430634, 920],
    [567039457, 394735959, 3269],
    [241348366, 1010404028, 1578],
    [857045107, 567039457, 343],
    [413909912, 241348366, 2748],
    [90053829, 857045107, 1505],
    [720430634, 413909912, 3854],
    [394735959, 90053829, 2163],
]
GOLDEN_ZEROS = [[567039457], [23]]


def lazy(name: str, values: Array) -> LazyTensor:
    dtype = next(key for key, kind in DTYPES.items() if kind == values.dtype)
    return LazyTensor(name, values.shape, dtype, "model.safetensors", lambda start, stop: values[start:stop])


def checkpoint_of(stored: dict[str, Array], quantization: dict[str, Any], **config: Any) -> Checkpoint:
    """A checkpoint of a family without a table, so that any names and shapes will do."""
    return Checkpoint(
        name="m",
        config={"model_type": "none-of-ours", "quantization_config": quantization, **config},
        tensors={name: lazy(name, values) for name, values in stored.items()},
    )


def packed(tensor: QuantizedTensor, *, input_bits: int | None = None) -> tuple[dict[str, Array], dict[str, Any]]:
    """What is stored for one weight, and the config."""
    form = replace(tensor.form, input_bits=input_bits)
    FORMAT.check(form)
    stored = FORMAT.pack(NAME, tensor, form)
    planned = {each.name: (each.shape, DTYPES[each.dtype]) for each in FORMAT.planned(NAME, form)}
    assert planned == {name: (values.shape, values.dtype) for name, values in stored.items()}
    assert list(planned) == list(stored)
    return stored, FORMAT.settings({NAME: form}, ["lm_head.weight"], {})


def to_torch(values: Array) -> Any:
    import torch

    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(values))


def decompressed(stored: dict[str, Array], settings: dict[str, Any]) -> tuple[Array, str]:
    """What compressed-tensors makes of a weight, in float32, and the type it makes it in."""
    compressors = pytest.importorskip("compressed_tensors.compressors", reason="the oracle is not installed")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = quantization.QuantizationConfig.model_validate(settings)
    scheme = next(iter(config.config_groups.values()))
    compressor = compressors.BaseCompressor.get_value_from_registry(config.format)
    state = {name.removeprefix(f"{MODULE}."): to_torch(values) for name, values in stored.items()}
    weight = compressor.decompress(state, scheme)["weight"]
    return weight.float().numpy(), str(weight.dtype)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_is_packed_is_what_compressed_tensors_unpacks_and_what_opens_again(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from(BITS))
    columns, group = data.draw(st.sampled_from([(64, 32), (96, 48), (50, 50), (37, 37), (48, 16), (128, 128), (5, 5)]))
    tensor = random_tensor(
        data.draw(st.integers(0, 1 << 30)),
        data.draw(st.integers(9, 40)),  # of up to 8, the library cannot unpack zeros: one word, which it cannot view
        columns,
        bits=bits,
        group=group,
        symmetric=data.draw(st.booleans()),
        scale_type=data.draw(st.sampled_from(list(SCALE_TYPES))),
    )
    input_bits = data.draw(st.sampled_from([None, 8]))
    stored, config = packed(tensor, input_bits=input_bits)
    theirs, dtype = decompressed(stored, config)
    with np.errstate(over="ignore"):
        ours = tensor.dequantize().astype(tensor.scale.dtype)  # the library computes in the type of the scales
    np.testing.assert_array_equal(theirs, ours.astype(np.float32))
    assert dtype == {"F16": "torch.float16", "BF16": "torch.bfloat16", "F32": "torch.float32"}[tensor.form.scale_type]
    back = opened(checkpoint_of(stored, config)).quantized[NAME]
    assert back.form == replace(tensor.form, input_bits=input_bits)
    assert_same(back.read(), tensor)


GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def config_of(weights: dict[str, Any] = GROUP, **other: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **other}


def one(stored: dict[str, Array], settings: dict[str, Any]) -> QuantizedTensor:
    return opened(checkpoint_of(stored, settings)).quantized[NAME].read()


def test_words_with_empty_bits_of_earlier_versions_are_read() -> None:
    """Packed by compressed-tensors 0.13: 10 codes of 3 bits in a word; 24 of them need 3 words, as they do today."""
    codes = (np.arange(12)[:, None] * 5 + np.arange(24) * 3) % 8
    zero = (np.arange(12) * 3 + 1) % 8
    stored: dict[str, Array] = {
        f"{MODULE}.weight_packed": np.array(GOLDEN_CODES, np.int32),
        f"{MODULE}.weight_scale": np.ones((12, 1), np.float16),
        f"{MODULE}.weight_zero_point": np.array(GOLDEN_ZEROS, np.int32),
        f"{MODULE}.weight_shape": np.array([12, 24]),
    }
    channel = {"num_bits": 3, "type": "int", "symmetric": False, "strategy": "channel"}
    tensor = one(stored, config_of(channel))
    np.testing.assert_array_equal(tensor.codes, codes)
    np.testing.assert_array_equal(tensor.zeros()[:, 0], zero)


def test_one_of_the_two_highest_bits_says_that_words_are_a_stream() -> None:
    for bit in (30, 31):
        assert layout_in(np.zeros(2, np.int32), np.array([0, 1 << bit], np.uint32).view(np.int32)) == "dense"
    assert layout_in(np.array([(1 << 30) - 1], np.int32)) == "sparse"


def test_groups_in_an_order_of_their_own_are_read_and_those_in_order_are_none() -> None:
    tensor = random_tensor(1, 16, 128, bits=4, group=32, symmetric=False)
    stored, _ = packed(tensor)
    weights = {**GROUP, "symmetric": False, "actorder": "group"}
    g_idx = np.random.default_rng(0).permutation(np.arange(128) // 32).astype(np.int32)
    name = f"{MODULE}.weight_g_idx"
    lazy_weight = opened(checkpoint_of({**stored, name: g_idx}, config_of(weights))).quantized[NAME]
    assert lazy_weight.form.ordered
    assert_same(lazy_weight.read(), replace(tensor, g_idx=g_idx))
    for plain in (np.arange(128) // 32, np.full(128, -1)):  # -1: the library's beginning, never filled
        assert_same(one({**stored, name: plain.astype(np.int32)}, config_of(weights)), tensor)
    assert_same(one(stored, config_of({**weights, "actorder": "weight"})), tensor)
    with pytest.raises(InputError, match=r"weight_g_idx' goes from 0 to 4, there are 4 groups"):
        one({**stored, name: np.where(g_idx == 3, 4, g_idx).astype(np.int32)}, config_of(weights))
    with pytest.raises(InputError, match="wanted none, for the config has no actorder"):
        one({**stored, name: g_idx}, config_of({**weights, "actorder": None}))


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_one_scale_for_all_rows_and_flat_scales_are_spread(strategy: str, unpacked: bool) -> None:
    tensor = random_tensor(2, 16, 64, bits=8, group=-1, symmetric=False)
    if strategy == "tensor":
        zero = np.full((16, 1), tensor.zeros()[0, 0], np.uint8)
        tensor = replace(tensor, scale=np.full((16, 1), tensor.scale[0, 0]), zero=zero)
    stored, _ = packed(tensor, input_bits=8 if unpacked else None)
    count = 1 if strategy == "tensor" else 16
    stored[f"{MODULE}.weight_scale"] = tensor.scale[:count, 0]
    stored[f"{MODULE}.weight_zero_point"] = (tensor.zeros()[:count, 0] ^ np.uint8(128)).view(np.int8)
    weights = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": strategy}
    assert_same(one(stored, config_of(weights)), tensor)


def test_a_symmetric_zero_point_may_say_zero_and_nothing_else() -> None:
    tensor = random_tensor(2, 16, 64, bits=4, group=32, symmetric=True)
    stored, settings = packed(tensor)
    name = f"{MODULE}.weight_zero_point"
    assert_same(one({**stored, name: np.zeros((16, 2), np.int8)}, settings), tensor)
    with pytest.raises(InputError, match=r"weight_zero_point' is I8 .* says that these weights are symmetric"):
        one({**stored, name: np.ones((16, 2), np.int8)}, settings)


def test_rows_whose_last_group_is_shorter_are_read_but_not_written() -> None:
    tensor = random_tensor(2, 16, 80, bits=4, group=32, symmetric=True)
    assert tensor.groups == 3
    with pytest.raises(LayoutError, match="80 columns do not divide by 32: take a group size that does"):
        packed(tensor)
    whole, settings = packed(random_tensor(2, 16, 96, bits=4, group=32, symmetric=True))
    whole[f"{MODULE}.weight_packed"] = whole[f"{MODULE}.weight_packed"][:, :10]
    whole[f"{MODULE}.weight_shape"] = np.array([16, 80])
    assert one(whole, settings).form == tensor.form


def test_what_the_library_reads_no_more_is_refused() -> None:
    tensor = random_tensor(1, 16, 128, bits=4, group=32, symmetric=True)
    ordered = replace(tensor, g_idx=np.random.default_rng(0).permutation(np.arange(128) // 32).astype(np.int32))
    for form in (ordered.form, tensor.form):
        with pytest.raises(LayoutError, match=r"weight_g_idx no more since 0\.20; write gptq"):
            FORMAT.pack(NAME, ordered, form)
    with pytest.raises(LayoutError, match="inputs of 4 bits"):
        FORMAT.check(replace(tensor.form, input_bits=4))


def test_who_belongs_to_which_group_is_decided_as_the_library_decides() -> None:
    """A name before a pattern before a class, patterns in alphabetical order (compressed-tensors: utils/match.py)."""
    match = pytest.importorskip("compressed_tensors.utils.match", reason="the oracle is not installed").match_targets
    torch = pytest.importorskip("torch")
    groups: dict[str, Any] = {}
    targets = ["Linear", "re:.*down_proj", "re:.*mlp.*", "re:model.layers.[0-2].mlp", "model.layers.1.mlp.up_proj"]
    sizes = {target: 2 ** (number + 4) for number, target in enumerate(targets)}
    for target in reversed(targets):
        groups[target] = {"targets": [target], "weights": {**GROUP, "group_size": sizes[target]}}
    schemes = read_schemes(config_of() | {"config_groups": groups}, "m")
    for layer in range(4):
        for part in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"):
            module = f"model.layers.{layer}.{part}"
            theirs = match(module, torch.nn.Linear(1, 1), list(reversed(targets)))[0]
            assert schemes.of(module).group_size == sizes[theirs], module


def test_embeddings_have_a_class_of_their_own() -> None:
    groups = {"a": {"targets": ["Linear"], "weights": GROUP}}
    schemes = read_schemes(config_of(config_groups=groups), "m")
    assert schemes.of("embed_out").group_size == 32  # GPT-NeoX's head
    groups["b"] = {"targets": ["Embedding"], "weights": {**GROUP, "group_size": 64}}
    with pytest.raises(InputError, match=r"no target of config_groups means 'transformer.wte'"):
        schemes.of("transformer.wte")
    schemes = read_schemes(config_of(config_groups=groups), "m")
    for module in ("transformer.wte", "gpt_neox.embed_in", "model.embed_tokens"):
        assert schemes.of(module).group_size == 64


@pytest.mark.parametrize(
    ("inputs", "bits"),
    [
        ({"strategy": "token", "dynamic": True}, 8),
        ({"strategy": "token", "dynamic": True, "num_bits": 4}, None),
        ({"strategy": "token", "dynamic": True, "symmetric": False}, None),
        ({"strategy": "tensor", "dynamic": True}, None),
        ({"strategy": "tensor"}, None),
        ({"dynamic": True}, None),
        ([8], None),
    ],
)
def test_inputs_are_rounded_only_as_it_is_imitated(inputs: Any, bits: int | None) -> None:
    groups = {"a": {"targets": ["Linear"], "weights": GROUP, "input_activations": inputs}}
    scheme = read_schemes(config_of(config_groups=groups), "m").of("x")
    assert scheme.input_bits == bits
    assert scheme.other_inputs == (bits is None)


def test_ignored_modules_stay_plain() -> None:
    tensor = random_tensor(1, 16, 64, bits=4, group=32, symmetric=True)
    stored, settings = packed(tensor)
    head = {"lm_head.weight": np.ones((8, 64), np.float16), f"{MODULE}.bias": np.ones(16, np.float16)}
    checkpoint = opened(checkpoint_of(stored | head, settings, dtype="bfloat16"))
    assert list(checkpoint.quantized) == [NAME]
    assert set(checkpoint.tensors) == {NAME, *head}
    assert checkpoint.tensor(NAME).dtype == "BF16"
    assert checkpoint.format == "compressed-tensors"
    assert checkpoint.storage_types == {NAME: "int4 g32"}
    assert "quantization_config" not in checkpoint.config
    exact = checkpoint.tensor(NAME).exact_rows(3, 9)
    np.testing.assert_array_equal(exact, tensor.dequantize(3, 9))
    np.testing.assert_array_equal(checkpoint.tensor(NAME).read_rows(3, 9), exact.astype(ml_dtypes.bfloat16))
    for ignore in ([MODULE], ["re:.*down_proj"]):
        with pytest.raises(InputError, match=r"ignore names .*down_proj', but its weight is stored quantized"):
            opened(checkpoint_of(stored, settings | {"ignore": ignore}))


def test_other_roundings_of_inputs_and_caches_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    tensor = random_tensor(1, 16, 64, bits=8, group=-1, symmetric=True)
    stored, settings = packed(tensor, input_bits=8)
    opened(checkpoint_of(stored, settings))
    assert not caplog.text
    group = settings["config_groups"]["group_0"]
    group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    assert opened(checkpoint_of(stored, settings)).quantized[NAME].form.input_bits is None
    assert "quantized in a way that is not imitated here" in caplog.text
    caplog.clear()
    group["input_activations"] = None
    extra: dict[str, Array] = {
        f"{MODULE}.input_scale": np.ones(1, np.float16),
        "model.layers.0.self_attn.k_scale": np.ones(1, np.float16),
    }
    checkpoint = opened(checkpoint_of(stored | extra, settings))
    assert "quantized in a way that is not imitated here" in caplog.text
    assert set(checkpoint.tensors) == {NAME}

"""compressed-tensors checkpoints that are damaged, hostile or of a kind that is not known are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from quantpress.convert.checkpoint import Array
from quantpress.convert.compressed_tensors.reader import is_compressed_tensors, opened
from quantpress.convert.compressed_tensors.scheme import read_schemes
from quantpress.convert.lora import pattern_nodes
from quantpress.quant.errors import InputError
from tests.convert.test_compressed_tensors import GROUP, MODULE, NAME, checkpoint_of, config_of, one, packed
from tests.quantized_tensors import assert_same, random_tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": "float-quantized"},
            r"m: quantization_config: format 'float-quantized' cannot be opened",
        ),
        ({"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized' cannot be opened"),
        ({"format": ["pack-quantized"]}, "cannot be opened"),
        ({"config_groups": {}}, "config_groups must be an object with a group"),
        ({"config_groups": []}, "config_groups must be an object with a group"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "'W4A16': wanted an object with targets and weights"),
        ({"config_groups": {"a": {"targets": "Linear", "weights": GROUP}}}, "targets must be a list of names"),
        ({"config_groups": {"a": {"targets": [1], "weights": GROUP}}}, "targets must be a list of names"),
        ({"config_groups": {"a": {"targets": ["x.y"], "weights": GROUP}}}, "no target of config_groups means"),
        ({"config_groups": {"a": {"targets": ["re:(a+)+(?P<b"], "weights": GROUP}}}, "is not a regular expression"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": None}}}, "no target of config_groups means"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": []}}}, "weights must be an object"),
        ({"ignore": "lm_head"}, "ignore must be a list of names"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights .'sparse-24-bitmask'. cannot be opened"),
        ({"transform_config": {"config_groups": {"v": {}}}}, "transforms of their inputs"),
    ],
)
def test_configurations_that_make_no_sense_or_are_not_known_are_refused(change: dict[str, Any], message: str) -> None:
    stored, settings = packed(random_tensor(1, 16, 64, bits=4, group=32, symmetric=True))
    with pytest.raises(InputError, match=message):
        opened(checkpoint_of(stored, settings | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_bits": 5}, "num_bits is 5, wanted 2, 3, 4 or 8"),
        ({"num_bits": "4"}, "num_bits is '4'"),
        ({"type": "float", "num_bits": 8}, "weights of type 'float' in the format 'pack-quantized' cannot be opened"),
        ({"dynamic": True}, "dynamic"),
        ({"symmetric": None}, "symmetric is None, wanted true or false"),
        ({"strategy": "block"}, "strategy 'block' cannot be opened, only tensor, channel, group"),
        ({"strategy": "channel"}, "strategy channel does not go with group_size 32"),
        ({"group_size": None}, "strategy group does not go with group_size None"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": 10**30}, "group_size is 1000"),
        ({"group_size": 64}, r"weight_scale' is F16 of shape \(16, 2\), wanted .*\(16, 1\)"),
        ({"num_bits": 8}, r"weight_packed' is I32 of shape \(16, 8\), wanted 16 words for 64 codes of 8 bits"),
        ({"symmetric": False}, "weight_zero_point' is missing beside the other parts"),
    ],
)
def test_weights_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    stored, _ = packed(random_tensor(1, 16, 64, bits=4, group=32, symmetric=True))
    with pytest.raises(InputError, match=message):
        opened(checkpoint_of(stored, config_of(GROUP | change)))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("weight_scale", None, "weight_scale' is missing beside the other parts"),
        ("weight_shape", None, "weight_shape' is missing beside the other parts"),
        ("weight_packed", None, "belongs to no quantized weight"),
        ("weight_zero_point", None, "weight_zero_point' is missing"),
        (
            "weight_packed",
            np.zeros((16, 8), np.int64),
            r"weight_packed' is I64 of shape \(16, 8\), wanted I32",
        ),
        ("weight_packed", np.zeros(128, np.int32), "wanted I32 with two dimensions"),
        ("weight_packed", np.zeros((0, 8), np.int32), "wanted I32 with two dimensions"),
        ("weight_packed", np.zeros((16, 9), np.int32), "wanted 8 words for 64 codes of 4 bits"),
        ("weight_scale", np.ones((16, 2), np.float64), "is F64"),
        ("weight_scale", np.ones((2, 16), np.float16), r"F16 of shape \(2, 16\), wanted"),
        ("weight_shape", np.array([16.0, 64.0]), "wanted two integers"),
        ("weight_shape", np.array([16, 64, 1]), "wanted two integers"),
        ("weight_shape", np.array([17, 64]), "says 17 x 64, but .* has 16 rows"),
        ("weight_shape", np.array([16, -64]), "says 16 x -64"),
        ("weight_shape", np.array([16, 1 << 62]), "wanted .* words for 4611686018427387904 codes|weight_scale"),
        ("weight_zero_point", np.zeros((16, 2), np.int32), "wanted 2 words for 16 codes of 4 bits"),
        ("weight_zero_point", np.zeros((2, 3), np.int32), r"wanted I32 of shape \(2, 2\)"),
        ("weight_zero_point", np.full((16, 2), 8, np.int8), "goes from 8 to 8, wanted 4 bits, -8 to 7"),
        ("weight_scale", np.full((16, 2), np.inf, np.float16), "weight_scale' has 32 NaN or infinite values"),
        ("weight", np.zeros((16, 64), np.float16), "is there, and packed as well"),
        ("weight_global_scale", np.zeros(1, np.float32), "belongs to no quantized weight"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(part: str, values: Array | None, message: str) -> None:
    stored, settings = packed(random_tensor(1, 16, 64, bits=4, group=32, symmetric=False))
    name = f"{MODULE}.{part}"
    stored = {key: each for key, each in stored.items() if key != name} | ({} if values is None else {name: values})
    with pytest.raises(InputError, match=message):
        one(stored, settings)


def test_bytes_beyond_their_bits_are_refused() -> None:
    stored, settings = packed(random_tensor(1, 16, 64, bits=4, group=32, symmetric=True), input_bits=8)
    stored[NAME][3, 3] = -9
    with pytest.raises(InputError, match="goes from -9 to 7, wanted 4 bits, -8 to 7"):
        one(stored, settings)
    stored[NAME] = stored[NAME].astype(np.int16)
    with pytest.raises(InputError, match=r"is I16 .*wanted I8 with two dimensions"):
        one(stored, settings)


def test_a_config_inside_a_config_is_read_and_other_methods_are_not_ours() -> None:
    tensor = random_tensor(1, 16, 64, bits=4, group=32, symmetric=True)
    stored, settings = packed(tensor)
    assert_same(one(stored, {"quant_method": "compressed-tensors", "quantization_config": settings}), tensor)
    assert is_compressed_tensors({"quantization_config": settings})
    assert not is_compressed_tensors({"quantization_config": {"quant_method": "gptq"}})
    assert not is_compressed_tensors({"quantization_config": ["compressed-tensors"]})


def test_patterns_are_matched_in_bounded_time_and_many_modules_are_no_hindrance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = {"a": {"targets": ["re:(a+)+b", "re:.*experts.*(gate|up|down)_proj$"], "weights": GROUP}}
    ignore = ["lm_head", "re:.*mlp.gate$", "re:.*self_attn.*", "re:visual.*"]
    schemes = read_schemes(config_of(config_groups=groups, ignore=ignore), "m")
    monkeypatch.setattr(pattern_nodes, "MAX_STEPS", 50_000)  # 250 modules' worth, as 2,500,000 are of 12,500
    for layer in range(2):
        for expert in range(250):
            assert schemes.of(f"model.layers.{layer}.mlp.experts.{expert}.down_proj").group_size == 32
    with pytest.raises(InputError, match="no target of config_groups means"):
        schemes.of("a" * 200)
    many = config_of(config_groups={"a": {"targets": ["re:" + "(.*a)" * 60], "weights": GROUP}})
    with pytest.raises(InputError, match=r"no target|take too long"):
        read_schemes(many, "m").of("a" * 59 + "b" * 900)


def test_codes_and_zeros_lie_in_words_in_the_same_way() -> None:
    stored, settings = packed(random_tensor(1, 32, 64, bits=3, group=32, symmetric=False))
    stored[f"{MODULE}.weight_zero_point"] = np.zeros((4, 2), np.int32)  # 10 zeros in a word, the codes are a stream
    with pytest.raises(InputError, match=r"weight_zero_point' is I32 .*wanted codes in words as"):
        one(stored, settings)

"""NF4, FP4, double quantization and LLM.int8() against bitsandbytes itself, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantpress.quant.bitsandbytes import (
    BLOCKSIZES,
    block_absmax,
    block_count,
    check_4bit,
    dequantize_4bit,
    pack,
    quantize_4bit,
    round_trip_4bit,
)
from quantpress.quant.bitsandbytes_levels import LEVELS
from quantpress.quant.dynamic_map import dynamic_map, mean_absmax, quantize_absmax
from quantpress.quant.errors import InputError, UsageError
from quantpress.quant.llm_int8 import dequantize_int8, quantize_int8

torch = pytest.importorskip("torch")
functional: Any = pytest.importorskip("bitsandbytes.functional", reason="the oracle, bitsandbytes, is not installed")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"bfloat16": BFLOAT16, "float16": np.dtype(np.float16), "float32": np.dtype(np.float32)}


def _weights(count: int, dtype: str, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(scale=0.02, size=count)
    return values.astype(np.float32).astype(DTYPES[dtype])


def _to_torch(values: np.ndarray) -> Any:
    if values.dtype == BFLOAT16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


def _to_numpy(tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _far_from_fp4_limits(weights: np.ndarray, blocksize: int) -> np.ndarray:
    """Where CPU and CUDA cannot differ: CUDA's limits have 6 digits and more, and quotients like 7 / 12 are common."""
    absmax = np.repeat(block_absmax(weights, blocksize), blocksize)[: weights.size].astype(np.float64)
    scaled = np.abs(weights.astype(np.float64)) / absmax
    magnitudes = np.sort(np.abs(LEVELS["fp4"][:8]).astype(np.float64))
    limits = (magnitudes[:-1] + magnitudes[1:]) / 2
    return np.abs(scaled[:, None] - limits[None]).min(axis=1) > 1e-6


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_levels_are_those_of_bitsandbytes(quant_type: str) -> None:
    theirs = functional.get_4bit_type(quant_type, device="cpu").numpy()
    np.testing.assert_array_equal(LEVELS[quant_type], theirs)
    assert np.signbit(LEVELS["fp4"][8])  # as its kernels compute it, the published table says +0


def test_the_dynamic_map_is_that_of_bitsandbytes() -> None:
    np.testing.assert_array_equal(_bits(dynamic_map()), _bits(functional.create_dynamic_map().numpy()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
# a whole number of blocks, a shorter last one, an odd number, less than one block, more than one chunk of 65536
@pytest.mark.parametrize("count", [8192, 9000, 8191, 17, 70001])
def test_nf4_bytes_and_scales_are_those_of_bitsandbytes(dtype: str, blocksize: int, count: int) -> None:
    weights = _weights(count, dtype)
    packed, state = functional.quantize_4bit(_to_torch(weights), blocksize=blocksize, quant_type="nf4")
    absmax = block_absmax(weights, blocksize)
    np.testing.assert_array_equal(_bits(absmax), _bits(state.absmax.numpy()))
    ours = pack(quantize_4bit(weights, absmax, quant_type="nf4", blocksize=blocksize))
    theirs = packed.numpy().reshape(-1)
    if count % 2:  # nobody reads the low half of an odd last byte: CUDA writes the code of a zero, the CPU too
        ours[-1] &= 0xF0
        theirs[-1] &= 0xF0
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 1024])
@pytest.mark.parametrize("count", [8192, 70002])
def test_dequantized_values_are_those_of_bitsandbytes(quant_type: str, dtype: str, blocksize: int, count: int) -> None:
    # One row: with several rows the AVX-512 kernel of bitsandbytes 0.50 takes the wrong blocks if the length of a row
    # is no multiple of the block.
    weights = _weights(count, dtype, seed=1)
    packed, state = functional.quantize_4bit(_to_torch(weights[None]), blocksize=blocksize, quant_type=quant_type)
    theirs = _to_numpy(functional.dequantize_4bit(packed, state))[0]
    absmax = state.absmax.numpy()
    settings: dict[str, Any] = {"quant_type": quant_type, "blocksize": blocksize, "dtype": weights.dtype}
    ours = dequantize_4bit(packed.numpy().reshape(-1), absmax, first=0, count=count, **settings)
    # as numbers: bitsandbytes' kernels do not agree among themselves on the sign of FP4's second zero
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.astype(np.float32))
    for first, last in [(0, 1), (1, 2), (blocksize - 1, blocksize + 1), (4097, 8190), (count - 1, count), (5, count)]:
        part = dequantize_4bit(
            packed.numpy().reshape(-1)[first // 2 : (last + 1) // 2],
            absmax[first // blocksize :],
            first=first,
            count=last - first,
            **settings,
        )
        np.testing.assert_array_equal(_bits(part), _bits(ours[first:last]))
    back = round_trip_4bit(weights, quant_type=quant_type, blocksize=blocksize).astype(np.float32)
    sure = _far_from_fp4_limits(weights, blocksize) if quant_type == "fp4" else np.ones(count, np.bool_)
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(back[sure], theirs.astype(np.float32)[sure])


def test_an_odd_number_of_values_comes_back() -> None:
    weights = _weights(1001, "bfloat16")
    longer = np.append(weights, np.zeros(1, BFLOAT16))  # odd numbers are slow there; a zero changes no absmax
    packed, state = functional.quantize_4bit(_to_torch(longer[None]), quant_type="nf4")
    theirs = _to_numpy(functional.dequantize_4bit(packed, state))[0, :1001]
    np.testing.assert_array_equal(_bits(round_trip_4bit(weights, quant_type="nf4", blocksize=64)), _bits(theirs))


def test_fp4_limits_are_the_digits_of_the_cuda_kernel_and_ties_go_to_the_smaller_magnitude() -> None:
    # dQuantizeFP4 (csrc/kernels.cu); level below the limit, level above it, in twelfths
    limits = {0.00260417: (0, 0.0625), 0.0859375: (0.0625, 2), 0.20833333: (2, 3), 0.29166667: (3, 4)}
    limits |= {0.4166667: (4, 6), 0.583333: (6, 8), 0.8333333: (8, 12)}
    for digits, levels in limits.items():
        limit = np.float32(digits)
        above = np.nextafter(limit, np.float32(2))
        block = np.array([1, limit, above, -limit, -above], np.float32)  # absmax 1: nothing is rounded on the way
        back = round_trip_4bit(block, quant_type="fp4", blocksize=64)
        low, high = np.float32(levels[0]) / np.float32(12), np.float32(levels[1]) / np.float32(12)
        np.testing.assert_array_equal(back, np.array([1, low, high, -low, -high], np.float32), err_msg=str(digits))


def test_nf4_limits_are_the_numbers_of_the_cuda_kernel() -> None:
    # dQuantizeNF4 (csrc/kernels.cu): a value is above a limit or belongs to the level below it
    limits = (
        *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984),
        *(-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668),
        *(0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011),
    )
    for code, digits in enumerate(limits):
        limit = np.float32(digits)
        block = np.array([1, limit, np.nextafter(limit, np.float32(2))], np.float32)
        assert quantize_4bit(block, block_absmax(block, 64), quant_type="nf4", blocksize=64).tolist() == [
            15,
            code,
            code + 1,
        ]


def test_no_quotient_of_bfloat16_numbers_is_so_near_to_an_nf4_limit_that_an_approximate_reciprocal_matters() -> None:
    # value / absmax for all pairs of 8-bit significands and every exponent down to the smallest limit, in float64
    significands = np.arange(128, 256)
    quotients = np.unique(significands[:, None] / significands[None])
    scaled = np.unique(np.concatenate([quotients * 2.0**-power for power in range(8)]))
    limits = np.abs((LEVELS["nf4"][:-1] + LEVELS["nf4"][1:]) * np.float32(0.5)).astype(np.float64)
    nearest = np.abs(scaled[:, None] / limits[None] - 1).min()
    assert nearest > 2.0**-22  # two roundings and one unit of CUDA's reciprocal: below 3 * 2^-24


def test_a_block_of_zeros_gets_code_0_as_on_cuda() -> None:
    weights = np.zeros(128, BFLOAT16)
    weights[64:] = 0.5
    absmax = block_absmax(weights, 64)
    codes = quantize_4bit(weights, absmax, quant_type="nf4", blocksize=64)
    assert set(codes[:64]) == {0}
    assert set(codes[64:]) == {15}
    assert not round_trip_4bit(weights, quant_type="nf4", blocksize=64)[:64].any()
    stored = np.array([0.25, 0.5], np.float32)  # what double quantization may make of it
    back = round_trip_4bit(weights, quant_type="nf4", blocksize=64, stored_absmax=stored)
    assert set(back[:64].tolist()) == {-0.25}
    assert set(quantize_4bit(weights, absmax, quant_type="fp4", blocksize=64)[:64]) == {0}


@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_double_quantization_takes_the_nearest_level_of_the_map(count: int) -> None:
    absmax = np.random.default_rng(count).gamma(40, 0.001, size=count).astype(np.float32)
    nested = quantize_absmax(absmax)
    centred = absmax - nested.offset
    outer = np.array([np.abs(centred[start : start + 256]).max() for start in range(0, count, 256)])
    np.testing.assert_array_equal(nested.absmax, outer)
    levels = functional.create_dynamic_map().numpy().astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.nan_to_num(centred.astype(np.float64) / np.repeat(outer, 256)[:count])
    distance = np.abs(scaled[:, None] - levels[None])
    chosen = np.take_along_axis(distance, nested.codes[:, None].astype(np.int64), axis=1)[:, 0]
    if count > 1:  # a single value is its own mean, and zero / zero has no nearest level
        assert (chosen <= distance.min(axis=1) + 2.0**-23).all()
    # the CPU kernel of bitsandbytes 0.50 finds a neighbouring level for one value in a thousand
    codes, _ = functional.quantize_blockwise(torch.from_numpy(centred), blocksize=256)
    assert (np.abs(codes.numpy().astype(int) - nested.codes) <= 2).all() or count == 1
    assert np.mean(codes.numpy() != nested.codes) <= 0.01 or count == 1


def test_ties_of_double_quantization_end_where_the_binary_search_of_cuda_ends() -> None:
    # dQuantize compares with pivot 127 first and then with 127 +- 64, 32, ... 1. The last pivot of every search is an
    # even number, and a midpoint stays with it: the level below the midpoint if that is even, else the one above.
    levels = dynamic_map()
    middles = (levels[:-1] + levels[1:]) * np.float32(0.5)
    for start in (0, 200):
        block = np.concatenate([[np.float32(1)], middles[start : start + 200]])  # absmax 1
        codes = quantize_absmax(block, np.float32(0)).codes[1:]
        below = np.arange(start, start + codes.size)
        np.testing.assert_array_equal(codes, below + below % 2)


def test_dequantized_scales_are_those_of_bitsandbytes() -> None:
    weights = _weights(64 * 1000, "float16", seed=2)
    _, state = functional.quantize_4bit(_to_torch(weights), quant_type="nf4", compress_statistics=True)
    absmax = block_absmax(weights, 64)
    nested = quantize_absmax(absmax, np.float32(state.offset.item()))
    theirs = (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).numpy()
    np.testing.assert_array_equal(nested.absmax, state.state2.absmax.numpy())
    same = nested.codes == state.absmax.numpy()
    assert same.mean() > 0.99
    np.testing.assert_array_equal(_bits(nested.values()[same]), _bits(theirs[same]))
    np.testing.assert_array_equal(nested.values(300, 700), nested.values()[300:700])


def test_the_mean_of_the_scales_is_that_of_torch() -> None:
    # 2^k numbers with 8 significant bits: float32 adds them exactly in any order, and 1 / 2^k is exact
    absmax = block_absmax(_weights(64 * 1024, "bfloat16"), 64)
    assert quantize_absmax(absmax).offset == torch.from_numpy(absmax).mean().item()
    # else the sum depends on the order: 16 partial sums of 63 numbers err by less than 2^-24 * 64 each, usually by 1
    absmax = block_absmax(_weights(64 * 1001, "float32"), 64)
    assert mean_absmax(float(absmax.sum(dtype=np.float64)), 1001) == pytest.approx(
        torch.from_numpy(absmax).mean().item(), rel=2.0**-20
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_codes_scales_and_values_are_those_of_bitsandbytes(dtype: str) -> None:
    weights = _weights(96 * 130, dtype, seed=3).reshape(96, 130)
    codes, absmax, _ = functional.int8_vectorwise_quant(_to_torch(weights).to(torch.float16))
    ours, scales = quantize_int8(weights)
    np.testing.assert_array_equal(ours, codes.numpy())
    np.testing.assert_array_equal(scales, absmax.numpy())
    theirs = functional.int8_vectorwise_dequant(codes, absmax).numpy()
    np.testing.assert_array_equal(_bits(dequantize_int8(ours, scales)), _bits(theirs))


def test_a_row_of_zeros_is_zeros_in_int8() -> None:
    codes, scales = quantize_int8(np.zeros((2, 8), np.float32))
    assert not codes.any()
    assert not dequantize_int8(codes, scales).any()


def test_values_that_are_not_finite_are_refused_with_their_number() -> None:
    weights = _weights(1000, "float16")
    weights[[3, 700]] = np.nan, np.inf
    with pytest.raises(InputError, match=r"^2 values are NaN or infinite"):
        block_absmax(weights, 64)
    with pytest.raises(InputError, match=r"^2 values are NaN or infinite"):
        round_trip_4bit(weights, quant_type="nf4", blocksize=64)
    with pytest.raises(InputError, match=r"^2 values are NaN, infinite, or beyond float16"):
        quantize_int8(weights[None])
    with pytest.raises(InputError, match=r"^1 values .*beyond float16"):
        quantize_int8(np.array([[7e4, 1]], np.float32))


def test_settings_that_bitsandbytes_does_not_have_are_refused() -> None:
    check_4bit("nf4", 64)
    with pytest.raises(UsageError, match="'int4' is unknown"):
        check_4bit("int4", 64)
    with pytest.raises(UsageError, match="blocksize 63"):
        check_4bit("nf4", 63)
    assert block_count(0, 64) == 0

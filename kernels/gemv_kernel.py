"""What a program of `kernels/gemv.py` does; how and why is told there.

Tiles are kept in tuples, because the parts of a block and the input rows are unrolled: entry part * rows_in + row is
the tile of one part and one input row. Triton knows neither starred tuples nor the types of growing ones.

A unit is the least number of codes that fills whole words: one word, or three words of 32 codes of 3 bits.
"""
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gemv_kernel"]


@triton.jit  # type: ignore[untyped-decorator]
def gemv_kernel(  # type: ignore[no-untyped-def]
    x, words, scale, zero, order, bias, out, partial, counter, rows, columns, rows_in: tl.constexpr,
    bits: tl.constexpr, group_size: tl.constexpr, units: tl.constexpr, width: tl.constexpr, parts: tl.constexpr,
    splits: tl.constexpr, slabs: tl.constexpr, stages: tl.constexpr, even_k: tl.constexpr, even_n: tl.constexpr,
):  # fmt: skip
    """Multiplies a block of outputs over a share of the places along K; the last of a block's programs adds up.

    `group_size` is 0 where all places of an output share a scale; `slabs` is `splits` or the power of two above;
    `even_k`, `even_n`: tiles divide K and blocks N.
    """
    split = tl.program_id(1)
    # that of 2^23, in a register: of a constant the compiler would make another instruction for each code
    exponent = (tl.cast(columns, tl.int32) >> 31) + 0x4B000000
    column = tl.program_id(0) * (parts * width) + tl.arange(0, width)
    unit_words: tl.constexpr = 3 if bits == 3 else 1
    tile_columns: tl.constexpr = units * unit_words * 32 // bits
    tiles = tl.cdiv(columns, tile_columns)
    totals = ()
    for _ in tl.static_range(parts * rows_in):
        totals = totals + (tl.zeros((units, width), tl.float32),)
    for tile in tl.range(tiles * split // splits, tiles * (split + 1) // splits, num_stages=stages):
        held = _load_words(words, tile, column, rows, columns, bits, units, width, parts, even_k and even_n)
        totals = _add_tile(
            totals, held, x, scale, zero, order, tile * tile_columns, column, rows, columns, exponent, rows_in, bits,
            group_size, units, width, parts, even_k, even_n,
        )  # fmt: skip
    for index in tl.static_range(parts * rows_in):
        at = column + index // rows_in * width
        total = tl.sum(totals[index], axis=0)
        if splits > 1:
            tl.store(partial + (split * rows_in + index % rows_in).to(tl.int64) * rows + at, total, mask=at < rows)
        else:
            _store(total, scale, bias, out, index % rows_in, at, rows, group_size)
    if splits > 1:
        tl.debug_barrier()  # all threads' sums are written before one of them says so
        arrived = tl.atomic_add(counter + tl.program_id(0), 1, sem="acq_rel")
        if arrived == splits - 1:
            for index in tl.static_range(parts * rows_in):
                _add_slabs(scale, bias, out, partial, column, rows, index, rows_in, group_size, splits, slabs)
            tl.store(counter + tl.program_id(0), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _add_slabs(  # type: ignore[no-untyped-def]
    scale, bias, out, partial, column, rows, index: tl.constexpr, rows_in: tl.constexpr, group_size: tl.constexpr,
    splits: tl.constexpr, slabs: tl.constexpr,
):  # fmt: skip
    at = column + index // rows_in * column.shape[0]
    slab = tl.arange(0, slabs)[:, None]
    kept = partial + (slab * rows_in + index % rows_in).to(tl.int64) * rows + at[None, :]
    sums = tl.load(kept, mask=(slab < splits) & (at < rows)[None, :], other=0.0, cache_modifier=".cg")
    _store(tl.sum(sums, axis=0), scale, bias, out, index % rows_in, at, rows, group_size)


@triton.jit  # type: ignore[untyped-decorator]
def _store(total, scale, bias, out, row, at, rows, group_size: tl.constexpr):  # type: ignore[no-untyped-def]
    if group_size == 0:
        total *= tl.load(scale + at, mask=at < rows, other=0.0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + at, mask=at < rows, other=0.0).to(tl.float32)
    tl.store(out + tl.cast(row, tl.int64) * rows + at, total.to(out.dtype.element_ty), mask=at < rows)


@triton.jit  # type: ignore[untyped-decorator]
def _load_words(  # type: ignore[no-untyped-def]
    words, tile, column, rows, columns, bits: tl.constexpr, units: tl.constexpr, width: tl.constexpr,
    parts: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    unit_words: tl.constexpr = 3 if bits == 3 else 1
    first = tile * (units * unit_words)
    held = ()
    for part in tl.static_range(parts):
        for word in tl.static_range(unit_words):
            row = tl.arange(0, units) * unit_words + word
            at = row[:, None] * rows + (column + part * width)[None, :]
            if even:
                loaded = tl.load(words + first.to(tl.int64) * rows + at)
            else:
                inside = (row < tl.cdiv(columns * bits, 32) - first)[:, None] & (column + part * width < rows)[None, :]
                loaded = tl.load(words + first.to(tl.int64) * rows + at, mask=inside, other=0)
            held = held + (loaded.to(tl.uint32, bitcast=True),)
    return held


@triton.jit  # type: ignore[untyped-decorator]
def _add_tile(  # type: ignore[no-untyped-def]
    totals, held, x, scale, zero, order, first, column, rows, columns, exponent, rows_in: tl.constexpr,
    bits: tl.constexpr, group_size: tl.constexpr, units: tl.constexpr, width: tl.constexpr, parts: tl.constexpr,
    even_k: tl.constexpr, even_n: tl.constexpr,
):  # fmt: skip
    unit_codes: tl.constexpr = 32 if bits == 3 else 32 // bits
    tile_columns: tl.constexpr = units * unit_codes
    by_code: tl.constexpr = group_size % unit_codes > 0  # a unit has codes of several groups
    by_unit: tl.constexpr = group_size > 0 and not by_code
    start = first + tl.arange(0, units) * unit_codes
    sums = totals
    steps = ()
    middles = ()
    if by_unit:
        steps = _per_group(scale, first, start, column, rows, columns, group_size, tile_columns, parts, even_k, even_n)
        sums = ()
        for _ in tl.static_range(parts * rows_in):
            sums = sums + (tl.zeros((units, width), tl.float32),)
    if not by_code and zero is not None:
        middles = _per_group(zero, first, start, column, rows, columns, group_size, tile_columns, parts, even_k, even_n)
    for code in tl.static_range(unit_codes):
        k = start + code
        entries = _entries(x, order, k, columns, rows_in, even_k)
        if by_code:
            steps = _per_group(scale, first, k, column, rows, columns, group_size, tile_columns, parts, even_k, even_n)
            if zero is not None:
                middles = _per_group(
                    zero, first, k, column, rows, columns, group_size, tile_columns, parts, even_k, even_n
                )
        added = ()
        for part in tl.static_range(parts):
            number = _number(held, zero, middles, part, exponent, code, bits)
            for row in tl.static_range(rows_in):
                product = entries[row][:, None] * number
                if by_code:
                    product *= steps[part]
                added = added + (sums[part * rows_in + row] + product,)
        sums = added
    if by_unit:
        added = ()
        for index in tl.static_range(parts * rows_in):
            added = added + (totals[index] + sums[index] * steps[index // rows_in],)
        sums = added
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def _per_group(  # type: ignore[no-untyped-def]
    pointer, first, k, column, rows, columns, group_size: tl.constexpr, tile_columns: tl.constexpr, parts: tl.constexpr,
    even_k: tl.constexpr, even_n: tl.constexpr,
):  # fmt: skip
    values = ()
    for part in tl.static_range(parts):
        at = column + part * column.shape[0]
        if group_size % tile_columns == 0:
            group = first // group_size if group_size > 0 else 0
            here = pointer + tl.cast(group, tl.int64) * rows + at
            found = tl.load(here) if even_n else tl.load(here, mask=at < rows, other=0)
            values = values + (found.to(tl.float32)[None, :],)
        else:
            here = pointer + (k // group_size).to(tl.int64)[:, None] * rows + at[None, :]
            if even_k and even_n:
                found = tl.load(here)
            else:
                found = tl.load(here, mask=(k < columns)[:, None] & (at < rows)[None, :], other=0)
            values = values + (found.to(tl.float32),)
    return values


@triton.jit  # type: ignore[untyped-decorator]
def _entries(x, order, k, columns, rows_in: tl.constexpr, even: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loads places k of each input row, widened."""
    entries = ()
    place = k
    if order is not None:
        place = tl.load(order + k) if even else tl.load(order + k, mask=k < columns, other=0)
    for row in tl.static_range(rows_in):
        here = x + row * columns + place
        found = tl.load(here) if even else tl.load(here, mask=k < columns, other=0.0)
        entries = entries + (found.to(tl.float32),)
    return entries


@triton.jit  # type: ignore[untyped-decorator]
def _number(held, zero, middles, part: tl.constexpr, exponent, code: tl.constexpr, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gives code - zero of one code of each unit, exactly."""
    unit_words: tl.constexpr = 3 if bits == 3 else 1
    shift: tl.constexpr = (9 // bits + 1) * bits  # moves codes that end above bit 22 to bits where others are
    at: tl.constexpr = code * bits % 32
    split: tl.constexpr = at + bits > 32  # the code ends in the next word
    place: tl.constexpr = 0 if split else (at if at + bits <= 23 else at - shift)
    word = held[part * unit_words + code * bits // 32]
    if split:
        word = (word >> at) | (held[part * unit_words + code * bits // 32 + 1] << (32 - at))
    elif at != place:
        word = word >> shift
    number = (word & (((1 << bits) - 1) << place)) | exponent.to(tl.uint32)
    number = number.to(tl.float32, bitcast=True) * (1.0 / (1 << place))  # 2^(23 - place) + code
    if zero is None:
        number -= (1 << (23 - place)) + (1 << (bits - 1))
    else:
        number -= middles[part] + (1 << (23 - place))
    return number

"""Cases of GPTQ's inner loop, shared by the tests on the processor and on a GPU; run as a script they are interpreted.

    TRITON_INTERPRET=1 python gptq_block_cases.py IN.npz OUT.npz

Triton decides at its import whether it interprets, so the tests that interpret need a process of their own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from quantpress.kernels.gptq_block import quantize_block, reference_quantize_block

Case = dict[str, np.ndarray]


def case(rows: int, count: int, *, groups: int = 3, bits: int = 4, seed: int = 0) -> Case:
    """A block with scales of both signs, arbitrary groups, a scale of 0 and outputs that hold poison."""
    rng = np.random.default_rng([rows, count, groups, bits, seed])
    columns = count + 7
    scale = ((1 + rng.random((rows, groups))) * rng.choice([-0.1, 0.1], (rows, groups))).astype(np.float32)
    scale[rng.random(scale.shape) < 0.05] = 0
    upper = np.triu(0.3 * rng.standard_normal((count, count)) / np.sqrt(count) + np.eye(count)).astype(np.float32)
    return {
        "work": rng.standard_normal((rows, count)).astype(np.float32),
        "upper": upper,
        "scale": scale,
        "zero": rng.integers(0, 1 << bits, scale.shape).astype(np.uint8),
        "groups": rng.integers(0, groups, count),
        "codes": np.full((rows, columns), 0xAA, np.uint8),
        "order": rng.permutation(columns)[:count],
        "errors": np.full((rows, count + 3), np.nan, np.float32),
        "losses": rng.random(rows),
        "top": np.array((1 << bits) - 1),
    }


def exact(rows: int, count: int) -> Case:
    """Multiples of a quarter, and divisors that are powers of two: no operation rounds, many quotients are ties."""
    made = case(rows, count, seed=1)
    rng = np.random.default_rng(count)
    made["work"] = (rng.integers(-40, 40, (rows, count)) / 4).astype(np.float32)
    made["scale"] = rng.choice(np.array([-1.0, -0.5, 0.0, 0.5, 1.0], np.float32), made["scale"].shape)
    # each column passes its error on to one later column: sums stay short enough for 24 bits
    made["upper"] = np.eye(count, dtype=np.float32)
    for column in range(count - 1):
        made["upper"][column, rng.integers(column + 1, count)] = rng.choice([-1.0, 0.0, 1.0])
        made["upper"][column, column] = rng.choice([0.5, 1.0])
    made["losses"][:] = 0
    return made


def extreme(rows: int, count: int) -> Case:
    """Scales down to the least subnormal number and weights up to 1e38: quotients overflow and codes are clamped."""
    made = case(rows, count, seed=2)
    rng = np.random.default_rng(count)
    made["work"] = (made["work"] * 10.0 ** rng.integers(-44, 38, (rows, count))).astype(np.float32)
    made["work"][:, ::5] = rng.choice(np.array([0.0, -0.0, 2.0**22, -(2.0**23) - 1, 0.5], np.float32))
    made["scale"] = (made["scale"] * 10.0 ** rng.integers(-44, 2, made["scale"].shape)).astype(np.float32)
    made["upper"] = np.eye(count, dtype=np.float32)
    return made


def outcome(one: Case, device: str, *, reference: bool = False) -> Case:
    """What the kernel or its reference makes of a case: codes, errors and losses."""
    tensors = {name: torch.from_numpy(value.copy()).to(device) for name, value in one.items() if name != "top"}
    # rows lie apart, as in a block that is part of a matrix
    tensors["work"] = torch.cat([tensors["work"], tensors["work"]], 1)[:, : one["work"].shape[1]]
    function = reference_quantize_block if reference else quantize_block
    function(**tensors, top=int(one["top"]))
    return {name: tensors[name].cpu().numpy() for name in ("codes", "errors", "losses")}


def main(source: Path, target: Path) -> None:
    """Runs the cases of one file through the interpreter and writes what they give into another."""
    found: Case = {}
    with np.load(source) as stored:
        for number in sorted({name.split(".")[0] for name in stored}):
            one = {name.split(".")[1]: stored[name] for name in stored if name.split(".")[0] == number}
            with np.errstate(over="ignore"):  # as a GPU, which does not warn
                found |= {f"{number}.{name}": value for name, value in outcome(one, "cpu").items()}
    np.savez(target, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

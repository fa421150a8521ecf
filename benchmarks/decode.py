"""Measures whole models on the kernels: tokens a second of a Llama-3-8B-shaped random model, in codes and in bfloat16.

    python benchmarks/decode.py [--small] [--bits 4 8] [--batch 1 8] [--prompt 128] [--decoded 256] [--json FILE]

Needs a CUDA device with 40 GB; `--small` runs a model of two small layers anywhere, to see that all of it works. The
weights are random numbers and codes that are made where they are used, the head and the embedding are bfloat16 in every
variant. Prefill is the time of one prompt, median of several; decode is the time of all steps after it, which run as a
CUDA graph, with no token read back. The bandwidth counts the weights that a step reads once, not the cache.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import git_commit

from quantpress.convert.arch.registry import find_arch
from quantpress.convert.arch.spec import ArchSpec, Hyperparameters, Role, TensorSpec
from quantpress.convert.model import Decoder
from quantpress.convert.packed_weights import PackedLinear
from quantpress.convert.static_decode import StaticDecoder
from quantpress.kernels.packed import PackedWeight

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
SMALL = {
    **LLAMA_3_8B, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 1000,
}  # fmt: skip
GROUP = 128
PREFILLS = 5


@dataclass(frozen=True, slots=True)
class Variant:
    """How the linears of the layers are kept: `bits` of a code, 16 for bfloat16."""

    bits: int
    batch: int
    compiled: bool

    @property
    def kind(self) -> str:
        """Name for tables."""
        return "bf16" if self.bits == 16 else f"int{self.bits} g{GROUP}"


class RandomModel:
    """Weights of a family's table that are made when they are asked for."""

    def __init__(self, config: dict[str, Any], bits: int, device: str) -> None:
        self.spec: ArchSpec = find_arch(config)
        self.hyper: Hyperparameters = self.spec.read_config(config)
        self._bits, self._device = bits, device
        self._rows = {row.slot: row for row in self.spec.tensors if not row.flag or row.flag in self.hyper.flags}
        self._random = torch.Generator(device).manual_seed(0)
        self.read_bytes = 0  # of the weights that a step reads: all but the embedding

    def weight(self, slot: str, layer: int) -> torch.Tensor | None:
        """Gives a weight in bfloat16: normal numbers whose products have the size of their inputs."""
        del layer
        if slot not in self._rows:
            return None
        shape = self._shape(self._rows[slot])
        values = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        if self._rows[slot].role is Role.NORM:
            return values.fill_(1)
        self.read_bytes += 0 if self._rows[slot].role is Role.EMBEDDING else values.nbytes
        return values.normal_(0, shape[-1] ** -0.5, generator=self._random)

    def linear(self, slot: str, layer: int) -> PackedLinear | None:
        """Gives a linear of a layer in random codes."""
        if self._bits == 16 or layer < 0 or self._rows[slot].role is not Role.LINEAR:
            return None
        rows, columns = self._shape(self._rows[slot])
        size = columns * self._bits // 32, rows
        words = torch.empty(size, dtype=torch.int32, device=self._device)
        words.random_(-(2**31), 2**31 - 1, generator=self._random)
        deviation = 2**self._bits / 12**0.5  # of codes that are all as likely
        scale = torch.full(
            (columns // GROUP, rows), columns**-0.5 / deviation, dtype=torch.bfloat16, device=self._device
        )
        weight = PackedWeight(words, scale, None, None, columns, self._bits, GROUP)
        self.read_bytes += weight.nbytes
        return PackedLinear(weight, deterministic=False)

    def _shape(self, row: TensorSpec) -> tuple[int, ...]:
        return tuple(self.hyper.dims[dim] for dim in row.shape)


def measured(config: dict[str, Any], variant: Variant, prompt: int, decoded: int, device: str) -> dict[str, Any]:
    """Gives the figures of a variant."""
    model = RandomModel(config, variant.bits, device)
    decoder = Decoder(
        model.weight, model.spec, model.hyper, device=device, dtype=torch.bfloat16, resident=True, linears=model.linear
    )
    static = StaticDecoder(decoder, prompt + decoded, batch=variant.batch, compiled=variant.compiled)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.hyper.vocab, (variant.batch, prompt), generator=random).to(device)
    prefills = [_seconds(lambda: static.prefill(tokens), device) for _ in range(1 + PREFILLS)][1:]

    def steps() -> None:
        for _ in range(decoded):
            static.step()

    seconds = []
    for _ in range(3):
        static.prefill(tokens)
        seconds.append(_seconds(steps, device))
    each = statistics.median(seconds) / decoded
    return {
        "kind": variant.kind,
        "batch": variant.batch,
        "compiled": variant.compiled,
        "prompt": prompt,
        "decoded": decoded,
        "prefill_s": round(statistics.median(prefills), 6),
        "prefill_tokens_per_s": round(variant.batch * prompt / statistics.median(prefills), 1),
        "decode_ms_per_token": round(each * 1e3, 4),
        "decode_tokens_per_s": round(variant.batch / each, 2),
        "weight_bytes": model.read_bytes,
        "weights_gb_per_s": round(model.read_bytes / each / 1e9, 1),
    }


def _seconds(run: Callable[[], None], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def _device_facts(device: str) -> dict[str, str]:
    facts = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform()}
    if device == "cuda":
        import triton

        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": triton.__version__}
    return facts


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| weights | texts | compiled | prefill tokens/s | decode tokens/s | ms a step | weights GB/s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = ("kind", "batch", "compiled", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_ms_per_token",
                 "weights_gb_per_s")  # fmt: skip
        lines.append("| " + " | ".join(str(row[cell]) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints a table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decoded", type=int, default=256)
    parser.add_argument("--plain", action="store_true", help="only without torch.compile")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        sys.exit("no CUDA device: --small runs a small model on the processor")
    config = SMALL if args.small else LLAMA_3_8B
    ways = (False,) if args.plain else (False, True)
    rows = []
    for bits, batch, compiled in itertools.product(args.bits, args.batch, ways):
        rows.append(measured(config, Variant(bits, batch, compiled), args.prompt, args.decoded, device))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    print(_table(rows))
    if args.json is not None:
        report = {"commit": git_commit(), "machine": _device_facts(device), "small": args.small, "rows": rows}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

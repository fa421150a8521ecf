"""Every kind of output, as the command that writes it; placeholders stand for what is made beside the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["CALIBRATED", "KINDS", "PIPELINE"]

_FEW = ["--calibration", "TEXT", "--samples", "8", "--sequence-length", "32"]
_QUANTIZE = ["quantize", "MODEL", "OUT", "--group-size", "32", "--no-verify"]
_CONVERT = ["convert", "MODEL", "OUT", "--no-verify"]

# name of the output -> command without --threads
KINDS: Mapping[str, Sequence[str]] = {
    **{
        f"{outtype}.gguf": [*_CONVERT, "--outtype", outtype]
        for outtype in ("f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q2_k", "q6_k", "iq4_xs", "tq2_0")
    },
    "adapted.gguf": [*_CONVERT, "--outtype", "q4_k_m", "--adapter", "ADAPTER"],
    "split/part-q8_0.gguf": [*_CONVERT, "--outtype", "q8_0", "--split-max-tensors", "9"],
    "vocab.gguf": [*_CONVERT, "--vocab-only"],
    **{
        f"onnx-{precision}": [*_CONVERT, "--to", "onnx", "--precision", precision]
        for precision in ("fp32", "fp16", "int8", "int4")
    },
    "onnx-standard": [*_CONVERT, "--to", "onnx", "--precision", "int4", "--standard-ops", "--adapter", "ADAPTER"],
    "safetensors": [*_CONVERT, "--to", "safetensors", "--dtype", "bf16"],
    "merged": ["merge", "MODEL", "ADAPTER", "OUT", "--no-verify"],
    "rtn-gptq": [*_QUANTIZE, "--method", "rtn"],
    "hqq-awq": [*_QUANTIZE, "--method", "hqq", "--format", "awq"],
    "rtn-compressed-tensors": [*_QUANTIZE, "--method", "rtn", "--format", "compressed-tensors"],
    "int8": ["quantize", "MODEL", "OUT", "--method", "llm_int8", "--no-verify"],
}
# the same, of kinds that run the model on a text; slower
CALIBRATED: Mapping[str, Sequence[str]] = {
    "matrix.gguf": ["imatrix", "MODEL", "OUT", "--text", "TEXT", "--context", "32", "--chunks", "4"],
    "weighted-q4_k_m.gguf": [*_CONVERT, "--outtype", "q4_k_m", "--imatrix", "matrix.gguf"],
    "gptq-q4_k_m.gguf": [*_CONVERT, "--outtype", "q4_k_m", "--method", "gptq", *_FEW],
    "gptq-gptq": [*_QUANTIZE, "--method", "gptq", *_FEW],
    "gptq-adapted": [*_QUANTIZE, "--method", "gptq", "--bits", "3", *_FEW, "--adapter", "ADAPTER"],
    "awq-awq": [*_QUANTIZE, "--method", "awq", *_FEW],
    "smooth": ["quantize", "MODEL", "OUT", "--method", "smoothquant", "--no-verify", *_FEW],
    "onnx-static": [*_CONVERT, "--to", "onnx", "--precision", "int8", "--int8", "static", *_FEW],
    "onnx-gptq": [*_CONVERT, "--to", "onnx", "--precision", "int4", "--method", "gptq", *_FEW],
    # judged, so that the figures of the proof repeat too
    "judged-q8_0.gguf": [
        "convert", "MODEL", "OUT", "--outtype", "q8_0", "--text", "TEXT", "--context", "32", "--chunks", "4",
        "--max-kld", "9", "--max-ppl-change", "9", "--min-top1", "0",
    ],
}  # fmt: skip
# a batch whose jobs share their beginning, and a cache
PIPELINE = """\
version: 1
cache: CACHE
defaults: {context: 32, chunks: 4, text: TEXT, max_kld: 9, max_ppl_change: 9, min_top1: 0}
jobs:
  - name: tuned-${outtype}
    matrix: {outtype: [Q4_K_M, Q8_0]}
    model: MODEL
    stages:
      - merge_lora: {adapter: ADAPTER}
      - imatrix: {text: TEXT, context: 32, chunks: 4}
      - gguf: {outtype: "${outtype}", output: "batch/${outtype}.gguf"}
  - name: int4
    model: MODEL
    stages:
      - gptq: {bits: 4, group_size: 32, samples: 8, sequence_length: 32, calibration: TEXT}
      - safetensors: {format: gptq, output: batch/gptq}
      - onnx: {output: batch/onnx}
"""

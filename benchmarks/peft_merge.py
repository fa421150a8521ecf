"""Merges an adapter as PEFT's documentation does; run by benchmarks/merge.py in an environment with peft.

python benchmarks/peft_merge.py BASE ADAPTER OUT
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, out: str) -> None:
    """Loads the base in bfloat16, merges, and saves the model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

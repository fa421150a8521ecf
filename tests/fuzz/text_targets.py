"""Every target whose input is a text or a tokenizer's file: configurations, tokenizers, adapters, pipelines, cache."""

from __future__ import annotations

from tests.fuzz import adapter_targets, config_targets, pipeline_targets, tokenizer_targets
from tests.fuzz.target import Target

__all__ = ["TARGETS"]

TARGETS: tuple[Target, ...] = (
    *config_targets.TARGETS,
    *adapter_targets.TARGETS,
    *tokenizer_targets.TARGETS,
    *pipeline_targets.TARGETS,
)

"""Makes files that lie elsewhere files of this machine, before a stage or a model is opened."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from quantpress.pipelines.batch.remote import fetch, is_url
from quantpress.pipelines.progress import Progress
from quantpress.pipelines.stage import Stage

__all__ = ["localized", "model_place"]


def model_place(model: str, cache: Path, progress: Progress) -> str:
    """Gives a model's place on this machine, or its Hub id.

    Raises:
        InputError, OutputError: it cannot be fetched.
    """
    return str(fetch(model, cache, progress)) if is_url(model) else model


def localized(stage: Stage, *, cache: Path, progress: Progress) -> Stage:
    """Gives a stage whose options name files of this machine where they named URLs.

    Raises:
        InputError, OutputError: one cannot be fetched.
    """
    found = {}
    for field in fields(stage):
        value = getattr(stage, field.name)
        if field.name != "output" and isinstance(value, str) and is_url(value):
            found[field.name] = fetch(value, cache, progress)
    return replace(stage, **found) if found else stage

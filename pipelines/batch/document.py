"""Pipeline files as pydantic models: what keys there are, of which types, and what they mean.

A file is checked in two steps. Its frame is checked as it was written; jobs are checked one by one after their matrix
and their variables have been filled in, when `${bits}` has become a number.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from quantpress.pipelines.judging import RUNTIMES

__all__ = ["SIZE_PATTERN", "Frame", "JobFrame", "JobSettings", "WrittenFile", "WrittenJob", "parse_size"]

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SIZE_PATTERN = r"^\d+(\.\d+)?\s*[KMGTkmgt]?[Bb]?$"

_Number = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=1)]
_Text = Annotated[str, Field(min_length=1)]
_Value = str | int | float | bool | None
Variable = _Value | list[_Value]


class JobSettings(BaseModel):
    """What may stand in `defaults` and in each job; a job's own value wins."""

    model_config = _STRICT

    text: _Text | None = Field(None, description="UTF-8 text to judge on; without it the built-in text")
    context: Annotated[int, Field(ge=8)] | None = Field(
        None, description="tokens per window; 512 or the model's context"
    )
    chunks: _Count | None = Field(None, description="number of windows to judge on")
    runtime: Literal[RUNTIMES] = Field("auto", description="what runs the outputs while they are judged")  # type: ignore[valid-type]
    max_kld: _Number | None = Field(
        None, description="largest mean KL divergence, nats per token; by type if not given"
    )
    max_ppl_change: _Number | None = Field(None, description="largest relative change of perplexity, either way")
    min_top1: _Share | None = Field(None, description="smallest top-1 agreement")
    verify: bool = Field(True, description="run every output and compare it with its source")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="what computes")
    threads: _Count | None = Field(
        None, description="worker threads of each task; what the executor gives it if not given"
    )
    max_memory: Annotated[str, Field(pattern=SIZE_PATTERN)] | _Count | None = Field(
        None, description="memory for weights while proving and for activations while quantizing: bytes, or as in 8G"
    )
    allow_nonfinite: bool = Field(False, description="write NaN and Inf instead of refusing them")


class JobFrame(JobSettings):
    """One job: a model and the stages that it goes through, for every combination of its matrix."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="unique in the file after every ${variable} is filled in"
    )
    matrix: dict[str, Annotated[list[Variable], Field(min_length=1)]] = Field(
        default_factory=dict, description="variable -> its values; the job is run for every combination"
    )
    exclude: list[dict[str, _Value]] = Field(
        default_factory=list, description="combinations of the matrix that are left out: variable -> value"
    )
    model: _Text = Field(description="model folder or .gguf file, Hub id (org/name or org/name@revision), or URL")
    stages: Annotated[list[Any], Field(min_length=1)] = Field(description="in order; each is `name: {options}`")


class Frame(BaseModel):
    """A pipeline file of quantpress."""

    model_config = _STRICT

    version: Literal[1] = Field(description="version of this form of file")
    cache: _Text = Field(".quantpress", description="folder of work that jobs and runs share, relative to this file")
    variables: dict[str, Variable] | None = Field(
        None, description="name -> value, used as ${name}; `--set name=value` replaces one"
    )
    defaults: JobSettings | None = Field(None, description="settings of every job")
    jobs: Annotated[list[JobFrame], Field(min_length=1)] = Field(description="what is to be made")


class WrittenJob(BaseModel):
    """A job before its variables are filled in: keys, and what must be there to fill them in."""

    model_config = ConfigDict(**{**_STRICT, "extra": "ignore"})

    name: str | int | float
    matrix: dict[str, Annotated[list[Variable], Field(min_length=1)] | _Text] = Field(default_factory=dict)
    exclude: list[dict[str, _Value]] = Field(default_factory=list)
    model: Any
    stages: Annotated[list[Any], Field(min_length=1)]


class WrittenFile(BaseModel):
    """A file before its variables are filled in."""

    model_config = _STRICT

    version: Any
    cache: _Text = ""
    variables: dict[str, Variable] | None = None
    defaults: dict[str, Any] | None = None
    jobs: Annotated[list[dict[str, Any]], Field(min_length=1)]


def parse_size(text: str | int) -> int:
    """Gives bytes of `8G` or `500M`, in decimal units, or of a number.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None or not float(match[1]):
        raise ValueError("a size is a number and K, M or G, as in 8G")
    return int(float(match[1]) * _UNITS[match[2]])

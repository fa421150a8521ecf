"""Inputs from URLs and outputs to URLs: object stores, servers, memory, through fsspec."""

from __future__ import annotations

from quantpress.pipelines.batch.fetched import fetch
from quantpress.pipelines.batch.published import check_publishable, publish
from quantpress.pipelines.batch.remote_output import published_sidecar, remote_state, remote_target
from quantpress.pipelines.batch.stores import is_url, local_path, name_of, shown_url

__all__ = [
    "check_publishable",
    "fetch",
    "is_url",
    "local_path",
    "name_of",
    "publish",
    "published_sidecar",
    "remote_state",
    "remote_target",
    "shown_url",
]

"""Writes the report of a batch in the form that the file's name asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from quantpress.convert.atomic import write_file
from quantpress.convert.files import shown
from quantpress.pipelines.batch.results import BatchResult
from quantpress.quant.errors import UsageError

__all__ = ["report_form", "write_report"]

_FORMS = {".html": "html", ".htm": "html", ".md": "md", ".markdown": "md"}
_NO_MODELS: Mapping[str, str] = MappingProxyType({})


def report_form(path: Path) -> str:
    """Gives "html" or "md", from the name of the report.

    Raises:
        UsageError: it ends in something else; to be asked before a batch begins.
    """
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise UsageError(f"--report {shown(str(path), 200)}: a report is a file .html or .md")
    return form


def write_report(result: BatchResult, path: Path | str, *, models: Mapping[str, str] = _NO_MODELS) -> None:
    """Writes the report of a batch, replacing an older one; the name holds the old report or the whole new one.

    Args:
        result: the batch, whatever became of its jobs.
        path: the file; `.html` for people, `.md` for a model card.
        models: job -> what to call its model in titles and in `base_model`; by default as `JobResult.model`.

    Raises:
        UsageError: the file's name ends in something else.
        OutputError: the file cannot be written.
    """
    path, models = Path(path), {job.name: job.model for job in result.jobs} | dict(models)
    if report_form(path) == "html":
        from quantpress.pipelines.report.page import html_report

        content = html_report(result, models)
    else:
        from quantpress.pipelines.report.markdown import markdown_report

        content = markdown_report(result, models)
    write_file(path, content.encode("utf-8", "backslashreplace"), force=True)

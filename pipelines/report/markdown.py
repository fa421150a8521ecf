"""A model card: front matter for the Hub, a table of the files, how they were made and proved, and how to run them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from quantpress.pipelines.batch.results import BatchResult
from quantpress.pipelines.report.columns import perplexity_text
from quantpress.pipelines.report.front_matter import front_matter
from quantpress.pipelines.report.model_facts import ModelFacts, card_facts, facts_of
from quantpress.pipelines.report.provenance import Source, calibration_text, options_text, sources
from quantpress.pipelines.report.rows import Row, rows_of
from quantpress.pipelines.report.run_commands import Snippet, snippets
from quantpress.pipelines.report.values import (
    bytes_text,
    count,
    items,
    mapping,
    number,
    percent_text,
    plain,
    significant,
    text,
)

__all__ = ["markdown_report"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_ACTIVE = re.compile(r"([\\`*_{}\[\]<>#|~&!$])")


def markdown_report(result: BatchResult, models: Mapping[str, str]) -> str:
    """Gives the model card of a batch.

    Args:
        result: the batch; what failed is only named in a comment, for it is not to be published.
        models: job -> its model, as the pipeline file has it; may be empty.
    """
    rows = rows_of(result)
    good = [row for row in rows if row.verdict != "failed"]
    facts = {row.anchor: facts_of(row.output.path) for row in good}
    base = _base_models(good, models, facts)
    names = list(dict.fromkeys(PurePath(models[row.job]).name for row in good if row.job in models))
    title = plain(names[0] if len(names) == 1 else result.pipeline.stem)
    parts = [
        front_matter(good, base, _license(good, models, facts)),
        f"# {escaped(title)}",
        _left_out(result, rows),
        _intro(base),
    ]
    found = sources(good, models)
    for source in found:
        if len(found) > 1:
            parts.append(f"## {escaped(source.title)}")
        parts += [_table(source), _verification(source), _making(source), _running(source, facts, models, base)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(value: str) -> str:
    """Gives a text as Markdown that shows it as it is."""
    return _ACTIVE.sub(r"\\\1", plain(value, 600)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def code(value: str) -> str:
    """Gives a text as a code span, in which nothing can end it or its cell of a table."""
    shown = plain(value, 600).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}" if longest else f"`{shown}`"


def fenced(snippet: Snippet) -> str:
    """Gives lines as a block of code that they cannot leave."""
    longest = max((len(run) for run in re.findall("`+", snippet.code)), default=0)
    fence = "`" * max(3, longest + 1)
    block = f"{fence}{snippet.language}\n{snippet.code.rstrip()}\n{fence}"
    return "\n\n".join(filter(None, [f"**{snippet.title}**", block, escaped(snippet.note)]))


def _is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model.partition("@")[0]) is not None and not Path(model).exists()


def _base_models(rows: Sequence[Row], models: Mapping[str, str], facts: Mapping[str, ModelFacts]) -> tuple[str, ...]:
    """Gives the Hub ids of the sources: as the pipeline file names them, or as the files say what they come from."""
    found = [models[row.job].partition("@")[0] for row in rows if _is_hub_id(models.get(row.job, ""))]
    if not found:
        found = [name for row in rows for name in facts[row.anchor].base_models if _HUB_ID.fullmatch(name)]
    return tuple(dict.fromkeys(found))


def _license(rows: Sequence[Row], models: Mapping[str, str], facts: Mapping[str, ModelFacts]) -> str:
    """Gives the licence where all sources say the same one; empty where none is known."""
    folders = dict.fromkeys(models[row.job] for row in rows if row.job in models)
    said = {card_facts(Path(folder)).license for folder in folders if Path(folder).is_dir()}
    said |= {facts[row.anchor].license for row in rows}
    said.discard("")
    return said.pop() if len(said) == 1 else ""


def _left_out(result: BatchResult, rows: Sequence[Row]) -> str:
    """Names what is not in the card, where only its author looks; errors name folders that are nobody else's matter."""
    lines = [f"job {plain(job.name)}: {plain(job.state, 40)}, exit code {job.exit_code}" for job in result.failed]
    lines += [f"file {row.path}: {row.reason or 'not as its source'}" for row in rows if row.verdict == "failed"]
    if not lines:
        return ""
    told = "\n".join(line.replace("--", "- -").replace(">", ")") for line in dict.fromkeys(lines))
    return f"<!-- Left out of this card:\n{told}\n-->"


def _intro(base: Sequence[str]) -> str:
    links = ", ".join(f"[{escaped(name)}](https://huggingface.co/{name})" for name in base)
    start = f"Made from {links} with quantpress." if links else "Made with quantpress."
    return f"{start} Every file that has figures below was run and compared with its source."


def _table(source: Source) -> str:
    lines = [
        "| file | type | size | bits per weight | perplexity | mean KL divergence | same top token | proved |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in source.rows:
        cells = [
            code(row.name), escaped(f"{row.label} {row.kind}"), bytes_text(row.nbytes), significant(row.bits),
            perplexity_text(row), significant(row.mean_kld), percent_text(row.top1),
            "yes" if row.verdict == "passed" else "no",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verification(source: Source) -> str:
    parities = [mapping(row.output.parity) for row in source.rows if row.output.parity]
    if not parities:
        return ""
    runtimes = dict.fromkeys(text(mapping(parity.get("candidate")).get("runtime"), 60) for parity in parities)
    ways = dict.fromkeys(map(_way, parities))
    meaning = (
        "Mean KL divergence is of the source to the file, in nats per token; the same top token is the share of tokens "
        "whose likeliest successor both agree on."
    )
    ran = f"The files ran in {escaped(_listed(runtimes))}."
    return "\n\n".join(["### Verification", ran, *ways, meaning])


def _way(parity: Mapping[str, Any]) -> str:
    """Says on what a proof was made."""
    source = mapping(parity.get("baseline"))
    perplexity = number(source.get("perplexity"))
    figure = "" if perplexity is None else f", its perplexity there is {significant(perplexity, 4)}"
    return (
        f"The source ran in {escaped(text(source.get('runtime'), 60) or 'its own runtime')}{figure}. "
        f"{count(parity.get('tokens')):,} tokens in windows of {count(parity.get('context'))} of a text with SHA-256 "
        f"{code(text(parity.get('text_sha256'), 64) or 'unknown')} were scored by both."
    )


def _making(source: Source) -> str:
    lines = ["### How it was made", ""]
    for row in source.rows:
        steps = "; ".join(
            f"{escaped(text(stage.get('name'), 60))} ({escaped(options_text(stage))})"
            for stage in items(row.sidecar.get("stages"))
        )
        lines.append(f"- {code(row.name)}: {steps or 'no record'}.")
        calibration = calibration_text(mapping(row.sidecar.get("calibration")))
        if calibration:
            lines.append(f"  Calibration: {escaped(calibration)}.")
    made_by = _listed(dict.fromkeys(text(row.sidecar.get("created_by")) for row in source.rows))
    hashes = ", ".join(f"{code(file.name)} {code(file.sha256)}" for file in source.files)
    lines += ["", f"By {escaped(made_by)}. Inputs (SHA-256): {hashes or 'not recorded'}."]
    return "\n".join(lines)


def _running(source: Source, facts: Mapping[str, ModelFacts], models: Mapping[str, str], base: Sequence[str]) -> str:
    parts = ["### How to run it", "These commands were not run by quantpress; they need the runtimes' recent versions."]
    only = base[0] if len(base) == 1 else ""
    for row in source.rows:
        model = models.get(row.job, "")
        blocks = snippets(row, facts[row.anchor], model.partition("@")[0] if _is_hub_id(model) else only)
        if blocks:
            parts += [f"#### {code(row.name)}", *(fenced(block) for block in blocks)]
    return "\n\n".join(parts) if len(parts) > 2 else ""


def _listed(names: Iterable[str]) -> str:
    found = [name for name in names if name]
    return " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]])) or "runtimes that the files do not name"

"""The report as one HTML file that needs nothing else.

The page is a heading (what the results say, what was run) and the registered sections (`qvit.report.sections`), in the
shell that all pages share (`qvit.report.shell`). The size is that of plotly.js, about 5 MB, plus some 50 kB per run; a
panel to try models in (`qvit.report.trial`) takes another 5 MB and the models.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qvit.errors import QvitError
from qvit.report.groups import Group, common_options, group_runs, runs_of
from qvit.report.markup import Canvas, escape, facts, folded, table, verdict_box
from qvit.report.runs import Run
from qvit.report.sections.base import SECTIONS
from qvit.report.shell import document, write_html
from qvit.report.tables import verdict
from qvit.report.trial import Trial, trial_data, trial_program, trial_section

MAX_SENTENCES = 4


def write_page(
    runs: Sequence[Run],
    out: str | Path,
    *,
    title: str | None = None,
    summary: Mapping[str, Any] | None = None,
    trial: Trial | str | None = None,
) -> Path:
    """Writes the report of one run, or the comparison of several.

    Args:
        runs: The runs, finished or not.
        out: The HTML file; its folder is created. It appears at once or not at all.
        title: Heading of the page; made from model and data if not given.
        summary: Further facts to show on top, such as the `results.json` of a demo; nested values are left out.
        trial: Models to try out in the page, or a sentence that says why there are none; None for nothing.

    Returns:
        The path of the page.

    Raises:
        QvitError: If there is no run, or the file cannot be written.
    """
    if not runs:
        raise QvitError("no run to report on: give at least one run directory")
    return write_html(render_page(runs, title=title, summary=summary, trial=trial), out)


def render_page(
    runs: Sequence[Run],
    *,
    title: str | None = None,
    summary: Mapping[str, Any] | None = None,
    trial: Trial | str | None = None,
) -> str:
    """The page as text; see `write_page`."""
    groups, canvas = group_runs(runs), Canvas()
    ordered = sorted(SECTIONS.values(), key=lambda section: section.order)
    parts = [(section.name, section.heading, section.render(groups, canvas)) for section in ordered]
    if trial is not None:
        parts.insert(1, trial_section(trial))
    said = verdict_box(verdict(runs), most=MAX_SENTENCES)
    header = f"{said}{_unfinished(groups)}{_facts(runs, summary or {})}{_options(runs)}"
    given = {"data": trial_data(trial), "program": trial_program(trial)} if isinstance(trial, Trial) else {}
    return document(title or _title(runs), header, parts, canvas, **given)


def _title(runs: Sequence[Run]) -> str:
    models = dict.fromkeys(run.model for run in runs)
    data = list(dict.fromkeys(str(run.config.get("data") or "") for run in runs))
    where = f" on {data[0]}" if len(data) == 1 and data[0] else ""
    return f"Quantization report: {', '.join(models)}{where}"


def _unfinished(groups: Sequence[Group]) -> str:
    """Which runs are not finished, and why."""
    runs = runs_of(groups)
    lines = [
        f"<li>{escape(group.name_of(run))} (<code>{escape(run.path.name)}</code>): {escape(run.state)}.</li>"
        for group, run in runs
        if not run.finished
    ]
    many = f"{len(lines)} of {len(runs)} runs {'is' if len(lines) == 1 else 'are'} not finished"
    return f'<div class="warning" role="note">{many}:<ul>{"".join(lines)}</ul></div>' if lines else ""


def _facts(runs: Sequence[Run], summary: Mapping[str, Any]) -> str:
    """What was run; values that differ between runs are all given."""
    configs = [run.config for run in runs]
    versions = [config.get("versions") or {} for config in configs]
    methods = dict.fromkeys(run.method + (f" {run.budget}" if run.budget else "") for run in runs)
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    said = f"; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
    found = {
        "Model": [
            run.model + (f" ({_pairs(own, '=')})" if (own := run.config.get("model_kwargs")) else "") for run in runs
        ],
        "Data": [config.get("data") for config in configs],
        "Runs": [f"{len(runs)}: {', '.join(methods)}{said}"],
        "Hardware": [config.get("hardware") for config in configs],
        "Versions": [_pairs(own, " ") for own in versions],
        "Date": [_dates(runs)],
    }
    shown = {key: "<br>".join(_distinct(values)) or "not recorded" for key, values in found.items()}
    first, *others = [f"<code>{command}</code>" for command in _distinct(map(_command, configs))] or [""]
    if first:
        shown["Command"] = first + (folded(f"{len(others)} more", "<br>".join(others)) if others else "")
    for key, value in summary.items():
        if isinstance(value, (str, int, float)):
            text = f"{value:.4g}" if isinstance(value, float) else value
            shown[str(key).replace("_", " ").capitalize()] = escape(text)
    return facts(shown)


def _distinct(values: Iterable[Any]) -> list[str]:
    """Those that are known, each once, as HTML."""
    return list(dict.fromkeys(escape(value) for value in values if value))


def _pairs(named: Mapping[str, Any], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in named.items())


def _command(config: Mapping[str, Any]) -> str:
    command = config.get("command") or ""
    return shlex.join(command) if isinstance(command, list) else command


def _dates(runs: Sequence[Run]) -> str:
    dates = []
    for run in runs:
        try:
            if run.log.started is not None:
                dates.append(datetime.fromtimestamp(run.log.started, UTC).strftime("%Y-%m-%d %H:%M"))
        except (OverflowError, OSError, ValueError):
            continue
    if not dates:
        return "not recorded"
    return min(dates) + ("" if min(dates) == max(dates) else f" to {max(dates)}") + " UTC"


def _options(runs: Sequence[Run]) -> str:
    shared, differing = common_options(runs)
    parts = ""
    if differing:
        rows = [
            [escape(run.path.name), *(escape(values[i]) for values in differing.values())] for i, run in enumerate(runs)
        ]
        inside = table(["run", *map(escape, differing)], rows)
        parts += folded(f"Options that differ between runs ({len(differing)})", inside)
    if shared:
        rows = [[escape(key), f"<code>{escape(value)}</code>"] for key, value in shared.items()]
        name = "Options" if len(runs) == 1 else "Options of all runs"
        parts += folded(f"{name} ({len(shared)})", table(["option", "value"], rows))
    return parts

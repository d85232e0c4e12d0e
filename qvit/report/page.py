"""The report as one HTML file that needs nothing else.

The page is a heading (what the results say, what was run) and the sections of `qvit.report.sections`, in the shell that
all pages share (`qvit.report.shell`). The size is that of plotly.js, about 5 MB, plus some 50 kB per run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qvit.errors import QvitError
from qvit.files import write_atomically
from qvit.report import oscillation, sections
from qvit.report.markup import Canvas, escape, folded, table
from qvit.report.runs import Run
from qvit.report.sections import run_name
from qvit.report.shell import document
from qvit.report.tables import Group, common_options, group_runs, verdict

MAX_SENTENCES = 4


def write_page(
    runs: Sequence[Run], out: str | Path, *, title: str | None = None, summary: Mapping[str, Any] | None = None
) -> Path:
    """Writes the report of one run, or the comparison of several.

    Args:
        runs: The runs, finished or not.
        out: The HTML file; its folder is created. It appears at once or not at all.
        title: Heading of the page; made from model and data if not given.
        summary: Further facts to show on top, such as the `results.json` of a demo; nested values are left out.

    Returns:
        The path of the page.

    Raises:
        QvitError: If there is no run, or the file cannot be written.
    """
    if not runs:
        raise QvitError("no run to report on: give at least one run directory")
    target = Path(out)
    page = render_page(runs, title=title, summary=summary).encode("utf-8", errors="replace")
    write_atomically(target, lambda file: file.write(page))
    return target


def render_page(runs: Sequence[Run], *, title: str | None = None, summary: Mapping[str, Any] | None = None) -> str:
    """The page as text; see `write_page`."""
    groups, canvas = group_runs(runs), Canvas()
    heading = title or _title(runs)
    parts = [
        ("results", "Results", sections.results(groups)),
        ("accuracy", "Accuracy against cost", sections.accuracy(groups, canvas)),
        ("widths", "Learned bit-widths", sections.width_maps(groups, canvas)),
        ("attention", "Attention: widths over heads", sections.attention(groups, canvas)),
        ("gelu", "GELU output: width by layer", sections.gelu(groups, canvas)),
        ("training", "Widths and budget during training", sections.training(groups, canvas)),
        ("freeze", "What freezing changed", sections.freeze(groups)),
        ("curves", "Training curves", sections.curves(groups, canvas)),
        ("oscillation", "Oscillation and variation of weights", oscillation.weights(groups, canvas)),
        ("costs", "What costs how much", sections.costs(groups, canvas)),
    ]
    return document(heading, _header(runs, groups, summary or {}), parts, canvas)


def _title(runs: Sequence[Run]) -> str:
    models = dict.fromkeys(run.model for run in runs)
    data = list(dict.fromkeys(str(run.config.get("data") or "") for run in runs))
    where = f" on {data[0]}" if len(data) == 1 and data[0] else ""
    return f"Quantization report: {', '.join(models)}{where}"


def _header(runs: Sequence[Run], groups: Sequence[Group], summary: Mapping[str, Any]) -> str:
    said = [f"<p>{escape(sentence)}</p>" for sentence in verdict(runs)]
    sentences = "".join(said[:MAX_SENTENCES])
    if len(said) > MAX_SENTENCES:
        sentences += folded(f"{len(said) - MAX_SENTENCES} more", "".join(said[MAX_SENTENCES:]))
    unfinished = [
        f"<li>{escape(run_name(run, group))} (<code>{escape(run.path.name)}</code>): {escape(run.state)}.</li>"
        for group in groups
        for run in group.runs
        if not run.finished
    ]
    note = ""
    if unfinished:
        many = f"{len(unfinished)} of {len(runs)} runs {'is' if len(unfinished) == 1 else 'are'} not finished"
        note = f'<div class="warning" role="note">{many}:<ul>{"".join(unfinished)}</ul></div>'
    return f'<div class="verdict">{sentences}</div>{note}{_facts(runs, summary)}{_options(runs)}'


def _facts(runs: Sequence[Run], summary: Mapping[str, Any]) -> str:
    """What was run, as a list of definitions; values that differ between runs are all given."""
    configs = [run.config for run in runs]
    versions = [
        ", ".join(f"{name} {version}" for name, version in config["versions"].items())
        for config in configs
        if isinstance(config.get("versions"), dict)
    ]
    models = [run.model + _kwargs(run) for run in runs]
    methods = list(dict.fromkeys(run.method + (f" {run.budget}" if run.budget else "") for run in runs))
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    facts = {
        "Model": models,
        "Data": [str(config["data"]) for config in configs if config.get("data")],
        "Runs": [
            f"{len(runs)}: {', '.join(methods)}"
            + (f"; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else "")
        ],
        "Hardware": [str(config["hardware"]) for config in configs if config.get("hardware")],
        "Versions": versions,
        "Date": [_dates(runs)],
    }
    lines = [
        (key, "<br>".join(escape(value) for value in dict.fromkeys(values)) or "not recorded")
        for key, values in facts.items()
    ]
    commands = [_command(config.get("command")) for config in configs if config.get("command")]
    commands = list(dict.fromkeys(commands))
    if commands:
        shown = f"<code>{escape(commands[0])}</code>"
        if len(commands) > 1:
            rest = "<br>".join(f"<code>{escape(command)}</code>" for command in commands[1:])
            shown += f"<details><summary>{len(commands) - 1} more</summary>{rest}</details>"
        lines.append(("Command", shown))
    for key, value in summary.items():
        if isinstance(value, (str, int, float)):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append((escape(str(key).replace("_", " ").capitalize()), escape(shown)))
    return '<dl class="facts">' + "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in lines) + "</dl>"


def _kwargs(run: Run) -> str:
    kwargs = run.config.get("model_kwargs")
    if not isinstance(kwargs, dict) or not kwargs:
        return ""
    return " (" + ", ".join(f"{key}={value}" for key, value in kwargs.items()) + ")"


def _command(value: Any) -> str:
    return shlex.join(map(str, value)) if isinstance(value, list) else str(value)


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
        parts += folded(
            f"{'Options' if len(runs) == 1 else 'Options of all runs'} ({len(shared)})",
            table(["option", "value"], rows),
        )
    return parts

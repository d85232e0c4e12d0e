"""Weights in training: how many oscillate, how modules vary, how far outliers lie.

Read from the `diagnostics` lines of a run's log; runs without them are left out. Oscillating are weights whose moving
frequency of oscillation exceeds 0.005 (Nagel et al. 2022); variation is standard deviation over mean of |w|, outliers
are the largest |w| over the standard deviation, both of the weight of a site at the last epoch (VVTQ, Huang et al.
2023, motivates its parts by such plots).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go

from qvit.documents.log import DiagnosticsEvent
from qvit.report.figures import COLOURS, label, line, new_figure, with_room
from qvit.report.groups import Group, runs_of
from qvit.report.markup import Canvas, escape, folded, grid, muted, select, table
from qvit.report.runs import Run
from qvit.report.sections.base import section
from qvit.report.sites import Place, layer_labels, layers_of, locate, tensors_of
from qvit.report.units import percent

NAMES = {"variation": "standard deviation / mean |w|", "outliers": "max |w| / standard deviation"}
NOTE = (
    "A weight counts as oscillating while the moving frequency of changes of its code against the direction of the "
    "last change exceeds 0.005 (Nagel et al. 2022); about 4096 weights of each site are followed."
)


@section("oscillation", "Oscillation and variation of weights", order=90)
def oscillation(groups: Sequence[Group], canvas: Canvas) -> str:
    """Oscillating shares over training by kind of tensor, variation and outliers by layer, and a table of all sites."""
    named = [(group.name_of(run), run) for group, run in runs_of(groups) if any(d.sites for d in run.log.diagnostics)]
    if not named:
        return ""
    shown = [run for _, run in named]
    figures = {
        "oscillating": ("Oscillating weights by kind of tensor", [oscillation_figure(run) for run in shown]),
        "variation": ("Variation of modules", [spread_figure(run, "variation") for run in shown]),
        "outliers": ("Outliers", [spread_figure(run, "outliers") for run in shown]),
    }
    plots = [canvas.plot(f"weights-{name}", own, heading=heading) for name, (heading, own) in figures.items()]
    box = select("weights-run", "Run", [name for name, _ in named], [f"weights-{name}" for name in figures])
    rows = [row for name, run in named for row in _rows(name, _last(run))]
    inside = table(["run", "weight", "oscillating", *map(escape, NAMES.values())], rows, text=2)
    last = folded("All weights at the last epoch as a table", f'<div class="tall">{inside}</div>')
    return muted(NOTE) + box + grid(plots) + last


def oscillation_figure(run: Run) -> go.Figure:
    """The share of oscillating weights over training steps, a line per kind of tensor."""
    records = [record for record in run.log.diagnostics if record.sites]
    figure = new_figure("Share of oscillating weights over training steps.", "training step", "oscillating (%)")
    means = [(record.step, _oscillating(record)) for record in records]
    for index, tensor in enumerate(_tensors(records[-1])):
        points = [(step, own.get(tensor)) for step, own in means]
        hover = f"{label(tensor)}, step %{{x}}: %{{y:.2f}} %"
        line(figure, points, tensor, hover, COLOURS[index % len(COLOURS)])
    return with_room(figure) or figure


def spread_figure(run: Run, key: str) -> go.Figure:
    """Variation or outliers at the last epoch: layers across, a line of marks per kind of tensor."""
    last = _last(run)
    layers = layers_of(last.sites)
    figure = new_figure(f"{key.capitalize()} of weights by layer.", "layer", NAMES[key])
    values = {locate(site): getattr(record, key) for site, record in last.sites.items()}
    for index, tensor in enumerate(_tensors(last)):
        own = [values.get(Place(layer, tensor)) for layer in layers]
        if any(value is not None for value in own):
            points = zip(layer_labels(layers), own, strict=True)
            hover = f"{label(tensor)}, layer %{{x}}: %{{y:.3g}}"
            line(figure, points, tensor, hover, COLOURS[index % len(COLOURS)], width=1, mode="lines+markers")
    figure.update_xaxes(type="category")
    return with_room(figure) or figure


def _rows(name: str, last: DiagnosticsEvent) -> list[list[str]]:
    rows = []
    for site, own in last.sites.items():
        place = locate(site)
        where = f"{escape(place.layer)} {label(place.tensor)}".strip()
        cells = ["" if value is None else f"{value:.3g}" for value in (own.variation, own.outliers)]
        rows.append([escape(name), where, percent(own.oscillating), *cells])
    return rows


def _last(run: Run) -> DiagnosticsEvent:
    return next(record for record in reversed(run.log.diagnostics) if record.sites)


def _tensors(record: DiagnosticsEvent) -> list[str]:
    """Kinds of tensors: those of layers in the order of the data flow, then first and last layers by their names."""
    return tensors_of(record.sites) + [site for site in record.sites if not locate(site).layer]


def _oscillating(record: DiagnosticsEvent) -> dict[str, float]:
    """The mean share of oscillating weights in percent by kind of tensor, as far as it was written."""
    pooled: dict[str, list[float]] = {}
    for site, own in record.sites.items():
        if own.oscillating is not None:
            pooled.setdefault(locate(site).tensor, []).append(own.oscillating)
    return {tensor: 100 * fmean(shares) for tensor, shares in pooled.items()}

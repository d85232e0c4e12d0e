"""The section on weights in training: how many oscillate, how modules vary, how far outliers lie.

Read from the `diagnostics` lines of a run's log; runs without them are left out. Oscillating are weights whose moving
frequency of oscillation exceeds 0.005 (Nagel et al. 2022); variation is standard deviation over mean of |w|, outliers
are the largest |w| over the standard deviation, both of the weight of a site at the last epoch (VVTQ, Huang et al.
2023, motivates its parts by such plots).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go

from qvit.report.figures import COLOURS, label, new_figure, thin, with_room
from qvit.report.markup import Canvas, escape, folded, select, table, tensor_name
from qvit.report.runs import Diagnostics, Run
from qvit.report.sites import Place, layer_labels, layers_of, locate, tensors_of
from qvit.report.tables import Group
from qvit.report.units import percent

NAMES = {"variation": "standard deviation / mean |w|", "outliers": "max |w| / standard deviation"}


def weights(groups: Sequence[Group], canvas: Canvas) -> str:
    """Oscillating shares over training by kind of tensor, variation and outliers by layer, and a table of all sites."""
    shown = [(group, run) for group in groups for run in group.runs if any(d.sites for d in run.log.diagnostics)]
    if not shown:
        return ""
    runs = [run for _, run in shown]
    plots = ["oscillating", "variation", "outliers"]
    figures = [
        [oscillation_figure(run) for run in runs],
        *([spread_figure(run, key) for run in runs] for key in NAMES),
    ]
    headings = ["Oscillating weights by kind of tensor", "Variation of modules", "Outliers"]
    drawn = "".join(
        canvas.plot(f"weights-{name}", own, heading=heading)
        for name, own, heading in zip(plots, figures, headings, strict=True)
    )
    names = [group.label + ("" if run.seed is None else f" · seed {run.seed}") for group, run in shown]
    box = select("weights-run", "Run", names, [f"weights-{name}" for name in plots])
    note = (
        "A weight counts as oscillating while the moving frequency of changes of its code against the direction of the "
        "last change exceeds 0.005 (Nagel et al. 2022); about 4096 weights of each site are followed."
    )
    return f'<p class="muted">{note}</p>{box}<div class="grid">{drawn}</div>{_last_table(names, runs)}'


def oscillation_figure(run: Run) -> go.Figure:
    """The share of oscillating weights over training steps, a line per kind of tensor."""
    records = thin([record for record in run.log.diagnostics if record.sites])
    figure = new_figure("Share of oscillating weights over training steps.", "training step", "oscillating (%)")
    means = [_oscillating(record) for record in records]
    for index, tensor in enumerate(_tensors(records[-1])):
        shares = [mean.get(tensor) for mean in means]
        figure.add_scatter(
            x=[record.step for record in records],
            y=[None if share is None else 100 * share for share in shares],
            name=label(tensor),
            mode="lines" if len(records) > 1 else "markers",
            line={"width": 1.5, "color": COLOURS[index % len(COLOURS)]},
            hovertemplate=f"{label(tensor)}, step %{{x}}: %{{y:.2f}} %<extra></extra>",
        )
    return with_room(figure) or figure


def spread_figure(run: Run, key: str) -> go.Figure:
    """Variation or outliers at the last epoch: layers across, a line of marks per kind of tensor."""
    last = _last(run)
    layers = layers_of(last.sites)
    short = layer_labels(layers)
    figure = new_figure(f"{key.capitalize()} of weights by layer.", "layer", NAMES[key])
    own = {locate(site): getattr(record, key) for site, record in last.sites.items()}
    for index, tensor in enumerate(_tensors(last)):
        points = [own.get(Place(layer, tensor)) for layer in layers]
        if any(point is not None for point in points):
            figure.add_scatter(
                x=short,
                y=points,
                name=label(tensor),
                mode="lines+markers",
                line={"width": 1, "color": COLOURS[index % len(COLOURS)]},
                hovertemplate=f"{label(tensor)}, layer %{{x}}: %{{y:.3g}}<extra></extra>",
            )
    figure.update_xaxes(type="category")
    return with_room(figure) or figure


def _last_table(names: Sequence[str], runs: Sequence[Run]) -> str:
    rows = []
    for name, run in zip(names, runs, strict=True):
        for site, own in _last(run).sites.items():
            place = locate(site)
            cells = ["" if value is None else f"{value:.3g}" for value in (own.variation, own.outliers)]
            share = "" if own.oscillating is None else percent(own.oscillating)
            where = f"{escape(place.layer)} {tensor_name(place.tensor)}".strip()
            rows.append([escape(name), where, share, *cells])
    header = ["run", "weight", "oscillating", *map(escape, NAMES.values())]
    return folded("All weights at the last epoch as a table", f'<div class="tall">{table(header, rows, text=2)}</div>')


def _last(run: Run) -> Diagnostics:
    return next(record for record in reversed(run.log.diagnostics) if record.sites)


def _tensors(record: Diagnostics) -> list[str]:
    """Kinds of tensors: those of layers in the order of the data flow, then first and last layers by their names."""
    inner = tensors_of(record.sites)
    return inner + [site for site in record.sites if not locate(site).layer]


def _oscillating(record: Diagnostics) -> dict[str, float]:
    """The mean share of oscillating weights by kind of tensor, as far as it was written."""
    pooled: dict[str, list[float]] = {}
    for site, own in record.sites.items():
        if own.oscillating is not None:
            pooled.setdefault(locate(site).tensor, []).append(own.oscillating)
    return {tensor: fmean(shares) for tensor, shares in pooled.items()}

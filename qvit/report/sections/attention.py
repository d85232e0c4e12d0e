"""Widths over attention heads: box plots of q, k, v and A, layer by layer (Figure 4 of the Q-ViT paper).

Where a group has several seeds, the boxes pool their heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go

from qvit.report.figures import BITS_AXIS, CATEGORIES, colour_of, label, marks, new_figure
from qvit.report.groups import Group
from qvit.report.markup import Canvas, escape, folded, grid, muted, select, table, variants
from qvit.report.sections.base import section
from qvit.report.sites import ATTENTION_PANELS, layer_labels
from qvit.report.widths import has_map, widths_by_layer

NOTE = (
    "Boxes span the quartiles over heads, the line inside is the median, whiskers reach the smallest and largest "
    "width that is no outlier, circles are outliers, × is the mean (as Figure 4 of the Q-ViT paper)."
)


@section("attention", "Attention: widths over heads", order=40)
def attention(groups: Sequence[Group], canvas: Canvas) -> str:
    """A panel per tensor, for one group at a time."""
    drawn = [(group, attention_figures(group)) for group in groups if any(map(has_map, group.runs))]
    drawn = [(group, panels) for group, panels in drawn if panels and panels.keys() == drawn[0][1].keys()]
    if not drawn:
        return ""
    names = {title: f"attention-{index}" for index, title in enumerate(drawn[0][1])}
    plots = [
        canvas.plot(name, [panels[title] for _, panels in drawn], heading=escape(title))
        for title, name in names.items()
    ]
    box = select("attention-group", "Runs", [group.label for group, _ in drawn], list(names.values()))
    notes = [_pooled_note(group) + _table(group) for group, _ in drawn]
    return box + grid(plots) + muted(NOTE) + variants("attention-group", notes)


def attention_figures(group: Group) -> dict[str, go.Figure]:
    """The four panels of the paper's Figure 4, for one group: title → box plots over heads, layer by layer."""
    figures = {}
    for tensor, title in ATTENTION_PANELS.items():
        widths = widths_by_layer(group.with_widths, tensor)
        if not widths:
            continue
        means = {layer: fmean(values) for layer, values in widths.items()}
        said = "; ".join(f"{layer} {mean:.1f}" for layer, mean in means.items())
        alt = f"Learned bits of {title} over the heads of each layer. Means: {said}."
        figure = new_figure(alt, "layer", "bits", height=280)
        rows = list(map(label, layer_labels(widths)))
        figure.add_box(
            x=[row for row, values in zip(rows, widths.values(), strict=True) for _ in values],
            y=[width for values in widths.values() for width in values],
            line={"color": colour_of(group), "width": 1.5},
            boxpoints="outliers",
            marker={"symbol": "circle-open", "size": 6},
            showlegend=False,
        )
        cross = {"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": colour_of(group)}}
        points = zip(rows, means.values(), strict=True)
        marks(figure, points, hover="layer %{x}: mean %{y:.2f} bits", marker=cross)
        figure.update_layout(xaxis=CATEGORIES, yaxis=BITS_AXIS)
        figures[title] = figure
    return figures


def _pooled_note(group: Group) -> str:
    runs = group.with_widths
    seeds = ", ".join("?" if run.seed is None else str(run.seed) for run in runs)
    return muted(f"The heads of {len(runs)} seeds ({escape(seeds)}) are pooled.") if len(runs) > 1 else ""


def _table(group: Group) -> str:
    columns = {tensor: widths_by_layer(group.with_widths, tensor) for tensor in ATTENTION_PANELS}
    layers = list(dict.fromkeys(layer for values in columns.values() for layer in values))
    rows = []
    for layer, row in zip(layers, layer_labels(layers), strict=True):
        found = [values.get(layer, []) for values in columns.values()]
        cells = [f"{fmean(bits):.2f} ({min(bits)} to {max(bits)})" if bits else "" for bits in found]
        rows.append([escape(row), *cells])
    header = ["layer", *(escape("A" if tensor == "probs" else tensor) for tensor in columns)]
    return folded("Means and ranges as a table", table(header, rows))

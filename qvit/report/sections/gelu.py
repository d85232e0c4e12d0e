"""The width of the GELU output by layer (Figure 5 of the Q-ViT paper).

Where a group has several seeds, a thin line per seed and a thick one for the mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

import plotly.graph_objects as go

from qvit.report.figures import BITS_AXIS, CATEGORIES, colour_of, label, level, line, new_figure, with_room
from qvit.report.groups import Group
from qvit.report.markup import Canvas, escape, folded, table
from qvit.report.runs import Run
from qvit.report.sections.base import section
from qvit.report.sites import GELU, layer_labels, natural_key
from qvit.report.widths import has_map, widths_by_layer

CAPTION = "The dashed line is the width of the uniform model with the same budget (as Figure 5 of the Q-ViT paper)."


@section("gelu", "GELU output: width by layer", order=50)
def gelu(groups: Sequence[Group], canvas: Canvas) -> str:
    """The figure, and a row per run."""
    shown = [group for group in groups if any(map(has_map, group.runs))]
    figure = gelu_figure(shown)
    if figure is None:
        return ""
    found = [(group.name_of(run), gelu_widths(run)) for group in shown for run in group.with_widths]
    layers = sorted({layer for _, widths in found for layer in widths}, key=natural_key)
    rows = [
        [escape(name), *(f"{widths[layer]:.3g}" if layer in widths else "" for layer in layers)]
        for name, widths in found
    ]
    header = ["run \\ layer", *map(escape, layer_labels(layers))]
    return canvas.plot("gelu", [figure], CAPTION) + folded("Widths as a table", table(header, rows))


def gelu_widths(run: Run) -> dict[str, float]:
    """Width of the GELU output by layer (the mean, should there be several)."""
    return {layer: fmean(widths) for layer, widths in widths_by_layer([run], GELU).items()}


def gelu_figure(groups: Sequence[Group]) -> go.Figure | None:
    """The paper's Figure 5: width of the GELU output by layer, and the uniform width of the same budget, dashed."""
    figure = new_figure("Learned bits of the GELU output by layer.", "layer", "bits")
    dashed: set[float] = set()
    for group in groups:
        drawn = [(run, widths) for run in group.with_widths if (widths := gelu_widths(run))]
        for run, widths in drawn:
            _line(figure, group, group.name_of(run), widths, main=len(drawn) == 1, width=1.2)
        if len(drawn) > 1:
            means = {layer: fmean(own[layer] for _, own in drawn if layer in own) for layer in drawn[0][1]}
            _line(figure, group, f"{group.label} (mean of {len(drawn)} seeds)", means, main=True, width=3.5)
        width = uniform_width(group.first) if drawn else None
        if width is not None and width not in dashed:
            dashed.add(width)
            level(figure, width, f" uniform {width:.3g}", position="right")
    figure.update_layout(margin={"r": 80}, xaxis=CATEGORIES, yaxis=BITS_AXIS)
    return with_room(figure)


def _line(figure: go.Figure, group: Group, name: str, widths: Mapping[str, float], *, main: bool, width: float) -> None:
    """A line through the layers; those that are not the group's main one are faint and stand in no legend."""
    points = zip(map(label, layer_labels(widths)), widths.values(), strict=True)
    style = {"opacity": 1 if main else 0.4, "marker": {"size": 8 if main else 5}, "mode": "lines+markers"}
    hover = f"{label(name)}<br>layer %{{x}}: %{{y:.3~g}} bits"
    of_group = {"legendgroup": str(group.index), "showlegend": main}
    line(figure, points, name, hover, colour_of(group), width=width, **style, **of_group)


def uniform_width(run: Run) -> float | None:
    """The width of the uniform model that costs as much as the run's budget.

    A budget such as `3bit` says it; for others it is interpolated between the uniform costs that the log gives. None
    if neither is known.
    """
    named = re.fullmatch(r"\s*(\d{1,2})\s*bits?\s*", run.budget or "", re.IGNORECASE)
    if named:
        return float(named.group(1))
    budget, known = run.log.budget_bit_operations, sorted(run.log.uniform_bit_operations.items())
    for (low, below), (high, above) in zip(known, known[1:], strict=False):
        if budget is not None and below <= budget <= above and above > below:
            return low + (high - low) * (budget - below) / (above - below)
    return None

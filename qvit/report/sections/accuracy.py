"""Accuracy against cost: a point per finished run, the mean and deviation per group, float as a line."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go

from qvit.report.figures import COST_NAMES, SYMBOLS, colour_of, label, level, marks, new_figure, with_room
from qvit.report.groups import Group, mean_std
from qvit.report.markup import Canvas, grid, log_axis, muted
from qvit.report.sections.base import section
from qvit.report.units import bops_text, bytes_text, titled, unit_for


@section("accuracy", "Accuracy against cost", order=20)
def accuracy(groups: Sequence[Group], canvas: Canvas) -> str:
    """Accuracy against bit operations and against weight bytes."""
    shown = _shown(groups)
    if not shown:
        return ""
    drawn = {
        f"accuracy-{kind}": (cost.replace("_", " ").capitalize(), accuracy_figure(groups, cost))
        for cost, (_, kind) in COST_NAMES.items()
    }
    plots = [canvas.plot(name, [figure], heading=heading) for name, (heading, figure) in drawn.items() if figure]
    note = "The dashed line is the float model."
    if len(shown) > 1:
        note = f"Marks of one method are joined. {note}"
    if any(len(group.finished) > 1 for group in groups):
        note = f"Large marks are means over seeds with their standard deviation, small marks single runs. {note}"
    return log_axis("logarithmic cost axis", list(drawn)) + grid(plots) + muted(note)


def _shown(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.accuracies and not group.is_float]


def accuracy_figure(groups: Sequence[Group], cost: str = "bit_operations") -> go.Figure | None:
    """Accuracy against a cost; None if no quantized run has finished.

    Args:
        groups: All groups.
        cost: `bit_operations` or `weight_bytes`.
    """
    shown = _shown(groups)
    if not shown:
        return None
    name, kind = COST_NAMES[cost]
    values = [getattr(result, cost) for group in shown for result in group.results]
    unit, size = unit_for(values, kind)
    alt = f"Accuracy against {name} of {len(values)} finished runs; the summary table has the numbers."
    figure = new_figure(alt, titled(name, unit), "accuracy (%)", height=400)
    methods = list(dict.fromkeys(group.first.method for group in shown))
    for group in shown:
        _points(figure, group, cost, size, SYMBOLS[methods.index(group.first.method) % len(SYMBOLS)])
    _join_means(figure, shown, cost, size)
    _float_lines(figure, groups, min(values) / size)
    if min(values) == max(values):
        figure.update_xaxes(range=[0.5 * values[0] / size, 1.5 * values[0] / size])
    return with_room(figure)


def _means(group: Group, cost: str, size: float) -> tuple[float, float, float]:
    """Mean cost in the unit, mean accuracy and its deviation."""
    mean, deviation = mean_std(group.accuracies)
    return fmean(getattr(result, cost) for result in group.results) / size, mean, deviation


def _points(figure: go.Figure, group: Group, cost: str, size: float, symbol: str) -> None:
    """The runs of a group, small, and their mean."""
    hover = [
        f"<b>{label(group.name_of(run))}</b><br>accuracy {result.accuracy:.2f} %<br>"
        f"{bops_text(result.bit_operations)} bit operations<br>{bytes_text(result.weight_bytes)} of weights"
        for run, result in zip(group.finished, group.results, strict=True)
    ]
    x, y, deviation = _means(group, cost, size)
    several, colour = len(hover) > 1, colour_of(group)
    of_group = {"hover": "%{text}", "legendgroup": str(group.index)}
    if several:
        small = {"size": 7, "color": colour, "opacity": 0.45, "symbol": symbol}
        costs = [getattr(result, cost) / size for result in group.results]
        points = list(zip(costs, group.accuracies, strict=True))
        marks(figure, points, marker=small, text=hover, **of_group)
        text = bops_text if cost == "bit_operations" else bytes_text
        hover = [
            f"<b>{label(group.label)}</b>, mean of {len(hover)} seeds<br>accuracy {y:.2f} ± {deviation:.2f} %"
            f"<br>{text(x * size)}"
        ]
    large = {"size": 13, "color": colour, "symbol": symbol, "line": {"width": 1, "color": "rgba(255,255,255,0.9)"}}
    spread = {"array": [deviation], "visible": several, "thickness": 1.5, "width": 6, "color": colour}
    marks(figure, [(x, y)], group.label, marker=large, error_y=spread, text=hover, **of_group)


def _join_means(figure: go.Figure, groups: Sequence[Group], cost: str, size: float) -> None:
    """A thin line through the means of one method, behind the points."""
    joined: dict[tuple[tuple[str, ...], str], list[tuple[float, float]]] = {}
    for group in groups:
        joined.setdefault((group.peers[:2], group.first.method), []).append(_means(group, cost, size)[:2])
    for points in joined.values():
        if len(points) > 1:
            thin = {"width": 1, "color": "rgba(128,128,128,0.55)"}
            marks(figure, sorted(points), mode="lines", line=thin, zorder=-1)


def _float_lines(figure: go.Figure, groups: Sequence[Group], x: float) -> None:
    """Float accuracy as a dashed line per model; an invisible point keeps it inside the axes."""
    references: dict[tuple[str, ...], tuple[list[float], list[float]]] = {}
    for group in groups:
        for result in group.results:
            own = result.accuracy if group.is_float else result.float_accuracy
            if own is not None:
                references.setdefault(group.peers[:2], ([], []))[group.is_float].append(own)
    lowest = min((accuracy for group in groups for accuracy in group.accuracies), default=0.0)
    for position, ((_, model), (said, measured)) in enumerate(references.items()):
        name = "float" if len(references) == 1 else f"float {model}"
        mean = fmean(measured or said)
        level(figure, mean, label(f"{name} {mean:.2f} %"), position="bottom right" if position % 2 else "top left")
        marks(figure, [(x, mean + 0.08 * abs(mean - lowest))], marker={"opacity": 0, "size": 1})

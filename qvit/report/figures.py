"""Plotly figures of results and of training; the figures of bit-widths are in `qvit.report.widths`.

Every function takes groups of runs (`qvit.report.tables.group_runs`) or one run, and returns a figure, or None if
there is nothing to draw. A figure has no title (the page has headings), carries a sentence for those who cannot see
it in `layout.meta["alt"]`, and the width below which it should scroll rather than shrink in
`layout.meta["min_width"]` (pixels). A group keeps its colour in all figures. Backgrounds are transparent and lines of
the grid grey, so that figures can stand on light and on dark ground.

Text from files is escaped (`label`), because plotly reads some HTML in labels. Curves are thinned to at most 500
points each.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from statistics import fmean
from typing import Any, TypeVar

import plotly.graph_objects as go

from qvit.report.runs import Run, Step
from qvit.report.sites import locate, tensors_of
from qvit.report.tables import Group, mean_std
from qvit.report.units import bops_text, bytes_text, percent, titled, unit_for

T = TypeVar("T")
COLOURS = (
    "#2f7fd1", "#e07b00", "#1a9a76", "#d1495b", "#8b68d6", "#7a8f1f", "#c44e9d", "#00a3b4", "#a8703a", "#7d8790",
    "#7cb3ea", "#f2b061", "#74c7ae", "#e8929e", "#bda6ec", "#b9c870",
)  # fmt: skip
GREY = "#808080"
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
MAX_POINTS = 500
COST_NAMES = {"bit_operations": ("bit operations", "bops"), "weight_bytes": ("weights", "bytes")}
# A product of two activations is counted at one of them.
PRODUCTS = {"k": "q·kᵀ", "v": "A·v"}


def label(text: str) -> str:
    """Text from a file as plotly text: special characters escaped, `W_q` with a true subscript."""
    return re.sub(r"^W_(\w+)$", r"W<sub>\1</sub>", html.escape(text, quote=False))


def colour_of(group: Group) -> str:
    """The colour of a group in all figures."""
    return GREY if group.is_float else COLOURS[group.index % len(COLOURS)]


def run_label(run: Run, group: Group) -> str:
    """A run's group and seed, escaped."""
    return label(group.label + ("" if run.seed is None else f" · seed {run.seed}"))


def new_figure(alt: str, x_title: str, y_title: str, *, height: int = 380, min_width: int = 0) -> go.Figure:
    """An empty figure in the style of the report."""
    axis = {"gridcolor": "rgba(128,128,128,0.22)", "zeroline": False, "linecolor": "rgba(128,128,128,0.6)"}
    axis |= {"ticks": "outside", "tickcolor": "rgba(128,128,128,0.6)", "automargin": True}
    figure = go.Figure(layout_template="none")
    figure.update_layout(
        height=height,
        margin={"l": 56, "r": 16, "t": 16, "b": 48},
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "xref": "container", "x": 0, "xanchor": "left"}
        | {"yref": "container", "y": 1, "yanchor": "top"},
        hoverlabel={"align": "left"},
        xaxis={**axis, "title": {"text": x_title, "standoff": 8}},
        yaxis={**axis, "title": {"text": y_title, "standoff": 8}},
        meta={"alt": alt, "min_width": min_width},
    )
    return figure


def with_room(figure: go.Figure) -> go.Figure | None:
    """The figure, higher if its legend takes many lines; None if it is empty."""
    if not figure.data:
        return None
    traces: Any = figure.data
    names = [trace.name for trace in traces if trace.name and trace.showlegend is not False]
    columns = max(1, 480 // (7 * max(map(len, names), default=0) + 45))
    figure.layout.height += 28 * max(0, -(-len(names) // columns) - 2)
    return figure


def thin(points: Sequence[T], limit: int = MAX_POINTS) -> list[T]:
    """At most `limit` of the points, evenly spaced, the first and the last always among them."""
    if len(points) <= limit:
        return list(points)
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def accuracy_figure(groups: Sequence[Group], cost: str = "bit_operations") -> go.Figure | None:
    """Accuracy against a cost: a point per finished run, the mean and deviation per group, float as a line.

    Args:
        groups: All groups.
        cost: `bit_operations` or `weight_bytes`.
    """
    shown = [group for group in groups if group.finished and not group.is_float]
    if not shown:
        return None
    name, kind = COST_NAMES[cost]
    values = [getattr(run.result, cost) for group in shown for run in group.finished]
    unit, size = unit_for(values, kind)
    figure = new_figure(
        f"Accuracy against {name} of {len(values)} finished runs; the summary table has the numbers.",
        titled(name, unit),
        "accuracy (%)",
        height=400,
    )
    methods = list(dict.fromkeys(group.first.method for group in shown))
    for group in shown:
        _accuracy_points(figure, group, cost, size, SYMBOLS[methods.index(group.first.method) % len(SYMBOLS)])
    _join_means(figure, shown, cost, size)
    _float_lines(figure, groups, min(values) / size)
    if min(values) == max(values):
        figure.update_xaxes(range=[0.5 * values[0] / size, 1.5 * values[0] / size])
    return with_room(figure)


def _means(group: Group, cost: str, size: float) -> tuple[float, float, float]:
    """Mean cost in the unit, mean accuracy and its deviation."""
    results = [run.result for run in group.finished if run.result is not None]
    accuracy, deviation = mean_std([result.accuracy for result in results])
    return fmean(getattr(result, cost) for result in results) / size, accuracy, deviation


def _accuracy_points(figure: go.Figure, group: Group, cost: str, size: float, symbol: str) -> None:
    text = bops_text if cost == "bit_operations" else bytes_text
    pairs = [(run, run.result) for run in group.finished if run.result is not None]
    hover = [
        f"<b>{run_label(run, group)}</b><br>accuracy {result.accuracy:.2f} %<br>"
        f"{bops_text(result.bit_operations)} bit operations<br>{bytes_text(result.weight_bytes)} of weights"
        for run, result in pairs
    ]
    x, y, deviation = _means(group, cost, size)
    several, colour = len(pairs) > 1, colour_of(group)
    if several:
        figure.add_scatter(
            x=[getattr(result, cost) / size for _, result in pairs],
            y=[result.accuracy for _, result in pairs],
            mode="markers",
            marker={"size": 7, "color": colour, "opacity": 0.45, "symbol": symbol},
            text=hover,
            hovertemplate="%{text}<extra></extra>",
            legendgroup=str(group.index),
            showlegend=False,
        )
        hover = [f"<b>{label(group.label)}</b>, mean of {len(pairs)} seeds<br>accuracy {y:.2f} ± {deviation:.2f} %"]
        hover[0] += f"<br>{text(x * size)}"
    figure.add_scatter(
        x=[x],
        y=[y],
        name=label(group.label),
        mode="markers",
        marker={"size": 13, "color": colour, "symbol": symbol, "line": {"width": 1, "color": "rgba(255,255,255,0.9)"}},
        error_y={"array": [deviation], "visible": several, "thickness": 1.5, "width": 6, "color": colour},
        text=hover,
        hovertemplate="%{text}<extra></extra>",
        legendgroup=str(group.index),
    )


def _join_means(figure: go.Figure, groups: Sequence[Group], cost: str, size: float) -> None:
    """A thin line through the means of one method, behind the points."""
    for key in dict.fromkeys((group.peers[:2], group.first.method) for group in groups):
        members = [group for group in groups if (group.peers[:2], group.first.method) == key]
        points = sorted(_means(group, cost, size)[:2] for group in members)
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            line = {"width": 1, "color": "rgba(128,128,128,0.55)"}
            figure.add_scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip", showlegend=False, zorder=-1)


def _float_lines(figure: go.Figure, groups: Sequence[Group], x: float) -> None:
    """Float accuracy as a dashed line per model; an invisible point keeps it inside the axes."""
    references: dict[tuple[str, ...], list[float]] = {}
    for group in groups:
        for run in group.finished:
            if run.result is not None:
                own = run.result.accuracy if group.is_float else run.result.float_accuracy
                if own is not None:
                    references.setdefault(group.peers[:2], []).append(own)
    for group in groups:
        if group.is_float and group.finished:
            references[group.peers[:2]] = [run.result.accuracy for run in group.finished if run.result is not None]
    lowest = min((run.result.accuracy for group in groups for run in group.finished if run.result), default=0.0)
    for position, ((_, model), values) in enumerate(references.items()):
        name = "float" if len(references) == 1 else f"float {model}"
        mean = fmean(values)
        room = 0.08 * abs(mean - lowest)
        figure.add_hline(
            y=mean,
            line={"dash": "dash", "width": 1.5, "color": GREY},
            annotation={"text": label(f"{name} {mean:.2f} %"), "font": {"size": 12}},
            annotation_position="bottom right" if position % 2 else "top left",
        )
        hidden = {"opacity": 0, "size": 1}
        figure.add_scatter(x=[x], y=[mean + room], mode="markers", marker=hidden, hoverinfo="skip", showlegend=False)


def bit_operations_figure(groups: Sequence[Group]) -> go.Figure | None:
    """Bit operations during training of the runs that learn widths, with their budgets and the freeze."""
    shown = [(group, run) for group in groups for run in group.runs if run.learned and run.log.steps]
    values = [step.bit_operations for _, run in shown for step in run.log.steps if step.bit_operations]
    if not values:
        return None
    unit, size = unit_for(values, "bops")
    alt = f"Bit operations over training steps of {len(shown)} runs, with the budget as a dashed line."
    figure = new_figure(alt, "training step", titled("bit operations", unit), height=400)
    seen: set[int] = set()
    for group, run in shown:
        steps = thin(run.log.steps)
        _curve(figure, group, run, steps, lambda step: _scaled(step.bit_operations, size), group.index not in seen)
        budget = run.log.budget_bit_operations
        if budget is not None and group.index not in seen:
            line = {"dash": "dash", "width": 1.5, "color": colour_of(group)}
            ends = [0, max(member.log.last_step for member in group.runs)]
            text = f"budget of {label(group.label)}: {bops_text(budget)}<extra></extra>"
            figure.add_scatter(
                x=ends, y=[budget / size] * 2, mode="lines", line=line, hovertemplate=text,
                legendgroup=str(group.index), showlegend=False,
            )  # fmt: skip
        seen.add(group.index)
        freeze = run.log.freeze
        if freeze is not None and freeze.bit_operations is not None:
            figure.add_scatter(
                x=[freeze.step],
                y=[freeze.bit_operations / size],
                mode="markers",
                marker={"symbol": "diamond", "size": 10, "color": colour_of(group), "line": {"width": 1}},
                hovertemplate=f"{run_label(run, group)}: frozen at step {freeze.step}, "
                f"{bops_text(freeze.bit_operations)}<extra></extra>",
                legendgroup=str(group.index),
                showlegend=False,
            )
    return with_room(figure)


def curve_figures(groups: Sequence[Group]) -> dict[str, go.Figure]:
    """Training loss, held-out accuracy and learning rate over training steps, as far as they were logged."""
    figures = {
        "Training loss": _curves(groups, "loss", lambda step: step.loss),
        "Accuracy on held-out training images": _held_out(groups),
        "Learning rate": _curves(groups, "learning rate", lambda step: step.learning_rate),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _scaled(value: float | None, size: float) -> float | None:
    return None if value is None else value / size


def _curve(
    figure: go.Figure, group: Group, run: Run, points: Sequence[T], value: Callable[[T], float | None], first: bool
) -> None:
    figure.add_scatter(
        x=[point.step for point in points],  # type: ignore[attr-defined]
        y=[value(point) for point in points],
        name=label(group.label),
        mode="lines" if len(points) > 1 else "markers",
        line={"width": 1.5, "color": colour_of(group)},
        opacity=0.8,
        legendgroup=str(group.index),
        showlegend=first,
        hovertemplate=f"{run_label(run, group)}<br>step %{{x}}: %{{y:.4~g}}<extra></extra>",
    )


def _curves(groups: Sequence[Group], name: str, value: Callable[[Step], float | None]) -> go.Figure | None:
    figure = new_figure(f"{name.capitalize()} over training steps.", "training step", name, height=340)
    figure.update_yaxes(exponentformat="power")
    for group in groups:
        runs = [run for run in group.runs if any(value(step) is not None for step in run.log.steps)]
        for position, run in enumerate(runs):
            _curve(figure, group, run, thin(run.log.steps), value, position == 0)
    return with_room(figure)


def _held_out(groups: Sequence[Group]) -> go.Figure | None:
    alt = "Accuracy on held-out training images over training steps."
    figure = new_figure(alt, "training step", "accuracy (%)", height=340)
    for group in groups:
        runs = [run for run in group.runs if any(epoch.accuracy is not None for epoch in run.log.epochs)]
        for position, run in enumerate(runs):
            measured = [epoch for epoch in run.log.epochs if epoch.accuracy is not None]
            _curve(figure, group, run, thin(measured), lambda epoch: epoch.accuracy, position == 0)
    return with_room(figure)


def costs_by_tensor(group: Group, cost: str) -> dict[str, float]:
    """Mean cost of a group by kind of tensor; first and last layers go by their modules.

    A product of two activations appears as `q·kᵀ` and `A·v`.
    """
    runs = [run.cost for run in group.runs if run.cost is not None]
    sites = dict.fromkeys(site.site for one in runs for site in one.sites)
    sums: dict[str, float] = dict.fromkeys(tensors_of(sites), 0.0)
    for one in runs:
        for site in one.sites:
            tensor = locate(site.site).tensor
            sums[tensor] = sums.get(tensor, 0.0) + getattr(site, cost) / len(runs)
    return {
        PRODUCTS.get(tensor, tensor.removesuffix(".weight").removesuffix(".proj")): value
        for tensor, value in sums.items()
        if value
    }


def cost_figure(groups: Sequence[Group], cost: str = "bit_operations") -> go.Figure | None:
    """A stacked bar per group that is not float: what each kind of tensor costs.

    Args:
        groups: All groups.
        cost: `bit_operations` or `weight_bytes`.
    """
    shown = [(group, costs_by_tensor(group, cost)) for group in groups if not group.is_float]
    shown = [(group, costs) for group, costs in shown if costs]
    if not shown:
        return None
    name, kind = COST_NAMES[cost]
    unit, size = unit_for([sum(costs.values()) for _, costs in shown], kind)
    title = titled(name, unit)
    figure = new_figure(f"{name.capitalize()} by kind of tensor, a stacked bar per group.", title, "")
    both = [costs_by_tensor(group, key) for key in COST_NAMES for group, _ in shown]
    colours = dict(zip(dict.fromkeys(tensor for costs in both for tensor in costs), cycle(COLOURS), strict=False))
    for tensor in dict.fromkeys(tensor for _, costs in shown for tensor in costs):
        figure.add_bar(
            x=[costs.get(tensor, 0.0) / size for _, costs in shown],
            y=[label(group.label) for group, _ in shown],
            name=label(tensor),
            orientation="h",
            marker={"color": colours[tensor], "line": {"width": 0.5, "color": "rgba(255,255,255,0.8)"}},
            text=[percent(costs.get(tensor, 0.0) / sum(costs.values())) for _, costs in shown],
            textposition="none",
            hovertemplate=f"{label(tensor)}: %{{x:.4~g}} {unit} (%{{text}})<extra>%{{y}}</extra>",
        )
    figure.update_layout(
        barmode="stack",
        height=190 + 44 * len(shown),
        legend={"traceorder": "normal", "entrywidth": 20 + 6 * max(map(len, colours))},
    )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return with_room(figure)

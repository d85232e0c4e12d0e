"""How figures are drawn: an empty plotly figure in the style of the report, and the traces that recur.

A figure has no title (the page has headings), carries a sentence for those who cannot see it in `layout.meta["alt"]`,
and the width below which it should scroll rather than shrink in `layout.meta["min_width"]` (pixels). Backgrounds are
transparent and grid lines grey, so that figures can stand on light and on dark ground. A group of runs keeps its colour
in all figures.

Text from files is escaped (`label`), because plotly reads some HTML in labels. Curves are thinned to at most 500
points each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import plotly.graph_objects as go

from qvit.report.groups import Group
from qvit.report.markup import label
from qvit.report.runs import Run

T = TypeVar("T")
COLOURS = (
    "#2f7fd1", "#e07b00", "#1a9a76", "#d1495b", "#8b68d6", "#7a8f1f", "#c44e9d", "#00a3b4", "#a8703a", "#7d8790",
    "#7cb3ea", "#f2b061", "#74c7ae", "#e8929e", "#bda6ec", "#b9c870",
)  # fmt: skip
GREY = "#808080"
DASHED = {"dash": "dash", "width": 1.5, "color": GREY}
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
MAX_POINTS = 500
#: Costs that the report knows, as text and as units of `qvit.report.units`.
COST_NAMES = {"bit_operations": ("bit operations", "bops"), "weight_bytes": ("weights", "bytes")}
#: Axes: names in their order, and bit-widths.
CATEGORIES = {"type": "category", "showgrid": False}
BITS_AXIS = {"dtick": 1, "range": [1.6, 8.4]}
_AXIS = {
    "gridcolor": "rgba(128,128,128,0.22)",
    "linecolor": "rgba(128,128,128,0.6)",
    "tickcolor": "rgba(128,128,128,0.6)",
    "ticks": "outside",
    "zeroline": False,
    "automargin": True,
}
_LAYOUT = {
    "margin": {"l": 56, "r": 16, "t": 16, "b": 48},
    "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "legend": {"orientation": "h", "x": 0, "xref": "container", "xanchor": "left"}
    | {"y": 1, "yref": "container", "yanchor": "top"},
    "hoverlabel": {"align": "left"},
}


def colour_of(group: Group) -> str:
    """The colour of a group in all figures."""
    return GREY if group.is_float else COLOURS[group.index % len(COLOURS)]


def new_figure(alt: str, x_title: str, y_title: str, *, height: int = 380, min_width: int = 0) -> go.Figure:
    """An empty figure in the style of the report."""
    figure = go.Figure(layout_template="none")
    x_axis, y_axis = ({**_AXIS, "title": {"text": title, "standoff": 8}} for title in (x_title, y_title))
    meta = {"alt": alt, "min_width": min_width}
    figure.update_layout(**_LAYOUT, height=height, xaxis=x_axis, yaxis=y_axis, meta=meta)
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


def marks(figure: go.Figure, points: Iterable[tuple[Any, Any]], name: str = "", hover: str = "", **trace: Any) -> None:
    """Adds marks.

    Args:
        figure: Where to.
        points: Pairs (x, y).
        name: Its name in the legend, as text; without one it stands in no legend.
        hover: What a point says, in plotly's format; without it, nothing.
        trace: Further properties of the trace, such as another `mode` (lines, text).
    """
    pairs = list(points)
    named = {"name": label(name)} if name else {"showlegend": False}
    said = {"hovertemplate": f"{hover}<extra></extra>"} if hover else {"hoverinfo": "skip"}
    trace = {"mode": "markers"} | named | said | trace
    figure.add_scatter(x=[x for x, _ in pairs], y=[y for _, y in pairs], **trace)


def line(
    figure: go.Figure, points: Iterable[tuple[Any, Any]], name: str, hover: str, colour: str, *,
    width: float = 1.5, dash: str = "solid", **trace: Any,
) -> None:  # fmt: skip
    """Adds a line through points, thinned, or a mark if there is one point; see `marks`."""
    shown = thin(list(points))
    style = {"width": width, "dash": dash, "color": colour}
    marks(figure, shown, name, hover, **{"mode": "lines" if len(shown) > 1 else "markers", "line": style} | trace)


def run_line(
    figure: go.Figure, group: Group, run: Run, points: Iterable[tuple[int, float | None]], *, first: bool
) -> None:
    """Adds what one run of a group has logged over its steps; the `first` stands for the group in the legend."""
    hover = f"{label(group.name_of(run))}<br>step %{{x}}: %{{y:.4~g}}"
    own = {"opacity": 0.8, "legendgroup": str(group.index), "showlegend": first}
    line(figure, points, group.label, hover, colour_of(group), **own)


def level(figure: go.Figure, y: float, text: str = "", *, position: str = "top left") -> None:
    """Adds a dashed line across the figure, with a text in plotly's format beside it."""
    figure.add_hline(y=y, line=DASHED, annotation={"text": text, "font": {"size": 12}}, annotation_position=position)

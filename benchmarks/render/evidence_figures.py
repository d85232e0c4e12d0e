"""Figures of evidence_*.json: accuracy against costs, what ablations change, and learned widths.

A row keeps its colour and its marker in all figures of a set. Points whose costs are equal but for 3 % would hide each
other, so they are drawn side by side; the costs they have stand in the text that appears under the pointer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import plotly.graph_objects as go
from evidence_data import (
    ABLATIONS,
    KINDS,
    OF_HEADS,
    Row,
    figure_names,
    floats_of,
    learned,
    paired,
    reference_of,
    rows_of,
)
from rendering import Data, figures_of

from qvit.report.figures import COLOURS, COST_NAMES, DASHED, GREY, SYMBOLS, label, line, marks, new_figure
from qvit.report.units import bops_text, bytes_text, difference, significant, titled, unit_for

#: Costs are equal if they differ by less than this factor; from this range on an axis is logarithmic.
EQUAL, LOGARITHMIC = 1.03, 3.0
#: Rows below this share of the best accuracy at their budget have an axis of their own, below the other: a broken axis.
FAR = 0.85


@figures_of("evidence_*.json")
def evidence_figures(data: Data) -> dict[str, go.Figure]:
    makers = {
        "bit-operations": lambda: _frontier(data, "bit_operations"),
        "weight-bytes": lambda: _frontier(data, "weight_bytes"),
        **{figure: partial(_ablations, data, part, full) for part, (figure, full) in ABLATIONS.items()},
        "widths": lambda: _widths(data),
        "heads": lambda: _heads(data),
    }
    return {name: makers[kind]() for kind, name in figure_names(data).items()}


def _frontier(data: Data, cost: str) -> go.Figure:
    """Accuracy against a cost: a colour and marker per row, a point per budget, float dashed."""
    rows = [row for row in data["rows"] if row["part"] not in (*ABLATIONS, "scales", "widths alone")]
    title, kind = COST_NAMES[cost]
    unit, size = unit_for([row[cost] for row in rows], kind)
    places = _side_by_side([row[cost] / size for row in rows])
    curves: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for x, row in zip(places, rows, strict=True):
        curves.setdefault((row["part"], row["row"]), []).append((x, row))
    alt = f"Accuracy against {title} of {len(rows)} rows on {data['set']}; the tables below have the numbers."
    height = 440 + 12 * len(curves)
    figure = new_figure(alt, titled(title, unit), "top-1 accuracy (%)", height=height, min_width=560)
    limits = min(places) / 1.1, max(places) * 1.1
    _cost_axis(figure, rows, cost, size, limits)
    of_float = statistics.mean(floats_of(data).values())
    far = _far_below(rows)
    _accuracy_axes(figure, [row for row in rows if row not in far], far, of_float)
    names = [name for _, name in curves]
    for index, ((part, name), own) in enumerate(curves.items()):
        shown = name if names.count(name) == 1 else f"{name} ({part})"
        for panel, high in (("y", True), ("y2", False)):
            points = sorted((x, row["budget"], row) for x, row in own if (row not in far) is high)
            if points:
                first = high or all(row in far for _, row in own)
                _curve(figure, [(x, row) for x, _, row in points], shown, index, panel, in_legend=first)
    ends = [(x, of_float) for x in limits]
    marks(figure, ends, f"float {of_float:.2f} %", mode="lines", line=DASHED, zorder=-1, hoverinfo=None)
    return figure


def _curve(
    figure: go.Figure, points: list[tuple[float, Row]], name: str, index: int, panel: str, *, in_legend: bool
) -> None:
    colour = COLOURS[index % len(COLOURS)]
    line(
        figure,
        [(x, row["accuracy_mean"]) for x, row in points],
        name,
        "%{text}",
        _faint(colour),
        width=1,
        yaxis=panel,
        legendgroup=str(index),
        showlegend=in_legend,
        mode="lines+markers",
        marker={"size": 10, "color": colour, "symbol": SYMBOLS[index % len(SYMBOLS)]},
        error_y={"array": [row["accuracy_std"] for _, row in points], "thickness": 1.2, "width": 4, "color": colour},
        text=[_hover(row) for _, row in points],
    )


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.35)"


def _hover(row: Row) -> str:
    lines = [f"<b>{label(row['row'])}</b>, {label(row['budget'])}"]
    lines += [f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f} %"]
    lines += [f"{bops_text(row['bit_operations'])} bit operations", f"{bytes_text(row['weight_bytes'])} of weights"]
    return "<br>".join(lines)


def _groups(values: Sequence[float]) -> list[list[int]]:
    """Indices of values that are equal but for `EQUAL`, from the least on."""
    found: list[list[int]] = []
    for index in sorted(range(len(values)), key=lambda i: values[i]):
        if found and values[index] <= EQUAL * values[found[-1][0]]:
            found[-1].append(index)
        else:
            found.append([index])
    return [sorted(group) for group in found]


def _side_by_side(values: Sequence[float]) -> list[float]:
    """The values, those of a group moved apart: by a factor, in the order they were given."""
    groups = _groups(values)
    centres = [math.log(statistics.median(values[i] for i in group)) for group in groups]
    moved = [float(value) for value in values]
    for group, centre in zip(groups, centres, strict=True):
        gap = min((abs(centre - other) for other in centres if other != centre), default=0.4)
        step = min(0.8 * gap / len(group), 0.04)
        for position, index in enumerate(group):
            if len(group) > 1:
                moved[index] = math.exp(centre + step * (position - (len(group) - 1) / 2))
    return moved


def _cost_axis(figure: go.Figure, rows: list[Row], cost: str, size: float, limits: tuple[float, float]) -> None:
    """Ticks at the costs of the budgets, logarithmic where the range is wide."""
    values = [row[cost] / size for row in rows]
    wide = max(values) / min(values) >= LOGARITHMIC
    ticks = {row["budget"]: row[cost] / size for row in rows if row["row"] == "lsq+"}
    for row in rows:
        ticks.setdefault(row["budget"], row[cost] / size)
    figure.update_xaxes(
        type="log" if wide else "linear",
        range=[math.log10(end) if wide else end for end in limits],
        tickvals=list(ticks.values()),
        ticktext=[f"{significant(value, 3)}<br>{label(budget)}" for budget, value in ticks.items()],
        tickangle=0,
    )


def _far_below(rows: list[Row]) -> list[Row]:
    """The rows whose accuracy is far below the best one at their budget."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["budget"]] = max(best.get(row["budget"], 0.0), row["accuracy_mean"])
    return [row for row in rows if row["accuracy_mean"] < FAR * best[row["budget"]]]


def _accuracy_axes(figure: go.Figure, rows: list[Row], far: list[Row], of_float: float) -> None:
    """One axis, or two, the lower one for rows that are far below the others."""
    figure.update_yaxes(range=_limits(rows, of_float))
    if far:
        layout: Any = figure.layout
        axis = layout.yaxis.to_plotly_json() | {"range": _limits(far), "domain": [0.0, 0.27], "title": {}}
        figure.update_layout(yaxis2=axis | {"nticks": 4}, yaxis={"domain": [0.33, 1.0]}, xaxis={"anchor": "y2"})


def _limits(rows: list[Row], *others: float) -> list[float]:
    """Limits of an axis with room around means and their deviations."""
    ends = [row["accuracy_mean"] + sign * row["accuracy_std"] for row in rows for sign in (-1, 1)] + list(others)
    room = 0.08 * (max(ends) - min(ends)) or 1.0
    return [min(ends) - room, max(ends) + room]


def _ablations(data: Data, part: str, full: str) -> go.Figure:
    """What each ablation changes, with the deviation over seeds."""
    known = [(row, paired(row, reference_of(row, data, full))) for row in rows_of(data, part)]
    found = [(row, gain) for row, gain in known if gain is not None]
    alt = f"Difference of {len(found)} ablations to {full} on {data['set']}; the table above has the numbers."
    title = f"less {full}, {found[0][0]['budget']} (points)"
    figure = new_figure(alt, title, "", height=110 + 38 * len(found), min_width=520)
    marks(
        figure, [(gain[0], label(row["row"])) for row, gain in found], hover="%{y}: %{text}",
        marker={"size": 10, "color": COLOURS[0]},
        error_x={"array": [gain[1] for _, gain in found], "thickness": 1.5, "width": 5},
        text=[f"{difference(gain[0])} ± {gain[1]:.2f}" for _, gain in found],
    )  # fmt: skip
    figure.add_vline(x=0, line=DASHED)
    figure.update_yaxes(autorange="reversed")
    return figure


def _widths(data: Data) -> go.Figure:
    """Bits that `qvit` gave each kind of tensor more than `lsq+` has at the budget."""
    alt = f"Learned widths by kind of tensor less the uniform width on {data['set']}; the table above has the numbers."
    figure = new_figure(alt, "", "bits more than lsq+", height=380, min_width=640)
    for index, row in enumerate(learned(data)):
        uniform = reference_of(row, data, "lsq+")
        if uniform is None:
            continue
        kinds = [kind for kind in KINDS if kind in row["mean_widths"]]
        own = [row["mean_widths"][kind] for kind in kinds]
        figure.add_bar(
            x=[KINDS[kind] for kind in kinds],
            y=[width - uniform["mean_widths"][kind] for kind, width in zip(kinds, own, strict=True)],
            name=label(row["budget"]),
            marker={"color": COLOURS[index % len(COLOURS)]},
            text=[f"{width:.2f} bits" for width in own],
            textposition="none",
            hovertemplate=f"%{{x}}, {label(row['budget'])}: %{{text}}<extra></extra>",
        )
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(tickangle=-40, showgrid=False)
    figure.update_yaxes(zeroline=True, zerolinecolor=GREY)
    return figure


def _heads(data: Data) -> go.Figure:
    """Learned widths of single heads: a box per kind of tensor and budget, as in the paper's Figure 4."""
    rows = [row for row in learned(data) if "width_counts" in row]
    alt = f"Distribution of the widths of single heads by kind of tensor on {data['set']}, learned by qvit."
    figure = new_figure(alt, "", "bits", height=380, min_width=640)
    for index, row in enumerate(rows):
        kinds = [kind for kind in OF_HEADS if kind in row["width_counts"]]
        pairs = [
            (KINDS[kind], int(width), count) for kind in kinds for width, count in row["width_counts"][kind].items()
        ]
        figure.add_box(
            x=[kind for kind, _, count in pairs for _ in range(count)],
            y=[width for _, width, count in pairs for _ in range(count)],
            name=label(row["budget"]),
            boxmean=True,
            marker={"color": COLOURS[index % len(COLOURS)], "size": 4},
            line={"width": 1.5},
            hoverinfo="y",
        )
    figure.update_layout(boxmode="group")
    figure.update_yaxes(dtick=1, zeroline=False)
    return figure

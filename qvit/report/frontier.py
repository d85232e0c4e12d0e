"""The page of a Pareto frontier: move along it, and see the widths, the predicted loss and the costs of every point.

It draws the plain data of `qvit allocate --frontier`: format "qvit-frontier" with `points` (cost ascending, each with
predicted_loss, bit_operations, weight_bytes and widths by site), and plans to mark (`chosen`, `uniform`). Where data
compare predictions with measurements (`agreement`), a figure shows both. The map is drawn once; a script puts other
numbers into its cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from qvit.errors import UsageError
from qvit.plan.cost import FLOAT_BITS
from qvit.report.figures import COLOURS, COST_NAMES, DASHED, GREY, label, marks, new_figure
from qvit.report.markup import Canvas, escape, facts, folded, lead, muted, table, table_of
from qvit.report.shell import COSTS_NOTE, document, write_html
from qvit.report.sites import locate
from qvit.report.units import bops_text, bytes_text, fixed, significant, titled, unit_for
from qvit.report.widths import cell_names, draw_maps, map_of

FORMAT, VERSION = "qvit-frontier", 1
LOG_AXIS: dict[str, Any] = {"type": "log", "exponentformat": "power"}


def write_frontier_page(report: Mapping[str, Any], out: str | Path, *, title: str | None = None) -> Path:
    """Writes the page of a frontier.

    Args:
        report: Its plain data.
        out: The HTML file; its folder is created. It appears at once or not at all.
        title: Heading; made from the model if not given.

    Raises:
        UsageError: If the data are not a frontier.
        QvitError: If the file cannot be written.
    """
    return write_html(render_frontier(report, title=title), out)


def render_frontier(report: Mapping[str, Any], *, title: str | None = None) -> str:
    """The page as text; see `write_frontier_page`."""
    if report.get("format") != FORMAT or report.get("version") != VERSION or not report.get("points"):
        raise UsageError(f'not a frontier: it is an object with "format": "{FORMAT}", version {VERSION} and points')
    canvas = Canvas()
    start = _start(report)
    heading = title or f"Bit-width frontier: {report['model']}"
    parts = [
        ("frontier", "Predicted loss against cost", _frontier_section(report, canvas, start)),
        ("agreement", "Predicted against measured", _agreement_section(report.get("agreement"), canvas)),
        ("points", "All points", _table_section(report)),
    ]
    return document(
        heading, _header(report), parts, canvas, skip="Skip to the frontier", footer=COSTS_NOTE,
        data=_data(report), script="frontier.js",
    )  # fmt: skip


def _start(report: Mapping[str, Any]) -> int:
    """The point that is shown first: the dearest within the first chosen plan's cost, else the one in the middle."""
    points, chosen = report["points"], report.get("chosen") or []
    if not chosen:
        return len(points) // 2
    within = [index for index, point in enumerate(points) if point["cost"] <= chosen[0]["cost"]]
    return within[-1] if within else 0


def _cost_text(report: Mapping[str, Any], cost: float) -> str:
    if report["unit"] == "bit_operations":
        return f"{bops_text(cost)} bit operations"
    return f"{bytes_text(cost)} of weights" if report["unit"] == "weight_bytes" else f"{significant(cost)} ms"


def _axis(report: Mapping[str, Any]) -> tuple[str, float]:
    """Title of the cost axis, and the size of its unit."""
    if report["unit"] == "milliseconds":
        return "milliseconds", 1.0
    name, kind = COST_NAMES[report["unit"]]
    unit, size = unit_for([point["cost"] for point in report["points"]], kind)
    return titled(name, unit), size


def _header(report: Mapping[str, Any]) -> str:
    points = report["points"]
    normalised = ", each kind of tensor normalised to one mean" if report.get("type_normalised") else ""
    proven = (
        "each the best plan of all at its price of cost"
        if report.get("exact")
        else "each a good plan at its price of cost (ties close circles, so no proof)"
    )
    found = {
        "Model": report["model"],
        "Sensitivity": f"{report['metric']} on {report['images']} images, seed {report['seed']}{normalised}",
        "Frontier": f"{len(points)} plans, {proven}",
        "Range": f"{_cost_text(report, points[0]['cost'])} to {_cost_text(report, points[-1]['cost'])}",
    }
    return lead((_sentence(report, plan) for plan in report.get("chosen") or []), found)


def _sentence(report: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """What a budget costs, beside the uniform plan of the same name."""
    same = next((p for p in report.get("uniform") or [] if p["name"].replace(" ", "") == plan["name"]), None)
    beside = f", uniform {same['name']}s {significant(same['predicted_loss'], 3)}" if same else ""
    return (
        f"Budget {plan['name']}: predicted loss increase {significant(plan['predicted_loss'], 3)}{beside}, "
        f"{bops_text(plan['bit_operations'])} bit operations, {bytes_text(plan['weight_bytes'])} of weights."
    )


def _frontier_section(report: Mapping[str, Any], canvas: Canvas, start: int) -> str:
    """The slider, the facts that the script fills, the frontier, and the map of the chosen point."""
    last = len(report["points"]) - 1
    names = {"Predicted loss increase": "loss", "Bit operations": "bops", "Weights": "bytes", "Mean width": "bits"}
    if report["unit"] == "milliseconds":
        names = {"Cost": "cost"} | names
    live = facts({text: f'<span data-fact="{name}"></span>' for text, name in names.items()}, kind="facts live")
    control = (
        '<div class="controls slider"><button type="button" id="less" aria-label="one point cheaper">−</button>'
        f'<label for="point">Point <span data-fact="number"></span></label>'
        f'<input type="range" id="point" min="0" max="{last}" value="{start}" autocomplete="off">'
        '<button type="button" id="more" aria-label="one point dearer">+</button></div>'
    )
    caption = (
        "The line joins plans that no mixture of others beats. The prediction adds up single sites: it says which plan "
        "is better, not what the model will lose. Click a point, or move the slider."
    )
    plot = canvas.plot("frontier", [_frontier_figure(report, start)], caption)
    figure = map_of(report["points"][start]["widths"], "the chosen point")
    if figure is None:
        return control + live + plot
    outside = muted('First and last layer: <span data-fact="outside"></span>.')
    return f"{control}{live}{plot}<h3>Widths at this point</h3>{draw_maps(canvas, [figure])}{outside}"


def _frontier_figure(report: Mapping[str, Any], start: int) -> go.Figure:
    title, size = _axis(report)
    points = report["points"]
    alt = f"Predicted loss increase against {title} of {len(points)} plans; the table at the end has the numbers."
    figure = new_figure(alt, title, "predicted loss increase", height=420)
    figure.update_yaxes(**LOG_AXIS, dtick="D2")

    def places(plans: Sequence[Mapping[str, Any]]) -> list[tuple[float, float | None]]:
        return [(plan["cost"] / size, _positive(plan["predicted_loss"])) for plan in plans]

    hover = "%{text}<br>predicted loss %{y:.3~g}"
    costs = [_cost_text(report, point["cost"]) for point in points]
    style = {"mode": "lines+markers", "line": {"width": 2, "color": COLOURS[0]}, "marker": {"size": 6}}
    marks(figure, places(points), "frontier", hover, text=costs, meta="points", **style)
    for key, name, marker, mode in (
        ("uniform", "uniform widths", {"size": 9, "color": GREY, "symbol": "square"}, "markers+text"),
        ("chosen", "plans within budgets", {"size": 14, "color": COLOURS[1], "symbol": "star"}, "markers"),
    ):
        if plans := report.get(key) or []:
            texts = {"text": [label(plan["name"]) for plan in plans], "textposition": "top right"}
            style = {"mode": mode, "marker": marker, "textfont": {"size": 11}, "cliponaxis": False}
            marks(figure, places(plans), name, hover, **texts, **style)
    ring = {"size": 16, "color": "rgba(0,0,0,0)", "line": {"width": 3, "color": COLOURS[3]}}
    marks(figure, places([points[start]]), "this point", meta="selected", marker=ring)
    return figure


def _positive(value: float) -> float | None:
    """A value that a logarithmic axis can show."""
    return value if value > 0 else None


def _agreement_section(agreement: Mapping[str, Any] | None, canvas: Canvas) -> str:
    if not agreement:
        return ""
    rows = [row for row in agreement["rows"] if row[3] > 0 and row[4] > 0]
    ratios = agreement["median_ratio_by_width"]
    cells = [
        [f"{width} bits", fixed(value, 3), significant(ratios[width], 3)]
        for width, value in agreement["spearman_by_width"].items()
    ]
    note = (
        f"<p>Each mark is one head of one tensor, quantized alone, at one width: {len(rows)} marks, measured on "
        f"{agreement['measured_images']} images. Spearman's rank correlation of all is "
        f"<strong>{agreement['spearman']:.3f}</strong>.</p>"
    )
    plot = canvas.plot("agreement", [_agreement_figure(agreement, rows)])
    return note + plot + table(["", "rank correlation", "median of predicted / measured"], cells)


def _agreement_figure(agreement: Mapping[str, Any], rows: Sequence[Any]) -> go.Figure:
    """Rows (site, head, width, predicted, measured) as marks, a colour per width."""
    alt = f"Predicted against measured loss increase of {len(rows)} single sites; Spearman {agreement['spearman']:.3f}."
    titles = (f"measured ({agreement['measured']})", f"predicted ({agreement['predicted']})")
    figure = new_figure(alt, *titles, height=440)
    figure.update_layout(xaxis={**LOG_AXIS, "dtick": 1}, yaxis={**LOG_AXIS, "dtick": 1})
    ends = [pick(pick(row[3:]) for row in rows) for pick in (min, max)]
    marks(figure, zip(ends, ends, strict=True), name="equal", mode="lines", line=DASHED | {"width": 1})
    for position, width in enumerate(sorted({row[2] for row in rows})):
        own = [row for row in rows if row[2] == width]
        marks(
            figure, [(row[4], row[3]) for row in own], f"{width} bits",
            hover="%{text}<br>measured %{x:.3~g}, predicted %{y:.3~g}",
            marker={"size": 6, "opacity": 0.75, "color": COLOURS[position % len(COLOURS)]},
            text=[f"{label(row[0])}, head {row[1]}" for row in own],
        )  # fmt: skip
    return figure


def _table_section(report: Mapping[str, Any]) -> str:
    columns: dict[str, Callable[[Any], str]] = {
        "plan": lambda row: escape(row[0]),
        "predicted loss increase": lambda row: significant(row[1]["predicted_loss"]),
        "bit operations": lambda row: bops_text(row[1]["bit_operations"]),
        "weights": lambda row: bytes_text(row[1]["weight_bytes"]),
    }
    if report["unit"] == "milliseconds":
        columns["time"] = lambda row: _cost_text(report, row[1]["cost"])
    marked = [(f"uniform {plan['name']}", plan) for plan in report.get("uniform") or []]
    marked += [(f"budget {plan['name']}", plan) for plan in report.get("chosen") or []]
    numbered = folded(
        f"{len(report['points'])} points of the frontier", table_of(columns, enumerate(report["points"], 1))
    )
    return (table_of(columns, marked) if marked else "") + numbered


def _data(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the script needs: of every point its texts, its place, and its widths in the order of the cells."""
    _, size = _axis(report)
    points = report["points"]
    inner = {site: widths for site, widths in points[0]["widths"].items() if locate(site).layer}
    states = []
    for number, point in enumerate(points, 1):
        widths = point["widths"]
        quantized = [width for own in widths.values() for width in own if width != FLOAT_BITS]
        outside = [f"{site} {', '.join(map(str, own))}" for site, own in widths.items() if site not in inner]
        texts = {
            "number": f"{number} of {len(points)}",
            "cost": _cost_text(report, point["cost"]),
            "loss": significant(point["predicted_loss"]),
            "bops": bops_text(point["bit_operations"]),
            "bytes": bytes_text(point["weight_bytes"]),
            "bits": f"{sum(quantized) / max(1, len(quantized)):.2f} bits over all tensors and heads",
            "outside": "; ".join(outside) or "none",
        }
        flat = [width for site in inner for width in widths[site]]
        place = {"x": point["cost"] / size, "y": _positive(point["predicted_loss"])}
        states.append({**place, "texts": texts, "widths": flat})
    cells = [cell for site, widths in inner.items() for cell in cell_names(site, widths)]
    return {"states": states, "cells": cells}

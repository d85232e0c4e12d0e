"""The page of a Pareto frontier: move along it, and see the widths, the predicted loss and the costs of every point.

It draws the plain data of `qvit allocate --frontier`: format "qvit-frontier" with `points` (cost ascending, each with
predicted_loss, bit_operations, weight_bytes and widths by site), and plans to mark (`chosen`, `uniform`). Where data
compare predictions with measurements (`agreement`), a figure shows both. The map is drawn once; a script puts other
numbers into its cells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from qvit.errors import UsageError
from qvit.files import write_atomically
from qvit.report.figures import COLOURS, GREY, label, new_figure
from qvit.report.markup import Canvas, embedded, escape, folded, table
from qvit.report.shell import COSTS_NOTE, document
from qvit.report.sites import locate
from qvit.report.units import bops_text, bytes_text, significant, titled, unit_for
from qvit.report.widths import DARK_ABOVE, WIDTH_COLOURS, map_of

FORMAT, VERSION = "qvit-frontier", 1
FLOAT_BITS = 32
SCRIPT = """
(() => {
  "use strict";
  const { states, cells, low, high, dark } = JSON.parse(document.getElementById("data").textContent);
  const { figures, draw } = window.report;
  const slider = document.getElementById("point");
  const index = new Map(cells.map((cell, position) => [cell, position]));

  function fillMap(widths) {
    if (!figures.map) return;
    const data = figures.map[0].data;
    const numbers = [{ x: [], y: [], text: [] }, { x: [], y: [], text: [] }];
    for (const trace of data.filter((one) => one.type === "heatmap")) {
      trace.customdata.forEach((row, y) => row.forEach((cell, x) => {
        if (!index.has(cell)) return;
        const width = widths[index.get(cell)];
        trace.z[y][x] = Math.min(Math.max(width, low), high);
        trace.text[y][x] = String(width);
        const own = numbers[width > dark ? 1 : 0];
        own.x.push(trace.x[x]); own.y.push(trace.y[y]); own.text.push(String(width));
      }));
    }
    data.filter((one) => one.meta === "numbers").forEach((trace, position) => Object.assign(trace, numbers[position]));
    draw("map");
  }

  function show() {
    const state = states[Number(slider.value)];
    for (const [name, text] of Object.entries(state.texts)) {
      for (const place of document.querySelectorAll(`[data-fact="${name}"]`)) place.textContent = text;
    }
    slider.setAttribute("aria-valuetext", `${state.texts.cost}, predicted loss increase ${state.texts.loss}`);
    const selected = figures.frontier[0].data.find((trace) => trace.meta === "selected");
    selected.x = [state.x];
    selected.y = [state.y];
    draw("frontier");
    fillMap(state.widths);
  }

  slider.addEventListener("input", show);
  const step = (change) => {
    slider.value = Number(slider.value) + change;
    show();
  };
  document.getElementById("less").addEventListener("click", () => step(-1));
  document.getElementById("more").addEventListener("click", () => step(1));
  const plot = document.getElementById("plot-frontier");
  const listen = () => plot.on ? plot.on("plotly_click", (event) => {
    const point = event.points[0];
    if (point.data.meta !== "points") return;
    slider.value = point.pointNumber;
    show();
  }) : setTimeout(listen, 50);
  listen();
  show();
})();
"""


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
    page = render_frontier(report, title=title).encode("utf-8", errors="replace")
    write_atomically(Path(out), lambda file: file.write(page))
    return Path(out)


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
        data=_data(report), script=SCRIPT,
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
    name, kind = ("bit operations", "bops") if report["unit"] == "bit_operations" else ("weights", "bytes")
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
    facts = {
        "Model": report["model"],
        "Sensitivity": f"{report['metric']} on {report['images']} images, seed {report['seed']}{normalised}",
        "Frontier": f"{len(points)} plans, {proven}",
        "Range": f"{_cost_text(report, points[0]['cost'])} to {_cost_text(report, points[-1]['cost'])}",
    }
    lines = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    said = ""
    for plan in report.get("chosen") or []:
        same = next((p for p in report.get("uniform") or [] if p["name"].replace(" ", "") == plan["name"]), None)
        beside = f", uniform {escape(same['name'])}s {significant(same['predicted_loss'], 3)}" if same else ""
        said += (
            f"<p>Budget {escape(plan['name'])}: predicted loss increase {significant(plan['predicted_loss'], 3)}"
            f"{beside}, {bops_text(plan['bit_operations'])} bit operations, "
            f"{bytes_text(plan['weight_bytes'])} of weights.</p>"
        )
    return (f'<div class="verdict">{said}</div>' if said else "") + f'<dl class="facts">{lines}</dl>'


def _frontier_section(report: Mapping[str, Any], canvas: Canvas, start: int) -> str:
    last = len(report["points"]) - 1
    facts = {
        "cost": "Cost",
        "loss": "Predicted loss increase",
        "bops": "Bit operations",
        "bytes": "Weights",
        "bits": "Mean width",
    }
    if report["unit"] != "milliseconds":
        facts.pop("cost")
    lines = "".join(f'<dt>{text}</dt><dd data-fact="{name}"></dd>' for name, text in facts.items())
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
    return f'{control}<dl class="facts live">{lines}</dl>{plot}{_map(report["points"][start], canvas)}'


def _frontier_figure(report: Mapping[str, Any], start: int) -> go.Figure:
    title, size = _axis(report)
    points = report["points"]
    alt = f"Predicted loss increase against {title} of {len(points)} plans; the table at the end has the numbers."
    figure = new_figure(alt, title, "predicted loss increase", height=420)
    figure.update_yaxes(type="log", exponentformat="power", dtick="D2")
    hover = "<br>".join(("%{text}", "predicted loss %{y:.3~g}")) + "<extra></extra>"
    figure.add_scatter(
        x=[p["cost"] / size for p in points],
        y=[_positive(p["predicted_loss"]) for p in points],
        text=[_cost_text(report, p["cost"]) for p in points],
        name="frontier", mode="lines+markers", line={"width": 2, "color": COLOURS[0]}, marker={"size": 6},
        hovertemplate=hover, meta="points",
    )  # fmt: skip
    marks = (("uniform", "uniform widths", GREY, "square"), ("chosen", "plans within budgets", COLOURS[1], "star"))
    for key, name, colour, symbol in marks:
        plans = report.get(key) or []
        if plans:
            figure.add_scatter(
                x=[p["cost"] / size for p in plans],
                y=[_positive(p["predicted_loss"]) for p in plans],
                text=[label(p["name"]) for p in plans],
                name=name, mode="markers+text" if key == "uniform" else "markers", textposition="top right",
                textfont={"size": 11},
                marker={"size": 9 if key == "uniform" else 14, "color": colour, "symbol": symbol},
                hovertemplate=hover, cliponaxis=False,
            )  # fmt: skip
    figure.add_scatter(
        x=[points[start]["cost"] / size], y=[_positive(points[start]["predicted_loss"])],
        name="this point", mode="markers", hoverinfo="skip", meta="selected",
        marker={"size": 16, "color": "rgba(0,0,0,0)", "line": {"width": 3, "color": COLOURS[3]}},
    )  # fmt: skip
    return figure


def _positive(value: float) -> float | None:
    """A value that a logarithmic axis can show."""
    return value if value > 0 else None


def _map(point: Mapping[str, Any], canvas: Canvas) -> str:
    figure = map_of(point["widths"], "the chosen point")
    if figure is None:
        return ""
    chips = "".join(
        f'<li style="background:{colour};color:{"#fff" if bits > DARK_ABOVE else "#16202b"}">{bits} bits</li>'
        for bits, colour in WIDTH_COLOURS.items()
    )
    caption = (
        "Rows are layers, columns are tensors; tensors of the attention have one width per head, numbered below. "
        "W are weights, the others activations."
    )
    outside = '<p class="muted">First and last layer: <span data-fact="outside"></span>.</p>'
    plot = canvas.plot("map", [figure], caption)
    return f'<h3>Widths at this point</h3><ul class="key" aria-label="Colours">{chips}</ul>{plot}{outside}'


def _agreement_section(agreement: Mapping[str, Any] | None, canvas: Canvas) -> str:
    if not agreement:
        return ""
    rows = [row for row in agreement["rows"] if row[3] > 0 and row[4] > 0]
    alt = f"Predicted against measured loss increase of {len(rows)} single sites; Spearman {agreement['spearman']:.3f}."
    titles = (f"measured ({agreement['measured']})", f"predicted ({agreement['predicted']})")
    figure = new_figure(alt, *titles, height=440)
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    ends = [min(min(row[3:]) for row in rows), max(max(row[3:]) for row in rows)]
    line = {"width": 1, "dash": "dash", "color": GREY}
    figure.add_scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip", name="equal")
    widths = sorted({row[2] for row in rows})
    for position, width in enumerate(widths):
        own = [row for row in rows if row[2] == width]
        figure.add_scatter(
            x=[row[4] for row in own], y=[row[3] for row in own], name=f"{width} bits", mode="markers",
            marker={"size": 6, "opacity": 0.75, "color": COLOURS[position % len(COLOURS)]},
            text=[f"{label(row[0])}, head {row[1]}" for row in own],
            hovertemplate="%{text}<br>measured %{x:.3~g}, predicted %{y:.3~g}<extra></extra>",
        )  # fmt: skip
    per_width = agreement["spearman_by_width"]
    cells = [
        [
            f"{width} bits",
            "" if value is None else f"{value:.3f}",
            significant(agreement["median_ratio_by_width"][width], 3),
        ]
        for width, value in per_width.items()
    ]
    note = (
        f"<p>Each mark is one head of one tensor, quantized alone, at one width: {len(rows)} marks, measured on "
        f"{agreement['measured_images']} images. Spearman's rank correlation of all is "
        f"<strong>{agreement['spearman']:.3f}</strong>.</p>"
    )
    inside = table(["", "rank correlation", "median of predicted / measured"], cells)
    return f"{note}{canvas.plot('agreement', [figure])}{inside}"


def _table_section(report: Mapping[str, Any]) -> str:
    timed = report["unit"] == "milliseconds"
    header = ["plan", "predicted loss increase", "bit operations", "weights", *(["time"] if timed else [])]

    def row(name: str, plan: Mapping[str, Any]) -> list[str]:
        cells = [escape(name), significant(plan["predicted_loss"], 4), bops_text(plan["bit_operations"])]
        cells.append(bytes_text(plan["weight_bytes"]))
        return [*cells, *([escape(_cost_text(report, plan["cost"]))] if timed else [])]

    groups = (("uniform", report.get("uniform") or []), ("budget", report.get("chosen") or []))
    rows = [row(f"{kind} {plan['name']}", plan) for kind, plans in groups for plan in plans]
    numbered = [row(str(index), point) for index, point in enumerate(report["points"], 1)]
    marked = table(header, rows) if rows else ""
    return marked + folded(f"{len(numbered)} points of the frontier", table(header, numbered))


def _data(report: Mapping[str, Any]) -> str:
    """What the script needs: of every point its texts, its place, and its widths in the order of the cells."""
    _, size = _axis(report)
    points = report["points"]
    sites = list(points[0]["widths"])
    inner = [site for site in sites if locate(site).layer]
    cells = [
        label(site) + (f", head {head}" if len(points[0]["widths"][site]) > 1 else "")
        for site in inner
        for head in range(len(points[0]["widths"][site]))
    ]
    states = []
    for number, point in enumerate(points, 1):
        widths = point["widths"]
        flat = [width for site in inner for width in widths[site]]
        quantized = [width for own in widths.values() for width in own if width != FLOAT_BITS]
        outside = [f"{site} {', '.join(map(str, widths[site]))}" for site in sites if not locate(site).layer]
        texts = {
            "number": f"{number} of {len(points)}",
            "cost": _cost_text(report, point["cost"]),
            "loss": significant(point["predicted_loss"], 4),
            "bops": bops_text(point["bit_operations"]),
            "bytes": bytes_text(point["weight_bytes"]),
            "bits": f"{sum(quantized) / max(1, len(quantized)):.2f} bits over all tensors and heads",
            "outside": "; ".join(outside) or "none",
        }
        place = {"x": point["cost"] / size, "y": _positive(point["predicted_loss"])}
        states.append({**place, "texts": texts, "widths": flat})
    limits = {"low": min(WIDTH_COLOURS), "high": max(WIDTH_COLOURS), "dark": DARK_ABOVE}
    return embedded(json.dumps({"states": states, "cells": cells, **limits}, separators=(",", ":"), allow_nan=False))

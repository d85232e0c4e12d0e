"""The page of `qvit analyze`, from its JSON file alone: the Q-ViT paper's Figures 1, 2a and 2b for one model.

    write_analysis_page("runs/analysis/analysis.json", "runs/analysis/analysis.html")

Bars of error are one standard error: of a share of the judged images, or of a loss, measured on the same images as the
float model. An analysis that was not measured has no section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from qvit.documents.analysis import Analysis
from qvit.report.figures import COLOURS, SYMBOLS, label, level, line, marks, new_figure
from qvit.report.markup import Canvas, escape, folded, lead, table, table_of
from qvit.report.shell import document, write_page_of
from qvit.report.units import bops_text, difference, duration, fixed, plus_minus

PART_NAMES = {"gelu": "GELU outputs", "fc": "fully-connected layers", "msa": "attention (MSA)"}
FOOTER = "The analyses follow Figures 1 and 2 of Q-ViT (Li et al. 2022, arXiv 2201.07703)."
UNTRAINED = "Post-training quantization: scales of least squared error from calibration images, nothing trained."
HEADS_NOTE = (
    "Bars of error are those of the loss against float. In a map of several layers, losses are against the model with "
    "all heads at the higher width; negative is a gain (Figure 2b of the paper)."
)
#: Of a row, and what it loses against no head lowered.
HEAD_COLUMNS: dict[str, Callable[[Any], str]] = {
    "layer": lambda pair: escape(pair[0]["layer"]),
    "head": lambda pair: str(pair[0]["head"]),
    "top-1 (%)": lambda pair: fixed(pair[0]["top1"]),
    "lost against float": lambda pair: plus_minus(pair[0]["drop"], pair[0]["drop_standard_error"]),
    "lost against no head lowered": lambda pair: difference(pair[1]),
}
Rows = Sequence[Mapping[str, Any]]


def write_analysis_page(data: str | Path, out: str | Path, *, title: str | None = None) -> Path:
    """Writes the page of an analysis file. Raises QvitError if it cannot be read or written."""
    return write_page_of(data, out, lambda record: render_analysis(record, title=title), Analysis, "analysis")


def render_analysis(record: Mapping[str, Any], *, title: str | None = None) -> str:
    """The page as text."""
    canvas, of_float = Canvas(), record["float"]
    kinds = _kinds(record)
    layers = {row["layer"]: index for index, row in enumerate(record.get("layers", []))}
    parts = [
        ("widths", "Accuracy against one width for all blocks", _widths(kinds["widths"], of_float, canvas)),
        ("parts", "One kind of tensor alone", _parts(kinds["parts"], of_float, canvas)),
        ("heads", "One attention head at few bits", _heads(kinds["heads"], layers, canvas)),
    ]
    heading = title or f"Robustness against quantization: {record['settings']['model']}"
    training = record["settings"].get("training")
    how = UNTRAINED if training is None else f"Each point was trained with LSQ+ for {training['epochs']} epochs."
    return document(heading, _header(record), parts, canvas, footer=f"{how} {FOOTER}")


def _kinds(record: Mapping[str, Any]) -> dict[str, Rows]:
    """The points of each analysis, those of uniform models from the smallest width."""
    own = {kind: [row for row in record["points"] if row["what"] == kind] for kind in ("widths", "parts", "heads")}
    return own | {"widths": _by_width(own["widths"])}


def _by_width(rows: Rows) -> Rows:
    return sorted(rows, key=lambda row: row["bit_width"])


def _header(record: Mapping[str, Any]) -> str:
    settings, of_float = record["settings"], record["float"] or {}
    found = {
        "Model": settings["model"],
        "Float": f"{of_float.get('top1', float('nan')):.2f} % top-1" if of_float else "not measured",
        "Judged": f"{settings['images']} images of {settings['eval_data'] or settings['data']}",
        "Calibrated": f"{settings['calibration_images']} images of {settings['data']}",
        "Seed": settings["seed"],
        "Measured": f"{len(record['points'])} points in {duration(record['seconds'])}",
    }
    return lead(_sentences(_kinds(record)), found)


def _sentences(kinds: Mapping[str, Rows]) -> list[str]:
    """What the points say: the smallest width that holds, the most fragile part, the spread over heads."""
    said = []
    for row in kinds["widths"]:
        if row["drop"] <= 2 * row["drop_standard_error"]:
            said.append(
                f"{row['bit_width']} bits are the smallest width whose loss against float is within two standard "
                f"errors of zero ({plus_minus(row['drop'], row['drop_standard_error'])} points)."
            )
            break
    total: dict[str, float] = {}
    for row in kinds["parts"]:
        total[row["part"]] = total.get(row["part"], 0.0) + row["drop"]
    if total:
        worst = max(total, key=lambda part: total[part])
        said.append(f"Of the parts, quantizing {_part(worst)} alone loses most, summed over all widths.")
    heads = [row for row in kinds["heads"] if row["head"] is not None]
    if heads:
        best, worst_head = (pick(heads, key=lambda row: row["top1"]) for pick in (max, min))
        spread = best["top1"] - worst_head["top1"]
        said.append(
            f"Lowering one head costs between {best['drop']:.2f} and {worst_head['drop']:.2f} points against float, "
            f"a spread of {spread:.2f} at a standard error of {worst_head['drop_standard_error']:.2f}."
        )
    return said


def _part(name: str) -> str:
    return PART_NAMES.get(name, name)


def _against_width(alt: str, curves: Mapping[str, Rows], of_float: Mapping[str, Any]) -> go.Figure:
    """Accuracy over widths, a curve per name, and float as a line."""
    figure = new_figure(alt, "bit-width", "top-1 accuracy (%)", height=400)
    for index, (name, rows) in enumerate(curves.items()):
        hover = (
            f"{label(name)}, %{{x}} bits<br>top-1 %{{y:.2f}} %<br>float minus this %{{customdata[0]:.2f}}"
            "<br>agrees with float on %{customdata[1]:.1f} %"
        )
        line(
            figure, [(row["bit_width"], row["top1"]) for row in rows], name, hover, COLOURS[index % len(COLOURS)],
            width=2, mode="lines+markers", customdata=[[row["drop"], row["agreement"]] for row in rows],
            marker={"size": 9, "symbol": SYMBOLS[index % len(SYMBOLS)]}, error_y=_bars(rows, "standard_error"),
        )  # fmt: skip
    level(figure, of_float["top1"], f"float {of_float['top1']:.2f} %")
    shown = [row for rows in curves.values() for row in rows]
    widths = [row["bit_width"] for row in shown]
    top = max([of_float["top1"], *(row["top1"] + row["standard_error"] for row in shown)])
    figure.update_xaxes(dtick=1, range=[min(widths) - 0.3, max(widths) + 0.3])
    figure.update_yaxes(range=[0, min(105.0, top * 1.12 + 1)])
    figure.update_layout(showlegend=len(curves) > 1)
    return figure


def _bars(rows: Rows, key: str) -> dict[str, Any]:
    return {"array": [row[key] for row in rows], "thickness": 1.2, "width": 4}


def _widths(rows: Rows, of_float: Mapping[str, Any], canvas: Canvas) -> str:
    if not rows:
        return ""
    figure = _against_width("Accuracy against the width of all blocks, float dashed.", {"uniform": rows}, of_float)
    caption = (
        "Weights and activations of all blocks at one width, first and last layer at 8 bits (Figure 1 of the paper)."
    )
    columns = {
        "bits": lambda row: str(row["bit_width"]),
        "top-1 (%)": lambda row: plus_minus(row["top1"], row["standard_error"]),
        "points vs float": lambda row: difference(-row["drop"]),
        "agrees with float (%)": lambda row: fixed(row["agreement"], 1),
        "bit operations": lambda row: bops_text(row["bit_operations"] or None),
    }
    return canvas.plot("widths", [figure], caption) + table_of(columns, rows, text=0)


def _parts(rows: Rows, of_float: Mapping[str, Any], canvas: Canvas) -> str:
    if not rows:
        return ""
    names: list[str] = list(dict.fromkeys(str(row["part"]) for row in rows))
    curves: dict[str, Rows] = {_part(name): _by_width([row for row in rows if row["part"] == name]) for name in names}
    figure = _against_width("Accuracy with one kind of tensor quantized, against its width.", curves, of_float)
    caption = (
        "One kind of tensor of all blocks quantized, everything else in float (Figure 2a of the paper). "
        "Fully-connected layers are the weights of the MLP and the input of its first layer; the input of the second "
        "is the GELU's output."
    )
    widths = sorted({row["bit_width"] for row in rows})
    found = {(row["part"], row["bit_width"]): row["top1"] for row in rows}
    cells = [[escape(_part(name)), *(fixed(found.get((name, width))) for width in widths)] for name in names]
    header = ["quantized alone", *(f"{width} bits" for width in widths)]
    return canvas.plot("parts", [figure], caption) + table(header, cells)


def _heads(rows: Rows, layers: Mapping[str, int], canvas: Canvas) -> str:
    lowered = [row for row in rows if row["head"] is not None]
    parts = ""
    for number, (low, high) in enumerate(dict.fromkeys((row["bit_width"], row["others"]) for row in lowered)):
        own = [row for row in lowered if (row["bit_width"], row["others"]) == (low, high)]
        base = next((row for row in rows if row["head"] is None and row["others"] == high), None)
        reference = base["top1"] if base else max(row["top1"] for row in own)
        paths = sorted({row["layer"] for row in own}, key=lambda path: layers.get(path, 0))
        lost = {(row["layer"], row["head"]): reference - row["top1"] for row in own}
        figure = _head_marks(own, base) if len(paths) == 1 else _head_map(paths, lost, layers)
        caption = f"With all heads at the higher width the model has {reference:.2f} % top-1. {HEADS_NOTE}"
        heading = f"{low} bits in one head, {high} elsewhere"
        parts += canvas.plot(f"heads-{number}", [figure], caption, heading)
        parts += folded("All heads", table_of(HEAD_COLUMNS, [(row, reference - row["top1"]) for row in own]))
    return parts


def _head_marks(rows: Rows, base: Mapping[str, Any] | None) -> go.Figure:
    """What each head of one layer loses against float, and what the model loses with none lowered."""
    ordered = sorted(rows, key=lambda row: row["head"])
    figure = new_figure("Accuracy lost per head.", "head", "points lost against float", height=340)
    points = [(str(row["head"]), row["drop"]) for row in ordered]
    style = {"marker": {"color": COLOURS[0], "size": 12}, "error_y": _bars(ordered, "drop_standard_error")}
    marks(figure, points, hover="head %{x}: %{y:.2f} points lost", **style)
    figure.update_xaxes(type="category")
    if base:
        level(figure, base["drop"], f"no head lowered {base['drop']:.2f}")
    return figure


def _head_map(paths: Sequence[str], lost: Mapping[tuple[str, int], float], layers: Mapping[str, int]) -> go.Figure:
    """What each head of several layers loses against the model with none lowered."""
    heads = range(1 + max(head for _, head in lost))
    height = 120 + 26 * len(paths)
    figure = new_figure("Accuracy lost per layer and head.", "head", "attention layer", height=height)
    z = [[lost.get((path, head)) for head in heads] for path in paths]
    limit = max(0.5, *(abs(value) for value in lost.values()))
    figure.add_heatmap(
        z=z,
        x=[str(head) for head in heads],
        y=[str(layers.get(path, path)) for path in paths],
        colorscale=[[0, "#2f7fd1"], [0.5, "#f4f4f4"], [1, "#d1495b"]],
        zmin=-limit,
        zmax=limit,
        xgap=2,
        ygap=2,
        text=[[fixed(value).replace("-", "−") for value in row] for row in z],
        texttemplate="%{text}",
        textfont={"color": "#16202b"},
        colorbar={"title": {"text": "points lost"}, "thickness": 14},
        hovertemplate="layer %{y}, head %{x}: %{z:.2f} points lost<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(type="category", showgrid=False)
    return figure

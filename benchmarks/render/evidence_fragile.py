"""Which parts are fragile: tables and figures of what `benchmarks/measure/fragile.py` measured, fragile.json.

An error is one standard error over images: of an accuracy, of a loss of accuracy against the float model on the same
images, or of the mean divergence from the float model. Sentences are made by rule: two of them differ if they are
further apart than two standard errors of their difference, taken as if they were independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
from rendering import Data, figures_of, origin, place, spread, table, table_of

from qvit.report.analysis import PART_NAMES
from qvit.report.figures import COLOURS, DASHED, SYMBOLS, label, level, line, marks, new_figure

Row = dict[str, Any]
COMMAND = "`python benchmarks/measure/fragile.py --data FOLDER`"


@table_of("fragile.json", COMMAND)
def fragile_tables(data: Data) -> str:
    """Accuracy by part and width, and what each head costs."""
    settings, curves = data["settings"], curves_of(data)
    largest = max(row["standard_error"] for rows in curves.values() for row in rows)
    note = (
        f"{data['weights']}, {settings['images']} images of {settings['eval_data']}, {settings['calibration_images']} "
        f"calibration images of {settings['data']}. Float: {data['float']['top1']:.2f} %. One standard error of an "
        f"accuracy is up to {largest:.1f} points."
    )
    widths = [row["bit_width"] for row in next(iter(curves.values()))]
    pieces = [note]
    for title, value in (
        ("top-1 (%)", lambda row: f"{row['top1']:.2f}"),
        ("same answer as float (%)", lambda row: f"{row['agreement']:.1f}"),
        ("divergence from float", lambda row: f"{row['divergence']:.4f}"),
    ):
        cells = [[name, *(value(row) for row in rows)] for name, rows in curves.items()]
        pieces.append(table([title, *(f"{width} bits" for width in widths)], cells, left=1))
    lowered = heads_of(data)
    if lowered:
        pieces += [_heads_title(data), _heads_table(lowered)]
    return "\n\n".join([*pieces, *_sentences(data), f"{origin(data)} Threads: {data['threads']}."])


@table_of("fragile.json", COMMAND)
def fragile_plots_tables(data: Data) -> str:
    """The places of the figures, with the sentences about them."""
    return "\n\n".join([*(place(name) for name in _figures(data)), *_sentences(data), origin(data)])


@figures_of("fragile.json")
def fragile_figures(data: Data) -> dict[str, go.Figure]:
    return {name: make(data) for name, make in _figures(data).items()}


@table_of("fragile_trained*.json", "`python benchmarks/measure/fragile_trained.py --seeds 0 1 2`")
def fragile_trained_tables(data: Data) -> str:
    """Points lost by part and width, with and without training, mean and deviation over seeds."""
    seeds = len(data["seeds"])
    widths = sorted({row["bit_width"] for row in data["rows"]})
    lost = {(row["part"], row["bit_width"], row["trained"]): row for row in data["rows"]}
    parts = list(dict.fromkeys(row["part"] for row in data["rows"]))
    cells = []
    for trained in (False, True):
        for part in parts:
            rows = [lost[part, width, trained] for width in widths]
            own = [spread(row["drop"], row["drop_deviation"] or 0.0, seeds).replace("-", "−") for row in rows]
            cells.append([f"{PART_NAMES[part]} alone", "trained" if trained else "calibrated", *own])
    said = []
    for trained, how in ((False, "Calibrated"), (True, "Trained")):
        worst = [max(parts, key=lambda part: lost[part, width, trained]["drop"]) for width in widths]
        named = ", ".join(f"{PART_NAMES[part]} at {width}" for part, width in zip(worst, widths, strict=True))
        said.append(f"{how}, the part that loses most is, by bits: {named}.")
    floats = ", ".join(f"{value:.2f}" for value in data["float"])
    over = f", mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    on = f"{data['train_images']} images" if "train_images" in data else "digits"
    epochs = "1 epoch" if data["epochs"] == 1 else f"{data['epochs']} epochs"
    note = (
        f"{data.get('title') or '`' + data['model'] + '`'}: points of top-1 lost against float ({floats} %) on "
        f"{data['images']} test images{over}; trained for {epochs} of {on}."
    )
    header = ["quantized", "how", *(f"{width} bits" for width in widths)]
    return "\n\n".join([note, table(header, cells, left=2), *said, origin(data)])


def curves_of(data: Data) -> dict[str, list[Row]]:
    """Rows by width of everything, and of each part alone."""
    found: dict[str, list[Row]] = {}
    for row in data["points"]:
        if row["what"] in ("widths", "parts"):
            name = "everything" if row["what"] == "widths" else f"{PART_NAMES[row['part']]} alone"
            found.setdefault(name, []).append(row)
    return {name: sorted(rows, key=lambda row: row["bit_width"]) for name, rows in found.items()}


def heads_of(data: Data) -> dict[int, list[Row]]:
    """Rows of lowered heads by the index of their layer."""
    index = {layer["layer"]: number for number, layer in enumerate(data["layers"])}
    found: dict[int, list[Row]] = {}
    for row in data["points"]:
        if row["what"] == "heads" and row["head"] is not None:
            found.setdefault(index[row["layer"]], []).append(row)
    return {layer: sorted(found[layer], key=lambda row: row["head"]) for layer in sorted(found)}


def base_of(data: Data) -> Row:
    """The model that no head was lowered in."""
    return next(row for row in data["points"] if row["what"] == "heads" and row["head"] is None)


def _heads_title(data: Data) -> str:
    row, base = next(row for rows in heads_of(data).values() for row in rows), base_of(data)
    return (
        f"One head at {row['bit_width']} bits, everything else at {row['others']}: points lost against float ± one "
        f"standard error, and divergence from float in thousandths. With no head lowered: {_loss(base)}, "
        f"{_thousandths(base)}."
    )


def _heads_table(lowered: dict[int, list[Row]]) -> str:
    count = max(map(len, lowered.values()))
    cells = []
    for layer, rows in lowered.items():
        both = [text for row in rows for text in (_loss(row), _thousandths(row))]
        cells.append([str(layer), *both, *[""] * (2 * count - len(both))])
    header = [text for head in range(count) for text in (f"head {head}: lost", "divergence")]
    return table(["layer", *header], cells, left=1)


def _loss(row: Row) -> str:
    return f"{row['drop']:.1f} ± {row['drop_standard_error']:.1f}".replace("-", "−")


def _thousandths(row: Row) -> str:
    return f"{1000 * row['divergence']:.1f} ± {1000 * row['divergence_standard_error']:.1f}"


def _apart(first: Row, second: Row, value: str, error: str) -> bool:
    return abs(first[value] - second[value]) > 2 * math.hypot(first[error], second[error])


def _sentences(data: Data) -> list[str]:
    """What the numbers say, by rule."""
    said, curves = [], curves_of(data)
    parts = {name: rows for name, rows in curves.items() if name != "everything"}
    gelu, layers = (parts.get(f"{PART_NAMES[part]} alone", []) for part in ("gelu", "fc"))
    if gelu and layers:
        said.append(
            "GELU outputs alone lose less accuracy than the fully-connected layers alone at (bits) "
            f"{_less(gelu, layers)}, more at {_less(layers, gelu)}; they diverge less at "
            f"{_less(gelu, layers, 'divergence')}, more at {_less(layers, gelu, 'divergence')}. The paper, after "
            "fine-tuning, has GELU as the most fragile part of the MLP."
        )
    if len(parts) > 1:
        worst = [
            max(parts, key=lambda name: parts[name][at]["divergence"]) for at in range(min(map(len, parts.values())))
        ]
        counted = ", ".join(f"{name} at {worst.count(name)} of {len(worst)} widths" for name in dict.fromkeys(worst))
        said.append(f"The part that moves the answers most: {counted}.")
    lowered = heads_of(data)
    if lowered:
        said.append(_said_of_heads(lowered))
    return said


def _less(first: list[Row], second: list[Row], value: str = "drop") -> str:
    """The widths at which the first loses less than the second."""
    pairs = zip(first, second, strict=True)
    found = [
        str(one["bit_width"])
        for one, other in pairs
        if one[value] < other[value] and _apart(one, other, value, f"{value}_standard_error")
    ]
    return ", ".join(found) or "none"


def _said_of_heads(lowered: dict[int, list[Row]]) -> str:
    every = [(row, layer) for layer, rows in lowered.items() for row in rows]
    (worst, at), (best, other) = (pick(every, key=lambda one: one[0]["divergence"]) for pick in (max, min))

    def differ(value: str, error: str) -> int:
        pairs = ((max(rows, key=_by(value)), min(rows, key=_by(value))) for rows in lowered.values())
        return sum(_apart(first, second, value, error) for first, second in pairs)

    return (
        f"Of {len(every)} heads, lowering head {worst['head']} of layer {at} moves the answers most (divergence "
        f"{worst['divergence']:.3f}, {_loss(worst)} points lost) and head {best['head']} of layer {other} least "
        f"({best['divergence']:.3f}, {_loss(best)}). The most and the least fragile head of a layer can be told apart "
        f"by the divergence in {differ('divergence', 'divergence_standard_error')} of {len(lowered)} layers, by the "
        f"accuracy lost in {differ('drop', 'drop_standard_error')}."
    )


def _by(value: str) -> Callable[[Row], float]:
    return lambda row: row[value]


def _figures(data: Data) -> dict[str, Callable[[Data], go.Figure]]:
    """How each figure that there are numbers for is made."""
    makers = {}
    if curves_of(data):
        makers["fragile-parts"] = _parts_figure
    if heads_of(data):
        makers["fragile-heads-accuracy"] = lambda own: _heads_figure(own, "drop", "points lost against float")
        makers["fragile-heads-divergence"] = lambda own: _heads_figure(own, "divergence", "divergence from float")
    return makers


def _parts_figure(data: Data) -> go.Figure:
    curves, top1 = curves_of(data), data["float"]["top1"]
    alt = "Accuracy against the width of everything and of one part alone; the table in Analyses has the numbers."
    figure = new_figure(alt, "bit-width", "top-1 accuracy (%)", height=420, min_width=480)
    for index, (name, rows) in enumerate(curves.items()):
        points = [(row["bit_width"], row["top1"]) for row in rows]
        line(
            figure, points, name, f"{label(name)}, %{{x}} bits: %{{text}}", COLOURS[index], width=2,
            mode="lines+markers", marker={"size": 9, "symbol": SYMBOLS[index]},
            error_y={"array": [row["standard_error"] for row in rows], "thickness": 1.2, "width": 4},
            text=[f"{row['top1']:.2f} %, divergence {row['divergence']:.4f}" for row in rows],
        )  # fmt: skip
    level(figure, top1, f"float {top1:.2f} %")
    figure.update_xaxes(dtick=1)
    figure.update_yaxes(range=[-3, top1 + 8])
    return figure


def _heads_figure(data: Data, value: str, title: str) -> go.Figure:
    """A mark per lowered head, side by side for each layer; dashed: no head lowered."""
    lowered, base = heads_of(data), base_of(data)
    alt = f"One head lowered at a time: {title}; the table in Analyses has the numbers."
    figure = new_figure(alt, "layer", title, height=380, min_width=560)
    count = max(map(len, lowered.values()))
    for head in range(count):
        own = [(layer, rows[head]) for layer, rows in lowered.items() if head < len(rows)]
        marks(
            figure,
            [(layer + 0.22 * (head - (count - 1) / 2), row[value]) for layer, row in own],
            f"head {head}",
            "%{text}",
            marker={"size": 8, "color": COLOURS[head % len(COLOURS)], "symbol": SYMBOLS[head % len(SYMBOLS)]},
            error_y={"array": [row[f"{value}_standard_error"] for _, row in own], "thickness": 1.2, "width": 3},
            text=[f"layer {layer}, head {head}: {row[value]:.3f}" for layer, row in own],
        )
    figure.add_hline(y=base[value], line=DASHED)
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(tickvals=list(lowered), ticktext=[str(layer) for layer in lowered], showgrid=False)
    return figure

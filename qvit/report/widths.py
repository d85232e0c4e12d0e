"""The map of a plan's widths: rows are layers, columns are tensors, and their heads where each has a width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import plotly.graph_objects as go

from qvit.report.figures import label, marks, new_figure
from qvit.report.markup import Canvas
from qvit.report.runs import Run
from qvit.report.sites import layer_labels, layers_of, locate, tensors_of

# From few bits (light) to many (dark), distinct in brightness, so that the map also reads without colours.
WIDTH_COLOURS = {2: "#fdf3c4", 3: "#d5e8a8", 4: "#8fd0a5", 5: "#4bb3b0", 6: "#2f8bb5", 7: "#2f5ea3", 8: "#2b2f7a"}
DARK_ABOVE = 5
MOST_CELLS = 200_000  # some times those of the largest models
LOW, HIGH = min(WIDTH_COLOURS), max(WIDTH_COLOURS)
ON_LIGHT, ON_DARK = "#16202b", "#ffffff"
#: Of a cell: its width and its name.
Cell = tuple[int | None, str]
CAPTION = (
    "Rows are layers, columns are tensors; tensors of the attention have one width per head, numbered below. "
    "W are weights, the others activations."
)


def has_map(run: Run) -> bool:
    """Whether there is something to see: widths that are learned, or not all the same inside the layers."""
    inner = {width for site, widths in run.bit_widths.items() if locate(site).layer for width in widths}
    return bool(run.plan) and (run.learned or len(inner) > 1)


def draw_maps(canvas: Canvas, maps: Sequence[go.Figure]) -> str:
    """Maps, one at a time, with the key to their colours; HTML."""
    chips = "".join(
        f'<li style="background:{colour};color:{ON_DARK if bits > DARK_ABOVE else ON_LIGHT}">{bits} bits</li>'
        for bits, colour in WIDTH_COLOURS.items()
    )
    return f'<ul class="key" aria-label="Colours">{chips}</ul>{canvas.plot("map", maps, CAPTION)}'


def cell_names(site: str, widths: Sequence[int]) -> list[str]:
    """What the cells of a site are called, one per width."""
    return [label(site) + (f", head {head}" if len(widths) > 1 else "") for head in range(len(widths))]


def map_of(widths_by_site: Mapping[str, Sequence[int]], name: str) -> go.Figure | None:
    """The map of widths by site, None if none lies in a layer; `name` is what they are of."""
    inner = {site: widths for site, widths in widths_by_site.items() if locate(site).layer}
    if not inner:
        return None
    layers, tensors = layers_of(inner), tensors_of(inner)
    heads = dict.fromkeys(tensors, 1)
    for site, own in inner.items():
        heads[locate(site).tensor] = max(heads[locate(site).tensor], len(own))
    if len(layers) * sum(heads.values()) > MOST_CELLS:
        return None
    starts = dict(zip(tensors, accumulate((heads[tensor] + 0.5 for tensor in tensors), initial=0.0), strict=False))
    columns = {tensor: [starts[tensor] + head for head in range(heads[tensor])] for tensor in tensors}
    row_of = {layer: row for row, layer in enumerate(layers)}
    cells: dict[tuple[int, float], Cell] = {}
    for site, widths in inner.items():
        place = locate(site)
        for x, width, cell in zip(columns[place.tensor], widths, cell_names(site, widths), strict=False):
            cells[row_of[place.layer], x] = width, cell
    figure = new_figure(
        f"Bit-widths of {name}: {len(layers)} layers by {len(tensors)} kinds of tensor, split into heads.",
        "", "layer", height=112 + 30 * len(layers), min_width=80 + 16 * sum(heads.values()) + 8 * len(tensors),
    )  # fmt: skip
    for x in columns.values():
        _block(figure, x, [[cells.get((row, at), (None, "")) for at in x] for row in range(len(layers))])
    for colour, dark in ((ON_LIGHT, False), (ON_DARK, True)):
        own = [(x, row, width) for (row, x), (width, _) in cells.items() if width and (width > DARK_ABOVE) == dark]
        _numbers(figure, own, size=12, colour=colour, meta="numbers")
    bottom = len(layers) - 0.1
    several = [x for x in columns.values() if len(x) > 1]
    if several:
        _numbers(figure, [(at, bottom, head) for x in several for head, at in enumerate(x)], size=10, colour="#808080")
    plain = {"ticks": "", "showgrid": False, "showline": False, "fixedrange": True}
    figure.update_xaxes(
        tickvals=[(x[0] + x[-1]) / 2 for x in columns.values()],
        ticktext=[label(tensor if len(tensor) <= 16 else tensor[:15] + "…") for tensor in tensors],
        side="top",
        tickangle=-40,
        ticklabeloverflow="allow",
        range=[-0.6, columns[tensors[-1]][-1] + 0.6],
        **plain,
    )
    figure.update_yaxes(
        tickvals=[*range(len(layers)), *([bottom] if several else [])],
        ticktext=[*map(label, layer_labels(layers)), *(["head"] if several else [])],
        range=[len(layers) + (0.3 if several else -0.5), -0.5],
        **plain,
    )
    figure.update_layout(margin={"t": 64, "b": 8, "r": 44})
    return figure


def _block(figure: go.Figure, x: Sequence[float], rows: Sequence[Sequence[Cell]]) -> None:
    """The columns of one tensor; cells without a site stay empty."""
    share = 1 / len(WIDTH_COLOURS)
    steps = [(edge, colour) for i, colour in enumerate(WIDTH_COLOURS.values()) for edge in (i * share, (i + 1) * share)]
    figure.add_heatmap(
        x=list(x),
        y=list(range(len(rows))),
        z=[[None if width is None else min(max(width, LOW), HIGH) for width, _ in row] for row in rows],
        text=[["" if width is None else str(width) for width, _ in row] for row in rows],
        customdata=[[name for _, name in row] for row in rows],
        hovertemplate="%{customdata}: <b>%{text} bits</b><extra></extra>",
        hoverongaps=False,
        zmin=LOW - 0.5,
        zmax=HIGH + 0.5,
        colorscale=[[min(edge, 1.0), colour] for edge, colour in steps],
        showscale=False,
        xgap=1,
        ygap=1,
    )


def _numbers(
    figure: go.Figure, points: Iterable[tuple[float, float, int]], *, size: int, colour: str, meta: str | None = None
) -> None:
    """Numbers at places (x, y, number)."""
    found = list(points)
    texts = [str(number) for _, _, number in found]
    font = {"size": size, "color": colour}
    marks(figure, [(x, y) for x, y, _ in found], mode="text", text=texts, textfont=font, meta=meta)

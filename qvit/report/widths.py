"""The map of a plan's widths: rows are layers, columns are tensors, and their heads where each has a width."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

import plotly.graph_objects as go

from qvit.report.figures import GREY, label, marks, new_figure
from qvit.report.markup import Canvas
from qvit.report.runs import Run
from qvit.report.sites import Place, layer_labels, layers_of, locate, tensors_of

# From few bits (light) to many (dark), distinct in brightness, so that the map also reads without colours.
WIDTH_COLOURS = {2: "#fdf3c4", 3: "#d5e8a8", 4: "#8fd0a5", 5: "#4bb3b0", 6: "#2f8bb5", 7: "#2f5ea3", 8: "#2b2f7a"}
DARK_ABOVE = 5
MOST_CELLS = 200_000  # some times those of the largest models
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
        f'<li style="background:{colour};color:{"#ffffff" if bits > DARK_ABOVE else "#16202b"}">{bits} bits</li>'
        for bits, colour in WIDTH_COLOURS.items()
    )
    return f'<ul class="key" aria-label="Colours">{chips}</ul>{canvas.plot("map", maps, CAPTION)}'


def cell_names(site: str, widths: Sequence[int]) -> list[str]:
    """What the cells of a site are called, one per width."""
    return [label(site) + (f", head {head}" if len(widths) > 1 else "") for head in range(len(widths))]


def widths_by_layer(runs: Iterable[Run], tensor: str) -> dict[str, list[int]]:
    """The widths of one kind of tensor, of all heads of all runs, by layer."""
    runs = list(runs)
    pooled: dict[str, list[int]] = {layer: [] for layer in layers_of(site for run in runs for site in run.bit_widths)}
    for run in runs:
        for site, widths in run.bit_widths.items():
            place = locate(site)
            if place.layer and place.tensor == tensor:
                pooled[place.layer].extend(widths)
    return {layer: widths for layer, widths in pooled.items() if widths}


def map_of(widths_by_site: Mapping[str, Sequence[int]], name: str) -> go.Figure | None:
    """The map of widths by site, None if none lies in a layer or there are too many; `name` is what they are of."""
    inner = {site: widths for site, widths in widths_by_site.items() if locate(site).layer}
    layers, tensors = layers_of(inner), tensors_of(inner)
    heads = dict.fromkeys(tensors, 1)
    for site, own in inner.items():
        heads[locate(site).tensor] = max(heads[locate(site).tensor], len(own))
    if not inner or len(layers) * sum(heads.values()) > MOST_CELLS:
        return None
    figure = new_figure(
        f"Bit-widths of {name}: {len(layers)} layers by {len(tensors)} kinds of tensor, split into heads.",
        "", "layer", height=112 + 30 * len(layers), min_width=80 + 16 * sum(heads.values()) + 8 * len(tensors),
    )  # fmt: skip
    starts = list(accumulate((count + 0.5 for count in heads.values()), initial=0.0))
    sites = {locate(site): site for site in inner}
    share = 1 / len(WIDTH_COLOURS)
    steps = [(edge, colour) for i, colour in enumerate(WIDTH_COLOURS.values()) for edge in (i * share, (i + 1) * share)]
    for (tensor, count), start in zip(heads.items(), starts, strict=False):
        found = [sites.get(Place(layer, tensor)) for layer in layers]
        rows = [[] if site is None else list(inner[site]) for site in found]
        names = [[] if site is None else cell_names(site, inner[site]) for site in found]
        figure.add_heatmap(
            x=[start + head for head in range(count)],
            y=list(range(len(layers))),
            z=[[*row, *[None] * (count - len(row))] for row in rows],
            customdata=[[*row, *[""] * (count - len(row))] for row in names],
            texttemplate="%{z}",
            textfont={"size": 12},
            hovertemplate="%{customdata}: <b>%{z} bits</b><extra></extra>",
            hoverongaps=False,
            zmin=min(WIDTH_COLOURS) - 0.5,
            zmax=max(WIDTH_COLOURS) + 0.5,
            colorscale=[[min(edge, 1.0), colour] for edge, colour in steps],
            showscale=False,
            xgap=1,
            ygap=1,
        )
    bottom = len(layers) - 0.1
    numbers = [
        (start + head, head) for start, n in zip(starts, heads.values(), strict=False) if n > 1 for head in range(n)
    ]
    if numbers:
        texts = [str(head) for _, head in numbers]
        marks(figure, [(x, bottom) for x, _ in numbers], mode="text", text=texts, textfont={"size": 10, "color": GREY})
    plain = {"ticks": "", "showgrid": False, "showline": False, "fixedrange": True}
    figure.update_xaxes(
        tickvals=[start + (count - 1) / 2 for start, count in zip(starts, heads.values(), strict=False)],
        ticktext=[label(tensor if len(tensor) <= 16 else tensor[:15] + "…") for tensor in tensors],
        side="top",
        tickangle=-40,
        ticklabeloverflow="allow",
        range=[-0.6, starts[-1] - 0.9],
        **plain,
    )
    figure.update_yaxes(
        tickvals=[*range(len(layers)), *([bottom] if numbers else [])],
        ticktext=[*map(label, layer_labels(layers)), *(["head"] if numbers else [])],
        range=[len(layers) + (0.3 if numbers else -0.5), -0.5],
        **plain,
    )
    figure.update_layout(margin={"t": 64, "b": 8, "r": 44})
    return figure

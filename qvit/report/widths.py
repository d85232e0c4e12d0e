"""Figures of bit-widths: the map of a plan, Figures 4 and 5 of the Q-ViT paper, and widths during training.

Figure 4 of the paper (Li et al. 2022, arXiv 2201.07703) shows, for q, k, v and the attention probabilities A, the
spread of the learned widths over the heads of each layer; Figure 5 shows the width of the GELU output by layer. Where
a group has several seeds, the boxes pool their heads, and Figure 5 draws a thin line per seed and a thick one for the
mean. All functions return None if there is nothing to draw. For conventions see `qvit.report.figures`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

import plotly.graph_objects as go

from qvit.report.figures import COLOURS, colour_of, label, new_figure, run_label, thin, with_room
from qvit.report.runs import Log, Run
from qvit.report.sites import ATTENTION_PANELS, GELU, layer_labels, layers_of, locate, tensors_of
from qvit.report.tables import Group

# From few bits (light) to many (dark), distinct in brightness, so that the map also reads without colours.
WIDTH_COLOURS = {2: "#fdf3c4", 3: "#d5e8a8", 4: "#8fd0a5", 5: "#4bb3b0", 6: "#2f8bb5", 7: "#2f5ea3", 8: "#2b2f7a"}
DARK_ABOVE = 5
MOST_CELLS = 200_000  # some times those of the largest models
# Partners of a product share a colour; weights are dashed.
PARTNERS = (("qkv in",), ("q", "W_q"), ("k", "W_k"), ("v", "W_v"), ("probs",), ("output", "W_o"), ("fc1 in", "W_fc1"))
TENSOR_COLOURS = {name: COLOURS[i] for i, names in enumerate((*PARTNERS, (GELU, "W_fc2"))) for name in names}


def is_mixed(run: Run) -> bool:
    """Whether the widths inside the layers are not all the same."""
    return len({width for site, widths in run.bit_widths.items() if locate(site).layer for width in widths}) > 1


def width_map(run: Run) -> go.Figure | None:
    """The plan of a run as a map: rows are layers, columns are tensors, and their heads where each has a width."""
    return map_of(run.bit_widths, run.path.name)


def map_of(widths_by_site: Mapping[str, Sequence[int]], name: str) -> go.Figure | None:
    """The map of widths by site, as `width_map`; `name` is what they are of."""
    inner = {site: widths for site, widths in widths_by_site.items() if locate(site).layer}
    if not inner:
        return None
    layers, tensors = layers_of(inner), tensors_of(inner)
    heads = dict.fromkeys(tensors, 1)
    for site, own in inner.items():
        heads[locate(site).tensor] = max(heads[locate(site).tensor], len(own))
    if len(layers) * sum(heads.values()) > MOST_CELLS:
        return None
    start, column = {}, 0
    for tensor in tensors:
        start[tensor] = column
        column += heads[tensor] + 0.5
    x = [start[tensor] + head for tensor in tensors for head in range(heads[tensor])]
    cells: dict[tuple[str, float], tuple[int, str]] = {}
    for site, widths in inner.items():
        place = locate(site)
        for head, width in enumerate(widths):
            cell = label(site) + (f", head {head}" if len(widths) > 1 else "")
            cells[place.layer, start[place.tensor] + head] = width, cell
    figure = new_figure(
        f"Bit-widths of {name}: {len(layers)} layers by {len(tensors)} kinds of tensor, split into heads.",
        "", "", height=112 + 30 * len(layers), min_width=80 + 16 * len(x) + 8 * len(tensors),
    )  # fmt: skip
    rows = layer_labels(layers)
    for tensor in tensors:
        _map_block(figure, cells, layers, [start[tensor] + head for head in range(heads[tensor])])
    _map_numbers(figure, cells, layers)
    _map_axes(figure, rows, tensors, start, heads)
    return figure


def _map_block(
    figure: go.Figure, cells: dict[tuple[str, float], tuple[int, str]], layers: Sequence[str], x: Sequence[float]
) -> None:
    """The columns of one tensor; cells without a site stay empty."""
    found = [[cells.get((layer, position)) for position in x] for layer in layers]
    low, high = min(WIDTH_COLOURS), max(WIDTH_COLOURS)
    share = 1 / len(WIDTH_COLOURS)
    steps = [[edge, colour] for i, colour in enumerate(WIDTH_COLOURS.values()) for edge in (i * share, (i + 1) * share)]
    figure.add_heatmap(
        x=list(x),
        y=list(range(len(layers))),
        z=[[None if cell is None else min(max(cell[0], low), high) for cell in row] for row in found],
        text=[["" if cell is None else str(cell[0]) for cell in row] for row in found],
        customdata=[["" if cell is None else cell[1] for cell in row] for row in found],
        hovertemplate="%{customdata}: <b>%{text} bits</b><extra></extra>",
        hoverongaps=False,
        zmin=low - 0.5,
        zmax=high + 0.5,
        colorscale=[[min(edge, 1.0), colour] for edge, colour in steps],
        showscale=False,
        xgap=1,
        ygap=1,
    )


def _map_numbers(figure: go.Figure, cells: dict[tuple[str, float], tuple[int, str]], layers: Sequence[str]) -> None:
    """The numbers in the cells: dark on light colours, white on dark ones."""
    rows = {layer: row for row, layer in enumerate(layers)}
    for colour, dark in (("#16202b", False), ("#ffffff", True)):
        chosen = [(x, rows[layer], cell[0]) for (layer, x), cell in cells.items() if (cell[0] > DARK_ABOVE) == dark]
        figure.add_scatter(
            x=[x for x, _, _ in chosen],
            y=[row for _, row, _ in chosen],
            text=[str(width) for _, _, width in chosen],
            mode="text",
            textfont={"size": 12, "color": colour},
            meta="numbers",
            hoverinfo="skip",
            showlegend=False,
        )


def _map_axes(
    figure: go.Figure, rows: Sequence[str], tensors: Sequence[str], start: dict[str, float], heads: dict[str, int]
) -> None:
    """Tensors above, head numbers below, layers at the left; the first layer on top."""
    several = [tensor for tensor in tensors if heads[tensor] > 1]
    if several:
        figure.add_scatter(
            x=[start[tensor] + head for tensor in several for head in range(heads[tensor])],
            y=[len(rows) - 0.1] * sum(heads[tensor] for tensor in several),
            text=[str(head) for tensor in several for head in range(heads[tensor])],
            mode="text",
            textfont={"size": 10, "color": "rgba(128,128,128,1)"},
            hoverinfo="skip",
            showlegend=False,
        )
    figure.update_xaxes(
        tickvals=[start[tensor] + (heads[tensor] - 1) / 2 for tensor in tensors],
        ticktext=[label(tensor if len(tensor) <= 16 else tensor[:15] + "…") for tensor in tensors],
        side="top",
        tickangle=-40,
        ticklabeloverflow="allow",
        ticks="",
        showgrid=False,
        showline=False,
        range=[-0.6, start[tensors[-1]] + heads[tensors[-1]] - 0.4],
        fixedrange=True,
    )
    figure.update_yaxes(
        tickvals=[*range(len(rows)), *([len(rows) - 0.1] if several else [])],
        ticktext=[*(label(row) for row in rows), *(["head"] if several else [])],
        title={"text": "layer"},
        range=[len(rows) - (0.5 if not several else -0.3), -0.5],
        ticks="",
        showgrid=False,
        showline=False,
        fixedrange=True,
    )
    figure.update_layout(margin={"t": 64, "b": 8, "r": 44})


def attention_widths(runs: Sequence[Run], tensor: str) -> dict[str, list[int]]:
    """The data of one panel of Figure 4: the widths of all heads of all runs, by layer.

    Args:
        runs: Runs to pool.
        tensor: `q`, `k`, `v` or `probs`.
    """
    pooled: dict[str, list[int]] = {layer: [] for layer in layers_of(site for run in runs for site in run.bit_widths)}
    for run in runs:
        for site, widths in run.bit_widths.items():
            place = locate(site)
            if place.layer and place.tensor == tensor:
                pooled[place.layer].extend(widths)
    return {layer: widths for layer, widths in pooled.items() if widths}


def attention_figures(group: Group) -> dict[str, go.Figure]:
    """The four panels of the paper's Figure 4, for one group: title → box plots over heads, layer by layer."""
    figures = {}
    for tensor, title in ATTENTION_PANELS.items():
        widths = attention_widths(runs_with_widths(group), tensor)
        if not widths:
            continue
        means = "; ".join(f"{layer} {fmean(values):.1f}" for layer, values in widths.items())
        figure = new_figure(
            f"Learned bits of {title} over the heads of each layer. Means: {means}.", "layer", "bits", height=280
        )
        rows = dict(zip(widths, layer_labels(widths), strict=True))
        figure.add_box(
            x=[label(rows[layer]) for layer, values in widths.items() for _ in values],
            y=[width for values in widths.values() for width in values],
            line={"color": colour_of(group), "width": 1.5},
            boxpoints="outliers",
            marker={"symbol": "circle-open", "size": 6},
            showlegend=False,
        )
        figure.add_scatter(
            x=[label(rows[layer]) for layer in widths],
            y=[fmean(values) for values in widths.values()],
            mode="markers",
            marker={"symbol": "x-thin", "size": 8, "line": {"width": 2, "color": colour_of(group)}},
            hovertemplate="layer %{x}: mean %{y:.2f} bits<extra></extra>",
            showlegend=False,
        )
        figure.update_xaxes(type="category", showgrid=False)
        _bits_axis(figure)
        figures[title] = figure
    return figures


def gelu_widths(run: Run) -> dict[str, float]:
    """Width of the GELU output by layer (the mean, should there be several)."""
    found = {
        locate(site).layer: fmean(widths) for site, widths in run.bit_widths.items() if locate(site).tensor == GELU
    }
    return {layer: found[layer] for layer in layers_of(run.bit_widths) if layer in found}


def gelu_figure(groups: Sequence[Group]) -> go.Figure | None:
    """The paper's Figure 5: width of the GELU output by layer, and the uniform width of the same budget, dashed."""
    figure = new_figure("Learned bits of the GELU output by layer.", "layer", "bits", height=380)
    dashed: set[float] = set()
    for group in groups:
        drawn = [(run, widths) for run in runs_with_widths(group) if (widths := gelu_widths(run))]
        if not drawn:
            continue
        layers = list(drawn[0][1])
        rows = [label(row) for row in layer_labels(layers)]
        style = {"color": colour_of(group), "dash": "solid"}
        for run, widths in drawn:
            _gelu_line(
                figure,
                group,
                run_label(run, group),
                rows,
                list(widths.values()),
                {**style, "width": 1.2},
                len(drawn) > 1,
            )
        if len(drawn) > 1:
            means = [fmean(widths[layer] for _, widths in drawn if layer in widths) for layer in layers]
            name = f"{label(group.label)} (mean of {len(drawn)} seeds)"
            _gelu_line(figure, group, name, rows, means, {**style, "width": 3.5}, False)
        width = uniform_width(group.first)
        if width is not None and width not in dashed:
            dashed.add(width)
            figure.add_hline(y=width, line={"dash": "dash", "width": 1.5, "color": "rgba(128,128,128,0.9)"})
            at = {"x": 1, "xref": "paper", "xanchor": "left", "y": width}
            figure.add_annotation(**at, text=f" uniform {width:.3g}", showarrow=False, font={"size": 12})
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_layout(margin={"r": 80})
    _bits_axis(figure)
    return with_room(figure)


def _gelu_line(
    figure: go.Figure, group: Group, name: str, x: list[str], y: list[float], line: dict[str, object], thin_line: bool
) -> None:
    figure.add_scatter(
        x=x,
        y=y,
        name=name,
        mode="lines+markers",
        line=line,
        marker={"size": 5 if thin_line else 8},
        opacity=0.4 if thin_line else 1,
        legendgroup=str(group.index),
        showlegend=not thin_line,
        hovertemplate=f"{name}<br>layer %{{x}}: %{{y:.3~g}} bits<extra></extra>",
    )


def uniform_width(run: Run) -> float | None:
    """The width of the uniform model that costs as much as the run's budget.

    A budget such as `3bit` says it; for others it is interpolated between the uniform costs that the log gives. None
    if neither is known.
    """
    named = re.fullmatch(r"\s*(\d{1,2})\s*bits?\s*", run.budget or "", re.IGNORECASE)
    if named:
        return float(named.group(1))
    return _interpolated(run.log)


def _interpolated(log: Log) -> float | None:
    budget, known = log.budget_bit_operations, sorted(log.uniform_bit_operations.items())
    if budget is None:
        return None
    for (low, below), (high, above) in zip(known, known[1:], strict=False):
        if below <= budget <= above and above > below:
            return low + (high - low) * (budget - below) / (above - below)
    return None


def mean_width_figure(run: Run) -> go.Figure | None:
    """Mean width per kind of tensor over epochs, with the freeze marked."""
    epochs = [epoch for epoch in run.log.epochs if epoch.bit_widths]
    if not run.learned or not epochs:
        return None
    figure = new_figure(
        f"Mean bit-width per kind of tensor over {len(epochs)} epochs of {run.path.name}.",
        "epoch",
        "mean bits",
        height=420,
    )
    per_epoch = run.log.steps_per_epoch
    curves: dict[str, list[tuple[float, float]]] = {}
    for epoch in epochs:
        pooled: dict[str, list[float]] = {}
        for site, own in epoch.bit_widths.items():
            pooled.setdefault(locate(site).tensor, []).extend(own)
        for tensor, own in pooled.items():
            curves.setdefault(tensor, []).append((epoch.step / per_epoch if per_epoch else epoch.epoch, fmean(own)))
    for position, tensor in enumerate(tensors_of(site for epoch in epochs for site in epoch.bit_widths)):
        points = thin(curves[tensor])
        colour = TENSOR_COLOURS.get(tensor, COLOURS[position % len(COLOURS)])
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[round(y, 4) for _, y in points],
            name=label(tensor),
            mode="lines" if len(points) > 1 else "markers",
            line={"color": colour, "width": 2, "dash": "dash" if tensor.startswith("W_") else "solid"},
            hovertemplate=f"{label(tensor)}: %{{y:.2f}} bits<extra>epoch %{{x:.3~g}}</extra>",
        )
    freeze = run.log.freeze
    if freeze is not None and per_epoch:
        line = {"dash": "dot", "width": 1.5, "color": "rgba(128,128,128,0.9)"}
        text = {"text": "freeze", "font": {"size": 12}}
        figure.add_vline(x=freeze.step / per_epoch, line=line, annotation=text, annotation_position="top left")
    return figure


def runs_with_widths(group: Group) -> list[Run]:
    """The runs of a group whose widths mean something: finished ones if there are any."""
    return [run for run in group.finished if run.plan] or [run for run in group.runs if run.plan]


def _bits_axis(figure: go.Figure) -> None:
    figure.update_yaxes(dtick=1, range=[1.6, 8.4])

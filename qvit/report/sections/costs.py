"""What costs how much: bit operations and bytes by kind of tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import plotly.graph_objects as go

from qvit.report.figures import COLOURS, COST_NAMES, label, new_figure, with_room
from qvit.report.groups import Group
from qvit.report.markup import Canvas, escape, folded, muted, table
from qvit.report.sections.base import section
from qvit.report.sites import locate, tensors_of
from qvit.report.units import column, percent, titled, unit_for

# A product of two activations is counted at one of them.
PRODUCTS = {"k": "q·kᵀ", "v": "A·v"}


@section("costs", "What costs how much", order=100)
def costs(groups: Sequence[Group], canvas: Canvas) -> str:
    """A figure and a table for each cost."""
    parts = []
    for cost, (name, kind) in COST_NAMES.items():
        figure = cost_figure(groups, cost)
        if figure is None:
            continue
        heading = cost.replace("_", " ").capitalize()
        found = {group.label: values for group, values in _costs(groups, cost)}
        tensors = list(dict.fromkeys(tensor for values in found.values() for tensor in values))
        unit, cells = column([values.get(tensor) for tensor in tensors for values in found.values()], kind)
        rows = [[label(t), *cells[i * len(found) : (i + 1) * len(found)]] for i, t in enumerate(tensors)]
        header = [escape(titled(name, unit)), *map(escape, found)]
        parts.append(canvas.plot(f"costs-{kind}", [figure], heading=heading))
        parts.append(folded(f"{heading} as a table", table(header, rows)))
    note = "Means over seeds. A product of two activations, q·kᵀ or A·v, has bit operations but no weights."
    return muted(note) + "".join(parts) if parts else ""


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


def _costs(groups: Sequence[Group], cost: str) -> list[tuple[Group, dict[str, float]]]:
    """The groups that are not float and have costs."""
    return [(g, found) for g in groups if not g.is_float and (found := costs_by_tensor(g, cost))]


def cost_figure(groups: Sequence[Group], cost: str = "bit_operations") -> go.Figure | None:
    """A stacked bar per group that is not float: what each kind of tensor costs.

    Args:
        groups: All groups.
        cost: `bit_operations` or `weight_bytes`.
    """
    shown = _costs(groups, cost)
    if not shown:
        return None
    name, kind = COST_NAMES[cost]
    unit, size = unit_for([sum(values.values()) for _, values in shown], kind)
    alt = f"{name.capitalize()} by kind of tensor, a stacked bar per group."
    figure = new_figure(alt, titled(name, unit), "", height=190 + 44 * len(shown))
    both = [values for key in COST_NAMES for _, values in _costs(groups, key)]
    colours = dict(zip(dict.fromkeys(tensor for values in both for tensor in values), cycle(COLOURS), strict=False))
    for tensor in dict.fromkeys(tensor for _, values in shown for tensor in values):
        own = [values.get(tensor, 0.0) for _, values in shown]
        figure.add_bar(
            x=[value / size for value in own],
            y=[label(group.label) for group, _ in shown],
            text=[percent(value / sum(values.values())) for value, (_, values) in zip(own, shown, strict=True)],
            name=label(tensor),
            orientation="h",
            textposition="none",
            marker={"color": colours[tensor], "line": {"width": 0.5, "color": "rgba(255,255,255,0.8)"}},
            hovertemplate=f"{label(tensor)}: %{{x:.4~g}} {unit} (%{{text}})<extra>%{{y}}</extra>",
        )
    legend = {"traceorder": "normal", "entrywidth": 20 + 6 * max(map(len, colours))}
    figure.update_layout(barmode="stack", legend=legend)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return with_room(figure)

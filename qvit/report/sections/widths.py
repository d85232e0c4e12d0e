"""Learned bit-widths: the map of every run with mixed widths, and the paper's Table 2 of first and last layers.

The sections on widths follow Figures 4 and 5 and Table 2 of the Q-ViT paper (Li et al. 2022, arXiv 2201.07703).
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from qvit.report.groups import Group, runs_of
from qvit.report.markup import Canvas, escape, muted, select, table, variants
from qvit.report.runs import Run
from qvit.report.sections.base import section
from qvit.report.sites import locate
from qvit.report.widths import draw_maps, has_map, map_of


@section("widths", "Learned bit-widths", order=30)
def widths(groups: Sequence[Group], canvas: Canvas) -> str:
    """The maps, or a sentence where all widths are uniform, and what is said of uniform groups and outer layers."""
    if not any(run.plan for _, run in runs_of(groups)):
        return ""
    others = _uniform_note(groups) + _boundary_table(groups)
    shown = [(group, run, figure) for group, run in runs_of(groups) if has_map(run) and (figure := width_map(run))]
    if not shown:
        return f"<p>No run has learned bit-widths, so there is no map to draw.</p>{others}"
    box = select("map-run", "Run", [group.name_of(run) for group, run, _ in shown], ["map"])
    states = [
        "" if run.finished else f'<p class="warning">This run is not finished ({escape(run.state)}).</p>'
        for _, run, _ in shown
    ]
    return box + variants("map-run", states) + draw_maps(canvas, [figure for _, _, figure in shown]) + others


def width_map(run: Run) -> go.Figure | None:
    """The plan of a run as a map."""
    return map_of(run.bit_widths, run.path.name)


def _uniform_note(groups: Sequence[Group]) -> str:
    """Which groups have one width inside the layers, as HTML."""
    uniform: dict[int, list[str]] = {}
    for group in groups:
        inner = {w for site, ws in group.first.bit_widths.items() if locate(site).layer for w in ws}
        if len(inner) == 1 and not any(map(has_map, group.runs)):
            uniform.setdefault(inner.pop(), []).append(escape(group.label))
    parts = "; ".join(f"{bits} bits in {', '.join(names)}" for bits, names in sorted(uniform.items(), reverse=True))
    return muted(f"Uniform in all layers but the first and the last: {parts}.") if parts else ""


def _boundary_table(groups: Sequence[Group]) -> str:
    """Widths of the sites outside of layers: the paper's Table 2."""
    plans = [(group.label, [run.bit_widths for run in group.runs if run.plan]) for group in groups]
    plans = [(name, own) for name, own in plans if own]
    sites = dict.fromkeys(site for _, own in plans for plan in own for site in plan if not locate(site).layer)
    if not sites:
        return ""

    def cell(own: Sequence[dict[str, tuple[int, ...]]], site: str) -> str:
        found = [", ".join(map(str, plan.get(site, ("float",)))) for plan in own]
        return found[0] if len(set(found)) == 1 else " / ".join(found)

    rows = [[escape(name), *(cell(own, site) for site in sites)] for name, own in plans]
    several = any(" / " in entry for _, *cells in rows for entry in cells)
    note = muted("Where seeds differ, one width per seed." if several else "")
    header = ["runs", *(f"<code>{escape(site)}</code>" for site in sites)]
    return f"<h3>First and last layers (bits)</h3>{note}{table(header, rows)}"

"""What method `pmq` chose along its frontier, and which patches of some test images got which bits."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from qvit.documents.run import Search
from qvit.report.figures import COLOURS, marks, new_figure
from qvit.report.frontier import LOG_AXIS
from qvit.report.groups import Group, runs_of
from qvit.report.markup import Canvas, escape, muted
from qvit.report.patches import RANKING, draw_image
from qvit.report.runs import Run
from qvit.report.sections.base import section
from qvit.report.units import bops_text, significant, titled, unit_for


@section("patches", "Class token and patches", order=45)
def patches(groups: Sequence[Group], canvas: Canvas) -> str:
    """The frontier of each run that has one, and its picture."""
    found = [
        (group.name_of(run), run)
        for group, run in runs_of(groups)
        if run.patches is not None or (run.result is not None and run.result.search is not None)
    ]
    parts = [_of_run(str(n), name if len(found) > 1 else "", run, canvas) for n, (name, run) in enumerate(found)]
    return "".join(parts) + (muted(RANKING) if any(run.patches for _, run in found) else "")


def _of_run(number: str, name: str, run: Run, canvas: Canvas) -> str:
    parts = [f"<h3>{escape(name)}</h3>" if name else ""]
    if run.result is not None and run.result.search is not None:
        parts += [muted(_sentence(run.result.search)), canvas.plot(f"pmq-{number}", [_frontier(run.result.search)])]
    if run.patches is not None:
        parts.append(muted("Violet patches have the lower width at the input of the block's MLP."))
        parts += [draw_image(f"{number}-{n}", image.model_dump()) for n, image in enumerate(run.patches.images)]
    return "".join(parts)


def _sentence(search: Search) -> str:
    chosen, seconds = search.chosen, sum(search.seconds.values())
    proven = "each the best of all at its price" if search.exact else "each a good one at its price, without proof"
    return (
        f"Chosen by {escape(search.metric)} on {search.images} images in {significant(seconds)} seconds, from "
        f"{len(search.frontier)} plans, {proven}. Of the activations {chosen.class_token} have a width for the class "
        f"token alone, {chosen.split} have patches of two widths."
    )


def _frontier(search: Search) -> go.Figure:
    unit, size = unit_for([point.bit_operations for point in search.frontier], "bops")
    title = titled("bit operations", unit)
    alt = f"Predicted loss increase against {title} of {len(search.frontier)} plans, and the one that was chosen."
    figure = new_figure(alt, title, "predicted loss increase", height=380)
    figure.update_yaxes(**LOG_AXIS, dtick="D2")
    for name, points, style in (
        ("frontier", search.frontier, {"mode": "lines+markers", "marker": {"size": 6, "color": COLOURS[0]}}),
        ("chosen", [search.chosen], {"mode": "markers", "marker": {"size": 14, "color": COLOURS[1], "symbol": "star"}}),
    ):
        texts = [
            f"{bops_text(point.bit_operations)}<br>class token alone {point.class_token}, split {point.split}"
            for point in points
        ]
        places = [(point.bit_operations / size, point.predicted_loss or None) for point in points]
        marks(figure, places, name, "%{text}<br>predicted loss %{y:.3~g}", text=texts, **style)
    return figure

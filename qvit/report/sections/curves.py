"""Training curves: loss, accuracy on held-out images and learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from qvit.report.figures import MAX_POINTS, new_figure, run_line, with_room
from qvit.report.groups import Group
from qvit.report.markup import Canvas, escape, grid, muted
from qvit.report.runs import Run
from qvit.report.sections.base import section

Points = list[tuple[int, float | None]]


def _losses(run: Run) -> Points:
    return [(step.step, step.loss) for step in run.log.steps]


def _held_out(run: Run) -> Points:
    return [(epoch.step, epoch.accuracy) for epoch in run.log.epochs if epoch.accuracy is not None]


def _learning_rates(run: Run) -> Points:
    return [(step.step, step.lr) for step in run.log.steps]


CURVES = {
    "Training loss": ("loss", _losses),
    "Accuracy on held-out training images": ("accuracy (%)", _held_out),
    "Learning rate": ("learning rate", _learning_rates),
}


@section("curves", "Training curves", order=80)
def curves(groups: Sequence[Group], canvas: Canvas) -> str:
    """A figure per curve that was logged."""
    drawn = enumerate(curve_figures(groups).items())
    plots = [canvas.plot(f"curve-{index}", [figure], heading=escape(title)) for index, (title, figure) in drawn]
    note = f"One line per run, seeds of a group in one colour, at most {MAX_POINTS} points per line."
    return grid(plots) + muted(note) if plots else ""


def curve_figures(groups: Sequence[Group]) -> dict[str, go.Figure]:
    """Title → figure over training steps, as far as it was logged."""
    figures = {}
    for title, (axis, points_of) in CURVES.items():
        figure = new_figure(f"{title} over training steps.", "training step", axis, height=340)
        if points_of is not _held_out:
            figure.update_yaxes(exponentformat="power")
        for group in groups:
            drawn = [(run, points_of(run)) for run in group.runs]
            drawn = [(run, points) for run, points in drawn if any(y is not None for _, y in points)]
            for position, (run, points) in enumerate(drawn):
                run_line(figure, group, run, points, first=position == 0)
        if with_room(figure) is not None:
            figures[title] = figure
    return figures

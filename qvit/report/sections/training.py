"""Widths and budget during training: bit operations over steps, and the mean width per kind of tensor over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go

from qvit.report.figures import COLOURS, DASHED, colour_of, label, line, marks, new_figure, run_line, with_room
from qvit.report.groups import Group, runs_of
from qvit.report.markup import Canvas, select
from qvit.report.runs import Run
from qvit.report.sections.base import section
from qvit.report.sites import GELU, locate, tensors_of
from qvit.report.units import bops_text, titled, unit_for

# Partners of a product share a colour; weights are dashed.
PARTNERS = (("qkv in",), ("q", "W_q"), ("k", "W_k"), ("v", "W_v"), ("probs",), ("output", "W_o"), ("fc1 in", "W_fc1"))
TENSOR_COLOURS = {name: COLOURS[i] for i, names in enumerate((*PARTNERS, (GELU, "W_fc2"))) for name in names}


@section("training", "Widths and budget during training", order=60)
def training(groups: Sequence[Group], canvas: Canvas) -> str:
    """Of the runs that learn widths."""
    parts = []
    overall = bit_operations_figure(groups)
    if overall is not None:
        caption = (
            "One line per run. Dashed lines are the budgets; a diamond marks the freeze, after which widths are fixed."
        )
        parts.append(canvas.plot("budget", [overall], caption, "Bit operations over training steps"))
    means = [(group.name_of(run), figure) for group, run in runs_of(groups) if (figure := mean_width_figure(run))]
    if means:
        box = select("means-run", "Run", [name for name, _ in means], ["means"])
        caption = "Weights are dashed, activations solid; partners of a product share a colour."
        plot = canvas.plot("means", [figure for _, figure in means], caption)
        parts.append(f"<h3>Mean width per kind of tensor</h3>{box}{plot}")
    return "".join(parts)


def bit_operations_figure(groups: Sequence[Group]) -> go.Figure | None:
    """Bit operations during training of the runs that learn widths, with their budgets and the freeze."""
    shown = [(group, run) for group, run in runs_of(groups) if run.learned and run.log.steps]
    values = [step.bit_operations for _, run in shown for step in run.log.steps if step.bit_operations]
    if not values:
        return None
    unit, size = unit_for(values, "bops")
    alt = f"Bit operations over training steps of {len(shown)} runs, with the budget as a dashed line."
    figure = new_figure(alt, "training step", titled("bit operations", unit), height=400)
    seen: set[int] = set()
    for group, run in shown:
        points = [
            (step.step, None if step.bit_operations is None else step.bit_operations / size) for step in run.log.steps
        ]
        run_line(figure, group, run, points, first=group.index not in seen)
        of_group = {"legendgroup": str(group.index)}
        budget, freeze = run.log.budget_bit_operations, run.log.freeze
        if budget is not None and group.index not in seen:
            last = max(member.log.last_step for member in group.runs)
            own = {"mode": "lines", "line": DASHED | {"color": colour_of(group)}, **of_group}
            hover = f"budget of {label(group.label)}: {bops_text(budget)}"
            marks(figure, [(0, budget / size), (last, budget / size)], hover=hover, **own)
        if freeze is not None and freeze.bit_operations is not None:
            diamond = {"symbol": "diamond", "size": 10, "color": colour_of(group), "line": {"width": 1}}
            hover = f"{label(group.name_of(run))}: frozen at step {freeze.step}, {bops_text(freeze.bit_operations)}"
            marks(figure, [(freeze.step, freeze.bit_operations / size)], hover=hover, marker=diamond, **of_group)
        seen.add(group.index)
    return with_room(figure)


def mean_width_figure(run: Run) -> go.Figure | None:
    """Mean width per kind of tensor over epochs, with the freeze marked; None if the run learns no widths."""
    epochs = [epoch for epoch in run.log.epochs if epoch.bit_widths]
    if not run.learned or not epochs:
        return None
    alt = f"Mean bit-width per kind of tensor over {len(epochs)} epochs of {run.path.name}."
    figure = new_figure(alt, "epoch", "mean bits", height=420)
    per_epoch, freeze = run.log.steps_per_epoch, run.log.freeze
    curves: dict[str, list[tuple[float, float]]] = {}
    for epoch in epochs:
        pooled: dict[str, list[float]] = {}
        for site, own in epoch.bit_widths.items():
            pooled.setdefault(locate(site).tensor, []).extend(own)
        for tensor, own in pooled.items():
            at = epoch.step / per_epoch if per_epoch else epoch.epoch
            curves.setdefault(tensor, []).append((at, round(fmean(own), 4)))
    for position, tensor in enumerate(tensors_of(site for epoch in epochs for site in epoch.bit_widths)):
        colour = TENSOR_COLOURS.get(tensor, COLOURS[position % len(COLOURS)])
        hover = f"{label(tensor)}, epoch %{{x:.3~g}}: %{{y:.2f}} bits"
        line(
            figure, curves[tensor], tensor, hover, colour, width=2, dash="dash" if tensor.startswith("W_") else "solid"
        )
    if freeze is not None and per_epoch:
        text = {"text": "freeze", "font": {"size": 12}}
        at = freeze.step / per_epoch
        figure.add_vline(x=at, line=DASHED | {"dash": "dot"}, annotation=text, annotation_position="top left")
    return figure

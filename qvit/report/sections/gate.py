"""What an accuracy gate tried: a row for each plan, and how sure its answer is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qvit.documents.run import Gate, GateTrial
from qvit.report.groups import Group, runs_of
from qvit.report.markup import Canvas, escape, muted, table_of
from qvit.report.sections.base import section
from qvit.report.units import bops_text, bytes_text, fixed

COLUMNS: dict[str, Callable[[GateTrial], str]] = {
    "plan": lambda trial: escape(trial.plan),
    "step": lambda trial: trial.step,
    "BOPs": lambda trial: bops_text(trial.bit_operations),
    "weights": lambda trial: bytes_text(trial.weight_bytes),
    "loses (points)": lambda trial: fixed(trial.drop),
    "images": lambda trial: str(trial.images),
    "within": lambda trial: "yes" if trial.within else "no",
}


@section("gate", "Accuracy gate", order=25)
def gate(groups: Sequence[Group], canvas: Canvas) -> str:
    """A sentence and a table for each run that had a gate."""
    found = [
        (group.name_of(run), run.result.gate)
        for group, run in runs_of(groups)
        if run.result is not None and run.result.gate is not None
    ]
    return "".join(_of_run(name if len(found) > 1 else "", one) for name, one in found)


def _of_run(name: str, gate: Gate) -> str:
    lost = f"loses {fixed(gate.drop)} points of top-1"
    if gate.measure == "agreement":
        lost = f"changes {fixed(gate.drop)} % of the answers"
    if gate.measure == "features":
        lost = f"moves features by {fixed(gate.drop)} points, 100 · (1 - cosine)"
    sentence = (
        f"The cheapest plan by {escape(gate.objective)} within {gate.max_drop:g} points. It {lost} on {gate.images} "
        f"training images that neither calibrated nor chose it: at most {gate.max_drop:g} with a confidence of "
        f"{100 * gate.confidence:.0f} %, at most {fixed(gate.drop_at_most)} with 95 %."
    )
    bold = [trial.within and trial.step == "confirm" for trial in gate.trials]
    title = f"<h3>{escape(name)}</h3>" if name else ""
    return title + muted(sentence) + table_of(COLUMNS, gate.trials, bold=bold)

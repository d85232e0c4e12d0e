"""The summary: a row per group of runs."""

from __future__ import annotations

from collections.abc import Sequence

from qvit.report.groups import Group
from qvit.report.markup import Canvas, escape, muted, table
from qvit.report.sections.base import section
from qvit.report.tables import display_table, results_table

NOTE = (
    "Mean over seeds ± sample standard deviation. Costs are for one image, weights are packed. “Points vs float” "
    "is the difference in accuracy; “BOPs vs float” says by how much the float model's bit operations are divided."
)


@section("results", "Results", order=10)
def results(groups: Sequence[Group], canvas: Canvas) -> str:
    """The table of `results_table`."""
    header, cells = display_table(results_table([run for group in groups for run in group.runs]))
    rows = [[escape(cell) for cell in row] for row in cells]
    return muted(NOTE) + table([escape(cell) for cell in header], rows, text=header.index("budget") + 1)

"""Tables and one self-contained HTML page about runs, from their JSON files alone.

    runs = load_runs(["demo-output"])            # run directories, or a directory with many in `runs/`
    rows = results_table(runs)                   # mean ± deviation over seeds, per model, method and budget
    write_page(runs, Path("report.html"))        # plotly.js inside; opens without a network
    write_frontier_page(frontier, "page.html")   # data of `qvit allocate --frontier`

This part knows nothing of models and tensors, and needs no torch: it can read runs of any machine, with neither the
model nor the data at hand. A section of the page is a file in `qvit.report.sections`.
"""

from __future__ import annotations

from qvit.report.frontier import write_frontier_page
from qvit.report.groups import Group, group_runs, mean_std
from qvit.report.page import write_page
from qvit.report.reader import load_run, load_runs
from qvit.report.runs import Run
from qvit.report.tables import display_table, markdown_table, results_table, verdict

__all__ = [
    "Group",
    "Run",
    "display_table",
    "group_runs",
    "load_run",
    "load_runs",
    "markdown_table",
    "mean_std",
    "results_table",
    "verdict",
    "write_frontier_page",
    "write_page",
]

"""The report's section on oscillation: what it draws, and that runs without records, or with broken ones, render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import write_run

from qvit.report.page import render_page
from qvit.report.reader import load_run
from qvit.report.sections.oscillation import oscillation_figure, spread_figure

SITES = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.weight", "blocks.1.attn.proj.weight")


def record(step: int, **changes: Any) -> dict[str, Any]:
    rows = {
        site: {"oscillating": 0.1 * (i + 1) * step / 40, "variation": 1.2 + i, "outliers": 4.0 + i}
        for i, site in enumerate(SITES)
    }
    return {"event": "diagnostics", "epoch": step // 20 - 1, "step": step, "sites": rows | changes}


def with_records(folder: Path, *records: Any) -> Path:
    write_run(folder, "vvtq", "3bit")
    with (folder / "log.jsonl").open("a") as log:
        log.writelines(json.dumps(one) + "\n" for one in records)
    return folder


def test_figures_hold_the_numbers_of_the_log(tmp_path: Path) -> None:
    run = load_run(with_records(tmp_path / "run", record(20), record(40)))
    traces: Any = {trace.name: trace for trace in oscillation_figure(run).data}
    assert set(traces) == {"W<sub>fc1</sub>", "W<sub>o</sub>", "patch_embed.proj.weight"}
    assert list(traces["W<sub>fc1</sub>"].x) == [20, 40]
    assert list(traces["W<sub>fc1</sub>"].y) == pytest.approx([12.5, 25.0]), "the mean of two layers, in percent"
    spread: Any = {trace.name: trace for trace in spread_figure(run, "variation").data}
    assert list(spread["W<sub>fc1</sub>"].y) == [2.2, 3.2] and list(spread["W<sub>o</sub>"].y) == [None, 4.2]


def test_the_page_has_the_section_and_its_table(tmp_path: Path) -> None:
    runs = [load_run(with_records(tmp_path / "a", record(20))), load_run(write_run(tmp_path / "b", "lsq+"))]
    page = render_page(runs)
    assert 'id="oscillation"' in page and "All weights at the last epoch" in page
    assert page.count("blocks.1") >= 1 and 'id="oscillation"' not in render_page(runs[1:])


def test_records_that_are_broken_leave_gaps(tmp_path: Path) -> None:
    broken = [
        record(20, **{SITES[1]: {"oscillating": None}}),
        {**record(40), "sites": [1]},
        {**record(60), "sites": {}},
    ]
    run = load_run(with_records(tmp_path / "run", *broken))
    assert run.log.diagnostics[0].sites[SITES[1]].variation is None
    assert 'id="oscillation"' in render_page([run])

"""Sections of the report register themselves; one from a package of somebody else takes its place among qvit's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import write_run

import qvit
from qvit.errors import QvitError
from qvit.report import load_run
from qvit.report.groups import group_runs
from qvit.report.markup import Canvas
from qvit.report.page import render_page
from qvit.report.sections.base import SECTIONS, section
from qvit.report.shell import asset

PLUGIN = """
from qvit.report.figures import line, new_figure
from qvit.report.sections.base import section

@section("losses", "Losses <of each run>", order=75)
def losses(groups, canvas):
    figure = new_figure("Losses.", "step", "loss")
    for group in groups:
        for run in group.runs:
            line(figure, [(s.step, s.loss) for s in run.log.steps], group.name_of(run), "%{y}", "#123456")
    return canvas.plot("losses", [figure], caption="One line per run.")
"""
SHOW = """
import re, sys
from pathlib import Path
from qvit.report import load_run, write_page
page = write_page([load_run(sys.argv[1])], sys.argv[2]).read_text(encoding="utf-8")
print(*re.findall('<section id="([^"]+)"', page))
assert 'id="plot-losses"' in page and "Losses &lt;of each run&gt;" in page and "One line per run." in page
assert not {"torch", "timm"} & set(sys.modules), "a report needs neither"
"""


def test_a_section_of_another_package_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "more_sections.py").write_text(PLUGIN)
    info = tmp_path / "more_sections-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-sections\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qvit.plugins]\nsections = more_sections\n")
    run = write_run(tmp_path / "run")
    paths = os.pathsep.join([str(tmp_path), str(Path(qvit.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", SHOW, str(run), str(tmp_path / "page.html")],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert names[names.index("freeze") : names.index("curves") + 1] == ["freeze", "losses", "curves"]


def test_sections_stand_by_their_order_and_empty_ones_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(SECTIONS)
    monkeypatch.setattr(SECTIONS, "_found", dict(SECTIONS))
    section("last", "Last", order=999)(lambda groups, canvas: f"<p>{len(groups)} group</p>")
    section("first", "First", order=0)(lambda groups, canvas: "<p>first</p>")
    section("nothing", "Nothing", order=1)(lambda groups, canvas: "")
    page = render_page([load_run(write_run(tmp_path / "run"))])
    assert page.index('<section id="first"') < page.index('<section id="results"') < page.index('<section id="last"')
    assert "1 group" in page and 'id="nothing"' not in page


def test_each_section_draws_groups_on_its_own(tmp_path: Path) -> None:
    groups = group_runs([load_run(write_run(tmp_path / "run"))])
    orders = [one.order for one in SECTIONS.values()]
    assert len(set(orders)) == len(orders) == 12
    for name, one in SECTIONS.items():
        canvas = Canvas()
        body = one.render(groups, canvas)
        assert name == one.name and (body or name in ("oscillation", "gate", "patches"))
        assert all(f'id="plot-{figure}"' in body for figure in canvas.figures)


def test_assets_are_files_of_the_package() -> None:
    folder = Path(qvit.__file__).parent / "report" / "assets"
    assert {"page.html", "page.css", "page.js", "frontier.js"} <= {file.name for file in folder.iterdir()}
    for file in folder.iterdir():
        assert asset(file.name) == file.read_text(encoding="utf-8")
    pattern = '"report/assets/*"'
    project = folder.parents[2] / "pyproject.toml"
    assert not project.exists() or pattern in project.read_text(encoding="utf-8"), "wheels carry them, too"


def test_an_accuracy_gate_shows_its_trials_and_how_sure_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "ptq")
    trial = {"step": "search", "bit_operations": 45_000_000, "weight_bytes": 31_000, "images": 256, "gained": 0}
    trials = [
        {**trial, "plan": "w8a8", "drop": 0.0, "within": True, "lost": 0},
        {**trial, "plan": "w<4>a4", "drop": 6.25, "within": False, "lost": 16},
        {**trial, "plan": "w8a8", "step": "confirm", "drop": 0.390625, "within": True, "lost": 1},
    ]
    found = {
        "max_drop": 0.5, "objective": "bops", "measure": "agreement", "drop": 0.390625, "images": 256,
        "confidence": 0.3678, "drop_at_most": 1.84, "search_drop": 0.0, "search_images": 256, "trials": trials,
    }  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"gate": found}))
    body = SECTIONS["gate"].render(group_runs([load_run(run)]), Canvas())
    assert "It changes 0.39 % of the answers on 256 training images that neither calibrated nor chose it" in body
    assert "with a confidence of 37 %, at most 1.84 with 95 %" in body
    assert body.count("<tr") == 4 and "6.25" in body and "w&lt;4&gt;a4" in body
    (run / "result.json").write_text(json.dumps(result | {"gate": {**found, "confidence": 2}}))
    with pytest.raises(QvitError, match=r"result\.json: key 'gate\.confidence' must be at most 1"):
        load_run(run)

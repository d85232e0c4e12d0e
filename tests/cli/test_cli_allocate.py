"""`qvit sensitivity` and `qvit allocate` from images to a plan that training starts from, and the frontier's page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import QUICK, SMALL_DIGITS, Qvit
from command_line import qvit as qvit  # a fixture
from image_sets import make_images
from safetensors.torch import save_file
from tiny_models import digits_model

from qvit.allocate import allocate_plan, frontier_report
from qvit.cli.allocation import _training_images
from qvit.errors import UsageError
from qvit.measure import Sensitivity
from qvit.models.families import inspect_model
from qvit.plan.budget import parse_budget
from qvit.plan.quant_plan import QuantPlan
from qvit.report import write_frontier_page
from qvit.report.frontier import render_frontier
from qvit.runs.requests import Request

ARGS = SMALL_DIGITS[1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("allocation")


@pytest.fixture
def weights(folder: Path) -> Path:
    file = folder / "digits.safetensors"
    if not file.is_file():
        save_file(digits_model().state_dict(), str(file))
    return file


@pytest.fixture
def measured(folder: Path, weights: Path, qvit: Qvit) -> Path:
    file = folder / "s.json"
    if not file.is_file():
        answer = qvit(
            "sensitivity", *SMALL_DIGITS, "--weights", weights, "--data", "digits", "--images", 8, "--out", file
        )
        assert answer.code == 0, answer.err
        assert "fisher on 8 images" in answer.out and "blocks.attn.probs" in answer.out
    return file


def test_the_file_is_what_the_library_measures(measured: Path, weights: Path, folder: Path, qvit: Qvit) -> None:
    found = Sensitivity.load(measured)
    assert found.model == "vit_digits" and found.images == 8 and found.widths == tuple(range(2, 9))
    again = folder / "again.json"
    options = ("--data", "digits", "--images", 8, "--json", "--out", again, "--type-normalised")
    data = qvit("sensitivity", *SMALL_DIGITS, "--weights", weights, *options).json
    assert data["type_normalised"] is True
    assert Sensitivity.from_json(data).raw["head.weight"].tolist() == found.raw["head.weight"].tolist()


def test_kl_keeps_and_removes_its_partial_file(weights: Path, folder: Path, qvit: Qvit) -> None:
    out = folder / "kl.json"
    options = ("--metric", "kl", "--widths", "2,8", "--images", 4, "--data", "digits", "--out", out)
    assert qvit("sensitivity", *SMALL_DIGITS, "--weights", weights, *options).code == 0
    assert Sensitivity.load(out).metric == "kl" and not Path(f"{out}.partial").exists()


def test_images_of_one_per_class_are_all_taken(folder: Path, weights: Path) -> None:
    few = make_images(folder / "few", {"a": 1, "b": 1, "c": 1})
    many = make_images(folder / "many", {"a": 10, "b": 10})
    assert len(_training_images(Request(model="vit_digits", data=str(few)))) == 3
    assert len(_training_images(Request(model="vit_digits", data=str(many)))) == 16


@pytest.mark.parametrize("method", ["lsq", "lsq+", "qvit"])
def test_training_starts_from_an_allocated_plan(
    method: str,
    measured: Path,
    weights: Path,
    folder: Path,
    qvit: Qvit,
) -> None:
    plan = folder / f"{method}.json"
    assert qvit("allocate", measured, *ARGS, "--budget", "4bit", "--out", plan).code == 0
    cost = inspect_model(digits_model())
    widths = QuantPlan.load(plan).widths()
    assert cost.bit_operations(widths) <= parse_budget("4bit", cost)
    run = folder / f"run-{method}"
    budget = ("--budget", "4bit") if method == "qvit" else ()
    options = ("--method", method, "--plan", plan, "--weights", weights, "--data", "digits", "--out", run)
    result = qvit("train", *SMALL_DIGITS, *options, *budget, *QUICK, "--json").json
    assert result["method"] == method
    if method != "qvit":
        assert QuantPlan.load(run).widths() == widths
    else:
        learned = folder / "learned.json"
        answer = qvit("sensitivity", run, "--metric", "learned", "--json", "--out", learned).json
        assert answer["metric"] == "learned" and answer["model"] == "vit_digits" and answer["images"] == 0
        assert qvit("allocate", learned, *ARGS, "--budget", "3bit", "--out", folder / "p.json").code == 0


def test_several_budgets_pins_ties_and_the_frontier(measured: Path, folder: Path, qvit: Qvit) -> None:
    page, out = folder / "frontier.html", folder / "plans" / "digits.json"
    options = ("--budget", "65%", "--budget", "80%", "--pin", "blocks.0.mlp.*=8", "--frontier", page)
    tie = ("--tie", "blocks.*.attn.query=blocks.*.attn.key", "--boundary", "free", "--solver", "greedy")
    answer = qvit("allocate", measured, *ARGS, *options, *tie, "--out", out, "--json").json
    assert [row["budget"] for row in answer["plans"]] == ["65%", "80%"]
    for row in answer["plans"]:
        widths = QuantPlan.load(row["plan"]).widths()
        assert widths["blocks.0.mlp.fc1.weight"] == (8,)
        assert widths["blocks.0.attn.query"] == widths["blocks.0.attn.key"]
        assert inspect_model(digits_model()).bit_operations(widths) == row["bit_operations"]
    assert (out.parent / "digits-80percent.json").is_file()
    assert page.stat().st_size > 1_000_000
    data = folder / "frontier.json"
    assert qvit("allocate", measured, *ARGS, "--frontier", data, "--points", 7).code == 0
    report = json.loads(data.read_text())
    assert len(report["points"]) == 7 and report["exact"] and report["unit"] == "bit_operations"


def test_wrong_use_is_said_in_one_line(measured: Path, folder: Path, weights: Path, qvit: Qvit) -> None:
    plan = ("--out", folder / "never.json")
    small = ("sensitivity", *SMALL_DIGITS, *plan)
    assert "needs training images" in qvit(*small).failed(2)
    assert "--weights FILE or --pretrained" in qvit(*small, "--data", "digits").failed(2)
    digits = (*small, "--data", "digits", "--weights", weights)
    assert "unknown metric 'hesian'; did you mean 'hessian'" in qvit(*digits, "--metric", "hesian").failed(2)
    assert "neither a range" in qvit(*digits, "--widths", "2;3").failed(2)
    assert "too few images" in qvit(*digits, "--images", 2).failed(1)
    assert "leave out --data" in qvit(*digits, "--metric", "learned").failed(2)
    allocate = ("allocate", measured, *ARGS)
    assert "give --budget and --out" in qvit(*allocate, "--budget", "4bit").failed(2)
    assert "must end in .html or .json" in qvit(*allocate, "--frontier", "x.txt").failed(2)
    assert "boundary 'first'" in qvit(*allocate, *plan, "--budget", "4bit", "--boundary", "first").failed(2)
    assert "unknown solver 'x'" in qvit(*allocate, *plan, "--budget", "4bit", "--solver", "x").failed(2)
    assert "impossible" in qvit(*allocate, *plan, "--budget", "0.01%").failed(1)
    assert "lacks" in qvit(
        "allocate", measured, "-m", "depth=2", "-m", "embed_dim=16", *plan, "--budget", "4bit"
    ).failed(2)
    assert "no sensitivity at" in qvit("allocate", folder / "none.json", *plan, "--budget", "4bit").failed(1)
    assert not (folder / "never.json").exists()


# ---- The page ----


def report(against: bool = True) -> dict[str, Any]:
    cost = inspect_model(digits_model(depth=2))
    generator = np.random.default_rng(0)
    fields: dict[str, Any] = {"metric": "fisher", "images": 8, "seed": 0, "seconds": 1.0}

    def table(model: str) -> Sensitivity:
        raw = {
            name: 10 ** generator.uniform(-2, 1, (site.layout.num_heads, 1)) * 4.0 ** -np.arange(2, 9)
            for name, site in cost.sites.items()
        }
        return Sensitivity.from_raw(raw, model=model, widths=tuple(range(2, 9)), **fields)

    own = table("<b>vit</b>")
    chosen = [("4bit", allocate_plan(cost, own, "4bit").widths())]
    return frontier_report(cost, own, chosen, points=9, against=table("vit") if against else None)


def test_the_page_escapes_and_says_what_is_marked() -> None:
    page = render_frontier(report())
    assert "<b>vit</b>" not in page and "&lt;b&gt;vit" in page
    assert "Predicted against measured" in page and "9 points of the frontier" in page
    assert "Budget 4bit: predicted loss increase" in page and "uniform 4 bits" in page
    assert "Predicted against measured" not in render_frontier(report(against=False))
    with pytest.raises(UsageError, match="not a frontier"):
        render_frontier({"format": "qvit-plan"})


def test_a_frontier_of_milliseconds_shows_times() -> None:
    data = report(against=False) | {"unit": "milliseconds", "chosen": [], "uniform": []}
    assert " ms" in render_frontier(data)


@pytest.mark.browser
def test_the_slider_moves_the_point_and_the_map(tmp_path: Path, browser_path: str) -> None:
    page = write_frontier_page(report(), tmp_path / "f.html")
    text = page.read_text(encoding="utf-8")
    probe = """
    addEventListener("load", () => setTimeout(() => {
      const state = () => [document.querySelector('[data-fact="bops"]').textContent,
        [...document.querySelectorAll("#plot-map .heatmap-label")].map((one) => one.textContent).join("")];
      const seen = { errors: window.failures, before: state() };
      const slider = document.getElementById("point");
      slider.value = 8;
      slider.dispatchEvent(new Event("input"));
      setTimeout(() => {
        seen.after = state();
        seen.plots = document.body.dataset.plots;
        seen.failed = document.body.dataset.failed;
        document.body.setAttribute("data-probe", JSON.stringify(seen));
      }, 500);
    }, 500));
    window.failures = [];
    addEventListener("error", (event) => window.failures.push(event.message));
    document.addEventListener("securitypolicyviolation", (event) => window.failures.push(event.blockedURI));
    """
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    page.write_text(text.replace("<style>", f"<script>{probe}</script><style>", 1), encoding="utf-8")
    command = [browser_path, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    match = re.search(r'data-probe="([^"]*)"', dom)
    assert match is not None, dom[-2000:]
    seen = json.loads(html.unescape(match.group(1)))
    assert seen["errors"] == [] and seen["plots"] == "3" and seen["failed"] == "0"
    assert seen["before"][0] != seen["after"][0]
    assert set(seen["after"][1]) - set("01") == {"8"} and set(seen["before"][1]) - set("01") != {"8"}

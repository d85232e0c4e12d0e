"""The page of evidence: tables, sentences and figures are made of the files of results, by rule."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from test_readme import ROOT, render_module, unwrapped

ORIGIN = {"command": "python run.py", "hardware": "CPU", "date": "2020-01-02", "versions": {"torch": "1"}}


def benchmark(name: str) -> Any:
    """A module of `benchmarks/measure`."""
    folder = ROOT / "benchmarks/measure"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def row(part: str, budget: str, name: str, accuracies: list[float], **other: Any) -> dict[str, Any]:
    bits = float(budget[0])
    widths = {"attn.query": bits, "attn.key": bits, "attn.value": bits, "attn.probs": bits, "mlp.fc2.input": bits}
    return {
        "part": part, "budget": budget, "row": name, "method": name, "method_options": {},
        "accuracy_mean": sum(accuracies) / len(accuracies), "accuracy_std": 1.0, "accuracies": accuracies,
        "float_accuracies": [50.0, 51.0], "bit_operations": int(12_300_000 * bits**2), "weight_bytes": 4500.0 * bits,
        "mean_widths": widths, "images": 9, "seconds_mean": 1.0, "seeds": list(range(len(accuracies))),
        "runs": [[own] for own in accuracies], "hardware": ["CPU"], **other,
    }  # fmt: skip


def measured(name: str = "s") -> dict[str, Any]:
    learned = {"attn.query": 3.5, "attn.key": 3.5, "attn.value": 3.0, "attn.probs": 3.0, "mlp.fc2.input": 3.25}
    rows = [
        row("budgets", "4bit", "lsq+", [44.0, 45.0]),
        row("budgets", "3bit", "lsq+", [40.0, 42.0]),
        row("budgets", "3bit", "qvit", [41.0, 44.0], mean_widths=learned),
        row("post-training", "3bit", "fisher", [10.0, 10.5]),
        row("rivals", "3bit", "ofq", [40.5, 42.0]),
        row("rivals", "3bit", "irm", [39.0, 41.5]),
        row("ablations", "3bit", "σ = 0.5", [40.0, 44.0]),
    ]
    settings = {
        "common": {"model": "vit", "batch_size": 4},
        "float": {"epochs": 9},
        "quantized": {"epochs": 5, "lr": 0.001},
    }
    about = {"set": name, "title": "A small model", "settings": settings, "train_images": 7, "float_images": 30}
    return ORIGIN | about | {"hours": 1.25, "rows": rows}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    nothing = "<!-- results:demo:begin -->\n<!-- results:demo:end -->"
    for name in render_module().DOCUMENTS:
        (tmp_path / name).write_text(nothing)
    (tmp_path / "docs/evidence.md").write_text("<!-- results:evidence:begin -->\n<!-- results:evidence:end -->")
    return tmp_path


def render(project: Path, *arguments: str) -> int:
    return render_module().main(["--root", str(project), "--results", str(project / "results"), *arguments])


def page(project: Path, *data: dict[str, Any]) -> str:
    for one in data:
        (project / "results" / f"evidence_{one['set']}.json").write_text(json.dumps(one))
    assert render(project) == 0
    return unwrapped(project / "docs/evidence.md")


def figure(project: Path, name: str) -> dict[str, Any]:
    return json.loads((project / "docs/figures" / f"{name}.json").read_text())


def test_without_results_the_command_stands_there(project: Path) -> None:
    text = page(project)
    assert "Not measured yet: `python benchmarks/measure/evidence.py" in text
    assert not (project / "docs/figures").exists()


def test_differences_are_taken_seed_by_seed(project: Path) -> None:
    text = page(project, measured())
    assert "A small model. Float models: 9 epochs of 30 images. Quantized: 5 epochs of 7 images" in text
    assert "learning rate 0.001; 9 test images; float 50.50 %" in text
    assert "| 3bit | lsq+ | 41.00 ± 1.00 |  | 0.1107 | 13.50 |" in text
    assert "| 3bit | qvit | 42.50 ± 1.00 | +1.50 ± 0.71 | 0.1107 | 13.50 |" in text
    assert "| 3bit | σ = 0.5 | 42.00 ± 1.00 | −0.50 ± 0.71 |" in text
    assert "| q | 3.50 |" in text
    assert "above `lsq+`: qvit at 3bit (+1.50). Below it: none. Within the deviation: none." in text
    assert "Below it: irm at 3bit (−0.75). Within the deviation: ofq at 3bit." in text
    assert "q and k have 3.50 bits, v and probabilities 3.00 (unlike the paper, Figure 4)" in text
    assert "`python run.py` on CPU, 2020-01-02 (torch 1). All runs together: 1.2 hours." in text


def test_seeds_are_paired_by_number(project: Path) -> None:
    data = measured()
    data["rows"][2] |= {"accuracies": [44.0, 41.0, 90.0], "float_accuracies": [51.0, 50.0, 52.0], "seeds": [1, 0, 7]}
    text = page(project, data)
    assert "| 3bit | qvit | 42.50 ± 1.00 | +1.50 ± 0.71 |" in text
    assert "float 51.00 %" in text and "over seeds 0, 1, 7;" in text
    assert "| 3bit | ofq (seeds 0, 1) |" in text


def test_runs_that_were_repeated_are_counted(project: Path) -> None:
    data = measured()
    data["rows"][2] |= {"runs": [[40.0, 42.0], [44.0]]}
    assert "| 3bit | qvit (2 runs per seed) | 42.50 ± 1.00 | +1.50 ± 0.71 |" in page(project, data)


def test_what_ran_where_is_told(project: Path) -> None:
    data = measured()
    assert "\n- On CPU" not in page(project, data)
    data["rows"][2]["hardware"] = ["a GPU", "another"]
    text = page(project, data)
    assert "- On a GPU and another: qvit (3bit)." in text and "- On CPU: lsq+ (4bit, 3bit); fisher (3bit);" in text


def test_one_seed_has_no_differences(project: Path) -> None:
    data = measured()
    for own in data["rows"]:
        own |= {"accuracies": own["accuracies"][:1], "float_accuracies": [50.0], "seeds": [0]}
    assert "nothing is said about differences" in page(project, data)
    assert not (project / "docs/figures/evidence-s-ablations.json").exists()


def test_figures_have_every_row_once(project: Path) -> None:
    data = measured()
    page(project, data, measured("other"))
    for cost in ("bit-operations", "weight-bytes"):
        drawn = figure(project, f"evidence-s-{cost}")
        heads = [text.split("<br>")[0] for trace in drawn["data"] for text in trace.get("text", [])]
        wanted = [f"<b>{one['row']}</b>, {one['budget']}" for one in data["rows"] if one["part"] != "ablations"]
        assert sorted(heads) == sorted(wanted)
        x = [value for trace in drawn["data"] if "text" in trace for value in trace["x"]]
        assert len(set(x)) == len(x), "points of equal cost do not hide each other"
        marks = {(t["name"], t["marker"]["color"], t["marker"]["symbol"]) for t in drawn["data"] if "text" in t}
        assert len(marks) == len({name for name, *_ in marks}) == len({mark[1:] for mark in marks}) == 5
    assert [trace["x"] for trace in figure(project, "evidence-s-ablations")["data"]] == [[-0.5]]
    assert [trace["y"] for trace in figure(project, "evidence-s-widths")["data"]] == [[0.5, 0.5, 0.0, 0.0, 0.25]]


def test_parts_are_compared_with_what_they_are_parts_of(project: Path) -> None:
    data = measured()
    data["rows"] += [
        row("budgets", "3bit", "qvit by differences", [43.0, 44.0]),
        row("by differences", "3bit", "σ = 0.5, by differences", [43.5, 44.0]),
    ]
    text = page(project, data)
    assert "### Parts of `qvit`" in text and "| 3bit | σ = 0.5 | 42.00 ± 1.00 | −0.50 ± 0.71 |" in text
    assert "### Parts of `qvit by differences`" in text
    assert "| 3bit | σ = 0.5, by differences | 43.75 ± 1.00 | +0.25 ± 0.35 |" in text
    assert [trace["x"] for trace in figure(project, "evidence-s-by-differences")["data"]] == [[0.25]]


def test_widths_of_single_heads_are_boxes(project: Path) -> None:
    data = measured()
    data["rows"][2]["width_counts"] = {"attn.query": {"3": 2, "4": 1}, "mlp.fc2.input": {"3": 9}}
    page(project, data)
    (box,) = figure(project, "evidence-s-heads")["data"]
    assert box["type"] == "box" and box["x"] == ["q"] * 3 and box["y"] == [3, 3, 4]


def test_an_axis_of_their_own_for_rows_far_below_the_others_at_their_budget(project: Path) -> None:
    """Fewer bits are no reason, another method is: `fisher` has 10 % where others have 40, 4 bits have 45."""
    data = measured()
    data["rows"].append(row("budgets", "2bit", "lsq+", [20.0, 21.0]))
    page(project, data)
    panels = {trace["name"]: trace.get("yaxis") for trace in figure(project, "evidence-s-bit-operations")["data"]}
    assert {name for name, panel in panels.items() if panel == "y2"} == {"fisher"}


def test_the_budgets_stand_in_another_document(project: Path) -> None:
    (project / "README.md").write_text("<!-- results:budgets:begin -->\n<!-- results:budgets:end -->")
    page(project, measured("tiny-imagenet"))
    text = (project / "README.md").read_text()
    assert text.count("| 3bit | qvit | 42.50 ± 1.00 | +1.50 ± 0.71 |") == 1 and "ofq" not in text
    assert "9 test images" in text and "`python run.py`" in text


def test_check_covers_tables_and_figures(project: Path) -> None:
    page(project, measured())
    assert render(project, "--check") == 0
    drawn = project / "docs/figures/evidence-s-widths.json"
    drawn.write_text(drawn.read_text().replace("0.25", "0.5"))
    assert render(project, "--check") == 1
    page(project, measured())
    (drawn.parent / "old.json").write_text("{}")
    assert render(project, "--check") == 1
    page(project)
    assert not (drawn.parent / "old.json").exists() and render(project, "--check") == 0


def test_a_wrong_file_and_a_lost_place_are_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page(project, measured())
    (project / "docs/evidence.md").write_text("<!-- results:demo:begin -->\n<!-- results:demo:end -->")
    assert render(project) == 2
    assert "figures without a place" in capsys.readouterr().err
    (project / "results/evidence_s.json").write_text("{}")
    assert render(project) == 2
    assert "evidence_s.json is not what the benchmark writes" in capsys.readouterr().err


def fragile() -> dict[str, Any]:
    def point(what: str, bits: int, drop: float, **other: Any) -> dict[str, Any]:
        own = {"what": what, "bit_width": bits, "part": None, "layer": None, "head": None, "others": None}
        own |= {"top1": 80.0 - drop, "standard_error": 2.0, "drop": drop, "drop_standard_error": 1.0}
        return own | {"agreement": 90.0, "divergence": drop / 100, "divergence_standard_error": 0.001} | other

    points = [point("widths", bits, 10.0 - bits) for bits in (2, 8)]
    for part, drops in (("gelu", (5.0, 1.0)), ("fc", (30.0, 1.5)), ("msa", (40.0, 2.0))):
        points += [point("parts", bits, drop, part=part) for bits, drop in zip((2, 8), drops, strict=True)]
    points += [point("heads", 8, 0.5, others=8)]
    points += [point("heads", 2, 1.0 + head, others=8, layer="blocks.0.attn", head=head) for head in (0, 1)]
    settings = {"data": "a.tar", "eval_data": "b.tar", "images": 9, "calibration_images": 4}
    record = {"settings": settings, "float": {"top1": 80.0}, "layers": [{"layer": "blocks.0.attn", "heads": 2}]}
    return ORIGIN | record | {"points": points, "threads": 1, "weights": "A model"}


def test_fragile_parts(project: Path) -> None:
    (project / "results/fragile.json").write_text(json.dumps(fragile()))
    for name in ("fragile", "fragile_plots"):
        markers = f"<!-- results:{name}:begin -->\n<!-- results:{name}:end -->"
        (project / "docs" / ("analyses.md" if name == "fragile" else "evidence.md")).write_text(markers)
    text = page(project)
    assert "layers alone at (bits) 2, more at none; they diverge less at 2, 8, more at none. The paper" in text
    assert "The part that moves the answers most: attention (MSA) alone at 2 of 2 widths." in text
    assert "lowering head 1 of layer 0 moves the answers most (divergence 0.020, 2.0 ± 1.0 points lost)" in text
    assert "by the divergence in 1 of 1 layers, by the accuracy lost in 0." in text
    table = unwrapped(project / "docs/analyses.md")
    assert "| GELU outputs alone | 75.00 | 79.00 |" in table and "Float: 80.00 %" in table
    assert "| 0 | 1.0 ± 1.0 | 10.0 ± 1.0 | 2.0 ± 1.0 | 20.0 ± 1.0 |" in table
    curves = figure(project, "fragile-parts")["data"]
    assert [len(curve["x"]) for curve in curves] == [2, 2, 2, 2]
    assert [trace["y"] for trace in figure(project, "fragile-heads-accuracy")["data"]] == [[1.0], [2.0]]
    assert render(project, "--check") == 0


def test_figures_are_put_into_the_built_page(tmp_path: Path) -> None:
    hooks = pytest.importorskip("mkdocs") and _hooks()
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/f.json").write_text('{"data": [{"name": "</script>"}]}')

    class Config:
        docs_dir, site_dir = str(tmp_path), str(tmp_path / "site")

    class Page:
        url, file = "evidence/", type("File", (), {"src_uri": "evidence.md"})

    place = '<div class="figure" data-figure="figures/f.json"></div>'
    html = hooks.on_page_content(place, Page(), Config(), None)
    assert place not in html and '"\\u003c/script>"' in html and 'src="../assets/plotly.min.js"' in html
    assert hooks.on_page_content("<p>plain</p>", Page(), Config(), None) == "<p>plain</p>"
    with pytest.raises(hooks.PluginError, match="evidence.md: there is no figures/g.json"):
        hooks.on_page_content(place.replace("f.json", "g.json"), Page(), Config(), None)
    hooks.on_post_build(Config())
    assert (tmp_path / "site/assets/plotly.min.js").stat().st_size > 1e6


def _hooks() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_tell_what_they_set_and_what_is_to_be_known_about_them(project: Path) -> None:
    data = measured()
    data["rows"][2] |= {"method_options": {"initial_bits": "N + 1", "head_wise": False}, "note": "one run was lost"}
    text = page(project, data)
    assert "Options that rows set:\n\n- *qvit*: `initial_bits = N + 1, head_wise = false`\n" in text
    assert "- *qvit* at 3bit: one run was lost" in text and text.count("Options that rows set") == 2


def test_rows_that_were_added_later_tell_where_they_are_from(project: Path) -> None:
    data = measured()
    rows = [["budgets", "3bit", "qvit"], ["rivals", "3bit", "ofq"]]
    data["added"] = [{**ORIGIN, "rows": rows, "command": "python again.py", "date": "2020-02-03"}]
    found = "Added later: qvit (3bit); ofq (3bit). Measured with `python again.py` on CPU, 2020-02-03 (torch 1)."
    assert found in page(project, data)


def test_trained_systems_have_the_seconds_of_their_search(project: Path) -> None:
    data = measured()
    plan = row("rivals", "3bit", "hessian + integer program", [40.0, 41.0], search_seconds_mean=12.4, seconds_mean=3.0)
    data["rows"].append(plan)
    data["added"] = [{**ORIGIN, "rows": [["rivals", "3bit", plan["row"]], ["ablations", "3bit", "σ = 0.5"]]}]
    (project / "docs/methods.md").write_text(
        "<!-- results:trained_systems:begin -->\n<!-- results:trained_systems:end -->"
    )
    page(project, data)
    text = unwrapped(project / "docs/methods.md")
    assert "| HAWQ plan, LSQ+ | 40.50 ± 1.00 | 3 | 12 |" in text and "| LSQ+ | 41.00 ± 1.00 | 1 |  |" in text
    assert "Added later: hessian + integer program (3bit). Measured" in text


def test_no_benchmark_hides_another() -> None:
    """Both folders may stand in `sys.path` of one process: by what is imported first, a shared name means either."""
    folders = ROOT / "benchmarks/measure", ROOT / "benchmarks/render"
    measure, rendering = ({file.stem for file in folder.glob("*.py")} for folder in folders)
    assert measure and rendering and not measure & rendering


def test_later_rows_take_the_place_of_those_of_their_name() -> None:
    evidence = benchmark("evidence")
    before = measured()
    later = {**ORIGIN, "date": "2020-02-03", "hours": 0.5, "rows": [row("budgets", "3bit", "qvit", [1.0, 2.0])]}
    later["rows"] += [row("budgets", "4bit", "vvtq", [3.0, 4.0])]
    data = evidence.added_to(before, later)
    names = [(own["part"], own["budget"], own["row"]) for own in data["rows"]]
    first = [("4bit", "lsq+"), ("4bit", "vvtq"), ("3bit", "lsq+"), ("3bit", "qvit")]
    assert names[:4] == [("budgets", *own) for own in first]
    assert data["rows"][3]["accuracies"] == [1.0, 2.0] and len(names) == 8 and data["hours"] == 1.75
    assert data["added"][0]["rows"] == [["budgets", "3bit", "qvit"], ["budgets", "4bit", "vvtq"]]
    again = evidence.added_to(data, {**later, "rows": later["rows"][:1], "date": "2020-03-04"})
    assert [(one["date"], len(one["rows"])) for one in again["added"]] == [("2020-02-03", 1), ("2020-03-04", 1)]


def test_the_published_search_is_that_of_the_recipes() -> None:
    """Row and recipe set the same options, but for the budget and the learning rate of the weights."""
    evidence = benchmark("evidence")
    (published,) = [own for own in evidence.PARTS["budgets"] if own.name == "qvit, the published search"]
    for recipe in sorted((ROOT / "recipes").glob("*-qvit-paper.toml")):
        values = tomllib.loads(recipe.read_text())
        known = {evidence.ABOVE: int(values["budget"][0]) + 1, evidence.OF_WEIGHTS: values["lr"]}
        assert {key: known.get(value, value) for key, value in published.options.items()} == values["method_options"]

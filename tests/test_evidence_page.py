"""The page of evidence: tables, sentences and figures are made of the files of results, by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_readme import ROOT, render_module

ORIGIN = {"command": "python run.py", "hardware": "CPU", "date": "2020-01-02", "versions": {"torch": "1"}}


def row(part: str, budget: str, name: str, accuracies: list[float], **other: Any) -> dict[str, Any]:
    bits = float(budget[0])
    widths = {"attn.query": bits, "attn.key": bits, "attn.value": bits, "attn.probs": bits, "mlp.fc2.input": bits}
    return {
        "part": part, "budget": budget, "row": name, "method": name, "method_options": {},
        "accuracy_mean": sum(accuracies) / len(accuracies), "accuracy_std": 1.0, "accuracies": accuracies,
        "float_accuracies": [50.0, 51.0], "bit_operations": int(12_300_000 * bits**2), "weight_bytes": 4500.0 * bits,
        "mean_widths": widths, "images": 9, "seconds_mean": 1.0, "seeds": list(range(len(accuracies))), **other,
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
    return ORIGIN | {"set": name, "title": "A small model", "train_images": 7, "hours": 1.25, "rows": rows}


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
    return (project / "docs/evidence.md").read_text()


def figure(project: Path, name: str) -> dict[str, Any]:
    return json.loads((project / "docs/figures" / f"{name}.json").read_text())


def test_without_results_the_command_stands_there(project: Path) -> None:
    text = page(project)
    assert "Not measured yet: `python benchmarks/accuracy/evidence.py" in text
    assert not (project / "docs/figures").exists()


def test_differences_are_taken_seed_by_seed(project: Path) -> None:
    text = page(project, measured())
    assert "A small model. 7 training and 9 test images; float 50.50 %" in text
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
    data["rows"][2] |= {"accuracies": [44.0, 41.0, 90.0], "seeds": [1, 0, 7]}
    assert "| 3bit | qvit | 42.50 ± 1.00 | +1.50 ± 0.71 |" in page(project, data)


def test_one_seed_has_no_differences(project: Path) -> None:
    data = measured()
    for own in data["rows"]:
        own |= {"accuracies": own["accuracies"][:1], "seeds": [0]}
    assert "nothing is said about differences" in page(project, data)
    assert not (project / "docs/figures/evidence-s-ablations.json").exists()


def test_figures_have_every_row_once(project: Path) -> None:
    data = measured()
    page(project, data, measured("other"))
    for cost in ("bit-operations", "weight-bytes"):
        drawn = figure(project, f"evidence-s-{cost}")
        heads = [text.split("<br>")[0] for trace in drawn["data"] for text in trace["text"]]
        wanted = [f"<b>{one['row']}</b>, {one['budget']}" for one in data["rows"] if one["part"] != "ablations"]
        assert sorted(heads) == sorted(wanted)
        x = [value for trace in drawn["data"] for value in trace["x"]]
        assert len(set(x)) == len(x), "points of equal cost do not hide each other"
        assert len({(t["marker"]["color"], t["marker"]["symbol"]) for t in drawn["data"]}) == len(drawn["data"])
    assert [trace["x"] for trace in figure(project, "evidence-s-ablations")["data"]] == [[-0.5]]
    assert [trace["y"] for trace in figure(project, "evidence-s-widths")["data"]] == [[0.5, 0.5, 0.0, 0.0, 0.25]]


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

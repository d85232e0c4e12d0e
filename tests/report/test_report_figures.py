"""The figures of the report hold the numbers of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_runs import EPOCHS, HEADS, LAYERS, write_demo, write_run

from qvit.report import group_runs, load_run, load_runs
from qvit.report.figures import MAX_POINTS, thin
from qvit.report.runs import Run
from qvit.report.sections.accuracy import accuracy_figure
from qvit.report.sections.attention import attention_figures
from qvit.report.sections.costs import cost_figure, costs_by_tensor
from qvit.report.sections.curves import curve_figures
from qvit.report.sections.gelu import gelu_figure, gelu_widths, uniform_width
from qvit.report.sections.training import bit_operations_figure, mean_width_figure
from qvit.report.sections.widths import width_map
from qvit.report.widths import widths_by_layer


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture(scope="module")
def runs(demo: Path) -> list[Run]:
    return load_runs([demo])


class TestFigures:
    def test_figure_4_is_the_plan(self, demo: Path, runs: list[Run]) -> None:
        group = next(group for group in group_runs(runs) if group.label == "qvit · 3bit")
        panels = attention_figures(group)
        assert [title.split(" ")[0] for title in panels] == ["q", "k", "v", "A"]
        names = ("attn.query", "attn.key", "attn.value", "attn.probs")
        for name, (title, figure) in zip(names, panels.items(), strict=True):
            box, means = figure.data
            for layer in range(LAYERS):
                expected = []
                for seed in range(3):
                    plan = json.loads((demo / "runs" / f"qvit-3bit-seed{seed}" / "plan.json").read_text())
                    expected += plan["sites"][f"blocks.{layer}.{name}"]["bit_width"]
                drawn = [y for x, y in zip(box.x, box.y, strict=True) if x == str(layer)]
                assert drawn == expected and len(drawn) == 3 * HEADS, title
                assert means.y[layer] == pytest.approx(sum(expected) / len(expected))
        assert widths_by_layer([group.first], "q")["blocks.0"] == list(
            group.first.plan["blocks.0.attn.query"].bit_width
        )

    def test_figure_5_is_the_plan(self, runs: list[Run]) -> None:
        groups = [group for group in group_runs(runs) if group.first.method == "qvit"]
        figure = gelu_figure(groups)
        assert figure is not None
        seeds = [trace for trace in figure.data if not trace.showlegend]
        assert len(seeds) == 6 and len(figure.data) == 8
        for trace, run in zip(seeds, (run for group in groups for run in group.runs), strict=True):
            assert list(trace.y) == [run.plan[f"blocks.{i}.mlp.fc2.input"].bit_width[0] for i in range(LAYERS)]
            assert list(gelu_widths(run).values()) == list(trace.y)
        means = figure.data[3]
        assert list(means.y) == pytest.approx(
            [sum(values) / 3 for values in zip(*(t.y for t in seeds[:3]), strict=True)]
        )
        assert sorted(shape.y0 for shape in figure.layout.shapes) == [2, 3]

    def test_the_uniform_width_of_a_budget(self, tmp_path: Path) -> None:
        for budget, expected in (("3bit", 3.0), ("4 bits", 4.0)):
            run = load_run(write_run(tmp_path / budget))
            assert uniform_width(Run(**{**vars(run), "budget": budget})) == expected
        run = load_run(tmp_path / "3bit")
        log = type(run.log)(budget_bit_operations=125.0, uniform_bit_operations={3: 90, 4: 160, 2: 40})
        assert uniform_width(Run(**{**vars(run), "budget": "0.25", "log": log})) == 3.5
        assert uniform_width(Run(**{**vars(run), "budget": "9G", "log": type(run.log)()})) is None

    def test_the_map_is_the_plan(self, runs: list[Run]) -> None:
        run = next(run for run in runs if run.method == "qvit")
        figure = width_map(run)
        assert figure is not None
        cells = {
            cell: width
            for trace in figure.data
            if trace.type == "heatmap"
            for widths, names in zip(trace.z, trace.customdata, strict=True)
            for width, cell in zip(widths, names, strict=True)
        }
        expected = {
            site + (f", head {head}" if len(spec.bit_width) > 1 else ""): width
            for site, spec in run.plan.items()
            if site.startswith("blocks.")
            for head, width in enumerate(spec.bit_width)
        }
        assert cells == expected
        assert all(trace.texttemplate == "%{z}" for trace in figure.data if trace.type == "heatmap")

    def test_another_family(self, tmp_path: Path) -> None:
        sites = {"stem.weight": 1, "layers.0.blocks.0.attn.query": 2, "layers.0.blocks.1.attn.query": 2}
        sites |= {"layers.1.blocks.0.attn.query": 4, "layers.1.blocks.0.conv.weight": 1, "layers.1.pool.weight": 1}
        run = load_run(write_run(tmp_path / "run", sites=sites))
        figure = width_map(run)
        assert figure is not None
        rows = figure.layout.yaxis.ticktext
        assert rows == ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1", "layers.1.blocks.0", "head")
        assert figure.layout.xaxis.ticktext == ("q", "conv.weight", "pool.weight")
        (queries, conv, _) = (trace for trace in figure.data if trace.type == "heatmap")
        assert len(queries.x) == 4 and list(queries.z[0][2:]) == [None, None]
        assert conv.z[3][0] == run.plan["layers.1.blocks.0.conv.weight"].bit_width[0] and conv.z[0][0] is None

    def test_accuracy_against_cost(self, runs: list[Run]) -> None:
        groups = group_runs(runs)
        for cost in ("bit_operations", "weight_bytes"):
            figure = accuracy_figure(groups, cost)
            assert figure is not None
            points = {
                (round(x, 9), y) for t in figure.data if t.text and len(t.x) == 3 for x, y in zip(t.x, t.y, strict=True)
            }
            unit = 1e9 if cost == "bit_operations" else 1e3
            quantized = [run for run in runs if run.method != "float"]
            assert points == {
                (round(getattr(r.result, cost) / unit, 9), r.result.accuracy) for r in quantized if r.result
            }
            assert [trace.name for trace in figure.data if trace.name] == [g.label for g in groups[1:]]
            assert figure.layout.shapes[0].y0 == 96.0, "float is a line"

    def test_budget_and_freeze(self, runs: list[Run]) -> None:
        groups = [group for group in group_runs(runs) if group.label == "qvit · 2bit"]
        figure = bit_operations_figure(groups)
        assert figure is not None
        budget, freeze = groups[0].first.log.budget_bit_operations, groups[0].first.log.freeze
        assert budget is not None and freeze is not None
        dashed = [trace for trace in figure.data if trace.line.dash == "dash"]
        assert dashed[0].y == pytest.approx((budget / 1e9, budget / 1e9))
        diamonds = [trace for trace in figure.data if trace.marker.symbol == "diamond"]
        assert len(diamonds) == 3 and diamonds[0].x == (freeze.step,)
        assert bit_operations_figure([group for group in group_runs(runs) if group.first.method == "lsq+"]) is None

    def test_mean_widths(self, runs: list[Run]) -> None:
        run = next(run for run in runs if run.method == "qvit")
        figure = mean_width_figure(run)
        assert figure is not None
        trace = next(trace for trace in figure.data if trace.name == "q")
        last = [w for i in range(LAYERS) for w in run.log.epochs[-1].bit_widths[f"blocks.{i}.attn.query"]]
        assert list(trace.x) == list(range(1, EPOCHS + 1)) and trace.y[-1] == pytest.approx(sum(last) / len(last))
        assert mean_width_figure(next(run for run in runs if run.method == "lsq+")) is None

    def test_costs_add_up(self, runs: list[Run]) -> None:
        for group in group_runs(runs)[1:]:
            for cost in ("bit_operations", "weight_bytes"):
                totals = [getattr(run.cost, cost) for run in group.runs]
                assert sum(costs_by_tensor(group, cost).values()) == pytest.approx(sum(totals) / 3)
        assert list(costs_by_tensor(group_runs(runs)[1], "bit_operations"))[3:5] == ["q·kᵀ", "A·v"]
        figure = cost_figure(group_runs(runs))
        assert figure is not None and len(figure.data[0].x) == 4

    def test_curves_are_thinned(self, tmp_path: Path) -> None:
        run = load_run(write_run(tmp_path / "run", epochs=6, steps=2000))
        assert len(run.log.steps) == 2400
        figures = [*curve_figures(group_runs([run])).values(), bit_operations_figure(group_runs([run]))]
        lengths = [len(trace.x) for figure in figures if figure for trace in figure.data]
        assert max(lengths) == MAX_POINTS
        assert thin(range(1000), 4) == [0, 333, 666, 999] and thin([1, 2], 4) == [1, 2]

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        groups = group_runs([load_run(write_run(tmp_path / "run", "float", None))])
        assert accuracy_figure(groups) is None and cost_figure(groups) is None and gelu_figure(groups) is None
        assert width_map(groups[0].first) is None and attention_figures(groups[0]) == {}

"""What the report reads from run directories, how it groups them, and what it says about them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from report_runs import EPOCHS, HEADS, STEPS, made_up_cost, vit_sites, write, write_demo, write_run

from qvit.errors import QvitError
from qvit.report import (
    display_table,
    load_run,
    load_runs,
    markdown_table,
    mean_std,
    results_table,
    verdict,
    write_page,
)
from qvit.report.page import render_page
from qvit.report.runs import Run
from qvit.report.sites import Place, layer_labels, layers_of, locate, tensors_of
from qvit.report.units import bops_text, bytes_text, column, difference, duration, percent, significant


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture(scope="module")
def runs(demo: Path) -> list[Run]:
    return load_runs([demo])


class TestReading:
    def test_a_finished_run(self, demo: Path) -> None:
        run = load_run(demo / "runs" / "qvit-3bit-seed1")
        assert (run.model, run.method, run.budget, run.seed) == ("vit_small", "qvit", "3bit", 1)
        assert run.finished and run.learned and run.state == "finished"
        assert run.result is not None and run.result.accuracy == 95.5 and run.result.float_accuracy == 96.0
        assert run.plan_name == "qvit-3bit" and len(run.plan) == len(vit_sites())
        assert len(run.plan["blocks.0.attn.query"].bit_width) == HEADS
        assert len(run.plan["blocks.0.mlp.fc2.input"].bit_width) == 1
        assert run.cost is not None and run.cost.bit_operations == run.result.bit_operations
        assert sum(site.weight_bytes for site in run.cost.sites) == run.cost.weight_bytes
        assert len(run.log.epochs) == EPOCHS and run.log.steps[-1].step == run.log.last_step == EPOCHS * STEPS
        assert run.log.total_steps == EPOCHS * STEPS
        assert run.log.freeze is not None and run.log.freeze.step == EPOCHS * STEPS * 2 // 3
        assert run.log.freeze.changes[0].head is None and run.log.freeze.changes[-1].final == 8

    def test_a_killed_run(self, tmp_path: Path) -> None:
        run = load_run(write_run(tmp_path / "run", killed=True))
        assert not run.finished and run.learned and run.result is None and run.log.unreadable_lines == 1
        assert run.log.freeze is None and run.log.last_step == run.log.steps[-1].step == 60
        assert run.state == f"stopped at step 60 of {EPOCHS * STEPS}, or still running"
        learned = run.log.epochs[-1].bit_widths["blocks.1.attn.key"]
        assert run.bit_widths["blocks.1.attn.key"] == tuple(round(width) for width in learned)
        assert any(width != round(width) for width in learned)

    def test_a_run_that_was_killed_at_once(self, tmp_path: Path) -> None:
        write_run(tmp_path / "run")
        for name in ("plan.json", "cost.json", "result.json", "log.jsonl"):
            (tmp_path / "run" / name).unlink()
        run = load_run(tmp_path / "run")
        assert not run.finished and run.bit_widths == {} and run.state.startswith("stopped before the first")
        assert "No run has finished yet" in render_page([run])

    def test_a_resumed_run_counts_each_step_once(self, tmp_path: Path) -> None:
        log = write_run(tmp_path / "run", killed=True) / "log.jsonl"
        again = [{"event": "start", "step": 0, "time": 9e9, "epochs": EPOCHS, "steps_per_epoch": STEPS}]
        again += [{"event": "step", "step": step, "loss": 7.0} for step in (55, 60, 65)]
        text = log.read_text() + "".join("\n" + json.dumps(event) for event in again)
        log.write_text(text.replace("\n", "\r\n") + "\n\n")
        run = load_run(tmp_path / "run")
        steps = [step.step for step in run.log.steps]
        assert steps == sorted(set(steps)) and steps[-1] == 65
        assert [step.loss for step in run.log.steps if step.step >= 55] == [7.0] * 3
        assert run.log.started == 1.7e9, "the date is that of the first start"

    def test_a_failed_run_says_why(self, tmp_path: Path) -> None:
        log = write_run(tmp_path / "run", killed=True) / "log.jsonl"
        lines = [
            *log.read_text().splitlines()[:-1],
            json.dumps({"event": "failed", "step": 61, "reason": "loss is nan"}),
        ]
        log.write_text("\n".join(lines))
        assert load_run(tmp_path / "run").state == "failed at step 61: loss is nan"

    def test_what_is_not_finite_is_a_gap(self, tmp_path: Path) -> None:
        log = write_run(tmp_path / "run") / "log.jsonl"
        with log.open("a") as file:
            file.write(
                '{"event": "step", "step": 999, "loss": NaN, "lr": Infinity, "bit_operations": 1' + "0" * 400 + "}\n"
            )
        last = load_run(tmp_path / "run").log.steps[-1]
        assert (last.step, last.loss, last.lr, last.bit_operations) == (999, None, None, None)
        render_page(load_runs([tmp_path / "run"]))

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("config.json", None, "config.json is missing"),
            ("config.json", "{", "config.json"),
            ("config.json", "[]", "must hold a JSON object, not a list"),
            ("config.json", '{"method": "lsq"}', "key 'model' is missing"),
            ("result.json", '{"model": "m"}', "key 'accuracy' is missing"),
            ("result.json", '{"accuracy": NaN}', "NaN is no number of JSON"),
            ("plan.json", '{"sites": {}}', "key 'format' is missing"),
            ("plan.json", '{"format": "qvit-plan", "version": 2, "sites": {}}', "version"),
            ("plan.json", '{"format": "qvit-plan", "version": 1, "sites": []}', "key 'sites' must be an object"),
            (
                "plan.json",
                '{"format": "qvit-plan", "version": 1, "sites": {"a": {"bit_width": "x"}}}',
                "key 'sites.a.bit_width.0' must be a whole number, not 'x'",
            ),
            (
                "plan.json",
                '{"format": "qvit-plan", "version": 1, "sites": {"a": {"bit_width": 2.5}}}',
                "key 'sites.a.bit_width.0' must be a whole number, not 2.5",
            ),
            ("plan.json", '{"format": "qvit-plan", "version": 1, "sites": {"a": 3}}', "key 'sites.a' must be"),
            ("cost.json", '{"macs": 1, "bit_operations": 1, "weight_bytes": 1, "sites": [3]}', "key 'sites.0' must be"),
            ("cost.json", '{"bit_operations": 1}', "key 'macs' is missing"),
            ("log.jsonl", "not JSON\nat all\n", "is not a log: none of its 2 lines"),
        ],
    )
    def test_an_unusable_run_is_a_clear_error(
        self, tmp_path: Path, file: str, content: str | None, message: str
    ) -> None:
        path = write_run(tmp_path / "run") / file
        path.unlink()
        if content is not None:
            path.write_text(content)
        with pytest.raises(QvitError) as caught:
            load_run(tmp_path / "run")
        assert message in str(caught.value) and file in str(caught.value) and str(tmp_path / "run") in str(caught.value)

    def test_sites_in_float_are_no_widths(self, tmp_path: Path) -> None:
        file = write_run(tmp_path / "run") / "plan.json"
        plan = json.loads(file.read_text())
        plan["sites"]["head.weight"] = None
        write(file, plan)
        assert "head.weight" not in load_run(tmp_path / "run").plan
        assert "float" in render_page([load_run(tmp_path / "run")])

    def test_directories_with_many_runs(self, demo: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
        one = demo / "runs" / "lsq+-2bit-seed0"
        assert len(load_runs([demo])) == 15
        assert len(load_runs([one, demo, one])) == 15, "each run once"
        write_run(tmp_path / "runs" / "a")
        (tmp_path / "runs" / "b").mkdir()
        with caplog.at_level(logging.WARNING):
            assert [run.path.name for run in load_runs([tmp_path])] == ["a"]
        assert "no config.json" in caplog.text

    def test_no_runs(self, tmp_path: Path) -> None:
        (tmp_path / "runs").mkdir()
        with pytest.raises(QvitError, match="no run in"):
            load_runs([tmp_path])
        with pytest.raises(QvitError, match="no run given"):
            load_runs([])
        with pytest.raises(QvitError, match="no run directory at .*nowhere"):
            load_runs([tmp_path / "nowhere"])
        with pytest.raises(QvitError, match="give at least one"):
            write_page([], tmp_path / "report.html")


class TestTables:
    def test_mean_and_sample_deviation(self) -> None:
        assert mean_std([93.0, 94.0, 95.0]) == (94.0, 1.0)
        assert mean_std([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
        assert mean_std([5.0]) == (5.0, 0.0)

    def test_groups_are_model_method_and_budget(self, runs: list[Run]) -> None:
        rows = results_table(runs)
        assert [row["label"] for row in rows] == ["float", "lsq+ · 3bit", "qvit · 3bit", "lsq+ · 2bit", "qvit · 2bit"]
        assert all(row["seeds"] == [0, 1, 2] and row["n_seeds"] == 3 and row["unfinished"] == 0 for row in rows)
        qvit = rows[2]
        assert qvit["accuracy_mean"] == pytest.approx(95.1333, abs=1e-4)
        assert qvit["accuracy_std"] == pytest.approx(0.32146, abs=1e-5)
        mine = [run.result for run in runs if run.method == "qvit" and run.budget == "3bit" and run.result]
        assert qvit["bit_operations"] == round(sum(result.bit_operations for result in mine) / 3)
        assert qvit["bit_operations_g"] == pytest.approx(qvit["bit_operations"] / 1e9)
        assert qvit["seconds"] == 101.0 and qvit["float_accuracy"] == 96.0
        assert rows[0]["accuracy_mean"] == 96.0 and rows[0]["bit_operations"] == rows[0]["float_bit_operations"]
        assert json.loads(json.dumps(rows)) == rows

    def test_unfinished_runs_do_not_count(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", accuracy=90.0)
        write_run(tmp_path / "b", seed=1, killed=True)
        (row,) = results_table(load_runs([tmp_path / "a", tmp_path / "b"]))
        assert (row["n_seeds"], row["unfinished"], row["accuracy_mean"], row["accuracy_std"]) == (1, 1, 90.0, 0.0)
        (row,) = results_table(load_runs([tmp_path / "b"]))
        assert row["accuracy_mean"] is None and row["bit_operations"] is None and row["n_seeds"] == 0

    def test_what_differs_in_more_than_the_seed_is_not_pooled(self, tmp_path: Path) -> None:
        for name, options in {"a": {}, "b": {"data": "other"}, "c": {"model_kwargs": {"depth": 9}}}.items():
            write_run(tmp_path / name, "lsq", **options)
        for name in ("w4a4", "w3a3"):
            plan = write_run(tmp_path / name, "lsq", None) / "plan.json"
            write(plan, {**json.loads(plan.read_text()), "name": name})
        rows = results_table(load_runs(sorted(tmp_path.iterdir())))
        assert len(rows) == 5 and len({row["label"] for row in rows}) == 5
        assert "digits · vit_small" in rows[0]["label"]

    def test_text_of_the_table(self, runs: list[Run]) -> None:
        header, cells = display_table(results_table(runs))
        assert header[:5] == ["method", "budget", "accuracy (%)", "points vs float", "BOPs (G)"]
        by_label = {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in cells}
        row = by_label["qvit", "3bit"]
        assert row["accuracy (%)"] == "95.13 ± 0.32" and row["points vs float"] == "−0.87" and row["seeds"] == "3"
        assert re.fullmatch(r"0\.0\d{4}", row["BOPs (G)"]), "enough digits for a tiny model"
        assert row["BOPs vs float"].startswith("÷ ") and row["time per run"] == "1 min 41 s"
        assert by_label["float", ""]["points vs float"] == ""
        lines = markdown_table(results_table(runs)).splitlines()
        assert lines[1] == "| " + " | ".join(["---"] * len(header)) + " |" and len(lines) == 7

    def test_one_seed_has_no_deviation(self, tmp_path: Path) -> None:
        header, cells = display_table(results_table(load_runs([write_run(tmp_path / "run")])))
        assert cells[0][header.index("accuracy (%)")] == "90.00"


class TestVerdict:
    def write(self, folder: Path, *accuracies: tuple[str, tuple[float, ...]]) -> list[Run]:
        for method, values in accuracies:
            for seed, accuracy in enumerate(values):
                write_run(folder / f"{method}-{seed}", method, "3bit", seed, accuracy)
        return load_runs(sorted(folder.iterdir()))

    def test_each_budget_has_a_sentence(self, runs: list[Run]) -> None:
        first, second = verdict(runs)
        assert first.startswith("At the 3bit budget qvit is 1.13 points above lsq+, with ")
        assert first.endswith("(3 seeds each, standard deviations 0.32 and 1.00).")
        assert second.startswith("At the 2bit budget qvit is 7.00 points above lsq+")

    def test_worse_is_said_to_be_worse(self, tmp_path: Path) -> None:
        (sentence,) = verdict(self.write(tmp_path, ("lsq+", (95.0, 95.2)), ("qvit", (93.0, 93.2))))
        assert "qvit is 2.00 points below lsq+" in sentence and "more bit operations" in sentence

    def test_noise_is_said_to_be_noise(self, tmp_path: Path) -> None:
        (sentence,) = verdict(self.write(tmp_path, ("lsq+", (94.0, 96.0)), ("qvit", (95.0, 95.4))))
        assert "no more than the seeds differ among themselves" in sentence

    def test_one_seed_proves_nothing(self, tmp_path: Path) -> None:
        (sentence,) = verdict(self.write(tmp_path, ("lsq+", (94.0,)), ("qvit", (94.001,))))
        assert "qvit is level with lsq+" in sentence and "how much of this is chance is not known" in sentence

    def test_the_rival_is_the_best_of_the_others(self, tmp_path: Path) -> None:
        (sentence,) = verdict(
            self.write(tmp_path, ("lsq", (95.0, 95.1)), ("lsq+", (93.0, 93.1)), ("qvit", (94.0, 94.1)))
        )
        assert "qvit is 1.00 points below lsq, the best of 2 others" in sentence

    def test_a_single_method(self, tmp_path: Path) -> None:
        (sentence,) = verdict(self.write(tmp_path, ("qvit", (91.0,))))
        assert (
            "reaches 91.00 % (one seed, so the deviation is not known), 5.00 points below the float model" in sentence
        )

    def test_a_budget_that_was_not_kept(self, tmp_path: Path) -> None:
        log = write_run(tmp_path / "run") / "log.jsonl"
        budget = int(load_run(tmp_path / "run").log.budget_bit_operations or 0)
        log.write_text(
            log.read_text().replace(f'"budget_bit_operations": {budget}', f'"budget_bit_operations": {budget // 2}')
        )
        assert re.search(
            r"qvit · 3bit exceeds its budget, by up to 9\d\.\d %\.", verdict(load_runs([tmp_path / "run"]))[1]
        )

    def test_nothing_finished(self, tmp_path: Path) -> None:
        write_run(tmp_path / "killed", killed=True)
        assert verdict(load_runs([tmp_path / "killed"])) == [
            "No run has finished yet, so there is no result to compare."
        ]
        write_run(tmp_path / "float", "float", None)
        (sentence,) = verdict(load_runs(sorted(tmp_path.iterdir())))
        assert "no quantized run has finished" in sentence


class TestNames:
    @pytest.mark.parametrize(
        ("site", "layer", "tensor"),
        [
            ("blocks.3.attn.qkv.query_weight", "blocks.3", "W_q"),
            ("blocks.11.mlp.fc2.input", "blocks.11", "GELU out"),
            ("layers.0.blocks.1.attn.probs", "layers.0.blocks.1", "probs"),
            ("blocks.3.attn.q_proj.weight", "blocks.3", "W_q"),
            ("blocks_token_only.0.attn.v.weight", "blocks_token_only.0", "W_v"),
            ("layers.0.downsample.reduction.weight", "layers.0", "downsample.reduction.weight"),
            ("blocks.3.mlp.0.input", "blocks.3", "mlp.0.input"),
            ("features.7.weight", "features.7", "weight"),
            ("patch_embed.proj.weight", "", "patch_embed.proj.weight"),
            ("head", "", "head"),
        ],
    )
    def test_locate(self, site: str, layer: str, tensor: str) -> None:
        assert locate(site) == Place(layer, tensor)

    def test_order(self) -> None:
        sites = ["blocks.10.x", "blocks.2.mlp.fc2.input", "blocks.2.attn.query", "head.weight"]
        assert layers_of(sites) == ["blocks.2", "blocks.10"] and layer_labels(layers_of(sites)) == ["2", "10"]
        assert tensors_of(sites) == ["q", "GELU out", "x"]
        assert tensors_of(["blocks.0.attn.q.weight", "blocks.1.attn.qkv.query_weight"]) == ["W_q"]
        assert layer_labels(["layers.0", "layers.0.blocks.1"]) == ["layers.0", "layers.0.blocks.1"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (significant(21.4551), "21.46"),
            (significant(0.0123), "0.01230"),
            (significant(1255.2), "1,255"),
            (significant(0), "0"),
            (bops_text(21.4551e9), "21.46 G"),
            (bops_text(12_300_000), "12.30 M"),
            (bytes_text(512), "512 B"),
            (bytes_text(80_120), "80.12 kB"),
            (difference(-1.1), "−1.10"),
            (difference(-0.001), "0.00"),
            (difference(0.4), "+0.40"),
            (percent(0.98), "98.0 %"),
            (duration(0.84), "0.8 s"),
            (duration(723), "12 min 03 s"),
            (duration(7500), "2 h 05 min"),
            (column([4e9, 12.3e6, None], "bops"), ("G", ["4.000", "0.01230", ""])),
            (column([80_000, 8_448], "bytes"), ("kB", ["80.00", "8.448"])),
            (column([None], "bytes"), ("", [""])),
        ],
    )
    def test_numbers_for_people(self, text: object, expected: object) -> None:
        assert text == expected


def test_the_made_up_costs_are_consistent() -> None:
    cost = made_up_cost("m", {"a.weight": [3], "b.key": [2, 4]})
    assert cost["bit_operations"] == sum(row["bit_operations"] for row in cost["sites"])

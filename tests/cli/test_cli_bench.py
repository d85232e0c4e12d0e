"""`qvit bench` on the command line, its JSON, and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SMALL_DIGITS, Qvit, qvit  # noqa: F401
from fake_engines import fake_engines  # noqa: F401
from tiny_models import digits_model

from qvit.deploy.bench.peers import PEERS, Material, Peer, Prepared
from qvit.errors import QvitError
from qvit.measure import Sensitivity
from qvit.models.families import inspect_model
from qvit.report.bench import doubts, render_bench, verdict, write_bench_page

QUICK = [*SMALL_DIGITS, "--rounds", "1", "--seconds", "0.001", "--images", "8", "--threads", "1"]


@pytest.mark.usefixtures("fake_engines")
def test_json_has_a_row_for_each_engine(qvit: Qvit) -> None:  # noqa: F811
    result = qvit(
        "bench", *QUICK, "--plan", "w8a8", "--batch", 1, "--engine", "qvit", "--engine", "pytorch", "--json"
    ).json
    assert (result["threads"], result["batch"]) == (1, 1)
    assert [row["engine"] for row in result["rows"]] == ["qvit-torch", "qvit-wrong", "pytorch", "pytorch"]
    assert all(
        {"engine", "precision", "milliseconds_median", "ratio_to_openvino_int8"} <= set(r) for r in result["rows"]
    )


@pytest.mark.usefixtures("fake_engines")
def test_table_and_page(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    page = tmp_path / "new" / "bench.html"
    answer = qvit("bench", *QUICK, "--batch", 1, "--batch", 2, "--no-peers", "--engine", "qvit-torch",
                  "--engine", "qvit-broken", "--out", page)  # fmt: skip
    assert answer.code == 0, answer.err
    assert "batch 1, threads: 1" in answer.out and "batch 2, threads: 1" in answer.out
    assert "qvit-torch: nothing in integers" in answer.out and "speed only" in answer.out
    assert "left out: qvit-broken w8a8: this CPU lacks what it needs" in answer.out and str(page) in answer.out
    record = json.loads(page.with_suffix(".json").read_text())
    assert record["batch"] == [1, 2] and page.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.usefixtures("fake_engines")
def test_plans_are_rows_and_profiles_a_table(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    page = tmp_path / "bench.html"
    answer = qvit("bench", *QUICK, "--plan", "w8a8", "--plan", "w4a4", "--engine", "qvit-told", "--engine",
                  "qvit-torch", "--engine", "pytorch-fp32", "--profile", "--out", page)  # fmt: skip
    assert answer.code == 0, answer.err
    assert all(name in answer.out for name in ("qvit-told w8a8", "qvit-told w4a4", "qvit-torch w4a4", "pytorch fp32"))
    assert "qvit-told w8a8, w4a4: nothing in integers" in answer.out
    assert re.search(r"fc1\+gelu +│ +0.125 \(17 %\) │ +0.125 \(17 %\)", answer.out)
    assert "right" not in answer.out  # of noise nothing like that is said
    text = page.read_text()
    assert "Where the time goes" in text and "qvit-told w4a4</b>, batch 1" in text and "0.125 (17 %)" in text
    without = qvit("bench", *QUICK, "--engine", "qvit-torch", "--profile")
    assert "no engine of these tells where its time goes" in without.out


@pytest.mark.usefixtures("fake_engines")
def test_peers_are_right_or_wrong_on_real_images(
    qvit: Qvit,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opposite(material: Material) -> Prepared:
        return Prepared(lambda batch: lambda images: -material.model(images).detach(), "int8", 1)

    monkeypatch.setitem(PEERS._found, "fast-int8", Peer("fast", "int8", (), False, opposite))
    torch.save(digits_model().state_dict(), tmp_path / "float.pth")
    answer = qvit("bench", *QUICK, "--weights", tmp_path / "float.pth", "--data", "digits", "--engine", "qvit-torch",
                  "--engine", "fast", "--engine", "pytorch-fp32", "--out", tmp_path / "bench.html")  # fmt: skip
    assert answer.code == 0, answer.err
    assert re.search(r"fast int8 .* wrong", answer.out) and re.search(r"pytorch fp32 .* 100\.0 ", answer.out)
    assert "fastest right peer at batch 1: pytorch fp32, " in answer.out and "× right peer" in answer.out
    assert "right: a peer with at least 95 % of the float model's answers to 8 images" in answer.out
    page = (tmp_path / "bench.html").read_text()
    assert "0.0 wrong" in page and "the fastest right peer, pytorch fp32" in page


@pytest.mark.usefixtures("fake_engines")
def test_a_latency_table_leads_to_a_plan(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    file, plan = tmp_path / "new" / "latency.json", tmp_path / "plan.json"
    words = ["--engine", "qvit-told", "--plan", "w8a8", "--plan", "w4a4", "--plan", "w2a2"]
    answer = qvit("bench", *QUICK, *words, "--latency-table", file)
    assert answer.code == 0, answer.err
    assert "divided over" in answer.out and "by the engine's own account" in answer.out and str(file) in answer.out
    table = json.loads(file.read_text())
    for product in table["products"]:  # as if time went with the widths
        product["milliseconds"] = {pair: float(pair[-1]) for pair in product["milliseconds"]}
    file.write_text(json.dumps(table))
    cost = inspect_model(digits_model())
    rows = {name: np.array([[3.0, 1.0, 0.1]] * site.layout.num_heads) for name, site in cost.sites.items()}
    fields: dict[str, Any] = {"model": "vit_digits", "metric": "fisher", "images": 1, "seed": 0, "seconds": 1.0}
    Sensitivity.from_raw(rows, widths=(2, 4, 8), **fields).save(tmp_path / "s.json")
    small = [word for word in SMALL_DIGITS if word != "vit_digits"]
    found = qvit(
        "allocate", tmp_path / "s.json", *small, "--unit", file, "--budget", "4bit", "--out", plan, "--json"
    ).json
    (row,) = found["plans"]
    ends = sum(8 for matmul in cost.matmuls if cost.sites[matmul.right].position != "block")
    assert row["milliseconds"] == 4.0 * (len(cost.matmuls) - 2) + ends
    assert "no page" in qvit("bench", *QUICK, "--latency-table", file, "--out", tmp_path / "x.html").failed(2)
    table["model"] = "another"
    file.write_text(json.dumps(table))
    wrong = qvit("allocate", tmp_path / "s.json", *small, "--unit", file, "--budget", "4bit", "--out", plan).failed(2)
    assert "latency.json: the latency table is of 'another', the sensitivity of 'vit_digits'" in wrong


@pytest.mark.usefixtures("fake_engines")
def test_wrong_use_is_one_line(qvit: Qvit, tmp_path: Path) -> None:  # noqa: F811
    assert "unknown engine 'openvinoo'; did you mean 'openvino'" in qvit(
        "bench", *QUICK, "--engine", "openvinoo"
    ).failed(2)
    assert "bench.html" in qvit("bench", *QUICK, "--out", tmp_path / "page.json").failed(2)
    assert "unknown model" in qvit("bench", "vit_digit").failed(2)
    assert "no file" in qvit("bench", tmp_path / "x.safetensors").failed(1)


def record(**changes: Any) -> dict[str, Any]:
    """The data of a benchmark of two engines at two batch sizes."""

    def row(engine: str, precision: str, batch: int, ms: float, *, ours: bool = False) -> dict[str, Any]:
        return {
            "engine": engine, "precision": precision, "batch": batch, "milliseconds_median": ms,
            "milliseconds_quartiles": [0.9 * ms, 1.2 * ms], "ratio_to_openvino_int8": ms / (10.0 * batch),
            "ratio_to_pytorch_fp32": None, "images_per_second": 1000 * batch / ms, "calls": 9, "rounds": 3,
            "top1_agreement": 98.0, "error_to_float": 0.05, "agreement_with_simulated": 100.0 if ours else None,
            "error_to_simulated": 0.001 if ours else None, "arithmetic": "int8 <b>", "file_bytes": 1000, "ours": ours,
        }  # fmt: skip

    data: dict[str, Any] = {
        "format": "qvit-bench", "version": 1, "model": "deit<script>", "plan": "w8a8", "threads": 2, "batch": [1, 8],
        "rows": [row("qvit-torch", "w8a8", 1, 8.0, ours=True), row("openvino", "int8", 1, 10.0),
                 row("qvit-torch", "w8a8", 8, 88.0, ours=True), row("openvino", "int8", 8, 80.0)],
        "skipped": [{"engine": "onnxruntime", "precision": "int8", "reason": "not installed"}],
        "images": "noise", "speed_only": True, "calibration_images": 8, "compared_images": 32,
        "float_weights": "untrained", "rounds": 3, "seconds": 2.0, "max_seconds": 300.0, "seed": 0,
        "hardware": "CPU", "instructions": ["avx2"], "date": "2020-01-02", "versions": {"torch": "1"},
        "command": "qvit bench deit",
    }  # fmt: skip
    return data | changes


def test_page_draws_bars_with_ratios_and_escapes_what_it_is_given() -> None:
    page = render_bench(record())
    figures = json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    (figure,) = figures["times"]
    bars, texts = figure["data"][::2], figure["data"][1::2]
    assert [one["name"] for one in bars] == ["batch 1", "batch 8"]
    assert [one["text"] for one in texts] == [[" × 0.800", " × 1.00"], [" × 1.10", " × 1.00"]]
    assert figure["data"][0]["y"] == ["<b>qvit-torch w8a8</b>", "openvino int8"]
    assert "deit&lt;script&gt;" in page and "deit<script>" not in page and "int8 &lt;b&gt;" in page
    assert "Speed only" in page and "onnxruntime int8" in page and "not installed" in page
    assert "Batch 1: qvit-torch w8a8 takes 8.00 ms, 0.800 × the time of OpenVINO int8." in page
    assert "right" not in re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)  # nothing tells
    assert "Speed only" not in render_bench(record(speed_only=False, skipped=[], instructions=None))


def test_pages_of_several_plans_name_them_and_the_peer_that_is_right() -> None:
    data = record(plan="w8a8, mine", speed_only=False, right_percent=95.0)
    for row in data["rows"]:
        row |= {"plan": "mine" if row["ours"] else None, "right": None if row["ours"] else row["batch"] == 1}
        row["ratio_to_right_peer"] = 0.8 if row["batch"] == 1 else None
    page = render_bench(data)
    assert "qvit-torch mine (w8a8)" in page
    assert (
        "Batch 1: qvit-torch mine (w8a8) takes 8.00 ms, 0.800 × the time of the fastest right peer, openvino int8"
        in page
    )
    assert "A peer with fewer than 95 % of the float model's answers is marked as wrong" in page
    assert "98.0 wrong" in page and "the fastest peer that answers as the float model does" in page


def test_files_of_before_there_were_plans_still_make_pages(tmp_path: Path) -> None:
    data = record()
    assert not any({"plan", "right", "kernels"} & row.keys() for row in data["rows"])
    (tmp_path / "old.json").write_text(json.dumps(data))
    page = write_bench_page(tmp_path / "old.json", tmp_path / "old.html").read_text()
    assert "qvit-torch w8a8" in page and "openvino int8" in page
    data["rows"][1]["right"] = True
    (tmp_path / "new.json").write_text(json.dumps(data))
    with pytest.raises(QvitError, match="right or wrong, but no 'right_percent'"):
        write_bench_page(tmp_path / "new.json", tmp_path / "new.html")


def test_doubts_name_engines_that_answer_something_else() -> None:
    data = record()
    assert doubts(data) == [] and len(verdict(data)) == 2
    data["rows"][0]["error_to_simulated"], data["rows"][3]["error_to_float"] = 0.8, 1.1
    first, second = doubts(data)
    assert first.startswith("qvit-torch w8a8 at batch 1 answers unlike the simulated model: error 0.80")
    assert second.startswith("openvino int8 at batch 8 answers unlike the float model")
    assert [sentence.split(":")[0] for sentence in verdict(data)] == ["Batch 8"]  # the fast one at batch 1 is wrong
    assert verdict(record(rows=[row for row in data["rows"] if not row["ours"]])) == []


def test_page_refuses_other_files(tmp_path: Path) -> None:
    for text in ("{}", "[]", "x", json.dumps(record(rows=[]))):
        (tmp_path / "data.json").write_text(text)
        with pytest.raises(QvitError):
            write_bench_page(tmp_path / "data.json", tmp_path / "page.html")
    (tmp_path / "data.json").write_text(json.dumps(record()))
    assert write_bench_page(tmp_path / "data.json", tmp_path / "page.html").stat().st_size > 1_000_000

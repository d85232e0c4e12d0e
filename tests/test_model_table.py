"""The table of what works with which model: some of its rows measured again, and no crash among the recorded ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_evidence_page import ROOT, benchmark

TABLE = benchmark("model_table")
QUICK = ("reference", "torch")
ROWS: list[dict[str, Any]] = json.loads((ROOT / "benchmarks/results/model_table.json").read_text())["rows"]


def case_of(title: str) -> Any:
    return next(case for case in TABLE.CASES if case.title == title)


def test_the_table_has_no_failure() -> None:
    titles = [row["title"] for row in ROWS]
    assert titles == [case.title for case in TABLE.CASES if case.title in titles] and len(titles) >= 30
    assert {case.source for case in TABLE.CASES} == {"timm", "transformers"}
    for row in ROWS:
        assert tuple(row["steps"]) == TABLE.STEPS
        for step in row["steps"].values():
            assert step["outcome"] == "yes" or (step["outcome"] == "refused" and len(step["why"]) > 10), row


@pytest.mark.parametrize(
    "title",
    [
        "ViT, all tokens",
        "ViT, classes of every token",
        "DINOv2, registers, all tokens",
        "Swin without pooling",
        "BEiT-3",
    ],
)
def test_what_works_still_works(title: str) -> None:
    steps = TABLE.measured(case_of(title), QUICK)["steps"]
    assert {step["outcome"] for step in steps.values()} == {"yes"}, steps


@pytest.mark.parametrize(
    ("title", "why"),
    [
        ("MLP-Mixer", "models of class MlpMixer are not supported"),
        (
            "ViT, parallel scaling blocks",
            "'blocks.0.in_proj' (Linear) of a ParallelScalingBlock, where one layer yields",
        ),
        (
            "ViT, differential attention",
            "'blocks.0.attn.qkv' (Linear) of a DiffAttention, which subtracts two softmaxes",
        ),
        ("Hybrid of ResNet and ViT", "of a HybridEmbed, a convolutional network"),
    ],
)
def test_what_is_refused_says_why(title: str, why: str) -> None:
    steps = TABLE.measured(case_of(title), QUICK)["steps"]
    assert {step["outcome"] for step in steps.values()} == {"refused"}
    assert why in steps["quantize"]["why"]


@pytest.mark.parametrize(
    ("title", "outcome", "why"),
    [("Dinov2Model", "yes", ""), ("Dinov2ForImageClassification", "refused", "its classifier sees the class token")],
)
def test_models_of_transformers(title: str, outcome: str, why: str) -> None:
    pytest.importorskip("transformers")
    steps = TABLE.measured(case_of(title), QUICK)["steps"]
    assert {step["outcome"] for step in steps.values()} == {outcome}
    assert why in steps["ptq"].get("why", "")


def test_a_wrong_answer_is_a_failure_and_no_refusal() -> None:
    def wrong() -> None:
        raise TABLE.Wrong("relative error 2, more than 0.3")

    assert TABLE.outcome_of(wrong) == {"outcome": "failed", "why": "Wrong: relative error 2, more than 0.3"}

"""`qvit analyze` and `qvit patchwise` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import SMALL_DIGITS, Qvit, qvit

__all__ = ["qvit"]
COMMON = [*SMALL_DIGITS, "--data", "digits", "--device", "cpu", "--calibration-images", "32", "--images", "40"]


class TestAnalyze:
    def test_json_file_and_page(self, qvit: Qvit, tmp_path: Path) -> None:
        answer = qvit("analyze", *COMMON, "--widths", "2,8", "--out", tmp_path, "--json").json
        assert answer["points"] == json.loads((tmp_path / "analysis.json").read_text())["points"]
        assert {row["what"] for row in answer["points"]} == {"widths", "parts", "heads"}
        assert Path(answer["page"]).is_file()

    def test_a_table(self, qvit: Qvit, tmp_path: Path) -> None:
        answer = qvit("analyze", *COMMON, "--what", "heads", "--layers", "all", "--out", tmp_path)
        assert answer.code == 0 and "heads blocks.0.attn head 1" in answer.out and "analysis.html" in answer.out

    def test_mistakes(self, qvit: Qvit, tmp_path: Path) -> None:
        command = ["analyze", *COMMON, "--out", tmp_path]
        assert "unknown part 'fcc'" in qvit(*command, "--part", "fcc").failed(2)
        assert "layer 7 does not exist" in qvit(*command, "--what", "heads", "--layer", "7").failed(2)
        assert "neither a range" in qvit(*command, "--widths", "2;8").failed(2)
        assert "unknown analysis 'head'" in qvit(*command, "--what", "head").failed(2)
        assert not list(tmp_path.iterdir())


class TestPatchwise:
    def test_json_files_and_page(self, qvit: Qvit, tmp_path: Path) -> None:
        answer = qvit("patchwise", *COMMON, "--budget", "4bit", "--picture", "1", "--out", tmp_path, "--json").json
        assert answer["bit_operations"] <= answer["budget"]
        assert Path(answer["page"]).is_file()
        shown = qvit("plan", "show", tmp_path / "plan.json")
        assert "5 | 3 (tokens: 50 % | rest)" in shown.out
        assert qvit("plan", "show", tmp_path / "plan.json", "--json").json == json.loads(
            (tmp_path / "plan.json").read_text()
        )
        counted = qvit("cost", *SMALL_DIGITS, "--plan", tmp_path / "plan.json", "--json").json
        assert counted["bit_operations"] == answer["bit_operations"]

    def test_a_table(self, qvit: Qvit, tmp_path: Path) -> None:
        answer = qvit("patchwise", *COMMON, "--budget", "6bit", "--share", "0.5", "--out", tmp_path)
        assert answer.code == 0 and "patch-wise" in answer.out and "right in one of the two only" in answer.out

    def test_mistakes(self, qvit: Qvit, tmp_path: Path) -> None:
        command = ["patchwise", *COMMON, "--out", tmp_path]
        assert "impossible" in qvit(*command, "--budget", "0.01M").failed(1)
        assert "average to 8 bits" in qvit(*command, "--budget", "8bit").failed(2)
        assert not list(tmp_path.iterdir())

"""The page of the report: complete, self-contained, accessible, and safe from what the files hold."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import EPOCHS, vit_sites, write, write_demo, write_run

from qvit.errors import QvitError
from qvit.report import load_run, load_runs, write_page
from qvit.report.page import render_page
from qvit.report.runs import Run

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;<!--"


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, scripts, and the text outside of scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._inside: str | None = None
        self.source = source
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = attrs, text + data
        elif self._inside is None:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    @property
    def figures(self) -> dict[str, list[dict[str, Any]]]:
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "figures"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("report") / "demo")


@pytest.fixture(scope="module")
def runs(demo: Path) -> list[Run]:
    return load_runs([demo])


@pytest.fixture(scope="module")
def page(runs: list[Run]) -> Page:
    return Page(render_page(runs, summary={"float_accuracy_mean": 96.0, "rows": [1]}))


class TestPage:
    SECTIONS = ["results", "accuracy", "widths", "attention", "gelu", "training", "freeze", "curves", "costs"]

    def test_everything_is_there(self, page: Page) -> None:
        sections = [attrs["id"] for tag, attrs in page.elements if tag == "section"]
        assert sections == self.SECTIONS
        for needed in (
            "vit_small (depth=4)",
            "digits",
            "2 CPU cores",
            "torch 2.15.0",
            "2023-11-14",
            "qvit train --method",
        ):
            assert needed in page.text, needed
        assert "At the 3bit budget qvit is 1.13 points above lsq+" in page.text
        assert "95.13 ± 0.32" in page.text and "Float accuracy mean" in page.text
        assert (
            "Uniform in all layers but the first and the last: 3 bits in lsq+ · 3bit; 2 bits" in page.text
            and "The heads of 3 seeds (0, 1, 2) are pooled" in page.text
        )
        places = [attrs["id"] for tag, attrs in page.elements if attrs.get("class") == "plot"]
        assert places == [f"plot-{name}" for name in page.figures]
        assert len(page.figures["map"]) == 6 and len(page.figures["attention-0"]) == 2

    def test_it_asks_for_nothing(self, page: Page) -> None:
        for tag, attrs in page.elements:
            assert "src" not in attrs and tag not in ("link", "iframe", "object", "embed", "base", "img"), (tag, attrs)
            assert (attrs.get("href") or "#").startswith("#"), (tag, attrs)
        style = re.search(r"<style>(.*?)</style>", page.source, re.DOTALL)
        assert style and "url(" not in style[1] and "@import" not in style[1]
        code = [text for attrs, text in page.scripts if not attrs]
        policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
        assert len(code) == 2 and all(f"'sha256-{value}'" in (policy or "") for value in hashes)
        assert "default-src 'none'" in (policy or "")

    def test_it_can_be_read_without_seeing_it(self, page: Page) -> None:
        assert ("html", {"lang": "en"}) in page.elements
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
        for tag, attrs in page.elements:
            assert tag != "th" or attrs["scope"] in ("col", "row")
            assert attrs.get("class") != "plot" or (attrs["role"] == "img" and attrs["aria-label"])
            assert tag != "section" or any(a.get("id") == attrs["aria-labelledby"] for _, a in page.elements)
        labels = {attrs["for"] for tag, attrs in page.elements if tag == "label" and "for" in attrs}
        assert {attrs["id"] for tag, attrs in page.elements if tag == "select"} == labels
        ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
        assert len(ids) == len(set(ids))

    def test_nothing_in_the_files_becomes_markup(self, tmp_path: Path) -> None:
        hostile = {
            "model": HOSTILE,
            "data": HOSTILE,
            "hardware": HOSTILE,
            "versions": {HOSTILE: HOSTILE},
            HOSTILE: HOSTILE,
        }
        sites = {**vit_sites(2, 2), f"blocks.0.{HOSTILE}": 2, f"{HOSTILE}.weight": 1, "blocks.1.\ud800": 1}
        one = write_run(tmp_path / "a", sites=sites, command=[HOSTILE], seed=3, **hostile)
        two = write_run(tmp_path / "b<i>", sites=sites, killed=True, command=HOSTILE, **hostile)
        with (two / "log.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"event": "failed", "step": 70, "reason": HOSTILE}))
        for run in (one, two):
            config = json.loads((run / "config.json").read_text())
            write(run / "config.json", {**config, "method": f"m{HOSTILE}", "budget": HOSTILE})
            (run / "result.json").unlink(missing_ok=True)
        write(one / "result.json", {"accuracy": 1.0, "bit_operations": 5, "weight_bytes": 5})
        out = write_page(load_runs([one, two]), tmp_path / "r.html", title=HOSTILE, summary={HOSTILE: HOSTILE})
        page = Page(out.read_text(encoding="utf-8"))
        assert len(page.scripts) == 3 and not any(tag in ("img", "i") for tag, _ in page.elements)
        assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
        assert page.source.count("<!--") == 0 and HOSTILE not in page.source and HOSTILE in page.text
        texts = json.dumps(page.figures)
        assert "&lt;script&gt;" in texts and "<script" not in texts and "<img" not in texts

    def test_unfinished_runs_are_shown_as_such(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a")
        write_run(tmp_path / "b", seed=1, killed=True, epochs=2 * EPOCHS)
        page = Page(render_page(load_runs([tmp_path / "a", tmp_path / "b"])))
        assert "1 of 2 runs is not finished" in page.text and "stopped at step 120 of 240" in page.text
        assert (
            "epochs=" in page.text
            and "0 (+ 1 unfinished)" in page.text
            and "Options that differ between runs (1)" in page.text
        )
        assert len(page.figures["map"]) == 2

    def test_uniform_and_float_runs_leave_sections_out(self, tmp_path: Path) -> None:
        write_run(tmp_path / "a", "lsq+")
        page = Page(render_page(load_runs([tmp_path / "a"])))
        assert "No run has learned bit-widths" in page.text
        assert {"map", "attention-0", "gelu", "budget", "means"}.isdisjoint(page.figures)
        write_run(tmp_path / "b", "float", None)
        page = Page(render_page(load_runs([tmp_path / "b"])))
        assert [attrs["id"] for tag, attrs in page.elements if tag == "section"] == ["results", "curves"]
        assert "The float model reaches 90.00 %" in page.text

    def test_another_family(self, tmp_path: Path) -> None:
        sites = {"stem.weight": 1, "stages.0.attn.query": 2, "stages.1.attn.query": 4, "stages.1.conv.weight": 1}
        page = Page(render_page([load_run(write_run(tmp_path / "run", sites=sites))]))
        assert {"map", "budget", "attention-0", "costs-bops"} <= set(page.figures)
        assert "gelu" not in page.figures and "attention-1" not in page.figures
        assert "stem.weight" in page.text

    def test_a_switched_figure_keeps_its_axes(self, page: Page) -> None:
        first, second = page.figures["attention-0"]
        assert first["layout"]["yaxis"]["range"] == second["layout"]["yaxis"]["range"] == [1.6, 8.4]
        assert "template" not in first["layout"]

    def test_the_size_stays_small(self, runs: list[Run], page: Page) -> None:
        library = max(len(text) for _, text in page.scripts)
        assert len(page.source) - library < 60_000 * len(runs)

    def test_it_appears_at_once_or_not_at_all(
        self, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = write_page(runs[:1], tmp_path / "new" / "report.html")
        before = out.read_bytes()
        assert out == tmp_path / "new" / "report.html" and before.startswith(b"<!DOCTYPE html>")

        def fail(*_: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("qvit.files.os.replace", fail)
        with pytest.raises(QvitError, match="cannot write .*no space left"):
            write_page(runs, out)
        assert out.read_bytes() == before and [file.name for file in out.parent.iterdir()] == ["report.html"]

    def test_a_folder_is_no_page(self, runs: list[Run], tmp_path: Path) -> None:
        with pytest.raises(QvitError, match="cannot write"):
            write_page(runs[:1], tmp_path)

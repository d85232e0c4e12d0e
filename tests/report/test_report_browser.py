"""The report in a real browser: everything is drawn, the controls work, and nothing is asked of the network.

The page is opened with a probe in front of its own scripts. The probe notes errors, refused and performed loads; it
waits until the page says that it is done, works every control, and leaves what it saw in an attribute of `<body>`. So
the tests need no more than a browser that can print a page after its scripts ran; with playwright they also see the
requests from outside.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from report_runs import vit_sites, write_demo, write_run

from qvit.report import load_runs, write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)

PROBE = """
(() => {
  const seen = {errors: [], refused: [], before: {}, after: {}};
  addEventListener("error", (event) => seen.errors.push(String(event.message)));
  addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason)));
  document.addEventListener("securitypolicyviolation", (event) => seen.refused.push(event.blockedURI));
  const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));

  function look() {
    const plots = {};
    for (const place of document.querySelectorAll(".plot")) {
      const layout = place._fullLayout;
      plots[place.id.slice(5)] = {
        svgs: place.querySelectorAll("svg.main-svg").length,
        marks: place.querySelectorAll(".trace, .points, .heatmaplayer image, .heatmaplayer path").length,
        alt: place.getAttribute("aria-label"),
        axis: layout && layout.xaxis.type,
        area: layout && [layout._size.w, layout._size.h],
        numbers: [...place.querySelectorAll(".textpoint, .heatmap-label")].map((text) => text.textContent).join(""),
      };
    }
    const shown = [...document.querySelectorAll("[data-choice]")].filter((part) => !part.hidden);
    return {plots, shown: shown.map((part) => part.dataset.choice + part.dataset.value)};
  }

  addEventListener("load", async () => {
    for (let i = 0; i < 200 && !document.body.dataset.plots; i++) await pause(50);
    await pause(200);
    seen.drawn = Number(document.body.dataset.plots);
    seen.failed = Number(document.body.dataset.failed);
    seen.width = [document.documentElement.scrollWidth, innerWidth];
    seen.before = look();
    for (const box of document.querySelectorAll("select")) {
      box.selectedIndex = box.options.length - 1;
      box.dispatchEvent(new Event("change"));
    }
    for (const box of document.querySelectorAll("input[type=checkbox]")) box.click();
    await pause(400);
    seen.after = look();
    dispatchEvent(new Event("beforeprint"));
    await pause(200);
    seen.printed = [...document.querySelectorAll("svg.main-svg")].map((plot) => plot.getBoundingClientRect().width);
    dispatchEvent(new Event("afterprint"));
    seen.loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
    seen.hacked = typeof window.hacked !== "undefined";
    document.body.setAttribute("data-probe", JSON.stringify(seen));
  });
})();
"""

pytestmark = pytest.mark.browser


@dataclass(frozen=True)
class Seen:
    """What the probe saw, and the requests that were seen from outside (with playwright; else empty)."""

    probe: dict[str, Any]
    requests: list[str]

    def assert_quiet(self) -> None:
        assert self.probe["errors"] == [] and self.probe["failed"] == 0
        assert self.probe["refused"] == [] and self.probe["loaded"] == [] and self.requests == []


def browser() -> str:
    """Path of a Chromium; skips the test where there is none."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(BROWSERS)})")
    return found


def look_at(page: Path, folder: Path, *, width: int = 1280, extra: str = "") -> Seen:
    """Opens a copy of a page that has the probe, and `extra` HTML at the end of its body."""
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    source = page.read_text(encoding="utf-8")
    source = source.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    source = source.replace("<style>", f"<script>{PROBE}</script><style>", 1).replace("</body>", f"{extra}</body>", 1)
    copy = folder / f"probed-{width}.html"
    copy.write_text(source, encoding="utf-8")
    if importlib.util.find_spec("playwright") is not None:
        return with_playwright(copy, width)
    return with_dump(copy, folder, width)


def with_playwright(page: Path, width: int) -> Seen:
    """Opens the page in a window of that width, as playwright emulates it."""
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox", *QUIET])
        tab = chromium.new_page(viewport={"width": width, "height": 900})
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page.as_uri())
        tab.wait_for_selector("body[data-probe]", timeout=60_000)
        probe = json.loads(tab.get_attribute("body", "data-probe") or "")
        chromium.close()
    return Seen(probe, [url for url in requests if url != page.as_uri()])


def with_dump(page: Path, folder: Path, width: int) -> Seen:
    """Lets the browser print the page after its scripts ran."""
    command = [browser(), "--headless", "--no-sandbox", *QUIET, f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=30000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    found = re.search(r'<body[^>]* data-probe="([^"]*)"', done.stdout)
    assert found, f"the probe did not finish: {done.stderr[-2000:]}"
    return Seen(json.loads(html.unescape(found[1])), [])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    return write_page(load_runs([write_demo(folder / "demo")]), folder / "report.html")


@pytest.fixture(scope="module")
def desktop(page: Path) -> Seen:
    return look_at(page, page.parent)


def test_everything_is_drawn_without_a_network(desktop: Seen) -> None:
    desktop.assert_quiet()
    plots = desktop.probe["before"]["plots"]
    assert desktop.probe["drawn"] == len(plots) == 15
    for name, plot in plots.items():
        assert plot["svgs"] >= 1 and plot["marks"] >= 1, name
        assert plot["alt"] and min(plot["area"]) > 80, name
    assert len(plots["map"]["numbers"]) == 4 * (9 * 4 + 5) + 9 * 4, "a number in each cell, and those of the heads"


def test_controls_work(desktop: Seen) -> None:
    before, after = desktop.probe["before"], desktop.probe["after"]
    assert before["plots"]["map"]["numbers"] != after["plots"]["map"]["numbers"]
    assert "qvit-3bit-seed0" in before["plots"]["map"]["alt"] and "qvit-2bit-seed2" in after["plots"]["map"]["alt"]
    for panel in range(4):
        assert before["plots"][f"attention-{panel}"]["alt"] != after["plots"][f"attention-{panel}"]["alt"]
    assert before["shown"] == ["map-run0", "attention-group0", "freeze-run0"]
    assert after["shown"] == ["map-run5", "attention-group1", "freeze-run5"]
    for name in ("accuracy-bops", "accuracy-bytes"):
        assert (before["plots"][name]["axis"], after["plots"][name]["axis"]) == ("linear", "log")


def test_a_phone_need_not_scroll_sideways(page: Path, desktop: Seen) -> None:
    phone = look_at(page, page.parent, width=390)
    phone.assert_quiet()
    for seen in (phone, desktop):
        content, window = seen.probe["width"]
        assert content <= window
        assert all(min(plot["area"]) > 80 for plot in seen.probe["before"]["plots"].values())


def test_paper_gets_plots_that_fit(desktop: Seen) -> None:
    assert max(desktop.probe["printed"]) <= 700


def test_text_from_files_does_not_run(tmp_path: Path) -> None:
    hostile = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    sites = {**vit_sites(2, 2), f"blocks.0.{hostile}": 1, f"{hostile}.weight": 1}
    names = {key: hostile for key in ("model", "data", "hardware", hostile)}
    run = write_run(tmp_path / "run", sites=sites, command=[hostile], **names)
    out = write_page(load_runs([run]), tmp_path / "report.html", title=hostile, summary={hostile: hostile})
    seen = look_at(out, tmp_path)
    seen.assert_quiet()
    assert not seen.probe["hacked"] and seen.probe["drawn"] == 15


def test_the_policy_refuses_what_slips_through(page: Path, tmp_path: Path) -> None:
    slipped = "<script>window.hacked = 1</script><img src='https://example.org/x.png' onerror='window.hacked = 2'>"
    seen = look_at(page, tmp_path, extra=slipped)
    assert not seen.probe["hacked"]
    assert "https://example.org/x.png" in seen.probe["refused"] and "inline" in seen.probe["refused"]

"""The panel to try models in: what it holds, and in a browser the logits of `qvit.load` for drawings and images."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_sets import make_images
from PIL import Image
from tiny_models import small_config
from torch import Tensor

from qvit.data.augment import eval_transform
from qvit.data.digits import DigitStore
from qvit.deploy.engines import load
from qvit.deploy.export import web
from qvit.deploy.file.artifact import Artifact
from qvit.errors import QvitError, UsageError
from qvit.files import cache_folder
from qvit.report import load_runs, write_page
from qvit.report.trial import Graph, Preparation, Trial
from qvit.runs import trial as trial_module
from qvit.runs.finished import load_run
from qvit.runs.packed import write_packed
from qvit.runs.run import train
from qvit.runs.trial import preparation_of, trial_of

pytest.importorskip("onnxscript")
SCRIPT = "const a=1,b=2;export{a as env,b as Tensor};\n//# sourceMappingURL=x"
TINY = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}


def packed_pair(folder: Path, **options: Any) -> Path:
    """A float run and a packed one that starts from it; the latter's directory."""
    train(small_config(method="float", epochs=1, **options), folder / "float", quiet=True)
    options |= {"method": "lsq+", "budget": "4bit", "weights": str(folder / "float")}
    train(small_config(epochs=1, **options), folder / "run", quiet=True)
    write_packed(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_pair(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colours, a crop, Pillow's bicubic."""
    folder = tmp_path_factory.mktemp("photographs")
    data = make_images(folder / "images", {"cat": 10, "dog": 10})
    model = {"model": "vit_tiny_patch16_224", "model_kwargs": TINY}
    return packed_pair(folder, data=str(data), batch_size=4, calibration_images=8, **model)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that passes for the runtime's."""
    contents = {web.SCRIPT: SCRIPT.encode(), web.PROGRAM: b"\0asm"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(web, "SHA256", {name: hashlib.sha256(own).hexdigest() for name, own in contents.items()})
    return tmp_path


# ---------------------------------------------------------------------------------------------------------- the runtime


def test_only_the_known_files_are_taken(tmp_path: Path, runtime: Path) -> None:
    assert web.web_runtime(runtime).script == SCRIPT
    (runtime / web.PROGRAM).write_bytes(b"\0asm of another version")
    with pytest.raises(QvitError, match=rf"{web.PROGRAM} is not that of onnxruntime-web {web.VERSION}"):
        web.web_runtime(runtime)
    with pytest.raises(QvitError, match=r"no file of ONNX Runtime Web at"):
        web.web_runtime(tmp_path / "nothing")


def fake_npm(folder: Path, body: str) -> None:
    (folder / "npm").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "npm").chmod(0o755)


def test_npm_fills_the_cache_once(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    fake_npm(tmp_path, "echo there is no network >&2; exit 1")
    with pytest.raises(
        QvitError, match=r"npm cannot fetch onnxruntime-web .*: there is no network; try again, or unpack"
    ):
        web.web_runtime()
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as archive:
        for name in web.SHA256:
            archive.add(runtime / name, f"package/dist/{name}")
    # npm pack NAME@VERSION --pack-destination FOLDER ...
    fake_npm(tmp_path, f'cp {tmp_path / "package.tgz"} "$4/{web.NAME}-{web.VERSION}.tgz"')
    said: list[str] = []
    assert web.web_runtime(notify=said.append).program == b"\0asm" and "by npm, once" in said[0]
    fake_npm(tmp_path, "exit 1")
    assert web.web_runtime(notify=said.append).script == SCRIPT and len(said) == 1


def test_without_npm_it_says_what_to_do(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(QvitError, match="npm, which is not installed: .* name its folder `dist` with --runtime"):
        web.web_runtime()


# ------------------------------------------------------------------------------------------------------- what it holds


def test_a_panel_holds_the_packed_model_beside_its_float_one(digits: Path, runtime: Path) -> None:
    onnx = pytest.importorskip("onnx")
    said: list[str] = []
    found = trial_of(load_runs([digits]), runtime, said.append)
    (model,), (float_one,) = found.models, found.floats
    assert model.size == (digits / "packed.safetensors").stat().st_size and model.beside == 0
    assert {len(onnx.load(io.BytesIO(own.content)).graph.output) for own in (model, float_one)} == {1}
    assert found.preparation == Preparation(1, 8, 8, (0.3053,), (0.376,), (8,), "bilinear", drawn=True)
    assert [label for _, label in found.samples] == list(range(10)) and found.notes == []
    store = DigitStore()
    for codes, label in found.samples:
        same = (store.images * 16 == torch.tensor(codes).view(1, 1, 8, 8)).flatten(1).all(1)
        assert label in store.targets[same]
    assert any(str(digits / "packed.safetensors") in line for line in said)


def test_a_float_model_that_is_gone_is_missed_by_name(digits: Path, runtime: Path, tmp_path: Path) -> None:
    config = json.loads((digits / "config.json").read_text())
    text = json.dumps(config | {"weights": str(tmp_path / "gone")})
    (runs,) = load_runs([digits])
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in ("packed.safetensors", "result.json"):
        (moved / file).write_bytes((digits / file).read_bytes())
    (moved / "config.json").write_text(text)
    found = trial_of([replace(runs, path=moved)], runtime)
    assert (
        found.models[0].beside is None
        and found.floats == []
        and "There is no float model beside lsq+" in found.notes[0]
    )


def test_what_no_page_holds_is_refused(
    digits: Path, photographs: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no run has a packed model to try out, they are float models"):
        trial_of(load_runs([digits.parent / "float"]), runtime)
    (run,) = load_runs([digits])
    with pytest.raises(UsageError, match=r"`qvit pack .*float` makes one"):
        trial_of([replace(run, path=digits.parent / "float")], runtime)
    artifact = Artifact.load(photographs / "packed.safetensors")
    for change in ({"interpolation": "lanczos"}, {"crop_mode": "border"}, {"input_size": (3, 32, 64)}):
        with pytest.raises(UsageError, match="the page cannot prepare images by"):
            preparation_of(replace(artifact, data_config=artifact.data_config | change))
    monkeypatch.setattr(trial_module, "LARGEST", 1000)
    with pytest.raises(UsageError, match=r"a page holds at most 0 MB of graphs, and these take"):
        trial_of([run], runtime)


def test_models_of_other_images_are_left_out(digits: Path, photographs: Path, runtime: Path) -> None:
    found = trial_of(load_runs([digits, photographs]), runtime)
    assert len(found.models) == 1 and len(found.notes) == 1 and found.notes[0].startswith("Not in this panel: ")


def test_text_of_files_is_escaped(digits: Path, tmp_path: Path) -> None:
    hostile = "</script><script>window.hacked = 1</script>"
    given = Preparation(1, 8, 8, (0.0,), (1.0,), (8,), "bilinear", drawn=True)
    graph = Graph(hostile, 1, b"", None)
    trial = Trial(given, [hostile], [graph, graph], [graph], [], [hostile], SCRIPT, b"", "")
    page = write_page(load_runs([digits]), tmp_path / "page.html", trial=trial).read_text()
    assert "<script>window.hacked" not in page and "globalThis.ort={env:a,Tensor:b};" in page
    policy = re.search(r'content="default-src[^"]*"', page)
    assert policy and "'wasm-unsafe-eval'" in policy[0] and "connect-src" not in policy[0]
    plain = write_page(load_runs([digits]), tmp_path / "plain.html", trial="No panel: <b>.").read_text()
    assert "No panel: &lt;b&gt;." in plain and "wasm-unsafe-eval" not in plain


# --------------------------------------------------------------------------------------------------------- in a browser


@dataclass
class Panel:
    """A page with a panel, in a browser."""

    tab: Any
    requests: list[str]
    errors: list[str]

    def answer(self, act: Callable[[], Any]) -> dict[str, Any]:
        """What the panel answers after something is done: `input`, `logits`, `float`."""
        self.tab.evaluate("delete document.body.dataset.told")
        act()
        self.tab.wait_for_selector("body[data-told]", timeout=60_000)
        self.tab.wait_for_timeout(300)  # a stroke is answered as it grows: the last one counts
        return json.loads(self.tab.get_attribute("body", "data-told"))

    def draw(self, *strokes: list[tuple[float, float]]) -> None:
        """Lines on the pad, in shares of its side, by a mouse."""
        self.tab.locator("#trial-pad").scroll_into_view_if_needed()
        box = self.tab.locator("#trial-pad").bounding_box()
        for stroke in strokes:
            places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
            self.tab.mouse.move(*places[0])
            self.tab.mouse.down()
            for place in places[1:]:
                self.tab.mouse.move(*place, steps=5)
            self.tab.mouse.up()


@pytest.fixture
def opened(browser_path: str, tmp_path: Path) -> Iterator[Callable[[Path], Panel]]:
    """Opens the page of a run with the true runtime; skips where that is not cached: tests fetch nothing."""
    api = pytest.importorskip("playwright.sync_api")
    try:
        web.web_runtime(cache_folder() / f"{web.NAME}-{web.VERSION}")
    except QvitError:
        pytest.skip("ONNX Runtime Web is not cached on this machine: `qvit report RUN --try-it` fetches it once")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])

        def opening(run: Path) -> Panel:
            page = write_page(load_runs([run]), tmp_path / "page.html", trial=trial_of(load_runs([run])))
            panel = Panel(chromium.new_page(viewport={"width": 390, "height": 900}), [], [])
            panel.tab.on("request", lambda request: panel.requests.append(request.url))
            panel.tab.on("pageerror", lambda error: panel.errors.append(str(error)))
            panel.tab.on("console", lambda line: panel.errors.append(line.text))
            panel.tab.goto(page.as_uri())
            panel.tab.wait_for_selector("body[data-trial]")
            tell = "(event) => { document.body.dataset.told = JSON.stringify(event.detail); }"
            panel.tab.evaluate(f"document.getElementById('trial-panel').addEventListener('answered', {tell})")
            return panel

        yield opening
        chromium.close()


def assert_same(found: dict[str, Any], run: Path, images: Tensor) -> None:
    """The page computes with these images, and has the logits of `qvit.load` and of the float model."""
    torch.testing.assert_close(torch.tensor(found["input"]).view_as(images), images, atol=1e-5, rtol=0)
    logits = load(run / "packed.safetensors", "reference")(images)
    torch.testing.assert_close(torch.tensor(found["logits"])[None], logits, atol=1e-3, rtol=0)
    with torch.no_grad():
        expected = load_run(run.parent / "float")(images)
    torch.testing.assert_close(torch.tensor(found["float"])[None], expected, atol=1e-3, rtol=0)


def digit_input(run: Path, codes: Tensor) -> Tensor:
    config = Artifact.load(run / "packed.safetensors").data_config
    return (codes.view(1, 1, 8, 8) / 16 - config["mean"][0]) / config["std"][0]


@pytest.mark.browser
def test_digits_are_drawn_taken_and_dropped(digits: Path, opened: Callable[[Path], Panel], tmp_path: Path) -> None:
    panel = opened(digits)
    scan = panel.answer(lambda: panel.tab.locator("#trial-scans button").nth(3).click())
    codes, label = trial_module._samples()[3]
    assert_same(scan, digits, digit_input(digits, torch.tensor(codes)))
    assert label == 3

    config = Artifact.load(digits / "packed.safetensors").data_config

    def codes_of(answer: dict[str, Any]) -> Tensor:
        return (torch.tensor(answer["input"]) * config["std"][0] + config["mean"][0]) * 16

    one = panel.answer(lambda: (panel.tab.click("#trial-clear"), panel.draw([(0.5, 0.2), (0.5, 0.5)])))
    drawn = codes_of(one)
    assert_same(one, digits, digit_input(digits, drawn.round()))
    ink = drawn.round().view(8, 8)
    assert bool((ink[:, 3:5] > 4).all()) and not bool(ink[:, :3].any() or ink[:, 5:].any()), "a 1 as high as its frame"

    moved = panel.answer(lambda: (panel.tab.click("#trial-clear"), panel.draw([(0.2, 0.6), (0.2, 0.9)])))
    assert float((codes_of(moved) - drawn).abs().max()) < 2.5, "wherever it is drawn"

    panel.tab.click("#trial-clear")
    panel.tab.locator("#trial-pad").focus()
    keys = panel.answer(lambda: [panel.tab.keyboard.press("Shift+ArrowDown") for _ in range(5)])
    assert float((codes_of(keys) - drawn).abs().max()) < 2.5, "or by the keyboard"

    paper = np.full((60, 50), 240, np.uint8)
    paper[10:50, 20:30] = 15
    Image.fromarray(paper).save(tmp_path / "one.png")
    photo = panel.answer(lambda: panel.tab.set_input_files("#trial-file", tmp_path / "one.png"))
    bar = codes_of(photo).view(8, 8)
    assert float(bar[:, 3:5].min()) > 14 and float(bar[:, [0, 1, 6, 7]].max()) < 2, "dark ink on white, upright"

    (tmp_path / "no.png").write_text("not an image")
    panel.tab.set_input_files("#trial-file", tmp_path / "no.png")
    panel.tab.get_by_text("no.png is no image that this browser can read").wait_for()
    assert panel.errors == [] and [url for url in panel.requests if not url.startswith("file:")] == []
    content, window = panel.tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert content <= window, "a phone need not scroll sideways"


@pytest.mark.browser
@pytest.mark.parametrize("size", [(53, 41), (30, 97), (300, 200)])
def test_photographs_are_prepared_as_by_the_transform(
    photographs: Path, opened: Callable[[Path], Panel], tmp_path: Path, size: tuple[int, int]
) -> None:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / "photograph.png")
    config = Artifact.load(photographs / "packed.safetensors").data_config
    with Image.open(tmp_path / "photograph.png") as image:
        pixels = torch.as_tensor(np.asarray(eval_transform(config)(image))).float() / 255
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    panel = opened(photographs)
    found = panel.answer(lambda: panel.tab.set_input_files("#trial-file", tmp_path / "photograph.png"))
    assert_same(found, photographs, ((pixels - mean) / std)[None])
    assert panel.tab.inner_text("#trial-answers .first").strip() in ("cat", "dog") and panel.errors == []

"""`qvit pmq` from end to end: its result, its directory as others take it, an interruption, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import SMALL, digit_batches, small_config

from qvit.deploy.file.artifact import Artifact
from qvit.deploy.integer.reference import integer_form
from qvit.errors import QvitError, UsageError
from qvit.measure import partial as partial_module
from qvit.measure.token_places import load_places, save_places
from qvit.methods import create_method
from qvit.methods.ptq.images import Progress
from qvit.models.convert import freeze
from qvit.models.families import inspect_model
from qvit.plan.quant_plan import QuantPlan
from qvit.plan.spec import TensorSpec
from qvit.report import load_runs
from qvit.report.page import render_page
from qvit.runs.finished import load_run
from qvit.runs.packed import write_packed
from qvit.runs.run import resume, train
from qvit.training.config import TrainConfig


def config(budget: str = "4bit", **options: Any) -> TrainConfig:
    return small_config(method="pmq", budget=budget, calibration_images=16, method_options={"points": 20, **options})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose class token may have no width of its own, so that patches are split."""
    folder = tmp_path_factory.mktemp("pmq") / "run"
    train(config(class_token="off", picture=2), folder, quiet=True)
    return folder


def test_result(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    plan, search = QuantPlan.load(run), result["search"]
    splits = [spec.token_bit_width for spec in plan.sites.values() if spec is not None and spec.token_bit_width]
    assert result["method"] == "pmq" and result["metric"] == search["metric"] == "fisher" and search["exact"]
    assert search["chosen"]["split"] == len(splits) > 0 and search["chosen"]["class_token"] == 0
    assert all(split.ranks for split in splits)
    assert search["chosen"]["bit_operations"] == result["bit_operations"]
    assert set(search["seconds"]) == {"sensitivity", "tokens", "allocate"} and min(search["seconds"].values()) > 0
    costs = [point["bit_operations"] for point in search["frontier"]]
    losses = [point["predicted_loss"] for point in search["frontier"]]
    assert len(costs) == 20 and costs == sorted(costs) and losses == sorted(losses, reverse=True)
    # none that is cheaper loses less, none that is dearer loses more
    cost, loss = search["chosen"]["bit_operations"], search["chosen"]["predicted_loss"]
    cheaper = [own for own, price in zip(losses, costs, strict=True) if price <= cost]
    dearer = [own for own, price in zip(losses, costs, strict=True) if price >= cost]
    assert cheaper and dearer and max(dearer) * (1 - 1e-9) <= loss <= min(cheaper) * (1 + 1e-9)
    budget = json.loads((run / "log.jsonl").read_text().splitlines()[0])["budget_bit_operations"]
    assert 0.97 * budget < result["bit_operations"] <= budget


def test_the_run_is_packed_and_computes_on_integers(run: Path) -> None:
    write_packed(run)
    artifact, images = Artifact.load(run / "packed.safetensors"), digit_batches(1)[0]
    model = load_run(run)
    with torch.no_grad():
        assert torch.equal(artifact.model()(images), model(images))
        assert torch.allclose(integer_form(freeze(model))(images), model(images), atol=1e-4)


def test_the_report_has_the_frontier_and_the_patches(run: Path) -> None:
    page = render_page(load_runs([run]))
    section = page.split('<section id="patches"')[1].split("</section>")[0]
    record = json.loads((run / "patches.json").read_text())
    layers = sum(len(image["layers"]) for image in record["images"])
    assert len(record["images"]) == 2 and section.count("data:image/png") == 2
    assert section.count("<figure") - section.count("plot") <= 2 + layers and section.count("<use ") == layers
    assert "from 20 plans, each the best of all at its price" in section


def test_options_decide_what_is_tried(tmp_path: Path) -> None:
    found = {}
    for name, options in {"none": {"class_token": "off", "patches": False}, "class": {"patches": False}}.items():
        found[name] = train(config(**options), tmp_path / name, quiet=True)["search"]
        assert not (tmp_path / name / "patches.json").exists()
    assert found["none"]["chosen"]["class_token"] == found["none"]["chosen"]["split"] == 0
    assert found["class"]["chosen"]["class_token"] > 0 == found["class"]["chosen"]["split"]
    assert not (tmp_path / "none" / "token_places.safetensors").exists()


def test_training_starts_from_such_a_plan(run: Path, tmp_path: Path) -> None:
    plan, expected = QuantPlan.load(run), json.loads((run / "result.json").read_text())
    split = [site for site, spec in plan.sites.items() if spec is not None and spec.ranks_tokens]
    own = small_config(method="lsq", plan=str(run / "plan.json"), epochs=1)
    assert train(own, tmp_path / "lsq", quiet=True)["bit_operations"] == expected["bit_operations"]
    trained, before = load_run(tmp_path / "lsq"), load_run(run)
    for site in split:
        spec = plan.sites[site]
        assert spec is not None and spec.token_bit_width is not None
        quantizer: Any = trained.get_submodule(f"{site}_quantizer")
        assert quantizer.spec.token_bit_width == spec.token_bit_width
        start: Any = before.get_submodule(f"{site}_quantizer")
        assert not torch.equal(quantizer.active_scale(), start.active_scale())
    cost = inspect_model(before)
    for method in ("dq", "qvit"):
        own = small_config(method=method, budget="4bit", plan=str(run / "plan.json"), epochs=2)
        result = train(own, tmp_path / method, quiet=True)
        assert result["bit_operations"] <= cost.bit_operations(cost.uniform(4))
    probs = {site: spec for site, spec in plan.sites.items() if site.endswith("attn.probs") and spec is not None}
    assert {spec.quantizer for spec in probs.values()} <= {"log2", "log-sqrt2"}, "a grid whose width cannot be learned"
    found = QuantPlan.load(tmp_path / "qvit").sites
    assert {spec.quantizer for site in probs if (spec := found[site]) is not None} == {"lsq"}
    learned = create_method(own).plan(cost)
    assert learned is not None
    for site in split:
        spec, own_spec = plan.sites[site], learned.sites[site]
        assert spec is not None and own_spec is not None and own_spec.learn_bit_width
        mean = sum(token_widths(spec, cost.sites[site].tokens)) / cost.sites[site].tokens
        assert own_spec.token_bit_width is None and set(own_spec.widths) == {round(mean)}


def token_widths(spec: TensorSpec, tokens: int) -> list[int]:
    """The width of every token, the class token first."""
    split = spec.token_bit_width
    assert split is not None
    high = spec.widths[0] if split.high is None else split.high
    return [spec.widths[0] if n == 0 else high if n < int(split.share * tokens) else split.low for n in range(tokens)]


class Killed(BaseException):
    """Stands for a kill: nothing in the library may catch it."""


def test_an_interrupted_search_goes_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_module, "_SAVE_EVERY", 0.0)
    seen: list[tuple[str, int]] = []

    def kill_at(text: str, place: int) -> Progress:
        def progress(part: str, done: int, _total: int, _figures: str) -> None:
            seen.append((part, done))
            if part == text and done >= place:
                raise Killed

        return progress

    with pytest.raises(Killed):
        train(config(class_token="off", picture=2), tmp_path / "run", quiet=True, progress=kill_at("tokens", 5))
    with pytest.raises(UsageError, match="an interrupted run, which `qvit train --resume"):
        train(config(class_token="off", picture=2), tmp_path / "run", quiet=True)
    seen.clear()
    with pytest.raises(Killed):
        resume(tmp_path / "run", quiet=True, progress=kill_at("calibrating", 1))
    assert [done for part, done in seen if part == "tokens"] == list(range(5, 17))
    seen.clear()
    resume(tmp_path / "run", quiet=True, progress=kill_at("", 0))
    assert seen and not any(part == "tokens" or part.startswith("sensitivity") for part, _ in seen)
    for name in ("model.safetensors", "patches.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()
    assert not list((tmp_path / "run").glob("*.partial"))


def test_a_model_whose_tokens_are_all_alike(tmp_path: Path) -> None:
    told: list[str] = []
    kwargs = SMALL | {"img_size": 32, "num_classes": 10}
    own = config().model_copy(update={"model": "eva02_tiny_patch14_224", "model_kwargs": kwargs})
    result = train(own, tmp_path / "run", quiet=True, notify=told.append)
    assert any("cannot differ in width" in line for line in told)
    assert result["search"]["chosen"]["split"] == 0


def test_mistakes(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --budget"):
        train(config().model_copy(update={"budget": None}), tmp_path / "a", quiet=True)
    with pytest.raises(UsageError, match="takes a --plan or a --max-drop"):
        train(config(max_drop=1.0), tmp_path / "b", quiet=True)
    with pytest.raises(UsageError, match="leave out image_sizes"):
        train(config(image_sizes=["8"]), tmp_path / "b", quiet=True)
    measured = {"sensitivity": str(run / "sensitivity.json")}
    with pytest.raises(UsageError, match="of 3 bits: widths that can be chosen here are 4, 5, 6, 7, 8"):
        train(config("6bit", class_token=3, min_width=4, **measured), tmp_path / "b", quiet=True)
    with pytest.raises(QvitError, match="takes between"):
        train(config("0.1M"), tmp_path / "c", quiet=True)
    with pytest.raises(UsageError, match="shares"):
        train(config(shares=[1.5]), tmp_path / "d", quiet=True)


def test_a_file_of_places_that_cannot_be_read(tmp_path: Path) -> None:
    save_places(tmp_path / "places", {"a": np.ones((2, 3))}, 1.5)
    places, seconds = load_places(tmp_path / "places")
    assert seconds == 1.5 and np.array_equal(places["a"], np.ones((2, 3)))
    (tmp_path / "places").write_bytes(b"nothing")
    with pytest.raises(QvitError, match="delete it, and it is measured again"):
        load_places(tmp_path / "places")
